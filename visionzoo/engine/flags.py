"""The flags of the tools: timm's names and defaults; what only visionzoo has is marked (visionzoo)."""

import argparse
from typing import Any

from visionzoo.engine.options import KeyValues, Number, Parser, Specs
from visionzoo.explanation.image import METHODS

COUNT, WHOLE = Number(int, low=1), Number(int, low=0)
AMOUNT, POSITIVE = Number(float, low=0), Number(float, above=0)
SHARE, RATIO, BELOW_ONE = Number(float, low=0, high=1), Number(float, above=0, high=1), Number(float, low=0, below=1)
INSIDE, PORT = Number(float, above=0, below=1), Number(int, low=0, high=65535)
FILTERS = ("nearest", "box", "bilinear", "hamming", "bicubic", "lanczos")
PROBES, HEADS = ("linear", "attentive", "ep"), ("attentive", "ep", "intr")
SCHEDULES = ("cosine", "tanh", "step", "multistep", "poly", "none")


def _yes(group: argparse._ArgumentGroup, name: str, help: str) -> None:
    """Add a flag that is on or off; --no-NAME turns off what a config turns on."""
    action = "store_true" if name.startswith("--no-") else argparse.BooleanOptionalAction
    group.add_argument(name, action=action, default=False, help=help)


def add_data_flags(parser: Parser) -> None:
    """Where the images come from."""
    group = parser.add_argument_group("data")
    add = group.add_argument
    add("--data-dir", metavar="DIR", help="folder of splits of class folders, or a .tar of class folders")
    add("--dataset", metavar="NAME", default="", help="torch/..., hfds/..., wds/..., visionzoo/digits; empty: images")
    _yes(group, "--dataset-download", "let torch/ data sets download themselves")
    add("--class-map", metavar="FILE", default="", help="text file of class names in the order of their numbers")
    _mode(add)
    add("--input-key", help="column or file ending of the image in hfds/ and wds/ sets")
    add("--target-key", help="column or file ending of the class in hfds/ and wds/ sets")
    _yes(group, "--dataset-trust-remote-code", "let hfds/ sets run the code that they come with")
    _yes(group, "--skip-bad-images", "skip unusable images and count them, instead of stopping (visionzoo)")
    _yes(group, "--apply-exif-orientation", "turn images as their EXIF says; else as stored, as in timm (visionzoo)")
    add("-j", "--workers", type=WHOLE, default=4, metavar="N", help="processes that load images")
    _yes(group, "--multi-label", "any number of labels an image, from labels.csv in each split's folder (visionzoo)")
    cached = "folder where decoded images are kept for all runs; batches are made on the device then (visionzoo)"
    add("--cache-images", default="", metavar="DIR", help=cached)
    _yes(group, "--pin-mem", "pin the memory that batches are loaded into")


def _mode(add: Any) -> None:
    """Add the mode of the images."""
    help = "PIL mode that images are converted to (default: as in training, else RGB, or L with one channel)"
    add("--input-img-mode", metavar="MODE", help=help)


def add_model_flags(parser: Parser, *, model: str | None) -> None:
    """Which model; `model` is the default name."""
    group = parser.add_argument_group("model")
    add = group.add_argument
    add("--model", default=model, metavar="NAME", help="any timm model, zoo_* included")
    _yes(group, "--pretrained", "start from the published weights")
    _yes(group, "--non-commercial", "accept weights whose license forbids commercial use (visionzoo)")
    add("--num-classes", type=COUNT, metavar="N", help="number of classes (default: the data set's, else the model's)")
    add("--in-chans", type=COUNT, metavar="N", help="image channels (default: 3)")
    add("--gp", metavar="POOL", help="global pooling (default: the model's)")
    add("--model-kwargs", nargs="*", default={}, action=KeyValues, metavar="K=V", help="arguments of the model itself")
    _yes(group, "--channels-last", "use the channels-last memory layout")
    add("--torchcompile", nargs="?", const="inductor", metavar="BACKEND", help="compile the model")
    add("--torchcompile-mode", metavar="MODE", help="torch.compile's mode")

    add = parser.add_argument_group("input").add_argument
    add("--img-size", type=COUNT, metavar="N", help="side of the square input in pixels (default: the model's)")
    add("--input-size", type=COUNT, nargs=3, metavar="N", help="channels, height, width (default: the model's)")
    add("--crop-pct", type=POSITIVE, metavar="FRACTION", help="share of the image kept by the evaluation crop")
    add("--mean", type=float, nargs="+", metavar="MEAN", help="mean per channel, of images in 0...1")
    add("--std", type=POSITIVE, nargs="+", metavar="STD", help="standard deviation per channel, of images in 0...1")
    add(
        "--interpolation",
        default="",
        choices=("", "random", *FILTERS),
        metavar="NAME",
        help="resizing at evaluation (default: the model's)",
    )


