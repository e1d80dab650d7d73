"""The flags of `visionzoo multi-task`; names that `visionzoo train` has mean the same."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

from visionzoo.engine.flags import (
    AMOUNT,
    COUNT,
    POSITIVE,
    RATIO,
    SHARE,
    WHOLE,
    AugmentationConfig,
    DeviceConfig,
    InferenceDeviceConfig,
    OptimizerConfig,
    RunConfig,
    ScheduleConfig,
    TrainConfig,
    with_yaml,
)
from visionzoo.engine.options import KeyValues, Parser, Specs, flag, switch


@dataclass(frozen=True, slots=True)
class SceneConfig:
    """Images with a mask each, as ADE20K has them, and how they are read."""

    TITLE: ClassVar = "data"
    data_dir: str | None = flag(
        "folder with images/SPLIT, annotations/SPLIT/*.png (0: unlabeled, else the class's number from 1) and "
        "classes.json, a list of the classes' names",
        metavar="DIR",
    )
    dataset: str = flag("visionzoo/scenes: the embedded digits; empty: --data-dir", "", metavar="NAME")
    train_split: str = flag("split to train on", "train", metavar="NAME")
    val_split: str = flag("split to validate on", "validation", metavar="NAME")
    workers: int = flag("processes that load images", 4, names=("-j", "--workers"), type=WHOLE, metavar="N")
    img_size: int | None = flag("side of the square input in pixels (default: 224)", type=COUNT, metavar="N")
    mean: Sequence[float] | None = flag(
        "mean per channel, of images in 0...1 (default: the backbone's)", type=float, nargs=3, metavar="MEAN"
    )
    std: Sequence[float] | None = flag(
        "standard deviation per channel (default: the backbone's)", type=POSITIVE, nargs=3, metavar="STD"
    )


@dataclass(frozen=True, slots=True)
class NetworkConfig:
    """The backbone and the decoders on it."""

    TITLE: ClassVar = "network"
    model: str | None = flag("hierarchical backbone: any of timm, zoo_* included", "zoo_pvtv2_b0", metavar="NAME")
    pretrained: bool = switch("start the backbone from the published weights")
    non_commercial: bool = switch("accept weights whose license forbids commercial use")
    model_kwargs: Mapping[str, Any] = flag("arguments of the backbone", {}, nargs="*", action=KeyValues, metavar="K=V")
    drop_path: float | None = flag("stochastic depth (default: the model's)", type=SHARE, metavar="RATE")


@dataclass(frozen=True, slots=True)
class BatchConfig:
    """Batches, moving averages and augmentation: random crops and flips, of image and mask alike."""

    TITLE: ClassVar = "batches and augmentation"
    batch_size: int = flag("images of a batch", 16, names=("-b", "--batch-size"), type=COUNT, metavar="N")
    grad_accum_steps: int = flag("batches summed into one update", 1, type=COUNT, metavar="N")
    model_ema: bool = switch("keep a moving average of the weights, validate and keep the best by it")
    model_ema_decay: float = flag("its decay at each update", 0.9998, type=SHARE)
    model_ema_warmup: bool = switch("let the decay grow towards its value")
    no_aug: bool = switch("train on the evaluation's crop", negatable=False)
    scale: Sequence[float] = flag("area of the random crop", [0.5, 1.0], type=POSITIVE, nargs=2, metavar="SHARE")
    ratio: Sequence[float] = flag("sides of the random crop", [3 / 4, 4 / 3], type=POSITIVE, nargs=2, metavar="RATIO")
    hflip: float = flag("probability of a horizontal flip", 0.5, type=SHARE, metavar="P")


@dataclass(frozen=True, slots=True)
class TaskConfig:
    """The decoders, what each weighs in the loss, and the widths that are trained."""

    TITLE: ClassVar = "tasks and widths"
    decoder: Sequence[Mapping[str, Any]] = flag(
        "decoder that labels pixels, in quotes with options: 'NAME KEY=VALUE' (default: edaformer)",
        [{"type": "edaformer"}],
        nargs=1,
        action=Specs,
        metavar="DECODER",
    )
    classifier_dim: int = flag("hidden width of the classifier of images", 256, type=COUNT, metavar="C")
    label_weight: float = flag("weight in the loss of the images' labels; that of pixels is 1", 1.0, type=AMOUNT)
    class_balance: float = flag(
        "pixels of a class weigh its share of all pixels to the power of minus this: 0 for all alike",
        0.5,
        type=SHARE,
        metavar="POWER",
    )
    distill_weight: float = flag("weight of what slimmed widths learn from the full one's answers", 1.0, type=AMOUNT)
    feature_weight: float = flag("weight of what they learn from the full one's maps", 1.0, type=AMOUNT)
    slim_epoch: int = flag(
        "epoch from which slimmed widths learn, too; before it the full one learns what it can teach them",
        0,
        type=WHOLE,
        metavar="N",
    )
    min_width: float = flag("smallest share of heads and hidden channels", 0.25, type=RATIO, metavar="SHARE")


@dataclass(frozen=True, slots=True)
class MultiTaskConfig:
    """What `visionzoo multi-task` is given to train; `config` is the YAML that some of it is from."""

    scenes: SceneConfig
    network: NetworkConfig
    tasks: TaskConfig
    batches: BatchConfig
    optimizer: OptimizerConfig
    schedule: ScheduleConfig
    device: DeviceConfig
    run: RunConfig
    config: str | None = flag("the same, as a flag", names=("-c", "--config"), metavar="CONFIG")


@dataclass(frozen=True, slots=True)
class MultiTaskTrainConfig(TrainConfig):
    """All that the engine's training is configured by, and the tasks; what `MultiTaskConfig` lacks has its default."""

    augmentation: AugmentationConfig = field(default_factory=lambda: AugmentationConfig(scale=BatchConfig().scale))
    tasks: TaskConfig = TaskConfig()


