"""The flags of training and comparing, each declared once, as frozen dataclasses; a field's help is its documentation.

Those of commands that take a trained model are in `trained_flags`.

Names and defaults are timm's; what only visionzoo has is marked (visionzoo). A field's `type` is the range that its
numbers are checked against, on the command line and in a YAML alike.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any, ClassVar

from visionzoo.engine.errors import UserError
from visionzoo.engine.options import KeyValues, Number, Parser, Specs, flag, switch

COUNT, WHOLE = Number(int, low=1), Number(int, low=0)
AMOUNT, POSITIVE = Number(float, low=0), Number(float, above=0)
SHARE, RATIO, BELOW_ONE = Number(float, low=0, high=1), Number(float, above=0, high=1), Number(float, low=0, below=1)
HALF = Number(float, above=0, high=0.5)
INSIDE = Number(float, above=0, below=1)
CROP = (0.01, 10.0)  # of crop_pct: images are enlarged by its inverse
FILTERS = ("nearest", "box", "bilinear", "hamming", "bicubic", "lanczos")
PROBES, HEADS = ("linear", "attentive", "ep"), ("attentive", "ep", "intr")
PART = "in quotes with options: 'NAME KEY=VALUE' or '{type: NAME, KEY: VALUE}', label=... for a short name"
SCHEDULES = ("cosine", "tanh", "step", "multistep", "poly", "none")


def image_mode() -> Any:
    """Return the flag of the images' mode, which all commands that read images have."""
    help = "PIL mode that images are converted to (default: as in training, else RGB, or L with one channel)"
    return flag(help, metavar="MODE")


@dataclass(frozen=True, slots=True)
class DataConfig:
    """Where the images come from, and how they are read."""

    TITLE: ClassVar = "data"
    data_dir: str | None = flag("folder of splits of class folders, or a .tar of class folders", metavar="DIR")
    dataset: str = flag("torch/..., hfds/..., wds/..., visionzoo/digits; empty: images", "", metavar="NAME")
    dataset_download: bool = switch("let torch/ data sets download themselves")
    class_map: str = flag("text file of class names in the order of their numbers", "", metavar="FILE")
    input_img_mode: str | None = image_mode()
    input_key: str | None = flag("column or file ending of the image in hfds/ and wds/ sets")
    target_key: str | None = flag("column or file ending of the class in hfds/ and wds/ sets")
    dataset_trust_remote_code: bool = switch("let hfds/ sets run the code that they come with")
    skip_bad_images: bool = switch("skip unusable images and count them, instead of stopping (visionzoo)")
    apply_exif_orientation: bool = switch("turn images as their EXIF says; else as stored, as in timm (visionzoo)")
    workers: int = flag("processes that load images", 4, names=("-j", "--workers"), type=WHOLE, metavar="N")
    multi_label: bool = switch("any number of labels an image, from labels.csv in each split's folder (visionzoo)")
    cache_images: str = flag(
        "folder where decoded images are kept for all runs; batches are made on the device then (visionzoo)",
        "",
        metavar="DIR",
    )
    pin_mem: bool = switch("pin the memory that batches are loaded into")


@dataclass(frozen=True, slots=True)
class ModelConfig:
    """Which model; what is None is left to it."""

    TITLE: ClassVar = "model"
    model: str | None = flag("any timm model, zoo_* included", metavar="NAME")
    pretrained: bool = switch("start from the published weights")
    non_commercial: bool = switch("accept weights whose license forbids commercial use (visionzoo)")
    num_classes: int | None = flag(
        "number of classes (default: the data set's, else the model's)", type=COUNT, metavar="N"
    )
    in_chans: int | None = flag("image channels (default: 3)", type=COUNT, metavar="N")
    gp: str | None = flag("global pooling (default: the model's)", metavar="POOL")
    model_kwargs: Mapping[str, Any] = flag(
        "arguments of the model itself", {}, nargs="*", action=KeyValues, metavar="K=V"
    )
    quantize: Mapping[str, Any] = flag(
        "quantize weights and activations, by their bits: weights=4 activations=4; further weight_quantizer=lsq, "
        "reparameterize=True; default: as in training (visionzoo)",
        {},
        nargs="+",
        action=KeyValues,
        metavar="K=V",
    )

    @property
    def name(self) -> str:
        """The model's name; empty where none is given."""
        return self.model or ""