def add_device_flags(parser: Parser) -> None:
    """Where and in which precision it runs."""
    group = parser.add_argument_group("device")
    add = group.add_argument
    add("--device", help="cuda, cuda:1, cpu, ... (default: cuda where there is one, else cpu)")
    _yes(group, "--amp", "mixed precision")
    add("--amp-dtype", default="float16", choices=("float16", "bfloat16"), help="the lower precision")
    add("--seed", type=WHOLE, default=42, metavar="S", help="seed of everything random")


def _reading(group: argparse._ArgumentGroup) -> None:
    """Add how image files are read that a command names."""
    _mode(group.add_argument)
    _yes(group, "--apply-exif-orientation", "turn images as their EXIF says (as in the run where it was given)")
    _yes(group, "--skip-bad-images", "skip unreadable images and count them, instead of stopping")


def train_parser() -> Parser:
    """Return the parser of `visionzoo train`."""
    about = "Train a classifier. Every flag may stand in the YAML file; flags given here win."
    parser = Parser("%(prog)s [CONFIG] [flags]", about)
    parser.add_argument("config_file", nargs="?", metavar="CONFIG", help="YAML of flag names and values")
    parser.add_argument("-c", "--config", metavar="CONFIG", help="the same, as timm's train script takes it")
    add_data_flags(parser)
    add_model_flags(parser, model="resnet50")
    add_device_flags(parser)
    for add_flags in (
        _split_flags,
        _batch_flags,
        _optimizer_flags,
        _schedule_flags,
        _augmentation_flags,
        _distillation_flags,
        _run_flags,
    ):
        add_flags(parser)
    return parser


def compare_parser() -> Parser:
    """Return the parser of `visionzoo compare`: that of training, and what is compared."""
    parser = train_parser()
    parser.usage = "%(prog)s [CONFIG] [flags]"
    parser.description = (
        "Train several models alike and compare their accuracy, speed and memory. All flags of `visionzoo train` hold."
    )
    group = parser.add_argument_group("comparison")
    add = group.add_argument
    add(
        "--models",
        nargs="+",
        default=[],
        metavar="MODEL",
        help="names, each in quotes with arguments: 'NAME KEY=VALUE'",
    )
    help = "probe each model when it is trained: linear, attentive, ep, in quotes with options: 'ep num_queries=16'"
    add("--probes", nargs="+", default=[], metavar="PROBE", help=help)
    add("--probe-epochs", type=COUNT, metavar="N", help="epochs of each probe (default: --epochs)")
    part = "in quotes with options: 'NAME KEY=VALUE' or '{type: NAME, KEY: VALUE}', label=... for a short name"
    add("--hosts", nargs="+", default=[], action=Specs, metavar="MODEL", help=f"zoo_* models for --mixers, {part}")
    what = f"token mixers that each host has in all its blocks, {part}; own: the host's"
    add("--mixers", nargs="+", default=[], action=Specs, metavar="MIXER", help=what)
    add("--seeds", nargs="+", type=WHOLE, default=[], metavar="S", help="train with each of them (default: --seed)")
    jobs = "runs at a time, each a process, spread over the GPUs; speeds are then measured apart, after the trainings"
    add("--jobs", type=COUNT, metavar="N", help=f"{jobs} (default: one after the other in this process)")
    tokens = "smallest and largest map on which the growth of a mixer's time and memory is measured"
    add("--growth-tokens", type=COUNT, nargs=2, default=[1024, 65536], metavar="N", help=tokens)
    add("--growth-dim", type=COUNT, default=128, metavar="C", help="channels of these maps")
    add("--write", default="", metavar="FILE", help="put table and picture into this Markdown file, between its marks")
    return parser


