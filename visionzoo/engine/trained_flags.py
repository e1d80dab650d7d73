"""The flags of commands that take a trained model: eval, predict, view, attention, registers, fit-hashes, sparse-rate.

They are declared as those of `visionzoo.engine.flags` are, and take its parts.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any, ClassVar, TypeVar

from visionzoo.engine.flags import (
    COUNT,
    INSIDE,
    POSITIVE,
    SHARE,
    WHOLE,
    CompiledModelConfig,
    DataConfig,
    InferenceDeviceConfig,
    InputConfig,
    ModelConfig,
    image_mode,
)
from visionzoo.engine.options import KeyValues, Number, Parser, flag, switch
from visionzoo.explanation.image import METHODS

PORT = Number(int, low=0, high=65535)
C = TypeVar("C")


def _few_images(config: type[C], usage: str, about: str) -> Parser[C]:
    """Return the parser of a command that sees few images, so that nothing is compiled for them."""
    parser = Parser(config, usage, about)
    parser.elsewhere = {f.name: "visionzoo eval" for f in fields(CompiledModelConfig)[len(fields(ModelConfig)) :]}
    return parser


def _images() -> Any:
    """Return the images that a command names."""
    help = "image files, folders, or patterns like 'x/*.jpg'"
    return flag(help, names=("images",), nargs="+", metavar="IMAGE")


@dataclass(frozen=True, slots=True)
class WeightsConfig:
    """The weights of a trained model."""

    checkpoint: str = flag("weights; of a run of `visionzoo train`, the model too", "", metavar="FILE")
    no_ema: bool = switch("use the trained weights, not their moving average (visionzoo)", negatable=False)


@dataclass(frozen=True, slots=True)
class ReadingConfig:
    """How image files are read that a command names."""

    input_img_mode: str | None = image_mode()
    apply_exif_orientation: bool = switch("turn images as their EXIF says (as in the run where it was given)")
    skip_bad_images: bool = switch("skip unreadable images and count them, instead of stopping")


@dataclass(frozen=True, slots=True)
class ResultConfig(WeightsConfig):
    """What `visionzoo eval` evaluates on, and where it writes the result."""

    TITLE: ClassVar = "evaluation"
    recorded_data: bool = switch("evaluate on the data set that the checkpoint says it was validated on (visionzoo)")
    split: str = flag("split (default: validation; the run's with --recorded-data)", "", metavar="NAME")
    num_samples: int | None = flag("length of a streamed split", type=COUNT, metavar="N")
    batch_size: int = flag("images of a batch", 256, names=("-b", "--batch-size"), type=COUNT, metavar="N")
    results_file: str = flag("JSON to write (default: beside the checkpoint)", "", metavar="FILE")
    results_csv: str = flag("CSV to add a row to, in timm's columns (visionzoo)", "", metavar="FILE")


@dataclass(frozen=True, slots=True)
class CalibrationConfig:
    """Early exits in `visionzoo eval`."""

    TITLE: ClassVar = "early exits"
    exits: bool = switch("calibrate a model's early exits: table and curve of accuracy against cost (visionzoo)")
    calibration_share: float = flag(
        "share of the images to calibrate thresholds on; it is measured on the others (visionzoo)",
        0.2,
        type=INSIDE,
        metavar="SHARE",
    )


@dataclass(frozen=True, slots=True)
class EvalConfig:
    """What `visionzoo eval` is given."""

    data: DataConfig
    model: CompiledModelConfig
    input: InputConfig
    device: InferenceDeviceConfig
    result: ResultConfig
    calibration: CalibrationConfig


def eval_parser() -> Parser[EvalConfig]:
    """Return the parser of `visionzoo eval`."""
    about = "Evaluate a checkpoint (which knows its model) or a pretrained model."
    return Parser(EvalConfig, "%(prog)s [flags]", about)


@dataclass(frozen=True, slots=True)
class PictureConfig(WeightsConfig):
    """What `visionzoo predict` shows, and where it writes it."""

    TITLE: ClassVar = "prediction"
    class_names: str = flag("text file of class names in order, or `imagenet`", "", metavar="FILE")
    topk: int = flag("classes to show", 5, type=COUNT, metavar="K")
    show_tokens: bool = switch("of a model with reducers: dim the patches whose tokens are gone, after each of them")
    output: str = flag(
        "folder for the pictures and predictions.jsonl (default: output/predict, numbered where that is taken)",
        "",
        metavar="DIR",
    )
    reading: ReadingConfig = ReadingConfig()


@dataclass(frozen=True, slots=True)
class ExitConfig:
    """Early exits in `visionzoo predict`; multiply-adds in billions."""

    TITLE: ClassVar = "early exits"
    exits: str = flag("stop at the first exit that is sure, as `eval --exits` says", "", metavar="FILE")
    budget: float | None = flag(
        "multiply-adds of an image on average at most, in billions", type=POSITIVE, metavar="GMACS"
    )
    thresholds: Mapping[str, Any] = flag(
        "exits to ask, and the probability from 0 to 1 at which each answers",
        {},
        nargs="*",
        action=KeyValues,
        metavar="EXIT=P",
    )


@dataclass(frozen=True, slots=True)
class PredictConfig:
    """What `visionzoo predict` is given."""

    model: ModelConfig
    input: InputConfig
    device: InferenceDeviceConfig
    picture: PictureConfig
    exits: ExitConfig
    images: Sequence[str] = _images()


def predict_parser() -> Parser[PredictConfig]:
    """Return the parser of `visionzoo predict`."""
    about = "Classify images: a picture with the likeliest classes and a line of JSON for each."
    return _few_images(PredictConfig, "%(prog)s IMAGE... [flags]", about)


@dataclass(frozen=True, slots=True)
class PageConfig:
    """Where a page is served."""

    TITLE: ClassVar = "page"
    host: str = flag("address to listen on; others than this see the page too", "127.0.0.1", metavar="ADDRESS")
    port: int = flag("port to listen on; 0 for any that is free", 7860, type=PORT, metavar="N")


@dataclass(frozen=True, slots=True)
class LookConfig(WeightsConfig):
    """Which weights `visionzoo view` looks at, and how it reads images."""

    TITLE: ClassVar = "view"
    no_ema: bool = switch("use the trained weights, not their moving average", negatable=False)
    random_weights: bool = switch("look at a model without weights: where it can look, not what it has learned")
    class_names: str = flag("text file of class names in order, or `imagenet`", "", metavar="FILE")
    topk: int = flag("classes to show", 5, type=COUNT, metavar="K")
    reading: ReadingConfig = ReadingConfig()


@dataclass(frozen=True, slots=True)
class DrawingConfig:
    """What `visionzoo view --save` draws."""

    TITLE: ClassVar = "pictures"
    save: str = flag("write a folder of pictures for each image there, and no page", "", metavar="DIR")
    method: Sequence[str] = flag(
        f"what to draw: {', '.join(METHODS)} (default: all that the model has and that takes seconds)",
        [],
        nargs="+",
        choices=tuple(METHODS),
        metavar="NAME",
    )
    place: Sequence[float] | None = flag(
        "look from there: shares of height and width, 0 to 1", type=SHARE, nargs=2, metavar=("Y", "X")
    )
    target: int | None = flag("number of the class to explain (default: the likeliest)", type=WHOLE, metavar="N")
    mask: str = flag(
        "image that is white where a feature is: print each map's Attention-IoU with it", "", metavar="FILE"
    )
    faithfulness: bool = switch("delete and insert pixels by each map; curves, and their mean over all images")


@dataclass(frozen=True, slots=True)
class ViewConfig:
    """What `visionzoo view` is given."""

    model: ModelConfig
    input: InputConfig
    device: InferenceDeviceConfig
    look: LookConfig
    drawing: DrawingConfig
    page: PageConfig
    images: Sequence[str] = flag(
        "image files, folders, or patterns like 'x/*.jpg'", [], names=("images",), nargs="*", metavar="IMAGE"
    )


def view_parser() -> Parser[ViewConfig]:
    """Return the parser of `visionzoo view`."""
    about = "Look at what a model makes of images: a local web page, or with --save pictures in a folder."
    return _few_images(ViewConfig, "%(prog)s [IMAGE...] --model NAME [flags]", about)


@dataclass(frozen=True, slots=True)
class QueryConfig(WeightsConfig):
    """What `visionzoo attention` draws."""

    TITLE: ClassVar = "attention"
    checkpoint: str = flag(
        "of a run of `visionzoo train` with --head intr or --probe ep", required=True, metavar="FILE"
    )
    no_ema: bool = switch("use the trained weights, not their moving average", negatable=False)
    class_names: str = flag("text file of class names in order, or `imagenet`", "", metavar="FILE")
    label: str = flag("name or number of the true class (default: the folder's name)", "", metavar="CLASS")
    layer: int = flag("layer of INTR's decoder", -1, type=int, metavar="N")
    output: str = flag(
        "folder for the pictures (default: output/attention, numbered where that is taken)", "", metavar="DIR"
    )
    reading: ReadingConfig = ReadingConfig()


@dataclass(frozen=True, slots=True)
class AttentionConfig:
    """What `visionzoo attention` is given."""

    model: ModelConfig
    input: InputConfig
    device: InferenceDeviceConfig
    query: QueryConfig
    images: Sequence[str] = _images()


def attention_parser() -> Parser[AttentionConfig]:
    """Return the parser of `visionzoo attention`."""
    about = "Draw what the class queries of INTR, or the queries of efficient probing, see of images."
    return _few_images(AttentionConfig, "%(prog)s IMAGE... --checkpoint FILE [flags]", about)


@dataclass(frozen=True, slots=True)
class OutlierConfig(WeightsConfig):
    """Where `visionzoo registers` looks for outliers, and how many tokens it adds."""

    TITLE: ClassVar = "registers"
    no_ema: bool = switch("use the trained weights, not their moving average", negatable=False)
    num_images: int = flag("images to look at, drawn from those that are named", 100, type=COUNT, metavar="N")
    num_pictures: int = flag("of how many of them to draw the norms", 8, type=COUNT, metavar="N")
    num_registers: int = flag("tokens to add", 1, type=COUNT, metavar="N")
    top_k: int = flag("neurons to move", 10, type=COUNT, metavar="N")
    block: int = flag("block after which outliers are looked for", -1, type=int, metavar="N")
    last_block: int | None = flag(
        "last block to take neurons of (default: where outliers begin)", type=int, metavar="N"
    )
    threshold: float | None = flag("norm of an outlier (default: 3 times the median)", type=POSITIVE, metavar="NORM")
    output: str = flag(
        "folder for pictures and registers.json (default: output/registers, numbered where that is taken)",
        "",
        metavar="DIR",
    )
    reading: ReadingConfig = ReadingConfig()


@dataclass(frozen=True, slots=True)
class RegistersConfig:
    """What `visionzoo registers` is given."""

    model: ModelConfig
    input: InputConfig
    device: InferenceDeviceConfig
    outliers: OutlierConfig
    images: Sequence[str] = _images()


def registers_parser() -> Parser[RegistersConfig]:
    """Return the parser of `visionzoo registers`."""
    about = "Move a model's outliers to test-time registers, and draw the norms of its features before and after."
    return _few_images(RegistersConfig, "%(prog)s IMAGE... [flags]", about)


@dataclass(frozen=True, slots=True)
class DrawnConfig(WeightsConfig):
    """Images that are drawn from those that a command names, and the weights of the model that sees them."""

    TITLE: ClassVar = "images and weights"
    no_ema: bool = switch("use the trained weights, not their moving average", negatable=False)
    num_images: int = flag("images to take, drawn from those that are named", 32, type=COUNT, metavar="N")
    reading: ReadingConfig = ReadingConfig()


@dataclass(frozen=True, slots=True)
class SoftmaxDrawnConfig(DrawnConfig):
    """The same, for models with hash functions."""

    checkpoint: str = flag("weights: the model's, or of its softmax form", required=True, metavar="FILE")


@dataclass(frozen=True, slots=True)
class FittingConfig:
    """How hash functions are fitted."""

    TITLE: ClassVar = "fitting"
    neighbors: int = flag("how many tokens most like another, and as many least like it", 10, type=COUNT, metavar="N")
    steps: int = flag("steps of SGD for each bit", 100, type=COUNT, metavar="N")
    output: str = flag(
        "file to write (default: output/fit_hashes/MODEL.pth, numbered where that is taken)", "", metavar="FILE"
    )


@dataclass(frozen=True, slots=True)
class FitHashesConfig:
    """What `visionzoo fit-hashes` is given."""

    model: ModelConfig
    input: InputConfig
    device: InferenceDeviceConfig
    drawn: SoftmaxDrawnConfig
    fitting: FittingConfig
    images: Sequence[str] = _images()


def fit_hashes_parser() -> Parser[FitHashesConfig]:
    """Return the parser of `visionzoo fit-hashes`."""
    about = "Fit the hash functions of a model with hashed attention to images: its checkpoint, with them."
    return _few_images(FitHashesConfig, "%(prog)s IMAGE... --checkpoint FILE [flags]", about)


@dataclass(frozen=True, slots=True)
class CrateDrawnConfig(DrawnConfig):
    """The same, for models with attention in subspaces."""

    checkpoint: str = flag("weights of the model", required=True, metavar="FILE")


@dataclass(frozen=True, slots=True)
class SparseRateConfig:
    """What `visionzoo sparse-rate` is given."""

    model: ModelConfig
    input: InputConfig
    device: InferenceDeviceConfig
    drawn: CrateDrawnConfig
    images: Sequence[str] = _images()
    output: str = flag(
        "folder to write to (default: output/sparse_rate/MODEL, numbered where that is taken)", "", metavar="FOLDER"
    )


def sparse_rate_parser() -> Parser[SparseRateConfig]:
    """Return the parser of `visionzoo sparse-rate`."""
    about = "Measure what CRATE's layers optimize, coding rates and sparsity, on images: a table and a plot."
    return _few_images(SparseRateConfig, "%(prog)s IMAGE... --checkpoint FILE [flags]", about)
