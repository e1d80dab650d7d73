import dataclasses
from types import SimpleNamespace

import pytest

from visionzoo.deploy.flags import ExportConfig
from visionzoo.engine.errors import UserError
from visionzoo.engine.flags import CompareConfig, TrainConfig, train_parser
from visionzoo.engine.idle_flags import OF, idle_flags
from visionzoo.engine.multi_task.flags import MultiTaskTrainConfig, multi_task_parser
from visionzoo.engine.options import FLAG, changed, filled, settings
from visionzoo.engine.trained_flags import EvalConfig, PredictConfig, eval_parser, predict_parser

# Facts of timm's train script, which is not part of its package.
TIMM_DEFAULTS = {
    "data_dir": None, "dataset": "", "train_split": "train", "val_split": "validation", "class_map": "",
    "input_img_mode": None, "model": "resnet50", "pretrained": False, "initial_checkpoint": "", "resume": "",
    "no_resume_opt": False, "num_classes": None, "gp": None, "img_size": None, "in_chans": None, "input_size": None,
    "crop_pct": None, "mean": None, "std": None, "interpolation": "", "batch_size": 128,
    "validation_batch_size": None, "channels_last": False, "grad_accum_steps": 1, "grad_checkpointing": False,
    "model_kwargs": {}, "torchcompile": None, "torchcompile_mode": None, "amp": False, "amp_dtype": "float16",
    "opt": "sgd", "opt_eps": None, "opt_betas": None, "momentum": 0.9, "weight_decay": 2e-5, "clip_grad": None,
    "clip_mode": "norm", "layer_decay": None, "opt_kwargs": {}, "sched": "cosine", "sched_on_updates": False,
    "lr": None, "lr_base": 0.1, "lr_base_size": 256, "lr_base_scale": "", "warmup_lr": 1e-5, "min_lr": 0,
    "epochs": 300, "start_epoch": None, "decay_epochs": 90, "warmup_epochs": 5, "warmup_prefix": False,
    "cooldown_epochs": 0, "decay_rate": 0.1, "no_aug": False, "scale": [0.08, 1.0], "ratio": [3 / 4, 4 / 3],
    "hflip": 0.5, "vflip": 0.0, "color_jitter": 0.4, "aa": None, "aug_repeats": 0, "bce_loss": False, "reprob": 0.0,
    "remode": "pixel", "recount": 1, "mixup": 0.0, "cutmix": 0.0, "cutmix_minmax": None, "mixup_prob": 1.0,
    "mixup_switch_prob": 0.5, "mixup_mode": "batch", "mixup_off_epoch": 0, "smoothing": 0.1,
    "train_interpolation": "random", "drop": 0.0, "drop_path": None, "drop_block": None, "sync_bn": False,
    "dist_bn": "reduce", "model_ema": False, "model_ema_decay": 0.9998, "model_ema_warmup": False, "seed": 42,
    "log_interval": 50, "val_interval": 1, "recovery_interval": 0, "checkpoint_hist": 10, "workers": 4,
    "pin_mem": False, "output": "", "experiment": "", "eval_metric": "top1", "log_wandb": False,
    "wandb_project": None, "wandb_tags": [], "wandb_resume_id": "", "kd_model_name": None, "kd_distill_type": "logit",
    "kd_loss_type": "kl", "distill_loss_weight": None, "task_loss_weight": None, "kd_temperature": 4.0,
    "kd_student_feature_dim": None, "kd_teacher_feature_dim": None, "kd_token_distill_type": "soft",
}  # fmt: skip


def parse(tmp_path, text, *flags):
    path = tmp_path / "config.yaml"
    path.write_text(text)
    return train_parser().parse_with_config([str(path), *flags])


def parsed(*args):
    """All flags by name."""
    return SimpleNamespace(**settings(parse(*args)))


def test_flags_have_timms_names_and_defaults():
    args = settings(train_parser().parse_with_config([]))
    assert {name: args[name] for name in TIMM_DEFAULTS} == TIMM_DEFAULTS


def flags_of(config):
    """Names of all flags of a command, as often as they are declared."""
    for field in dataclasses.fields(config):
        yield from [field.name] if FLAG in field.metadata else flags_of(field.type)


@pytest.mark.parametrize("command", [TrainConfig, CompareConfig, EvalConfig, PredictConfig, ExportConfig])
def test_a_flag_is_declared_once_and_says_what_it_is(command):
    names = list(flags_of(command))
    assert len(names) == len(set(names))
    for part in (field.type for field in dataclasses.fields(command) if FLAG not in field.metadata):
        for field in dataclasses.fields(part):
            if FLAG in field.metadata:
                assert field.metadata[FLAG][1]["help"], field.name