def _split_flags(parser: Parser) -> None:
    add = parser.add_argument_group("splits").add_argument
    add("--train-split", default="train", metavar="NAME", help="split to train on")
    add("--val-split", default="validation", metavar="NAME", help="split to validate on; empty: no validation")
    add("--val-data-dir", metavar="DIR", help="validation images that lie elsewhere, e.g. a second .tar (visionzoo)")
    add("--train-num-samples", type=COUNT, metavar="N", help="length of a streamed training split")
    add("--val-num-samples", type=COUNT, metavar="N", help="length of a streamed validation split")
    add("--epoch-repeats", type=AMOUNT, default=0.0, metavar="N", help="times a streamed set repeats in an epoch")


def _batch_flags(parser: Parser) -> None:
    group = parser.add_argument_group("weights and batches")
    add = group.add_argument
    add("--pretrained-path", metavar="FILE", help="use these as the published weights, head adapted")
    add("--initial-checkpoint", default="", metavar="FILE", help="load these weights before training")
    add("-b", "--batch-size", type=COUNT, default=128, metavar="N", help="images of a batch on each device")
    add(
        "-vb", "--validation-batch-size", type=COUNT, metavar="N", help="the same at validation (default: --batch-size)"
    )
    add("--grad-accum-steps", type=COUNT, default=1, metavar="N", help="batches summed into one update")
    _yes(group, "--freeze", "train the classifier only, and a memory: linear probing, or as --probe says (visionzoo)")
    help = "what --freeze trains: linear (the default, the model's own classifier), attentive or ep (visionzoo)"
    add("--probe", choices=PROBES, help=help)
    add("--head", choices=HEADS, help="put this head onto a zoo_* model in place of its own (visionzoo)")
    help = "options of --probe or --head: num_queries=16, d_out=2, ... (visionzoo)"
    add("--head-kwargs", nargs="*", default={}, action=KeyValues, metavar="K=V", help=help)
    _yes(group, "--grad-checkpointing", "recompute activations in the backward pass to save memory")
    _yes(group, "--cuda-graphs", "record a training step once and replay it, on GPUs (visionzoo)")
    _yes(group, "--sync-bn", "batch norm over all devices")
    add("--dist-bn", default="reduce", choices=("broadcast", "reduce", ""), help="share batch norm averages per epoch")
    _yes(group, "--fsdp", "share model, averages and optimizer between devices, for the largest models (visionzoo)")
    _yes(group, "--no-ddp-bb", "do not broadcast buffers between devices at each step")
    add("--drop", type=SHARE, default=0.0, metavar="RATE", help="dropout")
    add("--drop-path", type=SHARE, metavar="RATE", help="stochastic depth (default: the model's)")
    add("--drop-block", type=SHARE, metavar="RATE", help="drop block (default: the model's)")
    add("--bn-momentum", type=SHARE, help="momentum of batch norm (default: the model's)")
    add("--bn-eps", type=AMOUNT, help="epsilon of batch norm (default: the model's)")
    _yes(group, "--model-ema", "keep a moving average of the weights, validate and keep the best by it")
    add("--model-ema-decay", type=SHARE, default=0.9998, help="its decay at each update")
    _yes(group, "--model-ema-warmup", "let the decay grow towards its value")


