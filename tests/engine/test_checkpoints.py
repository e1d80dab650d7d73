import errno
import os

import pytest
import torch
from engine.helpers import truncate, write_pickle_that_runs

from visionzoo.engine.checkpoints import CheckpointFolder, new_folder, read_checkpoint, write_atomically
from visionzoo.engine.errors import UserError


def state(epoch, batches_done=4):
    return {"epoch": epoch, "batches_done": batches_done, "state_dict": {"weight": torch.full((1000,), float(epoch))}}


def folder_with(path, metrics, **options):
    folder = CheckpointFolder(path, **{"keep": 2, "lower_is_better": False, **options})
    for epoch, metric in enumerate(metrics):
        folder.save(state(epoch), epoch, metric)
    return folder


def names(path):
    return sorted(file.name for file in path.iterdir())


def epoch_of(path):
    return read_checkpoint(path)["epoch"]


def test_last_best_and_the_best_few_are_kept(tmp_path):
    folder_with(tmp_path, [50.0, 80.0, 70.0, 60.0])
    assert names(tmp_path) == ["checkpoint-1.pth.tar", "checkpoint-2.pth.tar", "last.pth.tar", "model_best.pth.tar"]
    assert epoch_of(tmp_path / "last.pth.tar") == 3
    assert epoch_of(tmp_path / "model_best.pth.tar") == 1


def test_a_loss_is_better_when_lower(tmp_path):
    folder = folder_with(tmp_path, [0.5, 0.2, 0.9], lower_is_better=True)
    assert folder.best == (1, 0.2)
    assert epoch_of(tmp_path / "model_best.pth.tar") == 1


def test_the_ranking_goes_on_after_a_restart(tmp_path):
    folder_with(tmp_path, [50.0, 80.0])
    folder = CheckpointFolder(tmp_path, keep=2, lower_is_better=False)
    folder.continue_from(tmp_path / "last.pth.tar", read_checkpoint(tmp_path / "last.pth.tar"))
    folder.save(state(2), 2, 60.0)
    assert folder.best == (1, 80.0)
    assert names(tmp_path) == ["checkpoint-1.pth.tar", "checkpoint-2.pth.tar", "last.pth.tar", "model_best.pth.tar"]


def test_a_recovery_goes_when_the_epoch_is_saved(tmp_path):
    folder = folder_with(tmp_path, [50.0])
    folder.save_recovery(state(1, 2))
    assert folder.newest(pytest.fail)[0].name == "recovery.pth.tar"
    folder.save(state(1), 1, 60.0)
    assert "recovery.pth.tar" not in names(tmp_path)


def test_an_older_recovery_is_not_the_newest(tmp_path):
    folder = folder_with(tmp_path, [50.0, 60.0])
    folder.save_recovery(state(1, 2))  # as if the run had been killed before it was removed
    assert folder.newest(pytest.fail)[0].name == "last.pth.tar"


def test_the_newest_sound_one_is_found_and_damaged_ones_are_named(tmp_path):
    folder = folder_with(tmp_path, [50.0, 60.0, 70.0])
    truncate(tmp_path / "last.pth.tar")  # a second name of checkpoint-2 and model_best
    said = []
    path, found = folder.newest(said.append)
    assert (path.name, found["epoch"]) == ("checkpoint-1.pth.tar", 1)
    assert [text.split(" ")[0] for text in said] == [
        str(tmp_path / n) for n in ("last.pth.tar", "checkpoint-2.pth.tar")
    ]
    before = {file.name: file.read_bytes() for file in tmp_path.iterdir()}
    kept = folder.continue_from(path, found)
    assert [file.name for file in kept] == ["last.pth.tar.unreadable", "checkpoint-2.pth.tar.unreadable"]
    assert [file.read_bytes() for file in kept] == [before["last.pth.tar"], before["checkpoint-2.pth.tar"]]


def test_checkpoints_that_cannot_be_read_are_not_absent(tmp_path):
    folder = folder_with(tmp_path, [50.0, 60.0])
    before = names(tmp_path)
    for file in tmp_path.iterdir():
        truncate(file, 0.1)
    with pytest.raises(UserError, match=r"none of 4 checkpoints in .* can be read.*last\.pth\.tar"):
        folder.newest(pytest.fail)
    assert names(tmp_path) == before


