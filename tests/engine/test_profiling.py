"""A run can be followed while it goes and understood after it has gone."""

import errno
import json
import math
import os
import subprocess
import sys

import pytest
import torch
import yaml
from engine.helpers import UPDATES, assert_same, learned, rows
from engine.two import in_two_processes, losses
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from timm.task import ClassificationTask
from torch.utils.tensorboard import SummaryWriter

from visionzoo.engine import building, profiling
from visionzoo.engine.building import build_run
from visionzoo.engine.environment import git_state
from visionzoo.engine.errors import UserError
from visionzoo.engine.images import announce_epoch, batch_names, batches
from visionzoo.engine.parallel import Process
from visionzoo.engine.profiling import Waiting
from visionzoo.engine.training import train

TEN = dict(epochs=4, max_steps=10, log_interval=2)


def records(path):
    """Yield the records of a log of wandb: blocks of 32 KiB of fragments, each behind checksum, length and kind."""
    content, position, record = path.read_bytes(), 7, b""  # behind the file's own header
    while position + 7 <= len(content):
        if (left := -position % 32768) and left < 7:  # no header fits in
            position += left
        length, kind = int.from_bytes(content[position + 4 : position + 6], "little"), content[position + 6]
        record += content[position + 7 : position + 7 + length]
        position += 7 + length
        if kind in (1, 4):  # whole, or the last fragment
            yield record
            record = b""


def wandb_values(folder):
    """Read the values of a run that was logged without a connection."""
    from wandb.proto.wandb_internal_pb2 import Record

    (path,) = folder.glob("wandb/offline-run-*/*.wandb")
    values = {}
    for data in records(path):
        for item in Record.FromString(data).history.item:
            values.setdefault(item.key or "/".join(item.nested_key), []).append(json.loads(item.value_json))
    return values


def test_all_logs_hold_loss_rate_speed_memory_and_metrics_after_ten_steps(make_args, tmp_path, monkeypatch):
    import wandb

    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")
    result = train(make_args(log_wandb=True, wandb_project="p", **TEN))
    wandb.teardown()
    folder = tmp_path / "output/run"
    assert result["updates"] == 10
    row = rows(folder)[-1]
    memory = "peak_process_memory_mib"  # no GPU
    names = ("train_loss", "eval_loss", "eval_top1", "lr", "images_per_second", memory, "waiting_seconds")
    assert all(math.isfinite(float(row[name])) for name in names) and float(row[memory]) > 10
    board = EventAccumulator(str(folder))
    board.Reload()
    logged = {tag: [event.value for event in board.Scalars(tag)] for tag in board.Tags()["scalars"]}
    elsewhere = wandb_values(folder)
    steps = ("train/loss", "train/lr", "train/images_per_second", f"train/{memory}")
    for name in (*steps, *(f"epoch/{name}" for name in names)):
        assert logged[name] and elsewhere[name] == pytest.approx(logged[name], rel=1e-5), name
    assert len(logged["train/loss"]) == 5
    assert logged["epoch/eval_top1"][-1] == pytest.approx(float(row["eval_top1"]))


def test_a_disk_that_is_full_for_the_log_is_said_with_the_last_checkpoint(make_args, tmp_path, monkeypatch):
    def full(self, *rest):
        if len(rest) == 0 or rest[-1] > UPDATES + 1:  # close, or the second epoch
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    for name in ("add_scalar", "close"):
        monkeypatch.setattr(SummaryWriter, name, full)
    with pytest.raises(UserError) as error:
        train(make_args(log_interval=1))
    assert "cannot write the TensorBoard log" in str(error.value) and "No space left on device" in str(error.value)
    assert f"--resume {tmp_path / 'output/run/last.pth.tar'}" in str(error.value)


