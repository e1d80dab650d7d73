"""The command lines of train, eval, predict, view, export and fit-gate with a config of OpenMMLab."""

import argparse
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

from mmengine.config import DictAction

from visionzoo.deploy.flags import FilesConfig, format_flag
from visionzoo.engine.configs import find_config
from visionzoo.engine.errors import UserError
from visionzoo.engine.flags import AMOUNT, SHARE
from visionzoo.engine.options import add_flags, filled, flag, switch
from visionzoo.engine.trained_flags import PageConfig

C = TypeVar("C")


class CfgOptions(DictAction):
    """mmengine's `--cfg-options KEY=VALUE ...`, which says what it cannot take."""

    def __call__(self, parser: Any, namespace: Any, values: Any, option_string: str | None = None) -> None:
        """Store the pairs as a dict.

        Raises:
            UserError: if one has no `=`.
        """
        if wrong := [value for value in values if "=" not in value]:
            raise UserError(f"{option_string}: expected KEY=VALUE, got {wrong[0]!r}; CONFIG.py comes before it")
        try:
            super().__call__(parser, namespace, values, option_string)
        except (RecursionError, AssertionError, ValueError) as error:
            raise UserError(
                f"{option_string} {' '.join(values)}: expected a value, or a list [A,B] or (A,B) of values; parts with "
                f"keys are set one by one, KEY.NUMBER.NAME=VALUE"
            ) from error


class Config(argparse.Action):
    """A config by its path, or by the name of one that visionzoo ships."""

    def __call__(self, parser: Any, namespace: Any, values: Any, option_string: str | None = None) -> None:
        """Store the path."""
        setattr(namespace, self.dest, str(find_config(values)))


class ConfigParser(argparse.ArgumentParser, Generic[C]):
    """A parser of the flags of a dataclass; its complaints are argparse's own."""

    def __init__(self, config: type[C], usage: str, description: str) -> None:
        super().__init__(usage=f"%(prog)s {usage} [flags]", description=description)
        self._config = config
        add_flags(self, config)

    def parse(self, argv: Sequence[str] | None = None) -> C:
        """Parse `argv` (default: sys.argv)."""
        return filled(self._config, vars(self.parse_args(argv)))


def _config() -> Any:
    about = "a config of mmdet or mmseg, or the name of one of ours, which `visionzoo configs` lists"
    return flag(about, names=("config",), action=Config, metavar="CONFIG")


def _options() -> Any:
    return flag("change the config", nargs="+", action=CfgOptions, metavar="KEY=VALUE")


def _checkpoint() -> Any:
    return flag("of the detector or segmentor, as train.py writes it", required=True)


def _work_dir(what: str) -> Any:
    return flag(f"of {what} (default: work_dirs/NAME_OF_CONFIG)")


@dataclass(frozen=True, slots=True)
class OwnDataConfig:
    """Your own data and classes."""

    data_root: str | None = flag("folder of the data, in the layout that the config expects")
    dataset: str | None = flag("your own data; see visionzoo.openmmlab.configuring.use_dataset", metavar="FILE.yaml")
    classes: str | None = flag("names of the classes; sets num_classes everywhere", metavar="A,B,...")


@dataclass(frozen=True, slots=True)
class LaunchConfig:
    """What changes the config, and how the processes were started."""

    cfg_options: Mapping[str, Any] | None = _options()
    launcher: str | None = flag(
        "what started the processes (default: pytorch under torchrun, else none)",
        choices=["none", "pytorch", "slurm", "mpi"],
    )
    local_rank: int = flag(argparse.SUPPRESS, 0, names=("--local-rank", "--local_rank"), type=int)


@dataclass(frozen=True, slots=True)
class TrainConfig:
    """What `visionzoo train CONFIG.py` is given."""

    config: str = _config()
    work_dir: str | None = _work_dir("logs and checkpoints")
    resume: str | None = flag("continue from FILE, or the last one", nargs="?", const="auto", metavar="FILE")
    amp: bool = switch("mixed precision on a GPU", negatable=False)
    auto_scale_lr: bool = switch("scale the learning rate with the whole batch", negatable=False)
    seed: int | None = flag("of the initial weights and the order of the data", type=int)
    skip_bad_images: bool = switch("skip unusable training images and masks, and log which", negatable=False)
    log_wandb: bool = switch("log to Weights & Biases too, not only to TensorBoard", negatable=False)
    wandb_project: str | None = flag("its project")
    data: OwnDataConfig = OwnDataConfig()
    launch: LaunchConfig = LaunchConfig()


