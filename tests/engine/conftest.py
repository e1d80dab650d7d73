"""Small data and a small model, so that a whole training takes about a second."""

from pathlib import Path

import pytest
import torch
from engine.helpers import TINY, write_images

from visionzoo.engine.flags import TrainConfig, train_parser
from visionzoo.engine.options import changed
from visionzoo.engine.training import train


@pytest.fixture(scope="session")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """36 training and 9 validation images of three colors."""
    root = tmp_path_factory.mktemp("images")
    write_images(root / "train", per_class=12, seed=0)
    write_images(root / "validation", per_class=3, seed=1)
    return root


@pytest.fixture
def make_args(images: Path, tmp_path: Path):
    """The configuration of a tiny training; keywords replace single flags."""

    def make(**changes: object) -> TrainConfig:
        parser = train_parser()
        parser.set_defaults(**TINY, data_dir=str(images), output=str(tmp_path / "output"), experiment="run")
        return changed(parser.parse_with_config([]), **changes)

    return make


@pytest.fixture(scope="session")
def trained(images: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict]:
    """A run folder with moving averages and what train returned."""
    torch.set_num_threads(1)
    output = tmp_path_factory.mktemp("output")
    parser = train_parser()
    parser.set_defaults(**TINY, data_dir=str(images), output=str(output), experiment="run", log_interval=2)
    parser.set_defaults(model_ema=True, model_ema_decay=0.5, epochs=6)
    result = train(parser.parse_with_config([]))
    return output / "run", result
