"""tools/compare.py: every number is a run's own, what is done is kept, and what cannot work is said at once."""

import csv
import gc
import os
import signal

import pytest
import torch
from engine.helpers import TINY_FLAGS, rows, run_tool, write_splits

from visionzoo.benchmark import comparison
from visionzoo.benchmark.timing import Budget
from visionzoo.engine.run import Run
from visionzoo.engine.training import Training

POOL = "zoo_poolformer_s12 depths=[1,1] embed_dims=[8,16]"
LEVIT = "zoo_levit_128s depths=[1,1,1] embed_dims=[16,24,32] num_heads=[1,1,1] key_dim=8"
MARKS = "before\n<!-- tiny: written by tools/compare.py -->\nold\n<!-- end of tiny -->\nafter\n"


@pytest.fixture(autouse=True)
def short_clocks(monkeypatch):
    monkeypatch.setattr(comparison, "INFERENCE", Budget(warmup_ms=1, repeat_ms=1))
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def command(tmp_path):
    write_splits(tmp_path / "data")

    def run(*flags, models=(POOL, LEVIT)):
        output = ["--output", str(tmp_path / "out"), "--experiment", "tiny"]
        data = ["--data-dir", str(tmp_path / "data"), "--opt", "adamw", "--epochs", "2"]
        return run_tool("compare", *TINY_FLAGS, *data, *output, *(["--models", *models] if models else []), *flags)

    return run


def table(path):
    with path.open() as file:
        return list(csv.DictReader(file))


def folder_of(tmp_path, spec):
    return tmp_path / "out/tiny" / spec.replace(" ", ",")


def test_results_are_the_runs_and_come_as_csv_table_and_picture(command, tmp_path, capsys):
    document = tmp_path / "results.md"
    document.write_text(MARKS)
    assert command("--write", str(document)) == 0
    results = table(tmp_path / "out/tiny/results.csv")
    assert [row["model"] for row in results] == [POOL, LEVIT]
    for row in results:
        last = rows(folder_of(tmp_path, row["model"]))[-1]
        assert float(row["top1"]) == float(last["eval_top1"])
        assert float(row["train_images_per_second"]) == float(last["images_per_second"])
        assert float(row["loader_images_per_second"]) > 0 and float(row["inference_images_per_second"]) > 0
        assert (row["epochs"], row["device"], row["torch"]) == ("2", "cpu", torch.__version__)
        assert row["peak_memory_mib"] == ""  # nobody counts it on a CPU
    text = document.read_text()
    assert text.startswith("before\n") and text.endswith("<!-- end of tiny -->\nafter\n") and "old" not in text
    assert f"| `{POOL}` | 0.0 | {float(results[0]['top1']):.2f} |" in text
    assert "2 epochs from nothing for each, batch 4, float32; cpu, torch" in text and "](tiny.png)" in text
    assert table(tmp_path / "tiny.csv") == results
    assert (tmp_path / "tiny.png").stat().st_size > 10_000 < (tmp_path / "out/tiny/results.png").stat().st_size
    assert f"{LEVIT} (2 of 2)" in capsys.readouterr().out
    gc.collect()
    assert not [thing for thing in gc.get_objects() if type(thing) is Run]  # nothing stays for the next model