def test_wandb_without_a_key_is_refused_in_plain_words(make_args, monkeypatch):
    import wandb

    for name in ("WANDB_API_KEY", "WANDB_MODE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("NETRC", "/dev/null")  # where it looks for one
    with pytest.raises(UserError, match="Weights & Biases cannot start: No API key configured"):
        train(make_args(log_wandb=True))
    wandb.teardown()


def train_without_connection(args):
    os.environ.update(WANDB_MODE="offline", WANDB_SILENT="true")
    train(args)
    import wandb

    wandb.teardown()


def test_only_the_first_of_two_processes_logs(make_args, tmp_path):
    in_two_processes(train_without_connection, make_args(batch_size=4, log_wandb=True, wandb_project="p", **TEN))
    folder = tmp_path / "output/run"
    assert len(list(folder.glob("events.out.tfevents*"))) == 1
    assert len(wandb_values(folder)["train/loss"]) == 5  # of one run
    assert losses(folder) == pytest.approx(wandb_values(folder)["train/loss"])
    assert [row["epoch"] for row in rows(folder)] == ["0", "1", "2"]
    assert (folder / "log.txt").read_text().count("run folder") == 1


def test_a_run_folder_explains_itself(make_args, tmp_path):
    train(make_args(epochs=1))
    folder = tmp_path / "output/run"
    found = yaml.safe_load((folder / "environment.yaml").read_text())
    assert found["command"] == sys.argv
    assert found["versions"]["torch"] == torch.__version__ and {"timm", "visionzoo", "python"} <= set(found["versions"])
    assert {"args.yaml", "summary.csv", "curves.png", "log.txt"} <= {path.name for path in folder.iterdir()}
    lines = (folder / "log.txt").read_text().splitlines()
    assert f"torch {torch.__version__}" in lines[0] and "M parameters" in lines[1]
    assert any("epoch 0: train_loss" in line for line in lines) and "best top1" in lines[-1]
    train(make_args(epochs=2, resume="auto"))
    more = (folder / "log.txt").read_text().splitlines()[len(lines) :]  # it continues, as the run does
    assert "continuing from" in more[0] and "best top1" in more[-1]


def test_the_git_state_is_told_from_none(tmp_path):
    def git(*words):
        subprocess.run(["git", "-C", str(tmp_path), "-c", "user.name=n", "-c", "user.email=e", *words], check=True)

    (tmp_path / "old.py").touch()
    assert git_state(tmp_path) is None
    git("init", "-q")
    git("add", ".")
    git("commit", "-q", "-m", "x")
    assert len(git_state(tmp_path)["commit"]) == 40 and git_state(tmp_path)["changed"] == []
    (tmp_path / "environment").mkdir()
    (tmp_path / "environment/new.py").touch()
    assert git_state(tmp_path)["changed"] == ["?? environment/"]
    assert git_state(tmp_path / "environment") is None  # in the checkout, and no part of it


def test_a_trace_of_some_updates_is_written(make_args, tmp_path, capsys):
    train(make_args(epochs=2, profile=3))
    trace = json.loads((tmp_path / "output/run/trace.json").read_text())
    names = [event.get("name", "") for event in trace["traceEvents"]]
    assert any("convolution" in name for name in names) and sum("Optimizer.step" in name for name in names) == 3
    assert "3 updates traced" in capsys.readouterr().out
    train(make_args(epochs=3, profile=1, resume="auto"))
    assert json.loads((tmp_path / "output/run/trace.json").read_text()) == trace  # of the start before
    assert f"1 update traced: {tmp_path / 'output/run/trace-1.json'}" in capsys.readouterr().out


def test_a_run_that_ends_before_its_trace_writes_what_there_is(make_args, tmp_path, capsys):
    train(make_args(max_steps=4, profile=9, experiment="short"))
    assert "2 updates traced" in capsys.readouterr().out
    assert json.loads((tmp_path / "output/short/trace.json").read_text())["traceEvents"]
    train(make_args(max_steps=1, profile=9, experiment="shorter"))
    assert "nothing is traced" in capsys.readouterr().out


def test_slow_loading_is_reported_and_fast_loading_is_not():
    waiting = Waiting()
    waiting.seconds = 25.0
    assert "62% of the epoch went by in waiting for images, with 2 loading processes" in waiting.advice(40.0, 2)
    assert waiting.advice(400.0, 2) is None
    with waiting():
        pass
    assert 25.0 < waiting.seconds < 26.0


def test_a_run_with_slow_loading_says_so(make_args, monkeypatch, capsys):
    monkeypatch.setattr(profiling, "SHORT_EPOCH", 0.0)
    monkeypatch.setattr(profiling, "SLOW_LOADING", 0.0)  # any is slow
    train(make_args(epochs=1))
    assert "of the epoch went by in waiting for images, with 0 loading processes" in capsys.readouterr().out


@pytest.mark.parametrize("workers", [0, 2])
def test_the_names_of_a_batch_are_those_of_its_images(make_args, workers):
    run = build_run(make_args(workers=workers, no_aug=True), Process(torch.device("cpu")))
    announce_epoch(run.loader, run.config.device.seed, 3)
    seen = [targets.tolist() for _, targets in batches(run.loader)]
    for index in range(UPDATES):
        names = batch_names(run.loader, run.config.device.seed, 3, index)
        assert [["blue", "green", "red"].index(name.split("/")[-2]) for name in names] == seen[index]


def spoil(monkeypatch, *at):
    """Let the losses of some batches (counted from the start of the process) be no numbers."""
    forward, count = ClassificationTask.forward, [0]

    def spoilt(self, images, targets):
        result = forward(self, images, targets)
        count[0] += 1
        return {**result, "loss": result["loss"] * (math.nan if count[0] - 1 in at else 1.0)}

    monkeypatch.setattr(ClassificationTask, "forward", spoilt)


def test_a_loss_that_is_no_number_stops_with_step_images_and_last_checkpoint(make_args, tmp_path, monkeypatch):
    spoil(monkeypatch, UPDATES + 1)
    with pytest.raises(UserError) as error:
        train(make_args())
    said, last = str(error.value), tmp_path / "output/run/last.pth.tar"
    assert f"the loss is nan in epoch 1, batch 1, update {UPDATES + 2} (images /" in said and "/train/" in said
    assert f"The last good checkpoint: {last}; continue with:" in said
    assert said in (tmp_path / "output/run/log.txt").read_text()
    assert all(value.isfinite().all() for value in learned(tmp_path / "output/run")["state_dict"].values())


@pytest.mark.parametrize("accumulated", [1, 2])
def test_updates_without_a_finite_loss_are_left_out_as_often_as_allowed(
    make_args, tmp_path, monkeypatch, capsys, accumulated
):
    spoil(monkeypatch, 2, 5)
    options = dict(epochs=3, grad_accum_steps=accumulated)
    result = train(make_args(experiment="two", skip_nonfinite=2, **options))
    assert math.isfinite(result["train_loss"])
    said = capsys.readouterr().out
    assert "batch 2" in said and "the update is left out, 2 of 2" in said
    assert all(value.isfinite().all() for value in learned(tmp_path / "output/two")["state_dict"].values())
    spoil(monkeypatch, 0, 1, 2)
    with pytest.raises(UserError, match=r"after 1 left out \(--skip-nonfinite\)"):
        train(make_args(experiment="one", skip_nonfinite=1, **options))


def test_to_allow_left_out_updates_changes_nothing_else(make_args, tmp_path):
    train(make_args(experiment="a"))
    train(make_args(experiment="b", skip_nonfinite=3))
    assert_same(learned(tmp_path / "output/a"), learned(tmp_path / "output/b"))


class Overflow(torch.nn.Module):
    """Batch norm whose input is infinite in one of its calls."""

    def __init__(self, at):
        super().__init__()
        self.norm, self.at, self.calls = torch.nn.BatchNorm2d(3), at, 0

    def forward(self, images):
        self.calls += 1
        return self.norm(images * (math.inf if self.calls - 1 == self.at else 1.0))


def test_a_left_out_update_leaves_no_trace_in_batch_norms(make_args, tmp_path, monkeypatch):
    overflow = Overflow(at=1)
    original = building._wrap_model

    def wrap(run):
        run.trainable.register_forward_pre_hook(lambda _, images: (overflow(images[0]),))
        run.trainable.overflow = overflow.train()
        return original(run)

    monkeypatch.setattr(building, "_wrap_model", wrap)
    train(make_args(skip_nonfinite=1, epochs=1))
    state = learned(tmp_path / "output/run")["state_dict"]
    assert all(value.isfinite().all() for value in state.values())
    assert state["overflow.norm.num_batches_tracked"] == UPDATES - 1


@pytest.mark.parametrize("recovery", [0, 1])
def test_weights_that_are_no_numbers_take_no_checkpoints_place(make_args, tmp_path, monkeypatch, recovery):
    """As after a gradient that overflows in the last update before a checkpoint: the loss shows it one update later."""
    step = torch.optim.AdamW.step

    def spoilt(self, *rest, **more):
        step(self, *rest, **more)
        count[0] += 1
        if count[0] == 2 * UPDATES:
            with torch.no_grad():
                self.param_groups[0]["params"][0].fill_(math.nan)

    count = [0]
    monkeypatch.setattr(torch.optim.AdamW, "step", spoilt)
    with pytest.raises(
        UserError, match=r"1 tensor of the model holds NaN, such as .* The last good checkpoint"
    ) as error:
        train(make_args(epochs=3, recovery_interval=recovery))
    name = "recovery.pth.tar" if recovery else "last.pth.tar"
    assert f"--resume {tmp_path / 'output/run' / name}" in str(error.value)
    assert all(value.isfinite().all() for value in learned(tmp_path / "output/run", name)["state_dict"].values())


def spoilt_in_the_second(args):
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    with pytest.MonkeyPatch.context() as patch:
        if int(os.environ["RANK"]) == 1:
            spoil(patch, 1, 2)
        try:
            train(args)
        except UserError as error:
            return str(error)


@pytest.mark.slow
@pytest.mark.parametrize("fsdp", [False, True])
def test_two_processes_leave_out_the_same_updates_and_tell_of_the_one_at_fault(make_args, tmp_path, fsdp):
    options = dict(batch_size=4, fsdp=fsdp)
    assert in_two_processes(spoilt_in_the_second, make_args(skip_nonfinite=2, **options)) == [None, None]
    assert all(value.isfinite().all() for value in learned(tmp_path / "output/run")["state_dict"].values())
    for allowed in (0, 1):
        args = make_args(skip_nonfinite=allowed, experiment=f"allows {allowed}", **options)
        first, second = in_two_processes(spoilt_in_the_second, args)
        assert first == second and f"the loss is nan in epoch 0, batch {1 + allowed}, update {2 + allowed} (" in first