@dataclass(frozen=True, slots=True)
class CompiledModelConfig(ModelConfig):
    """Which model, and how it is laid out and compiled, for commands that run it on many batches."""

    channels_last: bool = switch("use the channels-last memory layout")
    torchcompile: str | None = flag("compile the model", nargs="?", const="inductor", metavar="BACKEND")
    torchcompile_mode: str | None = flag("torch.compile's mode", metavar="MODE")


@dataclass(frozen=True, slots=True)
class InputConfig:
    """What the model sees: sizes in pixels, normalization of values from 0 to 1; None: as the model has it."""

    TITLE: ClassVar = "input"
    img_size: int | None = flag("side of the square input in pixels (default: the model's)", type=COUNT, metavar="N")
    input_size: Sequence[int] | None = flag(
        "channels, height, width (default: the model's)", type=COUNT, nargs=3, metavar="N"
    )
    crop_pct: float | None = flag(
        "share of the image kept by the evaluation crop",
        type=Number(float, low=CROP[0], high=CROP[1]),
        metavar="FRACTION",
    )
    mean: Sequence[float] | None = flag("mean per channel, of images in 0...1", type=float, nargs="+", metavar="MEAN")
    std: Sequence[float] | None = flag(
        "standard deviation per channel, of images in 0...1", type=POSITIVE, nargs="+", metavar="STD"
    )
    interpolation: str = flag(
        "resizing at evaluation (default: the model's)", "", choices=("", *FILTERS), metavar="NAME"
    )


@dataclass(frozen=True, slots=True)
class DeviceConfig:
    """Where and in which precision it runs."""

    TITLE: ClassVar = "device"
    device: str | None = flag("cuda, cuda:1, cpu, ... (default: cuda where there is one, else cpu)")
    amp: bool = switch("mixed precision")
    amp_dtype: str = flag("the lower precision", "float16", choices=("float16", "bfloat16"))
    seed: int = flag("seed of everything random", 42, type=WHOLE, metavar="S")


@dataclass(frozen=True, slots=True)
class InferenceDeviceConfig(DeviceConfig):
    """The same where no config stands behind the flags.

    Raises:
        UserError: there is a lower precision, and nothing is computed in it.
    """

    def __post_init__(self) -> None:
        if self.amp_dtype != "float16" and not self.amp:
            raise UserError(f"--amp-dtype {self.amp_dtype} is of --amp; give that too, or leave it out")


@dataclass(frozen=True, slots=True)
class SplitConfig:
    """Which parts of the data set a run trains and validates on, and in what the best checkpoint is best."""

    TITLE: ClassVar = "splits"
    train_split: str = flag("split to train on", "train", metavar="NAME")
    val_split: str = flag("split to validate on; empty: no validation", "validation", metavar="NAME")
    val_data_dir: str | None = flag(
        "validation images that lie elsewhere, e.g. a second .tar (visionzoo)", metavar="DIR"
    )
    train_num_samples: int | None = flag("length of a streamed training split", type=COUNT, metavar="N")
    val_num_samples: int | None = flag("length of a streamed validation split", type=COUNT, metavar="N")
    epoch_repeats: float = flag("times a streamed set repeats in an epoch", 0.0, type=AMOUNT, metavar="N")
    eval_metric: str = flag(
        "what the best checkpoint is best in; of images with several labels map or loss",
        "top1",
        choices=("top1", "top5", "loss"),
    )


