"""Training on exits and terms: each falls and is logged as what it is; every other tool sees logits."""

import json
import math
from unittest import mock

import early_exit
import pytest
import torch
from early_exit import NAME, WEIGHTS, balance_of
from engine.helpers import UPDATES, assert_same, learned, results, rows, run_tool
from engine.two import in_two_processes
from timm.task import ClassificationTask

from visionzoo.engine.auxiliary import AuxiliaryTask
from visionzoo.engine.building import build_run
from visionzoo.engine.checkpoints import read_checkpoint
from visionzoo.engine.errors import UserError
from visionzoo.engine.parallel import Process
from visionzoo.engine.training import train

FAMILY = {"model": NAME, "model_kwargs": {}, "drop_path": 0.0, "smoothing": 0.0}
PARTS = ("task_loss", *WEIGHTS)
WAYS = {
    "accumulated": {"batch_size": 4, "grad_accum_steps": 2},
    "averaged": {"model_ema": True, "model_ema_decay": 0.5},
    "bfloat16": {"amp": True, "amp_dtype": "bfloat16"},
    "float16": {"amp": True, "amp_dtype": "float16"},
    "mixed": {"mixup": 0.5, "cutmix": 0.5, "smoothing": 0.1},
    "smoothed": {"smoothing": 0.1},
    "binary": {"bce_loss": True},
    "recomputed": {"grad_checkpointing": True},
    "compiled": {"torchcompile": "eager", "grad_checkpointing": True},
    "skipping": {"skip_nonfinite": 2},
}


@pytest.fixture
def early(make_args):
    """Arguments of a training of the tiny family."""
    return lambda **changes: make_args(**{**FAMILY, **changes})