@dataclass(frozen=True, slots=True)
class BudgetConfig:
    """Which widths a trained network is evaluated at, and where the result goes."""

    TITLE: ClassVar = "budgets"
    checkpoint: str = flag("of a run of `visionzoo multi-task`", required=True, metavar="FILE")
    no_ema: bool = switch("use the trained weights, not their moving average", negatable=False)
    budget: Sequence[float] = flag(
        "multiply-adds at most, as shares of the full width's (default: five, from those of the smallest widths to 1)",
        [],
        type=RATIO,
        nargs="+",
        metavar="SHARE",
    )
    preference: Mapping[str, Any] = flag(
        "how much each task counts: the decoder of the one that counts less is narrower in proportion",
        {},
        nargs="*",
        action=KeyValues,
        metavar="TASK=WEIGHT",
    )
    data_dir: str | None = flag("data to evaluate on (default: the run's)", metavar="DIR")
    split: str = flag("split to evaluate on (default: the run's)", "", metavar="NAME")
    norm_images: int = flag(
        "training images from which batch norms of slimmed widths are measured", 128, type=COUNT, metavar="N"
    )
    batch_size: int = flag("images of a batch", 16, names=("-b", "--batch-size"), type=COUNT, metavar="N")
    workers: int = flag("processes that load images", 4, names=("-j", "--workers"), type=WHOLE, metavar="N")
    results: str = flag(
        "folder for table, curve and pictures (default: budgets beside the checkpoint)", "", metavar="DIR"
    )
    save_models: bool = switch("write each slimmed network as a program of torch.export that runs without visionzoo")


@dataclass(frozen=True, slots=True)
class BudgetEvalConfig:
    """What `visionzoo multi-task --checkpoint FILE` is given."""

    budgets: BudgetConfig
    device: InferenceDeviceConfig


def multi_task_parser() -> Parser[MultiTaskConfig]:
    """Return the parser of `visionzoo multi-task`, which trains."""
    about = (
        "Train one backbone to classify images and to label their pixels, at every width. With --checkpoint FILE a "
        "trained one is evaluated under budgets: visionzoo multi-task --checkpoint FILE --help lists those flags."
    )
    parser = Parser(MultiTaskConfig, "%(prog)s [CONFIG] [flags]", about)
    parser.task = "multi_task"
    return with_yaml(parser)


def budget_parser() -> Parser[BudgetEvalConfig]:
    """Return the parser of `visionzoo multi-task --checkpoint FILE`, which evaluates."""
    about = "Evaluate a network of several tasks at the widths that budgets of multiply-adds allow."
    return Parser(BudgetEvalConfig, "%(prog)s --checkpoint FILE [--budget SHARE ...] [flags]", about)
