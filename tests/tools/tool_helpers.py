"""Running the commands inside the test's process, which saves their start."""

import runpy
import sys
from pathlib import Path

import numpy as np
from PIL import Image

ROOT = Path(__file__).parents[2]
TINY_FLAGS = ["--img-size", "32", "-b", "4", "--warmup-epochs", "0", "--lr", "1e-3", "--device", "cpu", "-j", "0"]


def run_tool(name: str, *argv: str) -> int:
    """Run tools/NAME.py with arguments and return its exit code."""
    before = sys.argv
    sys.argv = [f"tools/{name}.py", *argv]
    try:
        runpy.run_path(str(ROOT / "tools" / f"{name}.py"), run_name="__main__")
    except SystemExit as error:
        return int(error.code or 0)
    finally:
        sys.argv = before
    return 0


def write_tiny_images(root: Path, val_per_class: int = 2) -> None:
    """Write folders of grey images: 12 of three classes to train, a few to validate."""
    random = np.random.default_rng(0)
    for split, count in (("train", 4), ("val", val_per_class)):
        for number, name in enumerate(("dark", "light", "middle")):
            folder = root / split / name
            folder.mkdir(parents=True)
            for index in range(count):
                pixels = random.normal((40, 210, 120)[number], 20, (36, 40, 3)).clip(0, 255).astype("uint8")
                Image.fromarray(pixels).save(folder / f"{index}.jpg")
