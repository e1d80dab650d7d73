"""Images and files for the tests of the engine."""

import os
from pathlib import Path

import numpy as np
from PIL import Image

COLOURS = {"blue": (30, 30, 220), "green": (30, 220, 30), "red": (220, 30, 30)}


def write_images(root: Path, per_class: int, seed: int, size: int = 40) -> None:
    """Write noisy images of each colour in a folder each."""
    random = np.random.default_rng(seed)
    for name, colour in COLOURS.items():
        (root / name).mkdir(parents=True)
        for number in range(per_class):
            pixels = np.clip(random.normal(colour, 40, (size, size, 3)), 0, 255).astype("uint8")
            Image.fromarray(pixels).save(root / name / f"{number}.png")


def truncate(path: Path, keep: float = 0.5) -> None:
    """Cut a file short."""
    content = path.read_bytes()
    path.write_bytes(content[: int(len(content) * keep)])


def write_pickle_that_runs(path: Path, witness: Path) -> None:
    """Write a torch file that makes the folder `witness` when it is unpickled carelessly."""
    import torch

    class Code:
        def __reduce__(self):
            return os.mkdir, (str(witness),)

    torch.save({"state_dict": {"weight": torch.zeros(1)}, "extra": Code()}, path)