def _optimizer_flags(parser: Parser) -> None:
    add = parser.add_argument_group("optimizer").add_argument
    add("--opt", default="sgd", metavar="NAME", help="any timm optimizer")
    add("--opt-eps", type=AMOUNT, metavar="EPS", help="epsilon (default: the optimizer's)")
    add("--opt-betas", type=AMOUNT, nargs="+", metavar="BETA", help="betas (default: the optimizer's)")
    add("--momentum", type=SHARE, default=0.9, metavar="M", help="momentum")
    add("--weight-decay", type=AMOUNT, default=2e-5, metavar="W", help="weight decay")
    add("--clip-grad", type=POSITIVE, metavar="NORM", help="clip gradients (default: off)")
    add("--clip-mode", default="norm", choices=("norm", "value", "agc"), help="how to clip")
    add("--layer-decay", type=RATIO, metavar="RATE", help="learning rate falls by this factor from layer to layer")
    add("--layer-decay-min-scale", type=SHARE, default=0.0, help="its smallest factor")
    add("--layer-decay-no-opt-scale", type=SHARE, help="layers below this factor are not trained")
    add("--opt-kwargs", nargs="*", default={}, action=KeyValues, metavar="K=V", help="other arguments of it")


def _schedule_flags(parser: Parser) -> None:
    group = parser.add_argument_group("learning rate")
    add = group.add_argument
    add("--lr", type=AMOUNT, help="learning rate (default: --lr-base scaled by the total batch)")
    add("--lr-base", type=POSITIVE, default=0.1, help="learning rate at a total batch of --lr-base-size")
    add("--lr-base-size", type=COUNT, default=256, metavar="N", help="the batch of --lr-base")
    add("--lr-base-scale", default="", choices=("linear", "sqrt", ""), help="scaling (default: sqrt for ada* and lamb)")
    add("--sched", default="cosine", choices=SCHEDULES, help="schedule")
    _yes(group, "--sched-on-updates", "move the learning rate at each update, not each epoch")
    add("--epochs", type=COUNT, default=300, metavar="N", help="epochs of the schedule")
    add("--warmup-epochs", type=WHOLE, default=5, metavar="N", help="epochs of warm-up")
    add("--warmup-lr", type=AMOUNT, default=1e-5, metavar="LR", help="learning rate at the start of the warm-up")
    _yes(group, "--warmup-prefix", "count the warm-up on top of --epochs")
    add("--cooldown-epochs", type=WHOLE, default=0, metavar="N", help="epochs at --min-lr after the schedule")
    add("--min-lr", type=AMOUNT, default=0.0, metavar="LR", help="lowest learning rate")
    add("--decay-epochs", type=POSITIVE, default=90, metavar="N", help="epochs between the falls of `step`")
    add("--decay-milestones", type=int, nargs="+", default=[90, 180, 270], help="epochs of the falls of `multistep`")
    add("--decay-rate", "--dr", type=AMOUNT, default=0.1, metavar="RATE", help="factor of a fall; power of `poly`")
    add("--lr-noise", type=SHARE, nargs="+", help="shares of the schedule between which the rate is noisy")
    add("--lr-noise-pct", type=AMOUNT, default=0.67, help="limit of the noise")
    add("--lr-noise-std", type=AMOUNT, default=1.0, help="spread of the noise")
    add("--lr-cycle-mul", type=POSITIVE, default=1.0, help="growth of a cycle's length")
    add("--lr-cycle-decay", type=AMOUNT, default=0.5, help="fall of the rate from cycle to cycle")
    add("--lr-cycle-limit", type=COUNT, default=1, metavar="N", help="number of cycles")
    add("--lr-k-decay", type=POSITIVE, default=1.0, help="k-decay of `cosine` and `poly`")


