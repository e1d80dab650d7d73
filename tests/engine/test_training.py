import contextlib
import dataclasses
import errno
import functools
import math
import multiprocessing
import os
import signal
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import yaml
from engine.helpers import TINY, TINY_FLAGS, UPDATES, Child, assert_same, learned, results, rows, truncate, write_images
from PIL import Image
from timm.data import IterableImageDataset

from visionzoo.engine.building import build_run
from visionzoo.engine.checkpoints import read_checkpoint
from visionzoo.engine.errors import Interrupted, UserError
from visionzoo.engine.images import batches
from visionzoo.engine.optimization import learning_rate, total_batch
from visionzoo.engine.parallel import Process
from visionzoo.engine.training import Training, train

OTHER_WIDTH = {**TINY["model_kwargs"], "embed_dims": [8, 32]}
POOLFORMER = {"model": "zoo_poolformer_s12", "model_kwargs": {"depths": [1, 1], "embed_dims": [8, 16]}}


def test_the_loss_falls_and_the_colours_are_learned(trained):
    folder, result = trained
    table = rows(folder)
    assert float(table[-1]["train_loss"]) < float(table[0]["train_loss"])
    assert result["eval_top1"] > 80  # of three classes
    assert result["best_metric"] == pytest.approx(max(float(row["eval_top1"]) for row in table))


def test_a_run_folder_holds_what_it_should(trained):
    folder, _ = trained
    names = {path.name for path in folder.iterdir()}
    assert {"args.yaml", "summary.csv", "curves.png", "last.pth.tar", "model_best.pth.tar"} <= names
    assert len([name for name in names if name.startswith("checkpoint-")]) == 2  # checkpoint_hist
    assert len([name for name in names if name.startswith("events.out.tfevents")]) == 1
    assert not [name for name in names if name.endswith(".tmp") or name == "recovery.pth.tar"]
    assert yaml.safe_load((folder / "args.yaml").read_text())["num_classes"] == 3
    assert (folder / "curves.png").stat().st_size > 5000
    columns = [
        "epoch",
        "train_loss",
        "eval_loss",
        "eval_top1",
        "eval_top5",
        "raw_top1",
        "lr",
        "images_per_second",
        "seconds",
        "waiting_seconds",
        "peak_process_memory_mib",
    ]
    assert [list(row) for row in rows(folder)] == [columns] * 6


def test_times_in_a_row_are_of_all_epochs_since_the_row_before(make_args):
    args = make_args(epochs=3, val_interval=2)
    train(args)
    table = rows(Path(args.run.output) / args.run.experiment)
    images = [round(float(row["images_per_second"]) * float(row["seconds"])) for row in table]
    assert images == [2 * UPDATES * 8, UPDATES * 8]


def test_tensorboard_holds_loss_rate_and_metrics(trained):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    log = EventAccumulator(str(trained[0]))
    log.Reload()
    steps = [event.step for event in log.Scalars("train/loss")]
    assert steps == list(range(1, 6 * UPDATES, 2))  # log_interval 2
    assert all(event.value > 0 for event in log.Scalars("train/images_per_second"))
    assert len(log.Scalars("train/lr")) == len(steps)
    assert [event.step for event in log.Scalars("epoch/eval_top1")] == [UPDATES * n for n in range(1, 7)]


def test_a_checkpoint_is_plain_and_says_what_it_is_of(trained):
    state = torch.load(trained[0] / "last.pth.tar", weights_only=True)
    assert state["class_names"] == ["blue", "green", "red"]
    assert state["args"]["model"] == state["arch"] == "zoo_biformer_t"
    assert state["data_config"]["input_size"] == (3, 32, 32)
    assert (state["epoch"], state["version"]) == (5, 2)
    assert {"state_dict", "state_dict_ema", "optimizer", "metric"} <= set(state)


AUGMENTED = {"mixup": 0.4, "cutmix": 1.0, "reprob": 0.5, "model_ema": True, "model_ema_decay": 0.9}