def test_configs_are_frozen_and_changed_by_a_flags_name():
    config = train_parser().parse_with_config(["--lr", "1", "--mixup", "0.5"])
    with pytest.raises(dataclasses.FrozenInstanceError):
        config.schedule.lr = 2.0
    other = changed(config, lr=2.0, model_kwargs={"depths": [1]})
    assert (other.schedule.lr, other.model.model_kwargs, config.schedule.lr) == (2.0, {"depths": [1]}, 1.0)
    assert settings(other) == settings(config) | {"lr": 2.0, "model_kwargs": {"depths": [1]}}
    with pytest.raises(TypeError, match="TrainConfig has no flags learning_rate"):
        changed(config, learning_rate=2.0)


def test_yaml_gives_defaults_and_flags_win(tmp_path):
    args = parsed(tmp_path, "epochs: 7\nopt: adamw\namp: true\nscale: [0.5, 1]", "--epochs", "9")
    assert (args.epochs, args.opt, args.amp, args.scale) == (9, "adamw", True, [0.5, 1.0])
    assert args.momentum == 0.9


def test_what_a_config_turns_on_a_flag_turns_off(tmp_path):
    assert parsed(tmp_path, "amp: true\nmodel_ema: true", "--no-amp").amp is False
    assert parsed(tmp_path, "amp: true\nmodel_ema: true", "--no-amp").model_ema is True


def test_config_may_be_named_as_in_timm(tmp_path):
    (tmp_path / "c.yaml").write_text("epochs: 3")
    assert train_parser().parse_with_config(["-c", str(tmp_path / "c.yaml")]).schedule.epochs == 3
    with pytest.raises(UserError, match="two configs"):
        train_parser().parse_with_config([str(tmp_path / "c.yaml"), "-c", "other.yaml"])


def test_number_that_yaml_reads_as_text_is_a_number(tmp_path):
    assert parsed(tmp_path, "lr: 1e-3").lr == 1e-3


def test_null_keeps_the_default_and_dashes_are_underscores(tmp_path):
    args = parsed(tmp_path, "epochs: null\nweight-decay: 0.3")
    assert (args.epochs, args.weight_decay) == (300, 0.3)


def test_model_arguments_come_as_a_mapping_or_as_pairs(tmp_path):
    assert parsed(tmp_path, "model_kwargs: {depths: [1, 2]}").model_kwargs == {"depths": [1, 2]}
    args = train_parser().parse_with_config(["--model-kwargs", "depths=[1,2]", "name=a=b"])
    assert args.model.model_kwargs == {"depths": [1, 2], "name": "a=b"}
    for given in ("mixers={type: full, num_heads: 2}", "mixers={'type': 'full', 'num_heads': 2}"):
        args = train_parser().parse_with_config(["--model-kwargs", given])
        assert args.model.model_kwargs == {"mixers": {"type": "full", "num_heads": 2}}
    mixers = parsed(tmp_path, "model_kwargs: {mixers: [{type: full}, pool]}").model_kwargs["mixers"]
    assert mixers == [{"type": "full"}, "pool"]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("batchsize: 3", "unknown key 'batchsize'; did you mean batch_size"),
        ("naflex_loader: true", "naflex_loader: True is for timm's train script, this one cannot do it"),
        ("model_dtype: bfloat16", "model_dtype: 'bfloat16' is for timm's train script"),
        ("help: true", "unknown key 'help'"),
        ("hosts: [a]", "unknown key 'hosts'; it belongs to `visionzoo compare`"),
        (
            "mixers: {type: full}",
            "unknown key 'mixers'; it is an argument of the model: --model-kwargs mixers=VALUE, in YAML model_kwargs",
        ),
        ("epochs: ten", "epochs: expected int, got 'ten'"),
        ("epochs: 1.5", "epochs: expected int, got 1.5"),
        ("epochs: [1]", "epochs: expected int"),
        ("lr: true", "lr: expected float, got True"),
        ("amp: 1", "amp: expected true or false, got 1"),
        ("scale: wide", "scale: expected float, got 'wide'"),
        ("input_size: [3, 224]", "input_size: expected 3 values"),
        ("model_kwargs: 3", "model_kwargs: expected a mapping, got 3"),
        ("sched: cosin", "expected one of cosine"),
        ("epochs: 3\namp: true\nepochs: 4", "given twice: epochs"),
        ("- epochs", "expected a mapping of flag names"),
        ("epochs: [", "is not YAML"),
    ],
)
def test_yaml_is_checked_as_flags_are(tmp_path, text, message):
    with pytest.raises(UserError) as error:
        parse(tmp_path, text)
    assert message in str(error.value)
    assert "config.yaml" in str(error.value)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--epoch", "3"], "unknown argument --epoch; did you mean --epochs"),
        (["--batchsize=3"], "unknown argument --batchsize; did you mean --batch-size"),
        (["--epochs", "x"], "argument --epochs: invalid int value: 'x'"),
        (["--model-kwargs", "depths"], "expected key=value, got 'depths'"),
        (["nowhere.yaml"], "cannot read the config nowhere.yaml"),
        (["."], "got the folder"),
    ],
)
def test_flags_that_cannot_be_are_refused(flags, message):
    with pytest.raises(UserError) as error:
        train_parser().parse_with_config(flags)
    assert message in str(error.value)