def _augmentation_flags(parser: Parser) -> None:
    group = parser.add_argument_group("augmentation and loss")
    add = group.add_argument
    _yes(group, "--no-aug", "train on the evaluation's crop")
    add("--train-crop-mode", choices=("rrc", "rkrc", "rkrr"), metavar="MODE", help="rrc, rkrc or rkrr (default: rrc)")
    add("--scale", type=POSITIVE, nargs="+", default=[0.08, 1.0], metavar="SHARE", help="area of the random crop")
    add("--ratio", type=POSITIVE, nargs="+", default=[3 / 4, 4 / 3], metavar="RATIO", help="sides of the random crop")
    add("--hflip", type=SHARE, default=0.5, metavar="P", help="probability of a horizontal flip")
    add("--vflip", type=SHARE, default=0.0, metavar="P", help="probability of a vertical flip")
    add("--color-jitter", type=AMOUNT, default=0.4, metavar="X", help="color jitter; without effect under --aa")
    add("--color-jitter-prob", type=SHARE, metavar="P", help="probability of color jitter")
    add("--grayscale-prob", type=SHARE, metavar="P", help="probability of grayscale")
    add("--gaussian-blur-prob", type=SHARE, metavar="P", help="probability of blur")
    add("--aa", metavar="POLICY", help="e.g. rand-m9-mstd0.5-inc1, augmix-m5-w4-d2, original")
    add("--aug-repeats", type=AMOUNT, default=0, metavar="N", help="repeated augmentation (several devices only)")
    add("--reprob", type=SHARE, default=0.0, metavar="P", help="probability of random erasing")
    add("--remode", default="pixel", choices=("const", "rand", "pixel"), help="what is put in the erased place")
    add("--recount", type=COUNT, default=1, metavar="N", help="erased places")
    add("--mixup", type=AMOUNT, default=0.0, metavar="ALPHA", help="mixup, on above 0")
    add("--cutmix", type=AMOUNT, default=0.0, metavar="ALPHA", help="cutmix, on above 0")
    add("--cutmix-minmax", type=SHARE, nargs="+", metavar="SHARE", help="cutmix by sides instead of alpha")
    add("--mixup-prob", type=SHARE, default=1.0, metavar="P", help="probability of either in a batch")
    add("--mixup-switch-prob", type=SHARE, default=0.5, metavar="P", help="probability of cutmix where both are on")
    add("--mixup-mode", default="batch", choices=("batch", "pair", "elem"), help="what shares one mixing ratio")
    add("--mixup-off-epoch", type=WHOLE, default=0, metavar="N", help="stop mixing at this epoch; 0: never")
    add("--smoothing", type=BELOW_ONE, default=0.1, metavar="X", help="label smoothing")
    _yes(group, "--bce-loss", "binary cross-entropy")
    _yes(group, "--bce-sum", "sum it over the classes")
    add("--bce-target-thresh", type=SHARE, metavar="X", help="make its soft targets 0 or 1 at this threshold")
    add("--bce-pos-weight", type=AMOUNT, metavar="X", help="weight of its positive targets")
    help = "weights in the loss of a model's exits and terms, 0 and up (default: the model's) (visionzoo)"
    add("--aux-weight", nargs="*", default={}, action=KeyValues, metavar="NAME=W", help=help)
    names = ("random", *FILTERS)
    add("--train-interpolation", default="random", choices=names, metavar="NAME", help="resizing of training images")


def _distillation_flags(parser: Parser) -> None:
    add = parser.add_argument_group("distillation").add_argument
    add("--kd-model-name", metavar="NAME", help="learn from this model, with its published weights")
    add("--kd-checkpoint", default="", metavar="FILE", help="its weights; of a run, the model too (visionzoo)")
    kinds = ("logit", "feature", "token")
    add("--kd-distill-type", default="logit", choices=kinds, help="what is learned; token: by a head of its own")
    add("--kd-loss-type", default="kl", choices=("kl",), help="loss between logits")
    add("--kd-token-distill-type", default="soft", choices=("soft", "hard"), help="teacher's logits, or its choice")
    add("--kd-temperature", type=POSITIVE, default=4.0, metavar="T", help="of the softmax over logits")
    add("--task-loss-weight", type=AMOUNT, metavar="W", help="weight of the loss against the labels (default: 1)")
    add(
        "--distill-loss-weight", type=AMOUNT, metavar="W", help="and against the teacher (default: 1 - the first, or 1)"
    )
    add("--kd-student-feature-dim", type=COUNT, metavar="C", help="width of pooled features (default: the model's)")
    add("--kd-teacher-feature-dim", type=COUNT, metavar="C", help="the same of the teacher")


