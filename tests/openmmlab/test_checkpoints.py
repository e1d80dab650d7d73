"""No checkpoint runs code on mmengine's way either, and mmengine's own are read all the same."""

import io

import numpy as np
import pytest
import torch
from engine.helpers import ROOT, run_tool, write_pickle_that_runs

pytest.importorskip("mmdet", reason='needs pip install "visionzoo[openmmlab]"')

from mmdet.visualization import DetLocalVisualizer
from mmengine.logging import HistoryBuffer
from mmengine.runner import CheckpointLoader, load_checkpoint
from mmengine.runner.checkpoint import load_from_http

from visionzoo.engine.errors import UserError
from visionzoo.models._checkpoint import read_checkpoint
from visionzoo.openmmlab import checkpoints

DETECTION = str(ROOT / "configs/detection/mask-rcnn_zoo-biformer_fpn_digits.py")


def mmengines(path):
    """Write what mmengine's Runner writes beside the weights."""
    history = HistoryBuffer()
    for value in (3.0, 1.0, 2.0):
        history.update(value)
    logs = {"log_scalars": {"train/loss": history}, "runtime_info": {"lr": np.float64(0.1), "mask": np.ones(2, bool)}}
    torch.save({"meta": {"epoch": 1}, "state_dict": {"weight": torch.ones(2, 2)}, "message_hub": logs}, path)


def test_mmengines_own_checkpoints_are_read_with_their_logs(tmp_path, caplog):
    mmengines(tmp_path / "epoch_1.pth")
    found = CheckpointLoader.load_checkpoint(str(tmp_path / "epoch_1.pth"))
    history = found["message_hub"]["log_scalars"]["train/loss"]
    assert (history.min(), history.mean(), history.statistics("max")) == (1.0, 2.0, 3.0)
    assert found["message_hub"]["runtime_info"]["lr"] == 0.1
    model = torch.nn.Linear(2, 2, bias=False)
    load_checkpoint(model, str(tmp_path / "epoch_1.pth"))
    assert torch.equal(model.weight, torch.ones(2, 2))
    assert "Falling back" not in caplog.text


def test_without_their_config_they_are_named(tmp_path):
    mmengines(tmp_path / "epoch_1.pth")
    with pytest.raises(ValueError, match=r"epoch_1\.pth is refused: .*logs of OpenMMLab's\. .* name its config"):
        read_checkpoint(tmp_path / "epoch_1.pth")


def test_a_pickle_that_runs_code_is_refused_by_name_everywhere(tmp_path):
    path, witness = tmp_path / "evil.pth", tmp_path / "witness"
    write_pickle_that_runs(path, witness)
    with pytest.raises(UserError, match=r"evil\.pth is refused: .*mkdir"):
        load_checkpoint(torch.nn.Linear(2, 2), str(path))
    with pytest.raises(UserError, match="refused"), path.open("rb") as file:
        checkpoints.read(io.BytesIO(file.read()))
    (tmp_path / "hub").mkdir()
    (tmp_path / "hub/evil.pth").write_bytes(path.read_bytes())  # as if it had been downloaded
    with pytest.raises(UserError, match=r"https://x\.org/evil\.pth is refused"):
        load_from_http("https://x.org/evil.pth", model_dir=str(tmp_path / "hub"))
    assert not witness.exists()


@pytest.mark.parametrize("tool", ["eval", "predict", "train"])
def test_the_commands_refuse_it_in_one_message(tmp_path, tool, capsys, monkeypatch):
    monkeypatch.setenv("VISIONZOO_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr("visionzoo.data.scenes.COUNTS", {"train": 4, "validation": 2})
    path, witness = tmp_path / "evil.pth", tmp_path / "witness"
    write_pickle_that_runs(path, witness)
    flags = {
        "eval": ["--checkpoint", str(path), "--work-dir", str(tmp_path / "w")],
        "predict": [str(next((ROOT / "docs").rglob("*.png"))), "--checkpoint", str(path)],
        "train": ["--resume", str(path), "--work-dir", str(tmp_path / "w")],
    }[tool]
    assert run_tool(tool, DETECTION, *flags) == 1
    said = capsys.readouterr().err
    DetLocalVisualizer._instance_dict.clear()  # a Runner's logs would go where this one's went
    assert f"error: {path} is refused" in said and "Traceback" not in said
    assert not witness.exists()


@pytest.mark.parametrize(("owner", "name"), [(HistoryBuffer, "__init__"), (np.ndarray, "tofile")])
def test_getattr_reaches_the_statistics_of_logs_alone(tmp_path, owner, name):
    class Reach:
        def __reduce__(self):
            return getattr, (owner, name)

    torch.save({"state_dict": {}, "x": Reach()}, tmp_path / "x.pth")
    with pytest.raises(UserError, match=r"x\.pth is refused: .*getattr"):
        CheckpointLoader.load_checkpoint(str(tmp_path / "x.pth"))
