"""Going on with a run: what is set anew is used, what cannot be is refused, and what differs is said."""

import multiprocessing
import os
import signal

import pytest
import torch
from engine.helpers import UPDATES, assert_same, learned, write_images
from torchvision.datasets import ImageFolder

from visionzoo.engine.building import build_run
from visionzoo.engine.checkpoints import read_checkpoint
from visionzoo.engine.data import class_names, open_split, open_train_and_val
from visionzoo.engine.errors import Interrupted, UserError
from visionzoo.engine.interruption import StopSignals
from visionzoo.engine.optimization import learning_rate
from visionzoo.engine.options import changed
from visionzoo.engine.parallel import Process
from visionzoo.engine.training import Training, train

CPU = Process(torch.device("cpu"))


def resumed(make_args, **changes):
    return build_run(make_args(resume="auto", **changes), CPU)


@pytest.mark.parametrize(
    ("opt", "change", "entry", "expected"),
    [
        ("adamw", {"weight_decay": 0.3}, "weight_decay", 0.3),
        ("adamw", {"opt_betas": [0.5, 0.6]}, "betas", [0.5, 0.6]),
        ("adamw", {"opt_eps": 1e-3}, "eps", 1e-3),
        ("adamw", {"sched": "none", "lr": 0.007}, "lr", 0.007),
        ("adamw", {"opt_kwargs": {"amsgrad": True}}, "amsgrad", True),
        ("sgd", {"momentum": 0.1}, "momentum", 0.1),
    ],
)
def test_a_changed_setting_of_the_optimizer_is_used_and_said(make_args, opt, change, entry, expected, capsys):
    options = {"opt": opt, "epochs": 3, "sched": "step", "weight_decay": 0.01}
    train(make_args(max_steps=1, **options))
    capsys.readouterr()
    groups = resumed(make_args, **{**options, **change}).optimizer.param_groups
    decayed = next(group for group in groups if group["weight_decay"]) if entry == "weight_decay" else groups[0]
    assert decayed[entry] == (tuple(expected) if isinstance(expected, list) else expected)
    assert f"{next(iter(change))} " in capsys.readouterr().out.partition("and from here on: ")[2]


def test_what_an_optimizer_has_learned_goes_on(make_args, tmp_path):
    options = {"opt": "lookahead_adamw", "epochs": 4, "opt_kwargs": {"amsgrad": True}}
    train(make_args(experiment="straight", **options))
    train(make_args(max_steps=UPDATES + 3, **options))
    train(make_args(resume="auto", **options))
    assert_same(learned(tmp_path / "output/straight"), learned(tmp_path / "output/run"))


def test_a_learning_rate_of_zero_is_zero(make_args):
    assert learning_rate(make_args(lr=0.0).schedule, "sgd", 64)[0] == 0.0


def test_second_derivatives_pass_through_attention(make_args, tmp_path, monkeypatch):
    options = {"opt": "adahessian", "lr": 0.1}
    train(make_args(experiment="straight", **options))
    assert read_checkpoint(tmp_path / "output/straight/last.pth.tar")["epoch"] == 1
    monkeypatch.setattr(Training, "_differentiable_twice", lambda self: torch.enable_grad())
    with pytest.raises(UserError, match="needs second derivatives, which a part of zoo_biformer_t has not"):
        train(make_args(**options))


def test_renamed_and_reordered_classes_are_refused(make_args, tmp_path):
    write_images(tmp_path / "d/train", per_class=4, seed=0)
    write_images(tmp_path / "d/val", per_class=2, seed=1)
    train(make_args(data_dir=str(tmp_path / "d"), batch_size=4, max_steps=1))
    for split in ("train", "val"):
        (tmp_path / "d" / split / "blue").rename(tmp_path / "d" / split / "zebra")
    with pytest.raises(UserError, match=r"class number 0 is 'blue' in .*last\.pth\.tar and 'green' in the data set"):
        resumed(make_args, data_dir=str(tmp_path / "d"), batch_size=4)


def test_other_sizes_modes_and_normalization_are_said(make_args, capsys):
    train(make_args(max_steps=1))
    capsys.readouterr()
    resumed(make_args, img_size=64, mean=[0.5, 0.5, 0.5], input_img_mode="HSV")
    said = capsys.readouterr().out
    for words in ("input_size (3, 32, 32) -> (3, 64, 64)", "img_size 32 -> 64", "input_img_mode None -> 'HSV'"):
        assert words in said
    assert "mean (0.485, 0.456, 0.406) -> (0.5, 0.5, 0.5)" in said


def partial(path, keep):
    state = read_checkpoint(path)["state_dict_ema"]
    return {name: state[name] for name in list(state)[: int(len(state) * keep)]}