def _run_flags(parser: Parser) -> None:
    group = parser.add_argument_group("run")
    add = group.add_argument
    add("--output", default="", metavar="DIR", help="where run folders are made (default: output/train)")
    add("--experiment", default="", metavar="NAME", help="name of the run folder (default: time, model and size)")
    add("--resume", default="", metavar="FILE", help="continue from a checkpoint; auto: the newest one of --experiment")
    _yes(group, "--no-resume-opt", "take only the weights from --resume")
    add("--start-epoch", type=WHOLE, metavar="N", help="epoch to start at, whatever the checkpoint says")
    add("--max-steps", type=COUNT, metavar="N", help="stop after N updates, then validate and save (visionzoo)")
    metric = "what the best checkpoint is best in; of images with several labels map or loss"
    add("--eval-metric", default="top1", choices=("top1", "top5", "loss"), help=metric)
    add("--val-interval", type=COUNT, default=1, metavar="N", help="epochs between validations and checkpoints")
    add(
        "--skip-nonfinite",
        type=WHOLE,
        default=0,
        metavar="N",
        help="updates without finite loss to leave out (visionzoo)",
    )
    add(
        "--profile",
        type=WHOLE,
        nargs="?",
        const=5,
        default=0,
        metavar="N",
        help="write a trace of N updates (visionzoo)",
    )
    add("--checkpoint-hist", type=COUNT, default=10, metavar="N", help="best checkpoints to keep")
    add("--recovery-interval", type=WHOLE, default=0, metavar="N", help="updates between recovery checkpoints; 0: none")
    add("--log-interval", type=COUNT, default=50, metavar="N", help="updates between log entries")
    _yes(group, "--no-curves", "leave the picture of losses and accuracy out (visionzoo)")
    _yes(group, "--log-wandb", "log to Weights & Biases too (WANDB_MODE=offline: without a connection)")
    add("--wandb-project", metavar="NAME", help="its project")
    add("--wandb-tags", nargs="+", default=[], metavar="TAG", help="its tags")
    add("--wandb-resume-id", default="", metavar="ID", help="the run there to continue")


def eval_parser() -> Parser:
    """Return the parser of `visionzoo eval`."""
    about = "Evaluate a checkpoint (which knows its model) or a pretrained model."
    parser = Parser("%(prog)s [flags]", about)
    add_data_flags(parser)
    add_model_flags(parser, model=None)
    add_device_flags(parser)
    group = parser.add_argument_group("evaluation")
    add = group.add_argument
    add("--checkpoint", default="", metavar="FILE", help="weights; of a run of `visionzoo train`, the model too")
    _yes(group, "--no-ema", "use the trained weights, not their moving average (visionzoo)")
    _yes(group, "--recorded-data", "evaluate on the data set that the checkpoint says it was validated on (visionzoo)")
    add("--split", default="", metavar="NAME", help="split (default: validation; the run's with --recorded-data)")
    add("--num-samples", type=COUNT, metavar="N", help="length of a streamed split")
    add("-b", "--batch-size", type=COUNT, default=256, metavar="N", help="images of a batch")
    add("--results-file", default="", metavar="FILE", help="JSON to write (default: beside the checkpoint)")
    add("--results-csv", default="", metavar="FILE", help="CSV to add a row to, in timm's columns (visionzoo)")
    group = parser.add_argument_group("early exits")
    _yes(group, "--exits", "calibrate a model's early exits: table and curve of accuracy against cost (visionzoo)")
    help = "share of the images to calibrate thresholds on; it is measured on the others (visionzoo)"
    group.add_argument("--calibration-share", type=INSIDE, default=0.2, metavar="SHARE", help=help)
    return parser