@pytest.mark.parametrize(
    ("stop", "workers"), [(2 * UPDATES, 2), (2 * UPDATES + 3, 0), (1, 2)], ids=["between epochs", "within one", "early"]
)
def test_a_resumed_run_is_the_run_that_was_never_stopped(make_args, tmp_path, workers, stop):
    options = {**AUGMENTED, "epochs": 4, "workers": workers, "sched_on_updates": True, "model_ema_warmup": True}
    train(make_args(experiment="straight", **options))
    train(make_args(experiment="stopped", max_steps=stop, **options))
    train(make_args(experiment="stopped", resume="auto", **options))
    straight, stopped = tmp_path / "output/straight", tmp_path / "output/stopped"
    assert_same(learned(straight), learned(stopped))
    assert_same(learned(straight, "model_best.pth.tar"), learned(stopped, "model_best.pth.tar"))
    assert results(stopped) == results(straight)


def test_mixed_precision_goes_on_with_its_loss_scale(make_args, tmp_path):
    """The scale has grown by then; also with accumulation, RandAugment and a schedule by epochs."""
    options = {"amp": True, "amp_dtype": "float16", "grad_accum_steps": 3, "aa": "rand-m9-mstd0.5-inc1", "epochs": 4}
    with pytest.MonkeyPatch.context() as patch:
        grown = functools.partial(torch.amp.GradScaler, init_scale=1024.0, growth_interval=3)
        patch.setattr(torch.amp, "GradScaler", grown)
        train(make_args(experiment="straight", **options))
        train(make_args(experiment="stopped", max_steps=5, **options))
        train(make_args(experiment="stopped", resume="auto", **options))
    straight, stopped = (learned(tmp_path / "output" / name) for name in ("straight", "stopped"))
    assert straight["amp_scaler"]["scale"] > 1024
    assert_same(straight, stopped)


def test_epochs_differ_from_each_other(make_args):
    run = build_run(make_args(), Process(torch.device("cpu")))
    loop = Training(run)
    with pytest.raises(dataclasses.FrozenInstanceError):
        run.num_epochs = 3  # a run is of parts that stay; its progress changes
    first = [targets.tolist() for _, _, targets in loop._remaining_batches()]
    run.progress.next_epoch()
    assert first != [targets.tolist() for _, _, targets in loop._remaining_batches()]


def test_accumulated_batches_make_the_gradient_of_their_union(make_args, tmp_path):
    options = {
        **POOLFORMER,  # without batch norm a batch is the sum of its images
        "no_aug": True,
        "drop_path": 0.0,
        "opt": "sgd",  # linear in the gradient, unlike adamw
        "epochs": 1,
    }
    train(make_args(experiment="whole", batch_size=12, **options))
    train(make_args(experiment="parts", batch_size=4, grad_accum_steps=3, **options))
    whole, parts = (
        read_checkpoint(tmp_path / "output" / name / "last.pth.tar")["state_dict"] for name in ("whole", "parts")
    )
    for name in whole:
        torch.testing.assert_close(whole[name], parts[name], rtol=1e-4, atol=1e-6)


def test_the_moving_average_counts_updates_and_starts_at_the_weights(make_args, tmp_path):
    train(make_args(model_ema=True, max_steps=1, experiment="one"))
    state = read_checkpoint(tmp_path / "output/one/last.pth.tar")
    assert_same(state["state_dict"], state["state_dict_ema"])
    train(make_args(model_ema=True, max_steps=2, experiment="two"))
    state = read_checkpoint(tmp_path / "output/two/last.pth.tar")
    assert not torch.equal(state["state_dict"]["head.fc.bias"], state["state_dict_ema"]["head.fc.bias"])


def test_a_rest_of_batches_is_an_update_too(make_args):
    result = train(make_args(grad_accum_steps=3, epochs=1))  # 4 batches: one update of three, one of one
    assert result["updates"] == 2


def test_a_step_limit_ends_validates_and_saves(make_args, tmp_path):
    result = train(make_args(epochs=10, max_steps=UPDATES + 1))
    assert (result["updates"], result["epoch"]) == (UPDATES + 1, 1)
    assert "eval_top1" in result
    assert read_checkpoint(tmp_path / "output/run/last.pth.tar")["batches_done"] == 1