def test_tools_share_the_names_of_their_flags():
    parsers = (train_parser(), eval_parser(), predict_parser())
    train, test, predict = (set(vars(parser.parse_known_args(["x"])[0])) for parser in parsers)
    assert test - train == {
        "checkpoint",
        "exits",
        "calibration_share",
        "recorded_data",
        "no_ema",
        "split",
        "num_samples",
        "results_file",
        "results_csv",
    }
    own = {"checkpoint", "no_ema", "images", "class_names", "topk", "exits", "budget", "thresholds", "show_tokens"}
    assert predict - train == own


def test_flags_that_wait_for_another_are_said():
    parse = train_parser().parse_with_config
    alone = ["--amp-dtype=bfloat16", "--recount=2", "--mixup-prob=0.5", "--bce-sum", "--kd-temperature=2"]
    said = idle_flags(parse([*alone, "--wandb-project=p"]))
    assert said.startswith("without effect: --amp-dtype (without --amp), --recount (without --reprob), --mixup-prob")
    assert all(f"{flag.partition('=')[0]} (without --" in said for flag in alone)
    assert said.endswith("--wandb-project (without --log-wandb)")
    beside = ["--amp", "--reprob=0.1", "--cutmix-minmax", "0.2", "0.8", "--multi-label", "--kd-model-name=x"]
    assert idle_flags(parse([*alone, *beside])) == idle_flags(parse([])) == ""