def predict_parser() -> Parser:
    """Return the parser of `visionzoo predict`."""
    about = "Classify images: a picture with the likeliest classes and a line of JSON for each."
    parser = Parser("%(prog)s IMAGE... [flags]", about)
    parser.add_argument("images", nargs="+", metavar="IMAGE", help="image files, folders, or patterns like 'x/*.jpg'")
    add_model_flags(parser, model=None)
    add_device_flags(parser)
    group = parser.add_argument_group("prediction")
    add = group.add_argument
    add("--checkpoint", default="", metavar="FILE", help="weights; of a run of `visionzoo train`, the model too")
    _yes(group, "--no-ema", "use the trained weights, not their moving average (visionzoo)")
    add("--class-names", default="", metavar="FILE", help="text file of class names in order, or `imagenet`")
    add("--topk", type=COUNT, default=5, metavar="K", help="classes to show")
    _yes(group, "--show-tokens", "of a model with reducers: dim the patches whose tokens are gone, after each of them")
    where = "folder for the pictures and predictions.jsonl (default: output/predict, numbered where that is taken)"
    add("--output", default="", metavar="DIR", help=where)
    _reading(group)
    add = parser.add_argument_group("early exits").add_argument
    add("--exits", default="", metavar="FILE", help="stop at the first exit that is sure, as `eval --exits` says")
    add("--budget", type=POSITIVE, metavar="GMACS", help="multiply-adds of an image on average at most, in billions")
    help = "exits to ask, and the probability from 0 to 1 at which each answers"
    add("--thresholds", nargs="*", default={}, action=KeyValues, metavar="EXIT=P", help=help)
    return parser


def attention_parser() -> Parser:
    """Return the parser of `visionzoo attention`."""
    about = "Draw what the class queries of INTR, or the queries of efficient probing, see of images."
    parser = Parser("%(prog)s IMAGE... --checkpoint FILE [flags]", about)
    parser.add_argument("images", nargs="+", metavar="IMAGE", help="image files, folders, or patterns like 'x/*.jpg'")
    add_model_flags(parser, model=None)
    add_device_flags(parser)
    group = parser.add_argument_group("attention")
    add = group.add_argument
    add(
        "--checkpoint",
        required=True,
        metavar="FILE",
        help="of a run of `visionzoo train` with --head intr or --probe ep",
    )
    _yes(group, "--no-ema", "use the trained weights, not their moving average")
    add("--class-names", default="", metavar="FILE", help="text file of class names in order, or `imagenet`")
    add("--label", default="", metavar="CLASS", help="name or number of the true class (default: the folder's name)")
    add("--layer", type=int, default=-1, metavar="N", help="layer of INTR's decoder")
    where = "folder for the pictures (default: output/attention, numbered where that is taken)"
    add("--output", default="", metavar="DIR", help=where)
    _reading(group)
    return parser


def registers_parser() -> Parser:
    """Return the parser of `visionzoo registers`."""
    about = "Move a model's outliers to test-time registers, and draw the norms of its features before and after."
    parser = Parser("%(prog)s IMAGE... [flags]", about)
    parser.add_argument("images", nargs="+", metavar="IMAGE", help="image files, folders, or patterns like 'x/*.jpg'")
    add_model_flags(parser, model=None)
    add_device_flags(parser)
    group = parser.add_argument_group("registers")
    add = group.add_argument
    add("--checkpoint", default="", metavar="FILE", help="weights; of a run of `visionzoo train`, the model too")
    _yes(group, "--no-ema", "use the trained weights, not their moving average")
    add("--num-images", type=COUNT, default=100, metavar="N", help="images to look at, drawn from those that are named")
    add("--num-pictures", type=COUNT, default=8, metavar="N", help="of how many of them to draw the norms")
    add("--num-registers", type=COUNT, default=1, metavar="N", help="tokens to add")
    add("--top-k", type=COUNT, default=10, metavar="N", help="neurons to move")
    add("--block", type=int, default=-1, metavar="N", help="block after which outliers are looked for")
    add("--last-block", type=int, metavar="N", help="last block to take neurons of (default: where outliers begin)")
    add("--threshold", type=POSITIVE, metavar="NORM", help="norm of an outlier (default: 3 times the median)")
    where = "folder for pictures and registers.json (default: output/registers, numbered where that is taken)"
    add("--output", default="", metavar="DIR", help=where)
    _reading(group)
    return parser