@dataclass(frozen=True, slots=True)
class FitConfig:
    """Where the weights begin, what of them is trained, in which batches and on how many devices."""

    TITLE: ClassVar = "weights and batches"
    pretrained_path: str | None = flag("use these as the published weights, head adapted", metavar="FILE")
    initial_checkpoint: str = flag("load these weights before training", "", metavar="FILE")
    batch_size: int = flag(
        "images of a batch on each device", 128, names=("-b", "--batch-size"), type=COUNT, metavar="N"
    )
    validation_batch_size: int | None = flag(
        "the same at validation (default: --batch-size)",
        names=("-vb", "--validation-batch-size"),
        type=COUNT,
        metavar="N",
    )
    grad_accum_steps: int = flag("batches summed into one update", 1, type=COUNT, metavar="N")
    freeze: bool = switch("train the classifier only, and a memory: linear probing, or as --probe says (visionzoo)")
    probe: str | None = flag(
        "what --freeze trains: linear (the default, the model's own classifier), attentive or ep (visionzoo)",
        choices=PROBES,
    )
    freeze_layers: Mapping[str, Any] = flag(
        "layers from the input on that stop learning at an epoch, by number: 0=2 10=6 (visionzoo)",
        {},
        nargs="*",
        action=KeyValues,
        metavar="EPOCH=N",
    )
    head: str | None = flag("put this head onto a zoo_* model in place of its own (visionzoo)", choices=HEADS)
    head_kwargs: Mapping[str, Any] = flag(
        "options of --probe or --head: num_queries=16, d_out=2, ... (visionzoo)",
        {},
        nargs="*",
        action=KeyValues,
        metavar="K=V",
    )
    grad_checkpointing: bool = switch("recompute activations in the backward pass to save memory")
    cuda_graphs: bool = switch("record a training step once and replay it, on GPUs (visionzoo)")
    sync_bn: bool = switch("batch norm over all devices")
    dist_bn: str = flag("share batch norm averages per epoch", "reduce", choices=("broadcast", "reduce", ""))
    fsdp: bool = switch("share model, averages and optimizer between devices, for the largest models (visionzoo)")
    no_ddp_bb: bool = switch("do not broadcast buffers between devices at each step", negatable=False)
    drop: float = flag("dropout", 0.0, type=SHARE, metavar="RATE")
    drop_path: float | None = flag("stochastic depth (default: the model's)", type=SHARE, metavar="RATE")
    drop_block: float | None = flag("drop block (default: the model's)", type=SHARE, metavar="RATE")
    relaxed_attention: float = flag(
        "share of equal weights that smooths attention in training (visionzoo)", 0.0, type=SHARE, metavar="GAMMA"
    )
    relaxed_attention_std: float = flag(
        "draw that share anew for each layer and batch, with this standard deviation (visionzoo)",
        0.0,
        type=AMOUNT,
        metavar="STD",
    )
    subsample_attention: float = flag(
        "share of the keys that attention sees in training, drawn anew for each layer and batch (visionzoo)",
        1.0,
        type=RATIO,
        metavar="SHARE",
    )
    quantize_anneal: int = flag(
        "last epochs, in which only weights near a boundary of rounding learn, with --quantize (visionzoo)",
        0,
        type=WHOLE,
        metavar="EPOCHS",
    )
    quantize_margin: float = flag(
        "how near, in steps between two levels (visionzoo)", 0.005, type=HALF, metavar="STEPS"
    )
    bn_momentum: float | None = flag("momentum of batch norm (default: the model's)", type=SHARE)
    bn_eps: float | None = flag("epsilon of batch norm (default: the model's)", type=AMOUNT)
    model_ema: bool = switch("keep a moving average of the weights, validate and keep the best by it")
    model_ema_decay: float = flag("its decay at each update", 0.9998, type=SHARE)
    model_ema_warmup: bool = switch("let the decay grow towards its value")