@pytest.mark.parametrize(
    ("change", "expected", "words"),
    [
        ({"lr": 0.3}, 0.3, "as given, total batch 64"),
        ({"lr": None, "opt": "sgd"}, 0.1 * 64 / 256, "scaled (linear) to a total batch of 64"),
        ({"lr": None, "opt": "adamw"}, 0.1 * math.sqrt(64 / 256), "scaled (sqrt)"),
        ({"lr": None, "opt": "adamw", "lr_base": 5e-4, "lr_base_size": 512, "lr_base_scale": "linear"}, 6.25e-5, "512"),
    ],
)
def test_the_learning_rate_is_scaled_as_in_timm_and_explained(make_args, change, expected, words):
    args = make_args(grad_accum_steps=4, **change)
    lr, origin = learning_rate(args.schedule, args.optimizer.opt, total_batch(args.fit, world_size=2))
    assert lr == pytest.approx(expected)
    assert words in origin and f"lr {expected:g}" in origin


def test_mixing_stops_where_it_should_also_in_running_processes(make_args):
    run = build_run(make_args(mixup=1.0, mixup_off_epoch=1, smoothing=0.0, workers=2), Process(torch.device("cpu")))
    loop = Training(run)

    def mixed():
        return any((targets.max(-1).values < 0.999).any() for _, _, targets in loop._remaining_batches())

    assert mixed()
    run.progress.next_epoch()
    assert not mixed()


def test_without_validation_the_training_loss_ranks(make_args, tmp_path):
    result = train(make_args(val_split=""))
    lowest = min(float(row["train_loss"]) for row in rows(tmp_path / "output/run"))
    assert result["best_metric"] == pytest.approx(lowest, rel=1e-6)
    assert "eval_loss" not in rows(tmp_path / "output/run")[0]


@pytest.mark.parametrize(
    "options",
    [
        {"opt": "sgd", "clip_grad": 1.0, "clip_mode": "agc", "bce_loss": True, "layer_decay": 0.7},
        {"amp": True, "amp_dtype": "bfloat16", "channels_last": True, "grad_checkpointing": True, "clip_grad": 1.0},
        {"opt": "lamb", "mixup": 0.5, "bce_loss": True, "aa": "rand-m9-mstd0.5-inc1", "eval_metric": "loss"},
    ],
    ids=["agc", "bf16", "rand-augment"],
)
def test_options_of_the_recipes_train(make_args, options):
    result = train(make_args(epochs=1, **options))
    assert math.isfinite(result["train_loss"]) and math.isfinite(result["eval_loss"])


def test_a_loss_that_is_not_finite_stops_with_its_place(make_args, tmp_path):
    with pytest.raises(UserError, match=r"the loss is (nan|inf) in epoch 0, batch \d"):
        train(make_args(opt="sgd", lr=1e30))
    assert not (tmp_path / "output/run/last.pth.tar").exists()


def test_a_damaged_last_checkpoint_is_named_and_the_one_before_taken(make_args, tmp_path, capsys):
    train(make_args(epochs=3, max_steps=2 * UPDATES))
    folder = tmp_path / "output/run"
    truncate(folder / "last.pth.tar")  # also checkpoint-1, its second name
    train(make_args(epochs=3, resume="auto"))
    said = capsys.readouterr().out
    assert f"{folder / 'last.pth.tar'}" in said and "damaged" in said
    assert f"continuing from {folder / 'checkpoint-0.pth.tar'} in epoch 1" in said
    assert [row["epoch"] for row in rows(folder)] == ["0", "1", "2"]


def test_resume_goes_on_in_the_folder_of_the_checkpoint(make_args, tmp_path):
    train(make_args(epochs=3, max_steps=UPDATES))
    result = train(make_args(epochs=3, resume=str(tmp_path / "output/run/last.pth.tar"), output="", experiment=""))
    assert result["folder"] == str(tmp_path / "output/run")
    assert [row["epoch"] for row in rows(tmp_path / "output/run")] == ["0", "1", "2"]


