"""The command line of `visionzoo export` for classifiers; the words are those of timm's onnx_export.py."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

from visionzoo.engine.flags import COUNT, RATIO, CompiledModelConfig, InputConfig
from visionzoo.engine.options import KeyValues, Parser, flag, switch
from visionzoo.engine.trained_flags import WeightsConfig

FORMATS = ("pt2", "onnx", "aoti")


def format_flag(default: Sequence[str]) -> Any:
    """Return the flag of the formats that are written; `default` where it is not given."""
    help = (
        "onnx; pt2: exported program of torch; aoti: AOTInductor package, compiled for this machine "
        f"(default: {' '.join(default)})"
    )
    return flag(help, list(default), nargs="+", choices=FORMATS)


@dataclass(frozen=True, slots=True)
class FilesConfig:
    """What is written, and for which images."""

    TITLE: ClassVar = "export"
    format: Sequence[str] = format_flag(("onnx", "pt2"))
    output: str = flag("folder for the files (default: output/export)", "output/export", metavar="DIR")
    overwrite: bool = switch("replace files of another export under the same names", negatable=False)
    batch_size: int = flag(
        "images of a batch with --static-batch", 1, names=("-b", "--batch-size"), type=int, metavar="N"
    )
    static_batch: bool = switch("take only batches of --batch-size (default: of any number)", negatable=False)
    dynamic_size: bool = switch("take any height and width, where the model can be exported so", negatable=False)
    opset: int | None = flag("version of ONNX's operators (default: torch's choice)", type=int, metavar="N")
    no_fuse: bool = switch("leave batch norms as they are (default: fold them, visionzoo.fuse)", negatable=False)
    device: str = flag("that the program runs on; ONNX runs on any (default: cpu)", "cpu")


@dataclass(frozen=True, slots=True)
class ExportedWeights(WeightsConfig):
    """The weights that are exported."""

    no_ema: bool = switch("use the trained weights, not their moving average", negatable=False)


@dataclass(frozen=True, slots=True)
class SourceConfig:
    """Which weights are exported, for which kind of images, and how much of the model."""

    TITLE: ClassVar = "weights"
    input_img_mode: str | None = flag("PIL mode of the images, for the JSON (default: as in training)", metavar="MODE")
    weights: ExportedWeights = ExportedWeights()
    random_weights: bool = switch("export without weights, to measure how fast it runs", negatable=False)
    exit: str = flag("export what this early exit answers, without the parts after it", "", metavar="NAME")


@dataclass(frozen=True, slots=True)
class TasksConfig:
    """At which widths a network of `visionzoo multi-task` is exported."""

    TITLE: ClassVar = "networks of several tasks"
    budget: float = flag(
        "multiply-adds at most, as a share of the full width's (default: 1, the whole network)",
        1.0,
        type=RATIO,
        metavar="SHARE",
    )
    preference: Mapping[str, Any] = flag(
        "how much each task counts, as in `visionzoo multi-task`",
        {},
        nargs="*",
        action=KeyValues,
        metavar="TASK=WEIGHT",
    )
    data_dir: str | None = flag("data to measure batch norms of slimmed widths on (default: the run's)", metavar="DIR")
    norm_images: int = flag("training images that they are measured on", 128, type=COUNT, metavar="N")


@dataclass(frozen=True, slots=True)
class SweepConfig:
    """Which models are exported to a table, and where it is."""

    TITLE: ClassVar = "all models"
    all: Sequence[str] | None = flag(
        "export every zoo_* model, or those like 'zoo_swin*', to a table", nargs="*", metavar="PATTERN"
    )
    results_csv: str = flag("table to add rows to; rows that it has are not done again", "", metavar="FILE")
    write: str = flag("put the table into this Markdown file, between its marks", "", metavar="FILE")


@dataclass(frozen=True, slots=True)
class ExportConfig:
    """What `visionzoo export` is given."""

    files: FilesConfig
    model: CompiledModelConfig
    input: InputConfig
    source: SourceConfig
    tasks: TasksConfig
    sweep: SweepConfig


def export_parser() -> Parser[ExportConfig]:
    """Return the parser of `visionzoo export`."""
    about = (
        "Export a classifier, or a network of `visionzoo multi-task`, to files that run without visionzoo, each "
        "checked against the model."
    )
    return Parser(ExportConfig, "%(prog)s [CONFIG.py] [flags]", about)