@pytest.mark.parametrize(
    ("flags", "idle"),
    [
        ("--opt=adamw --momentum=0.8 --opt-betas 0.8 0.9", ["--momentum (under --opt adamw)"]),
        ("--opt=sgd --momentum=0.8 --opt-eps=1e-3", ["--opt-eps (under --opt sgd)"]),
        ("--opt=adam --momentum=0.8 --layer-decay=0.7", ["--momentum (under --opt adam)"]),
        ("--opt=adamw --opt-eps=1e-8 --opt-betas 0.9 0.999 --sched=tanh --lr-noise=0.5", []),  # its own
        ("--opt=muon --momentum=0.8", []),
        ("--opt=nope --momentum=0.8", []),  # refused elsewhere
        ("--sched=cosine --decay-rate=0.3 --lr-k-decay=0.5 --min-lr=0.1", ["--decay-rate (under --sched cosine)"]),
        ("--sched=step --decay-rate=0.3 --min-lr=0.1", ["--min-lr (under --sched step)"]),
        ("--sched=multistep --decay-milestones 4 5 --decay-epochs=3", ["--decay-epochs (under --sched multistep)"]),
        ("--sched=tanh --lr-cycle-limit=2 --lr-cycle-mul=2 --lr-k-decay=2", ["--lr-k-decay (under --sched tanh)"]),
        ("--sched=poly --lr-cycle-decay=0.1 --decay-rate=2", ["--lr-cycle-decay (without --lr-cycle-limit)"]),
        ("--sched=none --warmup-epochs=3", ["--warmup-epochs (under --sched none)"]),
        ("--lr=0.2 --lr-base=0.3", ["--lr-base (under --lr 0.2)"]),
        ("--lr-base=0.3 --lr-base-size=64 --lr-base-scale=sqrt", []),
        ("--lr-base-scale=linear", []),  # the optimizer's own
        ("--warmup-epochs=0 --warmup-lr=0.1 --epochs=30", ["--warmup-lr (under --warmup-epochs 0)"]),
        ("--sched=step --epochs=30 --decay-epochs=40", ["--decay-epochs (under --epochs 30)"]),
        ("--sched=step --epochs=30 --decay-epochs=20 --warmup-epochs=0", []),
        ("--sched=step --decay-epochs=55 --cooldown-epochs=9", ["--cooldown-epochs (under --sched step)"]),  # timm's
        ("--sched=multistep --epochs=30 --decay-milestones 40 50", ["--decay-milestones (under --epochs 30)"]),
        ("--sched=step --sched-on-updates --warmup-epochs=0", ["--sched-on-updates (under --warmup-epochs 0)"]),
        ("--sched=step --sched-on-updates --decay-epochs=2.5", []),
        ("--lr-noise 0.2 0.9 --lr-noise-pct=0.5 --lr-noise-std=0.2 --sched-on-updates", []),
        ("--pretrained --initial-checkpoint=x", ["--pretrained (under --initial-checkpoint x)"]),
        ("--pretrained-path=y --initial-checkpoint=x", ["--pretrained-path (under --initial-checkpoint x)"]),
        ("--pretrained --pretrained-path=y", []),  # as timm's script wants it
        ("--scale 0.5 1 --hflip=0.2 --crop-padding=4", ["--scale (under --crop-padding 4)"]),
        ("--train-interpolation=box --crop-padding=4", ["--train-interpolation (under --crop-padding 4)"]),
        ("--train-interpolation=bilinear --crop-padding=4 --cache-images=x", []),  # which accepts no other
        ("--train-interpolation=box --crop-padding=4 --aa=original", []),  # whose operations resize
        ("--aa=original --hflip=0 --mixup=0.2 --no-aug", ["--aa (under --no-aug)"]),  # no flips there anyway
        ("--reprob=0.2 --remode=rand --no-aug", ["--reprob (under --no-aug)", "--remode (under --no-aug)"]),
        ("--color-jitter=0.2 --aa=original", ["--color-jitter (under --aa original)"]),
        ("--color-jitter=0.2 --aa=original --crop-padding=4", ["--color-jitter (under --aa original)"]),
        ("--color-jitter=0.2 --aa=original-3a", []),  # which timm's lets jitter too
        ("--color-jitter=0 --color-jitter-prob=0.2", ["--color-jitter-prob (under --color-jitter 0.0)"]),
        ("--train-crop-mode=rrc --scale 0.5 1 --aa=original --pretrained", []),
        ("--no-resume-opt", ["--no-resume-opt (without --resume)"]),
        ("--train-num-samples=5", ["--train-num-samples (under --dataset '')"]),
        ("--epoch-repeats=2 --dataset=hfds/x", ["--epoch-repeats (under --dataset hfds/x)"]),
        ("--epoch-repeats=2 --val-num-samples=5 --dataset=wds/x", []),
        ("--val-data-dir=x --val-split=", ["--val-data-dir (under --val-split '')"]),
        ("--val-data-dir=x --eval-metric=loss -vb=5", []),
        ("--img-size=32 --input-size 3 64 48", ["--img-size (under --input-size 3 64 48)"]),
        ("--kd-checkpoint=x --kd-feature-weight=2", ["--kd-feature-weight (under --kd-distill-type logit)"]),
        ("--kd-checkpoint=x --kd-temperature=2 --kd-distill-type=token --kd-token-distill-type=hard", []),
        ("--mixup=0.2 --mixup-off-epoch=20 --epochs=20", ["--mixup-off-epoch (under --epochs 20)"]),
        ("--mixup=0.2 --mixup-off-epoch=20 --epochs=20 --cooldown-epochs=2", []),
        ("--mixup=0.2 --mixup-switch-prob=0.3", ["--mixup-switch-prob (without --cutmix or --cutmix-minmax)"]),
        ("--cutmix=0.2 --mixup-switch-prob=0.3", ["--mixup-switch-prob (without --mixup)"]),
        ("--mixup=0.2 --cutmix-minmax 0.2 0.8 --mixup-switch-prob=0.3", []),
    ],
)
def test_flags_that_change_nothing_that_is_made_are_said(flags, idle):
    said = idle_flags(train_parser().parse_with_config(flags.split()))
    assert said == (f"without effect: {', '.join(idle)}" if idle else "")


def test_multi_task_training_has_a_crop_of_its_own():
    for flags, said in (("", ""), ("--scale 0.3 1", "without effect: --scale (under --no-aug)")):
        given = settings(multi_task_parser().parse_with_config(["--no-aug", *flags.split()]))
        assert idle_flags(filled(MultiTaskTrainConfig, {**settings(MultiTaskTrainConfig()), **given})) == said


def test_what_waits_for_another_flag_is_off_by_default():
    usual = settings(TrainConfig())
    for owners, names in OF.items():
        # one cycle of the learning rate is none
        assert not any(usual[owner] for owner in owners if owner != "lr_cycle_limit") and usual.keys() >= {*names}