@dataclass(frozen=True, slots=True)
class OptimizerConfig:
    """The optimizer, in timm's terms, but for its learning rate."""

    TITLE: ClassVar = "optimizer"
    opt: str = flag("any timm optimizer", "sgd", metavar="NAME")
    opt_eps: float | None = flag("epsilon (default: the optimizer's)", type=AMOUNT, metavar="EPS")
    opt_betas: Sequence[float] | None = flag("betas (default: the optimizer's)", type=AMOUNT, nargs="+", metavar="BETA")
    momentum: float = flag("momentum", 0.9, type=SHARE, metavar="M")
    weight_decay: float = flag("weight decay", 2e-05, type=AMOUNT, metavar="W")
    clip_grad: float | None = flag("clip gradients (default: off)", type=POSITIVE, metavar="NORM")
    clip_mode: str = flag("how to clip", "norm", choices=("norm", "value", "agc"))
    layer_decay: float | None = flag(
        "learning rate falls by this factor from layer to layer", type=RATIO, metavar="RATE"
    )
    layer_decay_min_scale: float = flag("its smallest factor", 0.0, type=SHARE)
    layer_decay_no_opt_scale: float | None = flag("layers below this factor are not trained", type=SHARE)
    opt_kwargs: Mapping[str, Any] = flag("other arguments of it", {}, nargs="*", action=KeyValues, metavar="K=V")


@dataclass(frozen=True, slots=True)
class ScheduleConfig:
    """The learning rate, per update or per epoch."""

    TITLE: ClassVar = "learning rate"
    lr: float | None = flag("learning rate (default: --lr-base scaled by the total batch)", type=AMOUNT)
    lr_base: float = flag("learning rate at a total batch of --lr-base-size", 0.1, type=POSITIVE)
    lr_base_size: int = flag("the batch of --lr-base", 256, type=COUNT, metavar="N")
    lr_base_scale: str = flag("scaling (default: sqrt for ada* and lamb)", "", choices=("linear", "sqrt", ""))
    sched: str = flag("schedule", "cosine", choices=SCHEDULES)
    sched_on_updates: bool = switch("move the learning rate at each update, not each epoch")
    epochs: int = flag("epochs of the schedule", 300, type=COUNT, metavar="N")
    warmup_epochs: int = flag("epochs of warm-up", 5, type=WHOLE, metavar="N")
    warmup_lr: float = flag("learning rate at the start of the warm-up", 1e-05, type=AMOUNT, metavar="LR")
    warmup_prefix: bool = switch("count the warm-up on top of --epochs")
    cooldown_epochs: int = flag("epochs at --min-lr after the schedule", 0, type=WHOLE, metavar="N")
    min_lr: float = flag("lowest learning rate", 0.0, type=AMOUNT, metavar="LR")
    decay_epochs: float = flag("epochs between the falls of `step`", 90, type=POSITIVE, metavar="N")
    decay_milestones: Sequence[int] = flag("epochs of the falls of `multistep`", [90, 180, 270], type=COUNT, nargs="+")
    decay_rate: float = flag(
        "factor of a fall; power of `poly`", 0.1, names=("--decay-rate", "--dr"), type=AMOUNT, metavar="RATE"
    )
    lr_noise: Sequence[float] | None = flag(
        "shares of the schedule between which the rate is noisy", type=SHARE, nargs="+"
    )
    lr_noise_pct: float = flag("limit of the noise", 0.67, type=POSITIVE)
    lr_noise_std: float = flag("spread of the noise", 1.0, type=AMOUNT)
    lr_cycle_mul: float = flag("growth of a cycle's length", 1.0, type=POSITIVE)
    lr_cycle_decay: float = flag("fall of the rate from cycle to cycle", 0.5, type=AMOUNT)
    lr_cycle_limit: int = flag("number of cycles", 1, type=COUNT, metavar="N")
    lr_k_decay: float = flag("k-decay of `cosine` and `poly`", 1.0, type=POSITIVE)