@pytest.mark.parametrize("on_updates", [True, False])
def test_a_changed_learning_rate_wins_over_the_checkpoints(make_args, on_updates):
    options = {"epochs": 3, "sched": "step", "sched_on_updates": on_updates}  # no fall within 90 epochs
    train(make_args(max_steps=UPDATES, **options))
    run = build_run(make_args(resume="auto", **{**options, "lr": 3e-3}), Process(torch.device("cpu")))
    assert run.lr == pytest.approx(3e-3)


def test_a_finished_run_has_nothing_to_do(make_args, capsys):
    train(make_args())
    train(make_args(resume="auto"))
    assert "nothing left to do: 8 updates are done" in capsys.readouterr().out
    train(make_args(experiment="limited", max_steps=3))
    assert train(make_args(experiment="limited", max_steps=3, resume="auto"))["updates"] == 3
    assert "nothing left to do: 3 updates are done" in capsys.readouterr().out


def test_resume_auto_starts_where_there_is_nothing_yet(make_args, capsys):
    assert train(make_args(resume="auto"))["updates"] == 2 * UPDATES
    assert "no checkpoint in" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({}, "holds a run already; continue it by --resume auto"),
        ({"resume": "auto", "experiment": ""}, "give the name"),
        ({"resume": "{last}", "experiment": "b", **POOLFORMER}, "is a checkpoint of zoo_biformer_t"),
        ({"resume": "{last}", "experiment": "b", "opt": "sgd"}, "was trained by opt='adamw', this run has 'sgd'"),
        ({"resume": "{last}", "experiment": "b", "model_kwargs": OTHER_WIDTH}, "does not fit"),
        ({"initial_checkpoint": "{last}", "experiment": "b", **POOLFORMER}, "cannot load"),
        ({"initial_checkpoint": "{args}", "experiment": "b"}, "args.yaml"),
        ({"experiment": "b", "num_classes": 10}, "num_classes is 10, the data set has 3 classes"),
        ({"experiment": "b", "model": "zoo_biformer_x"}, "unknown model 'zoo_biformer_x'; did you mean zoo_biformer"),
        ({"experiment": "b", "model_kwargs": {"deps": 1}}, "does not take --model-kwargs"),
        ({"experiment": "b", "opt": "adamwww"}, "opt='adamwww'"),
        ({"experiment": "b", "device": "gpu"}, "unknown device"),
    ],
)  # fmt: skip
def test_what_does_not_fit_is_said_before_the_first_step(make_args, trained, tmp_path, change, message):
    (tmp_path / "output/run").mkdir(parents=True)
    (tmp_path / "output/run/last.pth.tar").touch()
    places = {"last": trained[0] / "last.pth.tar", "args": trained[0] / "args.yaml"}
    change = {k: v.format(**places) if isinstance(v, str) else v for k, v in change.items()}
    with pytest.raises(UserError) as error:
        train(make_args(**change))
    assert message in str(error.value)


def test_weights_of_a_run_are_a_start_for_another(make_args, trained):
    start = build_run(make_args(initial_checkpoint=str(trained[0] / "last.pth.tar")), Process(torch.device("cpu")))
    averaged = read_checkpoint(trained[0] / "last.pth.tar")["state_dict_ema"]
    assert_same(dict(start.trainable.state_dict()), dict(averaged))
    assert start.progress.epoch == 0


def signal_at(monkeypatch, update, number):
    """Send the process a signal in the middle of an update."""
    original = Training._forward_backward

    def interrupted(self, *args):
        original(self, *args)
        if self.run.update == update:
            os.kill(os.getpid(), number)

    monkeypatch.setattr(Training, "_forward_backward", interrupted)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_saves_says_how_to_go_on_and_nothing_is_lost(make_args, tmp_path, monkeypatch, number):
    options = {**AUGMENTED, "epochs": 2}
    train(make_args(experiment="straight", **options))
    handlers = [signal.getsignal(n) for n in (signal.SIGINT, signal.SIGTERM)]
    monkeypatch.setattr(sys, "argv", ["tools/train.py", "c.yaml", "--resume", "old", "--lr", "1"])
    with monkeypatch.context() as patch:
        signal_at(patch, UPDATES + 1, number)
        with pytest.raises(Interrupted) as error:
            train(make_args(experiment="stopped", **options))
    recovery = tmp_path / "output/stopped/recovery.pth.tar"
    assert str(error.value) == (
        f"stopped by {number.name}; saved {recovery}; continue with: "
        f"python tools/train.py c.yaml --lr 1 --resume {recovery}"
    )
    assert [signal.getsignal(n) for n in (signal.SIGINT, signal.SIGTERM)] == handlers
    assert read_checkpoint(tmp_path / "output/stopped/last.pth.tar")["epoch"] == 0
    assert read_checkpoint(recovery)["batches_done"] == 2  # the update was finished
    train(make_args(resume=str(recovery), output="", experiment="", **options))
    assert_same(learned(tmp_path / "output/straight"), learned(tmp_path / "output/stopped"))
    assert not recovery.exists()