def test_probes_begin_where_their_model_ended_and_count_what_they_train(command, tmp_path):
    document = tmp_path / "results.md"
    document.write_text(MARKS)
    flags = ["--probes", "linear", "ep num_queries=2", "--probe-epochs", "1", "--write", str(document)]
    assert command(*flags, "--epochs", "1", models=[POOL]) == 0
    results = {row["model"]: row for row in table(tmp_path / "out/tiny/results.csv")}
    assert list(results) == [POOL, f"{POOL} + linear", f"{POOL} + ep num_queries=2"]
    own = {name: float(row["trained_m"]) * 1e6 for name, row in results.items()}
    assert own[f"{POOL} + linear"] == pytest.approx(16 * 3 + 3)
    assert own[f"{POOL} + ep num_queries=2"] == pytest.approx(2 * 16 + 16 * 16 + 16 * 3 + 3)
    folders = [folder_of(tmp_path, POOL), folder_of(tmp_path, f"{POOL},ep,num_queries=2")]
    before, after = (torch.load(f / "last.pth.tar", weights_only=True)["state_dict"] for f in folders)
    assert all(torch.equal(v, after[name]) for name, v in before.items() if not name.startswith("head."))
    text = document.read_text()
    assert "| Trained (M) |" in text and "then 1 of each probe on the frozen features of that very model" in text


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--probes", "lineer"], "--probes: expected some of linear, attentive, ep, got 'lineer'; did you mean linear"),
        (["--probes", "ep", "ep"], "each once, got"),
        (["--probes", "ep num_queries=3"], "num_queries must divide the 16 channels"),
        (["--probes", "linear norm=False"], "--probe linear has none"),
        (["--probe", "ep"], "a comparison takes probes and their options by --probes"),
    ],
)
def test_wrong_probes_are_said_before_anything_is_trained(command, tmp_path, capsys, flags, message):
    assert command(*flags, models=[POOL]) == 1
    assert message in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_a_stopped_comparison_goes_on_where_it_was(command, tmp_path, monkeypatch, capsys):
    assert command("--experiment", "straight") == 0
    step = Training._forward_backward

    def stop_in_the_second(self, *args):
        step(self, *args)
        if self.run.args.model.startswith("zoo_levit") and self.run.update == 4:  # of 6
            os.kill(os.getpid(), signal.SIGTERM)

    with monkeypatch.context() as patch:
        patch.setattr(Training, "_forward_backward", stop_in_the_second)
        assert command() == 128 + signal.SIGTERM
    assert "what is done is kept; start the same command again to go on" in capsys.readouterr().err
    assert [row["model"] for row in table(tmp_path / "out/tiny/results.csv")] == [POOL]
    with monkeypatch.context() as patch:
        fit = Training.fit
        trained = []
        patch.setattr(Training, "fit", lambda self: trained.append((self.run.args.model, self.run.update)) or fit(self))
        assert command() == 0
    assert trained == [("zoo_levit_128s", 5)]
    assert f"{POOL} (1 of 2): done before" in capsys.readouterr().out
    straight, stopped = (table(tmp_path / "out" / name / "results.csv") for name in ("straight", "tiny"))
    assert [row["top1"] for row in straight] == [row["top1"] for row in stopped]


def test_a_model_that_was_trained_but_not_measured_is_only_measured(command, tmp_path, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(comparison, "_inference_rate", lambda *_: 1 / 0)
        assert command(models=[POOL]) == 1
    with monkeypatch.context() as patch:
        patch.setattr(Training, "_forward_backward", lambda *_: pytest.fail("trained again"))
        assert command(models=[POOL]) == 0
    (row,) = table(tmp_path / "out/tiny/results.csv")
    assert float(row["top1"]) == float(rows(folder_of(tmp_path, POOL))[-1]["eval_top1"])


def test_a_model_may_be_added_but_the_recipe_stays(command, tmp_path, capsys):
    assert command(models=[POOL]) == 0
    assert command("--lr", "1e-2", models=[POOL, LEVIT]) == 1
    assert "holds a comparison with lr 0.001 instead of 0.01; name another --experiment" in capsys.readouterr().err
    assert command(models=[LEVIT]) == 0
    assert len(table(tmp_path / "out/tiny/results.csv")) == 2


@pytest.mark.parametrize(
    ("models", "flags", "message"),
    [
        ([], [], "--models: expected names, each once, got []"),
        ([POOL, POOL], [], "--models: expected names, each once"),
        (["zoo_poolformer_s12", "zoo_levit_x"], [], "unknown model 'zoo_levit_x'; did you mean zoo_levit"),
        (["zoo_levit_128s deps=1"], [], "does not take --model-kwargs {'deps': 1}"),
        (["zoo_levit_128s depths"], [], "--models 'zoo_levit_128s depths': expected key=value, got 'depths'"),
        ([POOL], ["--val-split", ""], "a comparison is not distributed and validates"),
        ([POOL], ["--write", "nowhere.md"], "--write nowhere.md: "),
        ([POOL], ["--write", "README.md"], "--write README.md: expected the lines '<!-- tiny: written by"),
    ],
)
def test_what_cannot_work_is_said_before_the_first_step(command, tmp_path, capsys, models, flags, message):
    assert command(*flags, models=models) == 1
    assert message in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_peak_memory_is_each_models_own(command, tmp_path):
    wide = POOL.replace("[8,16]", "[512,1024]")
    assert command("--device", "cuda", models=[wide, POOL]) == 0
    first, second = (float(row["peak_memory_mib"]) for row in table(tmp_path / "out/tiny/results.csv"))
    assert first > 2 * second > 0