@dataclass(frozen=True, slots=True)
class AugmentationConfig:
    """What is done to training images and labels, and the loss: probabilities and shares from 0 to 1."""

    TITLE: ClassVar = "augmentation and loss"
    no_aug: bool = switch("train on the evaluation's crop", negatable=False)
    train_crop_mode: str | None = flag(
        "rrc, rkrc or rkrr (default: rrc)", choices=("rrc", "rkrc", "rkrr"), metavar="MODE"
    )
    crop_padding: int = flag(
        "instead of a random resized crop, pad the evaluation's crop by this many mirrored pixels a side and take a "
        "random crop of the input's size; --scale and --ratio are without effect then; 0: off (visionzoo)",
        0,
        type=WHOLE,
        metavar="PIXELS",
    )
    scale: Sequence[float] = flag("area of the random crop", [0.08, 1.0], type=POSITIVE, nargs="+", metavar="SHARE")
    ratio: Sequence[float] = flag("sides of the random crop", [3 / 4, 4 / 3], type=POSITIVE, nargs="+", metavar="RATIO")
    hflip: float = flag("probability of a horizontal flip", 0.5, type=SHARE, metavar="P")
    vflip: float = flag("probability of a vertical flip", 0.0, type=SHARE, metavar="P")
    color_jitter: float = flag("color jitter; without effect under --aa", 0.4, type=AMOUNT, metavar="X")
    color_jitter_prob: float | None = flag("probability of color jitter", type=SHARE, metavar="P")
    grayscale_prob: float | None = flag("probability of grayscale", type=SHARE, metavar="P")
    gaussian_blur_prob: float | None = flag("probability of blur", type=SHARE, metavar="P")
    aa: str | None = flag("e.g. rand-m9-mstd0.5-inc1, augmix-m5-w4-d2, original", metavar="POLICY")
    aug_repeats: float = flag("repeated augmentation (several devices only)", 0, type=AMOUNT, metavar="N")
    reprob: float = flag("probability of random erasing", 0.0, type=SHARE, metavar="P")
    remode: str = flag("what is put in the erased place", "pixel", choices=("const", "rand", "pixel"))
    recount: int = flag("erased places", 1, type=COUNT, metavar="N")
    mixup: float = flag("mixup, on above 0", 0.0, type=AMOUNT, metavar="ALPHA")
    cutmix: float = flag("cutmix, on above 0", 0.0, type=AMOUNT, metavar="ALPHA")
    cutmix_minmax: Sequence[float] | None = flag(
        "cutmix by sides instead of alpha", type=SHARE, nargs="+", metavar="SHARE"
    )
    mixup_prob: float = flag("probability of either in a batch", 1.0, type=SHARE, metavar="P")
    mixup_switch_prob: float = flag("probability of cutmix where both are on", 0.5, type=SHARE, metavar="P")
    mixup_mode: str = flag("what shares one mixing ratio", "batch", choices=("batch", "pair", "elem"))
    mixup_off_epoch: int = flag("stop mixing at this epoch; 0: never", 0, type=WHOLE, metavar="N")
    smoothing: float = flag("label smoothing", 0.1, type=BELOW_ONE, metavar="X")
    bce_loss: bool = switch("binary cross-entropy")
    bce_sum: bool = switch("sum it over the classes")
    bce_target_thresh: float | None = flag("make its soft targets 0 or 1 at this threshold", type=SHARE, metavar="X")
    bce_pos_weight: float | None = flag("weight of its positive targets", type=AMOUNT, metavar="X")
    aux_weight: Mapping[str, Any] = flag(
        "weights in the loss of a model's exits and terms, 0 and up (default: the model's) (visionzoo)",
        {},
        nargs="*",
        action=KeyValues,
        metavar="NAME=W",
    )
    train_interpolation: str = flag(
        "resizing of training images", "random", choices=("random", *FILTERS), metavar="NAME"
    )