def test_what_is_read_on_a_gpu_is_kept_until_it_was_read(monkeypatch):
    """timm 1.0.29 wrote the next images over those that a GPU behind the host had still to read."""
    used = []
    monkeypatch.setattr("torch.cuda.current_stream", lambda device: f"current of {device}")
    image = SimpleNamespace(is_cuda=True, device="cuda:1", record_stream=used.append)
    assert list(batches([(image, torch.ones(1))])) == [(image, torch.ones(1))]
    assert used == ["current of cuda:1"]


@pytest.mark.parametrize("stop", [False, True], ids=["done", "stopped"])
def test_no_loading_process_outlives_a_run(make_args, monkeypatch, stop):
    """Whoever holds the run or its error: torch 2.11 would wait 5 s for each at exit."""
    args = make_args(workers=2, max_steps=UPDATES + 2, mixup=1.0, mixup_off_epoch=1)
    loading, kept, original = [], [], Training._forward_backward

    def counted(self, *arguments):
        loading.append(len(multiprocessing.active_children()))
        kept.append(self)
        original(self, *arguments)

    monkeypatch.setattr(Training, "_forward_backward", counted)
    if stop:
        signal_at(monkeypatch, UPDATES + 1, signal.SIGTERM)
    with pytest.raises(Interrupted) if stop else contextlib.nullcontext():
        train(args)
    assert loading == [2] * UPDATES + [4] * 2  # the second epoch has a loader of its own, beside validation's
    assert not multiprocessing.active_children()


def test_a_signal_during_validation_loses_no_epoch(make_args, tmp_path, monkeypatch):
    train(make_args(experiment="straight", **AUGMENTED))
    with monkeypatch.context() as patch:
        patch.setattr("visionzoo.engine.training.evaluate", lambda *_, **__: os.kill(os.getpid(), signal.SIGTERM))
        with pytest.raises(Interrupted):
            train(make_args(experiment="stopped", **AUGMENTED))
    assert read_checkpoint(tmp_path / "output/stopped/recovery.pth.tar")["batches_done"] == UPDATES
    train(make_args(experiment="stopped", resume="auto", **AUGMENTED))
    assert_same(learned(tmp_path / "output/straight"), learned(tmp_path / "output/stopped"))


@pytest.mark.skipif(not Path("/proc/self/task").exists(), reason="children are found in Linux's /proc")
@pytest.mark.parametrize("to", ["group", "children"])
def test_a_signal_to_all_processes_saves_too(to, images, tmp_path):
    """As from `timeout` and a terminal's Ctrl-C, or from Slurm and systemd."""
    flags = ["--data-dir", str(images), "--model", "zoo_biformer_t", *TINY_FLAGS, "-j", "2", "--epochs", "500"]
    flags += ["--model-kwargs", "depths=[1,1]", "embed_dims=[8,16]", "topks=[1,-2]", "regions=2"]
    run = Child(tmp_path / "said.txt", "train", *flags, "--output", str(tmp_path), "--experiment", "stopped")
    run.wait_for((tmp_path / "stopped/last.pth.tar").exists)
    code, said = run.stop(signal.SIGTERM, to=to)
    assert code == 128 + signal.SIGTERM, said
    assert f"stopped by SIGTERM; saved {tmp_path / 'stopped/recovery.pth.tar'}" in said


