"""A run owns its folder from its first moment, and what others have written is neither replaced nor deleted."""

import os
import shutil
import signal
import time
from argparse import Namespace

import pytest
import torch
from engine.helpers import UPDATES, learned, rows

from visionzoo.engine import ownership
from visionzoo.engine.building import build_run
from visionzoo.engine.checkpoints import read_checkpoint
from visionzoo.engine.errors import UserError
from visionzoo.engine.ownership import Claim
from visionzoo.engine.parallel import Process
from visionzoo.engine.training import train

CPU = Process(torch.device("cpu"))


def content(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.fixture
def timms(trained, tmp_path):
    """A run folder as timm's script leaves it, of a model that is at 100 %."""
    folder = tmp_path / "timms"
    folder.mkdir()
    state = read_checkpoint(trained[0] / "last.pth.tar")
    state = {key: state[key] for key in ("epoch", "arch", "state_dict", "optimizer", "version", "metric")}
    for epoch in (1, 2, 3):
        state = {**state, "epoch": epoch, "metric": 100.0, "args": Namespace(model="zoo_biformer_t", opt="adamw")}
        torch.save(state, folder / f"checkpoint-{epoch}.pth.tar")
    for name in ("last", "model_best"):
        os.link(folder / "checkpoint-3.pth.tar", folder / f"{name}.pth.tar")
    (folder / "args.yaml").write_text("model: zoo_biformer_t\n")
    (folder / "summary.csv").write_text("epoch,eval_top1\n3,100.0\n")
    return folder


def test_a_run_of_timms_script_goes_on_in_a_folder_of_its_own(make_args, timms, tmp_path, monkeypatch, capsys):
    before = content(timms)
    monkeypatch.chdir(tmp_path)
    result = train(make_args(resume=str(timms / "last.pth.tar"), output="", experiment="", epochs=5))
    assert result["updates"] == 5 * UPDATES and [row["epoch"] for row in rows(tmp_path / result["folder"])] == ["4"]
    assert str(timms) not in result["folder"]
    assert f"continuing in {result['folder']}" in capsys.readouterr().out
    assert content(timms) == before


@pytest.mark.parametrize("resume", ["auto", "{folder}/last.pth.tar", ""])
def test_a_run_of_timms_script_is_not_written_over(make_args, timms, tmp_path, resume):
    before = content(timms)
    resume = resume.format(folder=timms)
    with pytest.raises(UserError, match=r"another (one: --resume|--experiment)|name another"):
        train(make_args(resume=resume, output=str(tmp_path), experiment="timms"))
    assert content(timms) == before


@pytest.mark.parametrize("name", ["args.yaml", "summary.csv", "curves.png", "checkpoint-3.pth.tar", "recovery.pth.tar"])
def test_files_of_others_are_not_replaced(make_args, tmp_path, name):
    folder = tmp_path / "output/run"
    folder.mkdir(parents=True)
    (folder / name).write_text("precious")
    (folder / "slurm-17.out").write_text("a log may be there")
    with pytest.raises(UserError, match="name another --experiment"):
        train(make_args())
    assert (folder / name).read_text() == "precious"
    (folder / name).unlink()
    train(make_args(max_steps=1))
    assert (folder / "slurm-17.out").read_text() == "a log may be there"


def test_a_run_is_not_continued_over_another_one(make_args, trained, tmp_path):
    train(make_args(experiment="first", max_steps=1))
    before = content(tmp_path / "output/first")
    with pytest.raises(UserError, match=r"first holds a run already"):
        train(make_args(experiment="first", resume=str(trained[0] / "last.pth.tar")))
    assert content(tmp_path / "output/first") == before


def test_a_start_that_failed_before_its_first_checkpoint_can_be_made_again(make_args, tmp_path):
    with pytest.raises(UserError, match="the loss is"):
        train(make_args(opt="sgd", lr=1e30))
    assert not (tmp_path / "output/run/last.pth.tar").exists()
    train(make_args(max_steps=1))


def test_to_go_back_to_an_earlier_checkpoint_takes_a_word(make_args, tmp_path):
    train(make_args(epochs=3, checkpoint_hist=3))
    folder = tmp_path / "output/run"
    before = content(folder)
    options = dict(resume=str(folder / "checkpoint-0.pth.tar"), epochs=3, checkpoint_hist=3)
    with pytest.raises(UserError, match=r"checkpoint-0\.pth\.tar is of epoch 0, and .*last\.pth\.tar of epoch 2"):
        train(make_args(output="", experiment="", **options))
    assert content(folder) == before
    train(make_args(experiment="branch", max_steps=UPDATES + 1, **options))
    assert content(folder) == before
    train(make_args(max_steps=UPDATES + 1, **options))  # the folder's name is given again
    assert read_checkpoint(folder / "last.pth.tar")["epoch"] == 1


def test_a_copied_checkpoint_alone_in_a_folder_is_gone_on_from(make_args, trained, tmp_path):
    (tmp_path / "copy").mkdir()
    shutil.copy(trained[0] / "last.pth.tar", tmp_path / "copy")
    options = dict(model_ema=True, model_ema_decay=0.5, epochs=7)
    result = train(make_args(resume=str(tmp_path / "copy/last.pth.tar"), output="", experiment="", **options))
    assert result["folder"] == str(tmp_path / "copy")


def test_a_ranking_by_another_metric_is_not_gone_on_with(make_args, tmp_path):
    train(make_args(max_steps=1))
    with pytest.raises(UserError, match=r"ranked by top1, this run would rank them by loss"):
        train(make_args(eval_metric="loss", resume="auto"))
    train(make_args(eval_metric="loss", resume=str(tmp_path / "output/run/last.pth.tar"), experiment="other"))
    assert learned(tmp_path / "output/other")["best"][1] < 5


def test_unreadable_checkpoints_stop_a_start_and_stay(make_args, tmp_path):
    train(make_args(max_steps=1))
    folder = tmp_path / "output/run"
    for path in folder.glob("*.pth.tar"):
        path.unlink()
    torch.save({"state_dict": {}, "metric": torch.zeros(1).numpy()[0]}, folder / "last.pth.tar")  # numpy's scalar
    before = content(folder)
    with pytest.raises(UserError, match=r"none of 1 checkpoint in .* can be read"):
        train(make_args(resume="auto"))
    assert content(folder) == before


def test_a_folder_belongs_to_one_run_at_a_time(make_args, tmp_path):
    first = build_run(make_args(experiment="one"), CPU)
    (tmp_path / "output/one/.last.pth.tar.7.tmp").write_bytes(b"is being written")
    before = content(tmp_path / "output/one")
    for change in ({}, {"resume": "auto"}):
        with pytest.raises(UserError, match="another run is at work in"):
            train(make_args(experiment="one", **change))
    assert content(tmp_path / "output/one") == before
    first.close()
    train(make_args(experiment="one", resume="auto", max_steps=1))


def test_starts_within_one_second_have_a_folder_each(make_args, monkeypatch):
    class Noon(ownership.datetime):
        @classmethod
        def now(cls):
            return cls(2026, 1, 1, 12)

    monkeypatch.setattr(ownership, "datetime", Noon)
    runs = [build_run(make_args(experiment=""), CPU) for _ in range(3)]
    names = [run.folder.name for run in runs]
    assert names == [f"20260101-120000-zoo_biformer_t-32{end}" for end in ("", "-1", "-2")]


def test_a_start_that_cannot_be_leaves_no_folder(make_args, trained, tmp_path):
    with pytest.raises(UserError, match="does not fit"):
        train(make_args(experiment="new", resume=str(trained[0] / "last.pth.tar"), layer_decay=0.7))
    assert not (tmp_path / "output/new").exists()


def test_a_file_system_without_locks_is_named(make_args, tmp_path, monkeypatch, capsys):
    def none(*_):
        raise OSError(9, "Bad file descriptor")

    monkeypatch.setattr(ownership.fcntl, "flock", none)
    train(make_args(max_steps=1))
    assert f"no locks are to be had in {tmp_path / 'output/run'}" in capsys.readouterr().out


@pytest.mark.skipif(not hasattr(os, "fork"), reason="there is no fork")
def test_a_claim_ends_with_its_process_and_not_with_its_children(tmp_path):
    reads, writes = os.pipe()
    process = os.fork()
    if process == 0:
        own = Claim(tmp_path)
        child = os.fork()  # as a loading process
        if child:
            os.write(writes, f"{child}\n".encode())
        time.sleep(60)
        os._exit(int(own.note == ""))
    child = int(os.read(reads, 20))
    try:
        with pytest.raises(UserError, match="another run is at work"):
            Claim(tmp_path)
        os.kill(process, signal.SIGKILL)
        os.waitpid(process, 0)
        Claim(tmp_path).release()
        assert not list(tmp_path.iterdir())
    finally:
        os.kill(child, signal.SIGKILL)