@dataclass(frozen=True, slots=True)
class DistillationConfig:
    """The teacher, if there is one, and what is learned from it."""

    TITLE: ClassVar = "distillation"
    kd_model_name: str | None = flag("learn from this model, with its published weights", metavar="NAME")
    kd_checkpoint: str = flag("its weights; of a run, the model too (visionzoo)", "", metavar="FILE")
    kd_distill_type: str = flag(
        "what is learned; token: by a head of its own; scalekd: logits, and maps through projectors and the teacher's "
        "later parts (visionzoo; the published loss has --kd-temperature 1 --task-loss-weight 0.5)",
        "logit",
        choices=("logit", "feature", "token", "scalekd"),
    )
    kd_loss_type: str = flag("loss between logits", "kl", choices=("kl",))
    kd_token_distill_type: str = flag("teacher's logits, or its choice", "soft", choices=("soft", "hard"))
    kd_temperature: float = flag("of the softmax over logits", 4.0, type=POSITIVE, metavar="T")
    task_loss_weight: float | None = flag(
        "weight of the loss against the labels (default: 1)", type=AMOUNT, metavar="W"
    )
    distill_loss_weight: float | None = flag(
        "and against the teacher (default: 1 - the first, or 1)", type=AMOUNT, metavar="W"
    )
    kd_feature_weight: float = flag("scalekd: factor of the losses of maps (visionzoo)", 1.0, type=AMOUNT, metavar="W")
    kd_student_feature_dim: int | None = flag(
        "width of pooled features (default: the model's)", type=COUNT, metavar="C"
    )
    kd_teacher_feature_dim: int | None = flag("the same of the teacher", type=COUNT, metavar="C")


@dataclass(frozen=True, slots=True)
class RunConfig:
    """Where a run writes, how long it trains, and what it logs, in epochs and updates."""

    TITLE: ClassVar = "run"
    output: str = flag("where run folders are made (default: output/train)", "", metavar="DIR")
    experiment: str = flag("name of the run folder (default: time, model and size)", "", metavar="NAME")
    resume: str = flag("continue from a checkpoint; auto: the newest one of --experiment", "", metavar="FILE")
    no_resume_opt: bool = switch("take only the weights from --resume", negatable=False)
    start_epoch: int | None = flag("epoch to start at, whatever the checkpoint says", type=WHOLE, metavar="N")
    max_steps: int | None = flag("stop after N updates, then validate and save (visionzoo)", type=COUNT, metavar="N")
    val_interval: int = flag("epochs between validations and checkpoints", 1, type=COUNT, metavar="N")
    skip_nonfinite: int = flag("updates without finite loss to leave out (visionzoo)", 0, type=WHOLE, metavar="N")
    profile: int = flag("write a trace of N updates (visionzoo)", 0, type=WHOLE, nargs="?", const=5, metavar="N")
    checkpoint_hist: int = flag("best checkpoints to keep", 10, type=COUNT, metavar="N")
    recovery_interval: int = flag("updates between recovery checkpoints; 0: none", 0, type=WHOLE, metavar="N")
    log_interval: int = flag("updates between log entries", 50, type=COUNT, metavar="N")
    no_curves: bool = switch("leave the picture of losses and accuracy out (visionzoo)", negatable=False)
    log_wandb: bool = switch("log to Weights & Biases too (WANDB_MODE=offline: without a connection)")
    wandb_project: str | None = flag("its project", metavar="NAME")
    wandb_tags: Sequence[str] = flag("its tags", [], nargs="+", metavar="TAG")
    wandb_resume_id: str = flag("the run there to continue", "", metavar="ID")


@dataclass(frozen=True, slots=True)
class TrainConfig:
    """What `visionzoo train` is given; `config` is the YAML that some of it is from."""

    config: str | None = flag("the same, as timm's train script takes it", names=("-c", "--config"), metavar="CONFIG")
    data: DataConfig = DataConfig()
    model: CompiledModelConfig = CompiledModelConfig()
    input: InputConfig = InputConfig()
    device: DeviceConfig = DeviceConfig()
    splits: SplitConfig = SplitConfig()
    fit: FitConfig = FitConfig()
    optimizer: OptimizerConfig = OptimizerConfig()
    schedule: ScheduleConfig = ScheduleConfig()
    augmentation: AugmentationConfig = AugmentationConfig()
    distillation: DistillationConfig = DistillationConfig()
    run: RunConfig = RunConfig()