def test_a_full_disk_ends_the_run_and_keeps_the_last_good_checkpoint(make_args, tmp_path, monkeypatch):
    save, calls = torch.save, []

    def full_on_second(*args, **kwargs):
        calls.append(1)
        if len(calls) == 2:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        save(*args, **kwargs)

    monkeypatch.setattr(torch, "save", full_on_second)
    with pytest.raises(UserError) as error:
        train(make_args(epochs=3))
    last = tmp_path / "output/run/last.pth.tar"
    assert f"cannot write {last}: No space left on device" in str(error.value)
    assert f"--resume {last}" in str(error.value)
    assert read_checkpoint(last)["epoch"] == 0
    assert [row["epoch"] for row in rows(tmp_path / "output/run")] == ["0", "1"]
    monkeypatch.undo()
    train(make_args(epochs=3, resume="auto"))
    assert [row["epoch"] for row in rows(tmp_path / "output/run")] == ["0", "1", "2"]


def test_a_second_signal_saves_nothing_half_done(make_args, tmp_path, monkeypatch):
    def twice(self, *args):
        if self.run.update == UPDATES + 1:
            for _ in range(2):
                os.kill(os.getpid(), signal.SIGINT)
        return original(self, *args)

    original = Training._forward_backward
    monkeypatch.setattr(Training, "_forward_backward", twice)
    with pytest.raises(Interrupted) as error:
        train(make_args())
    last = tmp_path / "output/run/last.pth.tar"
    assert "nothing saved" in str(error.value) and f"--resume {last}" in str(error.value)
    assert not (tmp_path / "output/run/recovery.pth.tar").exists()
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "1")  # torchrun sends a second one after the terminal's
    with pytest.raises(Interrupted, match=r"saved .*recovery\.pth\.tar"):
        train(make_args(resume="auto"))


def test_recovery_checkpoints_are_written_on_the_way(make_args, tmp_path, monkeypatch):
    written = []
    monkeypatch.setattr(
        "visionzoo.engine.checkpoints.CheckpointFolder.save_recovery",
        lambda self, state: written.append((state["epoch"], state["batches_done"])),
    )
    train(make_args(recovery_interval=3))
    assert written == [(0, 3), (1, 2)]  # updates 3 and 6


def test_skipped_images_are_counted_at_the_end(make_args, tmp_path, capsys):
    write_images(tmp_path / "d/train", per_class=4, seed=0)
    write_images(tmp_path / "d/val", per_class=2, seed=0)
    truncate(tmp_path / "d/train/red/1.png")
    result = train(make_args(data_dir=str(tmp_path / "d"), skip_bad_images=True, batch_size=4))
    assert result["updates"] == 6
    said = capsys.readouterr().out
    assert f"1 unusable training image was skipped\n  {tmp_path}/d/train/red/1.png" in said
    assert "0 unusable validation images were skipped" in said


def test_a_streamed_set_may_be_shorter_than_it_says(make_args, monkeypatch):
    class Stream:
        def __init__(self):
            self.epochs = []

        def __len__(self):
            return 40

        def set_epoch(self, epoch):
            self.epochs.append(epoch)

        def __iter__(self):
            for number in range(26):
                yield Image.new("RGB", (40, 40), (number, 0, 0)), number % 3

    stream = Stream()
    monkeypatch.setattr(
        "visionzoo.engine.data.create_dataset", lambda name, **_: IterableImageDataset(None, reader=stream)
    )
    result = train(make_args(dataset="wds/x", num_classes=3, val_split="", drop_path=0.0))
    assert (result["epoch"], stream.epochs) == (1, [0, 1])
    assert math.isfinite(result["train_loss"])


@pytest.mark.parametrize(
    ("module", "change", "install"),
    [
        ("tensorboard", {}, 'pip install "visionzoo[train]"'),
        ("tqdm", {}, 'pip install "visionzoo[train]"'),
        ("wandb", {"log_wandb": True}, 'pip install "visionzoo[wandb]"'),
    ],
)
def test_a_missing_dependency_is_named_before_training(make_args, monkeypatch, module, change, install):
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(UserError) as error:
        train(make_args(**change))
    assert f"{module} is not installed" in str(error.value) and install in str(error.value)