@pytest.mark.parametrize("flag", ["pretrained_path", "initial_checkpoint"])
def test_a_part_of_the_weights_or_another_models_is_refused(make_args, trained, tmp_path, flag):
    torch.save(partial(trained[0] / "last.pth.tar", 0.4), tmp_path / "part.pth")
    with pytest.raises(UserError, match=r"fits only \d+ of the \d+ tensors") as error:
        train(make_args(**{flag: str(tmp_path / "part.pth")}))
    assert "allow_partial" not in str(error.value) and "strict=" not in str(error.value)
    other = {f"other.{number}": torch.zeros(2) for number in range(9)}
    torch.save(other, tmp_path / "other.pth")
    with pytest.raises(UserError):
        train(make_args(**{flag: str(tmp_path / "other.pth")}))


def test_a_few_missing_tensors_are_named(make_args, trained, tmp_path, capsys):
    state = partial(trained[0] / "last.pth.tar", 1)
    name = next(name for name in state if name.endswith("norm1.weight"))
    torch.save({key: value for key, value in state.items() if key != name}, tmp_path / "part.pth")
    train(make_args(pretrained_path=str(tmp_path / "part.pth"), max_steps=1))
    assert f"1 tensor is not in {tmp_path / 'part.pth'}, so random at first: {name}" in capsys.readouterr().out


def test_weights_of_other_classes_say_the_flag_that_takes_them(make_args, trained, tmp_path):
    state = partial(trained[0] / "last.pth.tar", 1)
    state |= {name: torch.cat([value, value]) for name, value in state.items() if name.startswith("head.fc")}
    torch.save(state, tmp_path / "six.pth")
    with pytest.raises(UserError, match=r"6 classes, the model 3\. \(--pretrained-path takes all but the classifier"):
        train(make_args(initial_checkpoint=str(tmp_path / "six.pth")))
    train(make_args(pretrained_path=str(tmp_path / "six.pth"), max_steps=1))


def test_class_folders_with_the_images_one_floor_below_are_not_one_class(make_args, tmp_path):
    for name in ("n01", "n02", "n03"):
        write_images(tmp_path / "d/train" / name, per_class=1, seed=0)
        (tmp_path / "d/train" / name / "red").rename(tmp_path / "d/train" / name / "images")
        for other in ("blue", "green"):
            for file in (tmp_path / "d/train" / name / other).iterdir():
                file.unlink()
            (tmp_path / "d/train" / name / other).rmdir()
    with pytest.raises(UserError, match=r"lie in 3 folders that are all named 'images'"):
        open_train_and_val(make_args(data_dir=str(tmp_path / "d"), val_split=""))
    (tmp_path / "d/train/n04").mkdir()
    (tmp_path / "d/train/n01/images/0.png").rename(tmp_path / "d/train/n04/0.png")
    train_set, _ = open_train_and_val(make_args(data_dir=str(tmp_path / "d"), val_split="", skip_bad_images=True))
    assert any("folders of one name are one class: 'images' of 2" in note for note in train_set.notes)


def test_one_class_is_nothing_to_tell_apart(make_args, tmp_path):
    write_images(tmp_path / "d", per_class=2, seed=0)
    (tmp_path / "one").mkdir()
    (tmp_path / "d/red").rename(tmp_path / "one/red")
    with pytest.raises(UserError, match="all training images are of one class, 'red'"):
        open_train_and_val(make_args(data_dir=str(tmp_path / "one"), val_split=""))


def test_a_link_to_a_folder_above_is_refused_and_folders_met_twice_are_named(make_args, tmp_path):
    write_images(tmp_path / "d", per_class=2, seed=0)
    (tmp_path / "d/rouge").symlink_to(tmp_path / "d/red")
    train_set, _ = open_train_and_val(make_args(data_dir=str(tmp_path / "d"), val_split=""))
    assert any("is the same folder as" in note for note in train_set.notes)
    (tmp_path / "d/red/all").symlink_to("..")
    with pytest.raises(UserError, match=r"(red|rouge)/all is a link to .*, a folder that it lies in"):
        open_train_and_val(make_args(data_dir=str(tmp_path / "d"), val_split=""))


@pytest.mark.parametrize("dataset", ["", "torch/image_folder"])
def test_validation_that_is_training_by_another_path_is_refused(make_args, images, tmp_path, dataset):
    (tmp_path / "again").symlink_to(images / "train")
    args = make_args(dataset=dataset, data_dir=str(images / "train"), val_data_dir=str(tmp_path / "again"))
    with pytest.raises(UserError, match="would read the same images"):
        open_train_and_val(args)
    (tmp_path / "linked").mkdir()
    for name in ("blue", "green", "red"):
        (tmp_path / "linked" / name).symlink_to(images / "train" / name)
    args = changed(args, val_data_dir=str(tmp_path / "linked"))
    with pytest.raises(UserError, match="would read the same images, 36 of 36"):
        open_train_and_val(args)
    write_images(tmp_path / "mixed", per_class=2, seed=3)
    (tmp_path / "mixed/red/9.png").symlink_to(images / "train/red/0.png")
    args = changed(args, val_data_dir=str(tmp_path / "mixed"))
    _, val = open_train_and_val(args)
    assert [note for note in val.notes if "trained on too: 1 of 7" in note]