def train_parser() -> Parser[TrainConfig]:
    """Return the parser of `visionzoo train`."""
    about = "Train a classifier. Every flag may stand in the YAML file; flags given here win."
    parser = Parser(TrainConfig, "%(prog)s [CONFIG] [flags]", about)
    parser.elsewhere = {field.name: "visionzoo compare" for field in fields(ComparisonConfig)}
    return with_yaml(parser, model="resnet50")


def with_yaml(parser: Parser, **defaults: Any) -> Parser:
    """Let a parser take the name of a YAML file, too, and set defaults other than the fields'."""
    parser.add_argument("config_file", nargs="?", metavar="CONFIG", help="YAML of flag names and values")
    parser.set_defaults(**defaults)
    return parser


@dataclass(frozen=True, slots=True)
class ComparisonConfig:
    """What `visionzoo compare` trains alike, and what it measures."""

    TITLE: ClassVar = "comparison"
    models: Sequence[str] = flag(
        "names, each in quotes with arguments: 'NAME KEY=VALUE'", [], nargs="+", metavar="MODEL"
    )
    probes: Sequence[str] = flag(
        "probe each model when it is trained: linear, attentive, ep, in quotes with options: 'ep num_queries=16'",
        [],
        nargs="+",
        metavar="PROBE",
    )
    probe_epochs: int | None = flag("epochs of each probe (default: --epochs)", type=COUNT, metavar="N")
    hosts: Sequence[Mapping[str, Any]] = flag(
        f"zoo_* models for --mixers, {PART}",
        [],
        nargs="+",
        action=Specs,
        metavar="MODEL",
    )
    mixers: Sequence[Mapping[str, Any]] = flag(
        f"token mixers that each host has in all its blocks, {PART}; own: the host's",
        [],
        nargs="+",
        action=Specs,
        metavar="MIXER",
    )
    variants: Sequence[Mapping[str, Any]] = flag(
        "train each of --models under each of these names with its flags of `visionzoo train`: 'NAME FLAG=VALUE ...'",
        [],
        nargs="+",
        action=Specs,
        metavar="VARIANT",
    )
    seeds: Sequence[int] = flag("train with each of them (default: --seed)", [], nargs="+", type=WHOLE, metavar="S")
    jobs: int | None = flag(
        "runs at a time, each a process, spread over the GPUs; speeds are then measured apart, after the trainings "
        "(default: one after the other in this process)",
        type=COUNT,
        metavar="N",
    )
    growth_tokens: Sequence[int] = flag(
        "smallest and largest map on which the growth of a mixer's time and memory is measured",
        [1024, 65536],
        type=COUNT,
        nargs=2,
        metavar="N",
    )
    growth_dim: int = flag("channels of these maps", 128, type=COUNT, metavar="C")
    write: str = flag("put table and picture into this Markdown file, between its marks", "", metavar="FILE")
    report: bool = switch("lay out what is done so far; train and measure nothing", negatable=False)


@dataclass(frozen=True, slots=True)
class CompareConfig:
    """What `visionzoo compare` is given: all that training is, and what is compared."""

    train: TrainConfig
    comparison: ComparisonConfig


def compare_parser() -> Parser[CompareConfig]:
    """Return the parser of `visionzoo compare`: that of training, and what is compared."""
    about = (
        "Train several models alike and compare their accuracy, speed and memory. All flags of `visionzoo train` hold."
    )
    return with_yaml(Parser(CompareConfig, "%(prog)s [CONFIG] [flags]", about), model="resnet50")