@dataclass(frozen=True, slots=True)
class EvalConfig:
    """What `visionzoo eval CONFIG.py` is given."""

    config: str = _config()
    checkpoint: str = _checkpoint()
    work_dir: str | None = _work_dir("the metrics")
    show_dir: str | None = flag("write pictures with annotation and prediction side by side there")
    data: OwnDataConfig = OwnDataConfig()
    launch: LaunchConfig = LaunchConfig()


@dataclass(frozen=True, slots=True)
class PredictConfig:
    """What `visionzoo predict CONFIG.py` is given; `score_threshold` is from 0 to 1."""

    config: str = _config()
    images: Sequence[str] = flag("pictures, or folders of them", names=("images",), nargs="+")
    checkpoint: str = _checkpoint()
    output: str = flag("folder (default: %(default)s)", "output/predictions")
    score_threshold: float = flag("of what is drawn (default: %(default)s)", 0.3, type=SHARE)
    device: str | None = flag("such as cuda:0 or cpu (default: the GPU if there is one)")


@dataclass(frozen=True, slots=True)
class ViewConfig:
    """What `visionzoo view CONFIG.py` is given; `score_threshold` is from 0 to 1."""

    config: str = _config()
    images: Sequence[str] = flag("pictures, or folders of them", [], names=("images",), nargs="*")
    checkpoint: str = _checkpoint()
    save: str = flag("write pictures and JSON there, and no page", "", metavar="DIR")
    score_threshold: float = flag("of what is drawn (default: %(default)s)", 0.3, type=SHARE)
    device: str | None = flag("such as cuda:0 or cpu (default: the GPU if there is one)")
    page: PageConfig = PageConfig()  # noqa: RUF009  a frozen dataclass


@dataclass(frozen=True, slots=True)
class FitGateConfig:
    """What `visionzoo fit-gate CONFIG.py` is given; `beta` is in IoU, from 0 to 1, for a layer."""

    config: str = _config()
    checkpoint: str = flag("of a Mask2Former trained with exits, as train.py writes it", required=True)
    beta: Sequence[float] = flag(
        "what a layer costs: the IoU that it must add to an image's mean; a gate is fitted for each (default: 0 0.002 "
        "0.005 0.01 0.02)",
        (0.0, 0.002, 0.005, 0.01, 0.02),
        type=AMOUNT,
        nargs="+",
    )
    work_dir: str | None = flag("of the gates and their table (default: work_dirs/NAME_OF_CONFIG-gate)")
    data: OwnDataConfig = OwnDataConfig()
    cfg_options: Mapping[str, Any] | None = _options()


@dataclass(frozen=True, slots=True)
class DenseFilesConfig(FilesConfig):
    """The same as for classifiers, with another default."""

    format: Sequence[str] = format_flag(("onnx",))


@dataclass(frozen=True, slots=True)
class ExportConfig:
    """What `visionzoo export CONFIG.py` is given; sizes are in pixels."""

    config: str = _config()
    checkpoint: str = flag("of the detector or segmentor, as train.py writes it", "")
    random_weights: bool = switch("export without weights, to measure speed", negatable=False)
    files: DenseFilesConfig = DenseFilesConfig()
    img_size: int | None = flag("side of a square input (default: the config's input)", type=int, metavar="N")
    input_size: Sequence[int] | None = flag("channels, height, width, likewise", type=int, nargs=3, metavar="N")
    cfg_options: Mapping[str, Any] | None = _options()


def train_parser() -> ConfigParser[TrainConfig]:
    """Return mmdet's flags, with those for your own data."""
    return ConfigParser(TrainConfig, "CONFIG", "Train a detector or segmentor.")


def eval_parser() -> ConfigParser[EvalConfig]:
    """Return the flags of evaluation."""
    return ConfigParser(EvalConfig, "CONFIG --checkpoint FILE", "Evaluate a detector or segmentor.")


def predict_parser() -> ConfigParser[PredictConfig]:
    """Return the flags of prediction."""
    return ConfigParser(PredictConfig, "CONFIG IMAGE...", "Draw boxes and masks on pictures, and write JSON.")


def view_parser() -> ConfigParser[ViewConfig]:
    """Return the flags of the page and its pictures."""
    about = "Look at what a detector or segmentor finds: a local page, or pictures."
    return ConfigParser(ViewConfig, "CONFIG [IMAGE...]", about)


def fit_gate_parser() -> ConfigParser[FitGateConfig]:
    """Return the flags of the gates of a Mask2Former with exits."""
    about = "Fit a gate that chooses by the image how many layers of a Mask2Former's encoder run."
    return ConfigParser(FitGateConfig, "CONFIG --checkpoint FILE", about)


def export_parser() -> ConfigParser[ExportConfig]:
    """Return the flags of export."""
    about = "Export what a network puts out, before any NMS."
    return ConfigParser(ExportConfig, "CONFIG --checkpoint FILE", about)