def test_two_splits_of_one_cache_are_not_the_same_images(make_args, monkeypatch):
    class Reader:
        root, class_to_idx = "/cache", {"a": 0, "b": 1}

    class Set(list):
        reader = Reader()

    monkeypatch.setattr("visionzoo.engine.data.create_dataset", lambda *_, **__: Set(range(4)))
    args = make_args(dataset="hfds/x", data_dir="/cache")
    open_train_and_val(args)
    args = changed(args, val_split="train")
    with pytest.raises(UserError, match=r"the same images, the split 'train' of hfds/x"):
        open_train_and_val(args)


def test_torchvisions_folders_are_numbered_as_in_training(make_args, images, tmp_path):
    write_images(tmp_path / "val", per_class=2, seed=1)
    for file in (tmp_path / "val/blue").iterdir():
        file.unlink()
    (tmp_path / "val/blue").rmdir()
    args = make_args(dataset="torch/image_folder", data_dir=str(images), val_data_dir=str(tmp_path / "val"))
    train_set, val = open_train_and_val(args)
    assert isinstance(val.dataset, ImageFolder) and class_names(val) == class_names(train_set)
    val.transform = lambda image: image
    assert [val[index][1] for index in range(4)] == [1, 1, 2, 2]  # green and red
    (tmp_path / "map.txt").write_text("red\ngreen\nblue\n")
    args = changed(args, class_map=str(tmp_path / "map.txt"))
    own = {"channels": 3, "seed": 0, "batch_size": 4, "class_map": args.data.class_map}
    mapped = open_split(args.data, is_training=False, split="x", root=str(images / "validation"), **own)
    mapped.transform = lambda image: image
    assert class_names(mapped) == ["red", "green", "blue"] and [mapped[i][1] for i in (0, 8)] == [2, 0]
    (tmp_path / "map.txt").write_text("red\ngreen\n")
    with pytest.raises(UserError, match="has classes that are not in it: blue"):
        open_train_and_val(args)


@pytest.mark.skipif(not hasattr(signal, "SIGHUP"), reason="there is no such signal")
def test_a_closed_terminal_saves_unless_it_is_to_be_passed_over(make_args, tmp_path, monkeypatch):
    original = Training._after_update

    def hang_up(self):
        os.kill(os.getpid(), signal.SIGHUP)
        original(self)

    before = signal.signal(signal.SIGHUP, signal.SIG_DFL)  # the tests themselves may run under nohup
    try:
        with monkeypatch.context() as patch:
            patch.setattr(Training, "_after_update", hang_up)
            with pytest.raises(Interrupted, match=r"stopped by SIGHUP; saved .*recovery\.pth\.tar"):
                train(make_args())
        signal.signal(signal.SIGHUP, signal.SIG_IGN)  # as under nohup
        with StopSignals(CPU):
            assert signal.getsignal(signal.SIGHUP) == signal.SIG_IGN
    finally:
        signal.signal(signal.SIGHUP, before)


def signal_twice(done):
    with StopSignals(CPU) as stop:
        for _ in range(2):
            os.kill(os.getpid(), signal.SIGTERM)
        done.send(stop.received)


def test_a_second_signal_ends_a_run_at_once_but_no_job_of_a_comparison():
    """A scheduler sends one to all processes of a job, and the comparison one to its own."""
    receiver, sender = multiprocessing.Pipe(duplex=False)
    job = multiprocessing.get_context("fork").Process(target=signal_twice, args=(sender,))
    job.start()
    job.join(60)
    assert job.exitcode == 0 and receiver.poll() and receiver.recv() == signal.SIGTERM
    with pytest.raises(Interrupted):
        signal_twice(sender)


def test_a_signal_during_compilation_names_only_checkpoints_that_are_there(make_args, monkeypatch):
    def compile_workers_end(self, *_):
        self.stop.received = signal.SIGTERM
        raise RuntimeError("a compile worker has ended")

    monkeypatch.setattr(Training, "_forward_backward", compile_workers_end)
    with pytest.raises(Interrupted, match="There is no checkpoint yet"):
        train(make_args())


def test_a_read_only_file_system_is_named_and_not_the_clean_up(make_args, tmp_path, monkeypatch):
    from pathlib import Path

    from visionzoo.engine.checkpoints import write_atomically

    def read_only(*_, **__):
        raise OSError(30, "Read-only file system")

    for owner, name in ((os, "fsync"), (Path, "unlink")):
        monkeypatch.setattr(owner, name, read_only)
    with pytest.raises(UserError, match=r"cannot write .*x: Read-only file system"):
        write_atomically(tmp_path / "x", lambda file: file.write(b"1"))