def scalars(folder):
    """The values of each name in a run's TensorBoard log."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    log = EventAccumulator(str(folder))
    log.Reload()
    return {name: [event.value for event in log.Scalars(name)] for name in log.Tags()["scalars"]}


def assert_adds_up(row, weights=WEIGHTS, prefix="train_"):
    """The loss is the weighted sum of its parts."""
    total = float(row[f"{prefix}task_loss"]) + sum(w * float(row[f"{prefix}{name}"]) for name, w in weights.items())
    assert float(row[f"{prefix}loss"]) == pytest.approx(total, rel=1e-4)


def cross_entropy(logits, targets):
    """Mean of -sum target * log softmax, from the definition, for targets [B, classes]."""
    exps = [[math.exp(value) for value in row] for row in logits.tolist()]
    terms = [
        -sum(t * math.log(e / sum(row)) for t, e in zip(target, row, strict=True))
        for target, row in zip(targets.tolist(), exps, strict=True)
    ]
    return sum(terms) / len(terms)


def test_training_lowers_exits_and_terms_and_logs_them(early, tmp_path, capsys, monkeypatch):
    wandb = mock.Mock()
    monkeypatch.setattr("visionzoo.engine.reporting._start_wandb", lambda *_: wandb)
    result = train(early(epochs=8, lr=3e-3, aux_weight={"balance": 1}, log_interval=1, log_wandb=True))
    table = rows(tmp_path / "output/run")
    for row in table:
        assert_adds_up(row, {**WEIGHTS, "balance": 1.0})
    for name in ("early", "balance", "task_loss"):
        first, last = (float(row[f"train_{name}"]) - 4 * (name == "balance") for row in (table[0], table[-1]))
        assert last < 0.95 * first, name  # four mixers, each with a balance of 1 at least
    assert result["best_metric"] > 60  # of three classes
    logged = scalars(tmp_path / "output/run")
    for name in PARTS:
        sent = [call.args[0][f"train/{name}"] for call in wandb.log.call_args_list if f"train/{name}" in call.args[0]]
        assert logged[f"train/{name}"] == pytest.approx(sent, rel=1e-5) and len(sent) == 8 * UPDATES
        assert logged[f"epoch/train_{name}"] == pytest.approx([float(row[f"train_{name}"]) for row in table], rel=1e-5)
    assert (
        "learning beside logits: early (weight 0.5), taught (weight 0.25), balance (weight 1)"
        in capsys.readouterr().out
    )


def test_what_is_logged_is_what_the_definitions_give(early, tmp_path):
    """Of one update on all images at once, whose order makes no difference."""
    options = {"batch_size": 36, "max_steps": 1, "no_aug": True, "log_interval": 1}
    run = build_run(early(experiment="untouched", **options), Process(torch.device("cpu")))
    run.reporter.close()
    images, labels = next(iter(run.loader))
    model = run.trainable.train()
    logits, (first, taught), _ = model(images)
    targets = torch.eye(3)[labels]
    expected = {
        "task_loss": cross_entropy(logits, targets),
        "early": cross_entropy(first.logits, targets),
        "taught": cross_entropy(taught.logits, logits.softmax(-1)),
        "balance": balance_of(model, images),
    }
    expected["loss"] = expected["task_loss"] + sum(weight * expected[name] for name, weight in WEIGHTS.items())
    run.close()
    train(early(**options))
    logged, row = scalars(tmp_path / "output/run"), rows(tmp_path / "output/run")[0]
    for name, value in expected.items():
        assert logged[f"train/{name}"] == pytest.approx([value], rel=1e-4), name
        assert float(row[f"train_{name}"]) == pytest.approx(value, rel=1e-4), name


@pytest.mark.parametrize("way", WAYS)
def test_exits_and_terms_go_with_every_way_of_training(early, tmp_path, way):
    train(early(epochs=3, lr=3e-3, **WAYS[way]))
    table = rows(tmp_path / "output/run")
    for row in table:
        assert_adds_up(row)
        assert row["eval_loss"] and math.isfinite(float(row["train_early"]))
    assert float(table[-1]["train_loss"]) < float(table[0]["train_loss"])


def test_an_exit_learns_as_the_logits_do_from_smoothed_labels_and_its_own_targets_as_they_are(early):
    run = build_run(early(smoothing=0.3), Process(torch.device("cpu")))
    run.reporter.close()
    run.close()
    images, labels = torch.randn(4, 3, 32, 32), torch.tensor([0, 1, 2, 0])
    logits, (first, taught), _ = run.trainable.train()(images)
    found = run.task(images, labels)
    smooth = torch.eye(3)[labels] * 0.7 + 0.1
    assert found["task_loss"].item() == pytest.approx(cross_entropy(logits, smooth), rel=1e-4)
    assert found["early"].item() == pytest.approx(cross_entropy(first.logits, smooth), rel=1e-4)
    assert found["taught"].item() == pytest.approx(cross_entropy(taught.logits, logits.softmax(-1)), rel=1e-4)
    found["loss"].backward()
    assert all(parameter.grad is not None for parameter in run.trainable.parameters())


def test_a_weight_of_zero_leaves_a_term_out_and_logs_it(early, tmp_path):
    train(early(epochs=1, aux_weight={"balance": 0, "early": 2.5}))
    (row,) = rows(tmp_path / "output/run")
    assert float(row["train_balance"]) >= 4
    assert_adds_up(row, {"early": 2.5, "taught": 0.25, "balance": 0.0})


def test_an_interrupted_run_is_the_one_that_ran_through(early, tmp_path):
    options = {"epochs": 3, "model_ema": True, "model_ema_decay": 0.5, "lr": 3e-3}
    train(early(experiment="straight", **options))
    train(early(experiment="stopped", max_steps=UPDATES + 2, **options))
    train(early(experiment="stopped", resume="auto", **options))
    straight, stopped = tmp_path / "output/straight", tmp_path / "output/stopped"
    assert_same(learned(straight), learned(stopped))
    assert results(straight) == results(stopped)
    assert read_checkpoint(straight / "last.pth.tar")["losses"][2].keys() == set(PARTS)


def test_a_checkpoint_from_before_there_were_parts_is_taken_up(early, tmp_path):
    train(early(epochs=2, max_steps=UPDATES + 2))
    path = tmp_path / "output/run/last.pth.tar"
    state = read_checkpoint(path)
    torch.save({**state, "losses": state["losses"][:2]}, path)
    train(early(epochs=2, resume=str(path)))
    assert len(rows(tmp_path / "output/run")) == 2


def test_what_is_evaluated_and_exported_gives_logits(early, tmp_path):
    result = train(early(epochs=2, lr=3e-3, model_ema=True, model_ema_decay=0.5))
    folder = tmp_path / "output/run"
    flags = ["--checkpoint", str(folder / "last.pth.tar"), "--device", "cpu"]
    data = ["--data-dir", str(early().data.data_dir), "-b", "9", "-j", "0", "--results-file", str(tmp_path / "r.json")]
    assert run_tool("eval", *flags, *data) == 0
    assert json.loads((tmp_path / "r.json").read_text())["top1"] == pytest.approx(result["eval_top1"], abs=0.01)
    assert run_tool("export", *flags, "--format", "pt2", "--output", str(tmp_path / "e")) == 0


def train_early_exit(args):
    """In a process of its own, which has to know the family."""
    assert args.model.model == early_exit.NAME
    return train(args)


@pytest.mark.slow
def test_two_processes_share_exits_and_terms_in_either_way(early, tmp_path):
    """Terms leave the blocks beside what these return, which sharding must not miss in the backward pass."""
    found = {}
    for way in ("ddp", "fsdp"):
        more = {"log_interval": 1, "fsdp": way == "fsdp", "aux_weight": {"balance": 3.0}}
        args = early(experiment=way, batch_size=3, grad_accum_steps=2, epochs=2, **more)
        in_two_processes(train_early_exit, args)
        for row in rows(tmp_path / "output" / way):
            assert_adds_up(row, {**WEIGHTS, "balance": 3.0})
        found[way] = scalars(tmp_path / "output" / way)
    for name in ("loss", *PARTS):
        values = found["ddp"][f"train/{name}"]
        assert len(set(values)) == len(values) == 6
        assert values == pytest.approx(found["fsdp"][f"train/{name}"], rel=1e-4), name


@pytest.mark.parametrize(
    ("changes", "messages"),
    [
        (
            {"aux_weight": {"balanse": 1}},
            ["no exit and no term 'balanse'; did you mean balance?", "it has early, taught"],
        ),
        ({"aux_weight": {"xyz": 1}}, ["no exit and no term 'xyz'; it has early, taught, balance"]),
        ({"aux_weight": {"early": -1}}, ["--aux-weight early: expected a number at least 0, got -1"]),
        ({"aux_weight": {"early": "much"}}, ["--aux-weight early: expected a number at least 0, got 'much'"]),
        ({"aux_weight": {"early": True}}, ["--aux-weight early: expected a number at least 0, got True"]),
        (
            {"aux_weight": {"early": 1}, "model": "test_resnet"},
            ["--aux-weight early=1: test_resnet as built has no exits and no terms"],
        ),
        (
            {"aux_weight": {"early": 1}, "freeze": True, "resume": "auto"},
            ["--freeze trains only the classifier, without exits and terms; leave --aux-weight out"],
        ),
        (
            {"kd_checkpoint": "teacher.pth", "aux_weight": {"early": 0}},
            [f"{NAME} learns from labels with taught, balance in its loss", "--aux-weight taught=0 balance=0"],
        ),
    ],
)
def test_what_has_no_place_is_refused_before_the_first_step(early, changes, messages):
    with pytest.raises(UserError) as error:
        train(early(**changes))
    for message in messages:
        assert message in str(error.value)


def test_a_teacher_takes_the_place_of_exits_and_terms_that_weigh_nothing(early, tmp_path, trained):
    weights = dict.fromkeys(WEIGHTS, 0)
    train(early(epochs=1, kd_checkpoint=str(trained[0] / "last.pth.tar"), aux_weight=weights))
    (row,) = rows(tmp_path / "output/run")
    assert {name for name in row if name.startswith("train_")} == {
        "train_loss",
        "train_task_loss",
        "train_kd_loss",
    }
    assert float(row["train_loss"]) == pytest.approx(
        float(row["train_task_loss"]) + float(row["train_kd_loss"]), rel=1e-4
    )


def test_models_without_any_train_as_ever_and_frozen_ones_learn_the_classifier_alone(early, make_args):
    run = build_run(make_args(), Process(torch.device("cpu")))
    run.reporter.close()
    run.close()
    assert type(run.task) is ClassificationTask
    frozen = build_run(early(experiment="frozen", freeze=True, resume="auto"), Process(torch.device("cpu")))
    frozen.reporter.close()
    frozen.close()
    assert type(frozen.task) is ClassificationTask and not frozen.trainable.auxiliary


def test_a_family_that_does_not_keep_its_word_is_told():
    model = early_exit.EarlyExit(num_classes=3).train()
    criterion = torch.nn.CrossEntropyLoss()
    task = AuxiliaryTask(model, criterion, {**WEIGHTS, "other": 1.0}, torch.device("cpu"))
    with pytest.raises(
        ValueError, match=r"declares in AUXILIARY .*'other'.* and returned .*each must come exactly once"
    ):
        task(torch.randn(2, 3, 32, 32), torch.tensor([0, 1]))