def test_an_empty_folder_has_no_newest_and_leftovers_of_checkpoints_alone_are_cleared(tmp_path):
    (tmp_path / ".last.pth.tar.123.tmp").write_bytes(b"half")
    (tmp_path / ".checkpoint-12.pth.tar.7.tmp").write_bytes(b"half")
    (tmp_path / ".environment.yaml.7.tmp").write_bytes(b"half")
    (tmp_path / ".eval-last.json.123.tmp").write_bytes(b"of another command")
    (tmp_path / ".notes.tmp").write_bytes(b"of an editor")
    folder = CheckpointFolder(tmp_path, keep=1, lower_is_better=False)
    assert folder.newest(pytest.fail) is None
    folder.clear_leftovers()
    assert names(tmp_path) == [".eval-last.json.123.tmp", ".notes.tmp"]


def flip_a_bit(path):
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


@pytest.mark.parametrize(
    "damage",
    [truncate, flip_a_bit, lambda p: p.write_bytes(b""), lambda p: p.write_text("hello"), lambda p: truncate(p, 0.999)],
    ids=["half", "bit", "empty", "text", "tail"],
)
def test_a_damaged_checkpoint_is_named(tmp_path, damage):
    path = tmp_path / "last.pth.tar"
    torch.save(state(0), path)
    damage(path)
    with pytest.raises(UserError, match=r"last\.pth\.tar.*damaged"):
        read_checkpoint(path)


def test_a_missing_file_and_a_bare_tensor_are_refused(tmp_path):
    with pytest.raises(UserError, match="no checkpoint at"):
        read_checkpoint(tmp_path / "nothing.pth")
    torch.save(torch.zeros(3), tmp_path / "tensor.pth")
    with pytest.raises(UserError, match="holds a Tensor"):
        read_checkpoint(tmp_path / "tensor.pth")


def test_a_pickle_that_runs_code_is_refused_unrun(tmp_path):
    path, witness = tmp_path / "evil.pth.tar", tmp_path / "witness"
    write_pickle_that_runs(path, witness)
    with pytest.raises(UserError, match=r"evil\.pth\.tar is refused"):
        read_checkpoint(path)
    assert not witness.exists()


def full_disk(*_):
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def test_a_full_disk_leaves_what_was_there(tmp_path, monkeypatch):
    folder = folder_with(tmp_path, [50.0])
    before = names(tmp_path)
    monkeypatch.setattr(os, "fsync", full_disk)
    with pytest.raises(UserError, match=r"cannot write .*last\.pth\.tar: No space left on device"):
        folder.save(state(1), 1, 90.0)
    assert names(tmp_path) == before
    assert epoch_of(tmp_path / "last.pth.tar") == epoch_of(tmp_path / "model_best.pth.tar") == 0


def test_a_disk_that_fills_while_torch_writes_is_said_plainly(tmp_path):
    class Full:
        def write(self, data):
            full_disk()

    with pytest.raises(UserError, match="No space left on device"):
        write_atomically(tmp_path / "x", lambda file: torch.save(state(0), Full()))
    assert names(tmp_path) == []


def test_other_errors_of_a_writer_are_not_called_a_disk_problem(tmp_path):
    def fail(file):
        raise RuntimeError("a bug")

    with pytest.raises(RuntimeError, match="a bug"):
        write_atomically(tmp_path / "x", fail)
    assert names(tmp_path) == []


def test_a_file_system_without_hard_links_gets_copies(tmp_path, monkeypatch):
    monkeypatch.setattr(os, "link", full_disk)
    folder_with(tmp_path, [50.0, 40.0])
    assert epoch_of(tmp_path / "model_best.pth.tar") == 0
    assert epoch_of(tmp_path / "checkpoint-1.pth.tar") == 1


def test_files_are_as_readable_as_any_other(tmp_path):
    write_atomically(tmp_path / "a", lambda file: file.write(b"x"))
    (tmp_path / "b").write_bytes(b"x")
    assert (tmp_path / "a").stat().st_mode == (tmp_path / "b").stat().st_mode


def test_a_folder_that_stays_empty_after_an_error_is_gone_again(tmp_path):
    def fail(path, written=()):
        with pytest.raises(ZeroDivisionError), new_folder(path):
            (path / "empty").mkdir()
            for name in written:
                (path / name).touch()
            raise ZeroDivisionError

    fail(tmp_path / "a/b")
    assert names(tmp_path) == []
    fail(tmp_path / "a/b", ["kept"])
    assert names(tmp_path / "a/b") == ["kept"]
    (tmp_path / "own").mkdir()
    fail(tmp_path / "own")
    assert names(tmp_path) == ["a", "own"]  # it was there before
    with new_folder(tmp_path / "fine/new"):
        pass
    assert (tmp_path / "fine/new").is_dir()