def _drawn_images(parser: Parser, weights: str) -> None:
    """Add which images a command draws, and the weights of the model that it shows them to."""
    parser.add_argument("images", nargs="+", metavar="IMAGE", help="image files, folders, or patterns like 'x/*.jpg'")
    add_model_flags(parser, model=None)
    add_device_flags(parser)
    group = parser.add_argument_group("images and weights")
    group.add_argument("--checkpoint", required=True, metavar="FILE", help=weights)
    _yes(group, "--no-ema", "use the trained weights, not their moving average")
    drawn = "images to take, drawn from those that are named"
    group.add_argument("--num-images", type=COUNT, default=32, metavar="N", help=drawn)
    _reading(group)


def fit_hashes_parser() -> Parser:
    """Return the parser of `visionzoo fit-hashes`."""
    about = "Fit the hash functions of a model with hashed attention to images: its checkpoint, with them."
    parser = Parser("%(prog)s IMAGE... --checkpoint FILE [flags]", about)
    _drawn_images(parser, "weights: the model's, or of its softmax form")
    add = parser.add_argument_group("fitting").add_argument
    add("--neighbors", type=COUNT, default=10, metavar="N", help="tokens most like another, and as many least like it")
    add("--steps", type=COUNT, default=100, metavar="N", help="steps of SGD for each bit")
    where = "file to write (default: output/fit_hashes/MODEL.pth, numbered where that is taken)"
    add("--output", default="", metavar="FILE", help=where)
    return parser


def sparse_rate_parser() -> Parser:
    """Return the parser of `visionzoo sparse-rate`."""
    about = "Measure what CRATE's layers optimize, coding rates and sparsity, on images: a table and a plot."
    parser = Parser("%(prog)s IMAGE... --checkpoint FILE [flags]", about)
    _drawn_images(parser, "weights of the model")
    where = "folder to write to (default: output/sparse_rate/MODEL, numbered where that is taken)"
    parser.add_argument("--output", default="", metavar="FOLDER", help=where)
    return parser


def view_parser() -> Parser:
    """Return the parser of `visionzoo view`."""
    about = "Look at what a model makes of images: a local web page, or with --save pictures in a folder."
    parser = Parser("%(prog)s [IMAGE...] --model NAME [flags]", about)
    parser.add_argument("images", nargs="*", metavar="IMAGE", help="image files, folders, or patterns like 'x/*.jpg'")
    add_model_flags(parser, model=None)
    add_device_flags(parser)
    group = parser.add_argument_group("view")
    add = group.add_argument
    add("--checkpoint", default="", metavar="FILE", help="weights; of a run of `visionzoo train`, the model too")
    _yes(group, "--no-ema", "use the trained weights, not their moving average")
    _yes(group, "--random-weights", "look at a model without weights: where it can look, not what it has learned")
    add("--class-names", default="", metavar="FILE", help="text file of class names in order, or `imagenet`")
    add("--topk", type=COUNT, default=5, metavar="K", help="classes to show")
    _reading(group)
    group = parser.add_argument_group("pictures")
    add = group.add_argument
    add("--save", default="", metavar="DIR", help="write a folder of pictures for each image there, and no page")
    which = f"what to draw: {', '.join(METHODS)} (default: all that the model has and that takes seconds)"
    add("--method", nargs="+", default=[], choices=tuple(METHODS), metavar="NAME", help=which)
    add("--place", type=SHARE, nargs=2, metavar=("Y", "X"), help="look from there: shares of height and width, 0 to 1")
    add("--target", type=WHOLE, metavar="N", help="number of the class to explain (default: the likeliest)")
    mask = "image that is white where a feature is: print each map's Attention-IoU with it"
    add("--mask", default="", metavar="FILE", help=mask)
    _yes(group, "--faithfulness", "delete and insert pixels by each map; curves, and their mean over all images")
    add_page_flags(parser)
    return parser


def add_page_flags(parser: argparse.ArgumentParser) -> None:
    """Add where a page is served."""
    add = parser.add_argument_group("page").add_argument
    add(
        "--host", default="127.0.0.1", metavar="ADDRESS", help="address to listen on; others than this see the page too"
    )
    add("--port", type=PORT, default=7860, metavar="N", help="port to listen on; 0 for any that is free")
