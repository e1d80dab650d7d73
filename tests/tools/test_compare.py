"""tools/compare.py: every number is a run's own, what is done is kept, and what cannot work is said at once."""

import csv
import gc
import math
import os
import re
import shlex
import signal
import statistics
import sys
import time

import pytest
import torch
import yaml
from engine.helpers import TINY_FLAGS, rows, run_tool, write_splits
from matplotlib.figure import Figure
from PIL import Image

from visionzoo.benchmark import comparison, comparison_report, growth, jobs, speeds
from visionzoo.benchmark.comparison_report import place_labels
from visionzoo.benchmark.timing import Budget
from visionzoo.engine.errors import UserError
from visionzoo.engine.flags import compare_parser
from visionzoo.engine.options import changed
from visionzoo.engine.ownership import Claim
from visionzoo.engine.run import Run
from visionzoo.engine.training import Training
from visionzoo.layers.mixers import ScoreMixer

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
    assert f"| `{POOL}` | {float(results[0]['params_m']):.2g} | {float(results[0]['top1']):.2f} |" in text
    assert "2 epochs from random weights for each, batch 4, float32; cpu, torch" in text and "](tiny.png)" in text
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


def test_variants_are_each_model_under_other_flags(command, tmp_path, capsys):
    variants = ["--variants", "plain", "relaxed relaxed_attention=0.2 drop_path=0.1"]
    few = ["--epochs", "1", *variants]
    model = f"{POOL} mixers='full'"
    assert command(*few, models=[model]) == 0
    results = {row["model"]: row for row in table(tmp_path / "out/tiny/results.csv")}
    assert list(results) == [f"{model} plain", f"{model} relaxed"]
    given = [yaml.safe_load((folder_of(tmp_path, name) / "args.yaml").read_text()) for name in results]
    assert [args["relaxed_attention"] for args in given] == [0.0, 0.2]
    assert {key for key in given[0] if given[0][key] != given[1][key]} == {
        *("relaxed_attention", "drop_path", "experiment")
    }
    shown = capsys.readouterr().out
    assert f"Variants of `{model}`:" in shown and "| `plain` |" in shown and "| `relaxed` |" in shown
    assert command("--epochs", "1", "--variants", "plain", "relaxed relaxed_attention=0.3", models=[model]) == 1
    assert "give it another label" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--variants", "a", "a"], "--variants: 'a' is there twice"),
        (["--variants", "a relaxed=1"], "--variants a: unknown key 'relaxed'"),
        (["--variants", "a relaxed_attention=2"], "--variants a: relaxed_attention: expected a number at least 0"),
        (["--variants", "a output=x"], "--variants a: output is of the whole comparison; leave it out"),
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
        if self.run.config.model.model.startswith("zoo_levit") and self.run.update == 4:  # of 6
            os.kill(os.getpid(), signal.SIGTERM)

    with monkeypatch.context() as patch:
        patch.setattr(Training, "_forward_backward", stop_in_the_second)
        assert command() == 128 + signal.SIGTERM
    assert "what is done is kept; start the same command again to continue" in capsys.readouterr().err
    assert [row["model"] for row in table(tmp_path / "out/tiny/results.csv")] == [POOL]
    with monkeypatch.context() as patch:
        fit = Training.fit
        trained = []
        patch.setattr(
            Training, "fit", lambda self: trained.append((self.run.config.model.model, self.run.update)) or fit(self)
        )
        assert command() == 0
    assert trained == [("zoo_levit_128s", 5)]
    assert f"{POOL} (1 of 2): done before" in capsys.readouterr().out
    straight, stopped = (table(tmp_path / "out" / name / "results.csv") for name in ("straight", "tiny"))
    assert [row["top1"] for row in straight] == [row["top1"] for row in stopped]


def test_a_model_that_was_trained_but_not_measured_is_only_measured(command, tmp_path, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(comparison, "inference_rate", lambda *_: 1 / 0)
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
    claimed = Claim(tmp_path / "out/tiny")
    assert command(models=[POOL, LEVIT]) == 1
    assert "another run is at work in" in capsys.readouterr().err
    assert command("--report", models=[POOL, LEVIT]) == 0  # reads only
    claimed.release()


@pytest.fixture
def done(tmp_path):
    """The folder of a comparison, with the row of a run of `POOL`."""
    folder = tmp_path / "out/tiny"
    folder.mkdir(parents=True)
    values = {"host": "", "mixer": "", "params_m": 1.0, "top1": 50.0, "epochs": 2, "device": "cpu", "torch": "2"}
    row = {"model": POOL, "seed": 42, "spec": POOL, "status": "ok", "reason": "", **values, "timm": "1", "python": "3"}
    comparison.write_rows([row], folder / "results.csv")
    return folder


@pytest.mark.parametrize(
    ("name", "damage", "message"),
    [
        ("results.csv", lambda b: b[:-3], "results.csv is cut off in line 2; fix the line, or remove it"),
        ("results.csv", lambda b: b.replace(b"42,", b"", 1), "results.csv, line 2: expected 14 cells, got 13"),
        ("results.csv", lambda b: b.replace(b",42,", b",x,", 1), "expected a model and its seed"),
        ("results.csv", lambda b: b"\xff" + b, "results.csv: 'utf-8' codec can't decode"),
        ("results.csv", lambda b: b.replace(b"model", b"name", 1), "expected a model and its seed"),
        ("results.csv", lambda b: b.replace(b"50,", b"half,"), "line 2: top1 must be a number, got 'half'; fix"),
        ("results.csv", lambda b: b.replace(b"top1", b"best"), "results.csv, line 2: nothing for top1; fix the line"),
        ("results.csv", lambda b: b.replace(b",ok,", b",fine,"), "status must be ok or failed, got 'fine'"),
        ("results.csv", lambda b: b.replace(b"cpu", b'"cpu'), "results.csv: unexpected end of data"),
        ("results.csv", lambda b: b + b.split(b"\r\n")[1] + b"\r\n", "results.csv has two rows of zoo_poolformer_s12"),
        ("results.csv", lambda b: b.replace(POOL.encode() + b'",ok', b'other",ok'), "was done with other, and now is"),
        ("recipe.yaml", lambda b: b"a: [", "cannot read"),
        ("recipe.yaml", lambda b: b"", "recipe.yaml: expected a mapping of flags to values, got None"),
    ],
    ids=["cut", "cell", "seed", "utf8", "key", "number", "column", "state", "quote", "twice", "spec", "yaml", "none"],
)
def test_damaged_results_are_neither_reported_nor_replaced(command, done, capsys, name, damage, message):
    path = done / name
    damaged = damage(path.read_bytes() if path.exists() else b"")
    path.write_bytes(damaged)
    assert command("--report", models=[POOL]) == 1
    assert message in capsys.readouterr().err
    assert path.read_bytes() == damaged


def test_results_that_a_spreadsheet_has_saved_are_read(command, done, capsys):
    path = done / "results.csv"
    path.write_bytes(b"\xef\xbb\xbf" + path.read_bytes())
    assert command("--report", models=[POOL, LEVIT]) == 0
    out = capsys.readouterr().out
    assert "50.00" in out and "not done yet: 1 of 2 runs; start the command without --report to do them" in out


def test_wrong_data_are_found_before_the_first_run_and_leave_nothing(command, tmp_path, capsys):
    assert command("--data-dir", "nowhere", models=[POOL]) == 1
    assert "error: no data at nowhere" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_the_recipe_of_a_start_that_did_nothing_binds_no_later_one(command, done, capsys):
    (done / "recipe.yaml").write_text("lr: 5.0\n")
    assert command("--report", models=[POOL]) == 1
    assert "holds a comparison with lr 5.0" in capsys.readouterr().err
    (done / "results.csv").unlink()
    (done / "run").mkdir()
    (done / "run/last.pth.tar").touch()
    assert command("--report", models=[POOL]) == 1
    assert "holds a comparison with lr 5.0" in capsys.readouterr().err
    (done / "run/last.pth.tar").unlink()
    assert command("--report", models=[POOL]) == 1
    assert "none of 1 run is done" in capsys.readouterr().err


def test_the_model_of_a_training_is_stated_to_be_left_out(command, capsys):
    assert command("--report", "--model", LEVIT, models=[POOL]) == 1
    assert f"without effect: --model {LEVIT} (the models are those of --models, or of " in capsys.readouterr().out


def test_a_report_has_the_speeds_of_the_models_as_they_are(command, done, capsys):
    speed = {"model": POOL, "status": "ok", "train_images_per_second": 1234.0, "inference_images_per_second": 5.0}
    for spec, shown in ((POOL, True), (f"{POOL} x=1", False)):
        comparison.write_rows([{**speed, "spec": spec}], done / "speeds.csv")
        assert command("--report", models=[POOL]) == 0
        assert ("1,234" in capsys.readouterr().out) is shown


@pytest.mark.parametrize(
    ("models", "flags", "message"),
    [
        ([], [], "nothing to compare: give --models NAME ..., or --hosts and --mixers"),
        ([POOL, POOL], [], "--models: expected names, each once"),
        (["zoo_poolformer_s12", "zoo_levit_x"], [], "unknown model 'zoo_levit_x'; did you mean zoo_levit"),
        (["zoo_levit_128s deps=1"], [], "does not take --model-kwargs {'deps': 1}"),
        (["zoo_levit_128s depths"], [], "--models 'zoo_levit_128s depths': expected key=value, got 'depths'"),
        ([POOL], ["--val-split", ""], "a comparison is not distributed and validates"),
        ([POOL], ["--write", "nowhere.md"], "--write nowhere.md: No such file or directory; give a page"),
        ([POOL], ["--cuda-graphs", "--device", "cpu"], "a CUDA device can be recorded, this is cpu; leave it out"),
        ([POOL], ["--torchcompile", "nope"], "--torchcompile: expected one of"),
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


# -- mixers in hosts ---------------------------------------------------------------------------------------------------

HOST = "zoo_poolformer_s12 depths=[1,1] embed_dims=[8,16] label=pyramid"
PLAIN = "{type: zoo_deit_t, depth: 1, embed_dim: 16, num_heads: 2, patch_size: 8, img_size: 32, label: plain}"
MIXERS = ["own", "{type: score, normalizer: sigmoid, label: sigmoid}"]


def learns_in_a_fork():
    """Say whether a forked process can train: not after autograd has started threads in this one."""
    if (pid := os.fork()) == 0:
        try:
            torch.ones(1, requires_grad=True).sum().backward()
        except RuntimeError:
            os._exit(1)
        os._exit(0)
    return os.waitpid(pid, 0)[1] == 0


@pytest.fixture
def mixers(command, monkeypatch):
    monkeypatch.setattr(speeds, "SPEED", Budget(warmup_ms=1, repeat_ms=1))
    monkeypatch.setattr(growth, "TIMES", Budget(warmup_ms=1, repeat_ms=1))
    if learns_in_a_fork():
        monkeypatch.setattr(jobs, "START", "fork")  # imports are done then; torch runs in one thread here
    draw = comparison.draw
    monkeypatch.setattr(comparison, "draw", lambda rows, path: "--write" in sys.argv and draw(rows, path))

    def run(*flags, hosts=(HOST,), mixers=MIXERS, seeds=("0",)):
        asked = ["--hosts", *hosts, "--mixers", *mixers, "--growth-tokens", "4", "64", "--growth-dim", "8"]
        return command(*asked, "--seeds", *seeds, "--epochs", "1", *flags, models=())

    return run


@pytest.mark.parametrize(
    ("hosts", "seeds"), [((HOST,), "01"), pytest.param((HOST, PLAIN), "012", marks=pytest.mark.full)]
)
def test_mixers_in_hosts_with_seeds_each_in_a_process(mixers, tmp_path, capsys, hosts, seeds):
    document = tmp_path / "mixers.md"
    document.write_text(MARKS)
    assert mixers("--jobs", "2", "--write", str(document), hosts=hosts, seeds=seeds) == 0
    folder = tmp_path / "out/tiny"
    results = table(folder / "results.csv")
    models = ["pyramid/own", "pyramid/sigmoid", "plain/own", "plain/sigmoid"][: 2 * len(hosts)]
    assert {(row["model"], row["seed"]) for row in results} == {(model, seed) for model in models for seed in seeds}
    for row in results:
        run = folder / f"{row['model'].replace('/', ',')},seed={row['seed']}"
        assert float(row["top1"]) == float(rows(run)[-1]["eval_top1"]) and f"seed: {row['seed']}\n" in (
            (run / "args.yaml").read_text()
        )
        assert ("sigmoid" in (run / "args.yaml").read_text()) == (row["mixer"] == "sigmoid")
        assert not (run / "curves.png").exists()
    speeds = table(folder / "speeds.csv")
    assert {row["model"] for row in speeds} == set(models)
    assert all(float(row["train_images_per_second"]) > 0 < float(row["inference_images_per_second"]) for row in speeds)
    (grown,) = table(folder / "growth.csv")
    assert grown["mixer"] == "sigmoid" and {"ms_4", "ms_16", "ms_64"} <= set(grown) and grown["stops"] == ""
    assert math.isfinite(float(grown["time_exponent"]))
    text = document.read_text()
    own = [float(row["top1"]) for row in results if row["model"] == "pyramid/sigmoid"]
    cell = f"{statistics.mean(own):.2f} ± {statistics.stdev(own):.2f}"
    assert re.search(rf"\| `sigmoid` \| 0\.0\d+ \| {re.escape(cell)} \|", text.split("`plain`")[0])
    assert "Mixers in `pyramid`" in text and f"of {len(seeds)} seeds (mean ± standard deviation)" in text
    assert [row["model"] for row in table(tmp_path / "tiny_models.csv")] == models
    assert (folder / "logs/pyramid,own-0.txt").read_text()
    runs = len(models) * len(seeds)
    assert f"{models[-1]} ({runs} of {runs}), seed {seeds[-1]}: done" in capsys.readouterr().out
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(comparison, "run_tasks", lambda *_, **__: pytest.fail("done again"))
        assert mixers("--jobs", "3", hosts=hosts, seeds=seeds) == 0
        for name in ("speeds.csv", "growth.csv"):
            (folder / name).unlink()
        assert mixers("--jobs", "3", "--report", "--write", str(document), hosts=hosts, seeds=[*seeds, "9"]) == 0
    text = document.read_text()
    assert f"not done yet: {len(models)} of {len(models) * (len(seeds) + 1)} runs" in text
    assert "Speeds and growth are not measured yet." in text and cell in text and ".png" not in text


def test_what_a_user_can_fix_has_no_traceback(tmp_path, capsys):
    def refuse(_):
        raise UserError("give a smaller batch")

    found = []
    jobs.run_tasks({"a": (refuse, None)}, lambda *result: found.append(result), jobs=None, logs=tmp_path)
    assert found == [("a", jobs.Failure("give a smaller batch"))]
    assert capsys.readouterr().err == ""


def test_a_run_that_fails_or_dies_is_written_down_and_tried_again(mixers, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(jobs, "START", "fork")  # which has what is patched here
    forward = ScoreMixer.forward

    def fail(self, x):
        if self.training:
            if os.getpid() != parent:
                os._exit(3)
            raise RuntimeError("no such\nkernel")
        return forward(self, x)

    parent = os.getpid()
    for flags, reason in (
        ([], "RuntimeError: no such kernel"),
        (["--jobs", "1"], "its process ended with exit code 3 and no message"),
    ):
        with monkeypatch.context() as patch:
            patch.setattr(ScoreMixer, "forward", fail)
            assert mixers(*flags) == 1
        assert reason in capsys.readouterr().err
        results = {row["model"]: row for row in table(tmp_path / "out/tiny/results.csv")}
        assert results["pyramid/own"]["status"] == "ok" and results["pyramid/sigmoid"]["status"] == "failed"
        assert results["pyramid/sigmoid"]["reason"] == reason
    assert mixers() == 0
    assert [row["status"] for row in table(tmp_path / "out/tiny/results.csv")] == ["ok", "ok"]


def test_a_signal_ends_the_processes_and_they_save(mixers, tmp_path, monkeypatch, capsys):
    step = Training._forward_backward
    parent = os.getpid()

    def tell(self, *args):
        step(self, *args)
        if "sigmoid" in str(self.run.config.model.model_kwargs) and self.run.update == 1:
            os.kill(parent, signal.SIGTERM)
            time.sleep(0.3)

    with monkeypatch.context() as patch:
        patch.setattr(Training, "_forward_backward", tell)
        assert mixers("--jobs", "1", mixers=MIXERS[1:]) == 128 + signal.SIGTERM
    assert "start the same command again to continue" in capsys.readouterr().err
    assert (tmp_path / "out/tiny/pyramid,sigmoid,seed=0/recovery.pth.tar").exists()
    assert mixers("--jobs", "1", mixers=MIXERS[1:]) == 0
    assert "continuing from" in (tmp_path / "out/tiny/logs/pyramid,sigmoid-0.txt").read_text()


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"mixers": ["sigmoyd"]}, "unknown mixer 'sigmoyd'"),
        ({"mixers": ["windw"]}, "unknown mixer 'windw'; did you mean window"),
        ({"mixers": ["own", "window window_siz=3"]}, "window_siz=3 (did you mean 'window_size'?)"),
        (
            {"mixers": ["halo block_size=0", "pool pool_size=2 label=even"]},
            "pyramid/even: cannot build zoo_poolformer_s12",
        ),
        ({"mixers": ["own", "own"]}, "--mixers: 'own' is there twice; give each its label=NAME"),
        ({"mixers": ["{type: [}"]}, "--mixers: '{type: [}' is not a mapping"),
        ({"mixers": ["{label: x}"]}, "--mixers: expected 'NAME KEY=VALUE ...' or '{type: NAME, KEY: VALUE}'"),
        ({"mixers": ["own label=a/b"]}, "expected a label without spaces and slashes, got 'a/b'"),
        ({"hosts": ["zoo_poolformer_x"]}, "unknown model 'zoo_poolformer_x'; did you mean"),
        ({"hosts": ["test_resnet"], "mixers": ["pool"]}, "test_resnet does not take"),
        ({"seeds": ["1", "1"]}, "--seeds: expected numbers, each once"),
        ({"flags": ["--growth-tokens", "64", "4"]}, "--growth-tokens: expected the smaller number first, got 64 4"),
        ({"flags": ["--models", POOL]}, "expected --models, or --hosts and --mixers"),
        ({"flags": ["--variants", "a"]}, "--variants are of --models; leave --hosts and --mixers out"),
        ({"flags": ["--jobs", "0"]}, "--jobs: expected a number at least 1, got 0"),
    ],
)
def test_what_cannot_be_compared_is_said_before_the_first_step(mixers, tmp_path, capsys, given, message):
    assert mixers(*given.pop("flags", []), **given) == 1
    assert message in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_a_label_that_means_something_else_now_is_not_taken_for_done(mixers, capsys):
    assert mixers() == 0
    assert mixers(mixers=["{type: score, normalizer: relu, label: sigmoid}"]) == 1
    assert "give it another label, or name another --experiment" in capsys.readouterr().err


def test_growth_is_the_slope_and_says_where_it_stops(monkeypatch):
    seconds = {4: 1.0, 16: 16.0, 64: 256.0}
    args = compare_parser().parse(["--growth-tokens", "4", "64", "--growth-dim", "8", "--device", "cpu"])
    own = args.comparison
    job = growth.GrowthJob(args.train, {"type": "pool"}, own.growth_tokens, own.growth_dim)

    def measure(mixer, x, *_):
        tokens = x.shape[1] * x.shape[2]
        if tokens == 64 and stop:
            raise stop
        return x.shape[0] * seconds[tokens], x.shape[0] * 8 * tokens

    monkeypatch.setattr(growth, "_measure", measure)
    monkeypatch.setattr(growth, "SLOW", math.inf)
    stop = None
    row = growth.measure_growth(job)
    assert row["time_exponent"] == pytest.approx(2) and row["memory_exponent"] == pytest.approx(1)
    assert row["stops_at"] is None and row["ms_16"] == pytest.approx(16e3)
    for raised, reason in ((torch.OutOfMemoryError("x"), "memory"), (ValueError("too many"), "ValueError: too many")):
        stop = raised
        row = growth.measure_growth(job)
        assert (row["stops_at"], row["stops"]) == (64, reason) and row["time_exponent"] == pytest.approx(2)
    monkeypatch.setattr(growth, "SLOW", 50.0)
    stop = None
    row = growth.measure_growth(job)
    assert row["stops_at"] == 64 and "a step of 16 tokens takes over 50 s" in row["stops"]


@pytest.mark.parametrize("flags", [[], ["--torchcompile", "eager"]], ids=["plain", "compiled"])
def test_speeds_and_growth_are_compiled_as_trainings_are(monkeypatch, flags):
    monkeypatch.setattr(speeds, "SPEED", Budget(warmup_ms=1, repeat_ms=1))
    monkeypatch.setattr(growth, "TIMES", Budget(warmup_ms=1, repeat_ms=1))
    forward, seen = ScoreMixer.forward, set()

    def watched(self, x):
        seen.add((self.training, torch.compiler.is_compiling()))
        return forward(self, x)

    monkeypatch.setattr(ScoreMixer, "forward", watched)
    size = ["--img-size", "16", "--batch-size", "2", "--growth-tokens", "4", "16", "--growth-dim", "8"]
    args = compare_parser().parse(["--device", "cpu", *size, *flags])
    kwargs = {"depth": 1, "embed_dim": 8, "num_heads": 1, "patch_size": 8, "mixers": "score"}
    row = speeds.measure_speed(changed(args.train, model="zoo_deit_t", model_kwargs={**kwargs, "img_size": 16}))
    assert row["train_images_per_second"] > 0 < row["inference_images_per_second"]
    assert seen == {(True, bool(flags)), (False, bool(flags))}  # steps, and inference
    seen.clear()
    own = args.comparison
    row = growth.measure_growth(growth.GrowthJob(args.train, {"type": "score"}, own.growth_tokens, own.growth_dim))
    assert {"ms_4", "ms_16"} <= row.keys() and row["stops"] == "" and seen == {(True, bool(flags))}


def test_labels_of_many_points_cover_neither_each_other_nor_points():
    axes = Figure(figsize=(12, 8), dpi=120).subplots()
    random = torch.Generator().manual_seed(0)
    points = [tuple(point) for point in torch.rand(60, 2, generator=random).mul(0.5).tolist()]
    axes.scatter(*zip(*points, strict=True))
    axes.figure.draw_without_rendering()
    boxes = place_labels(axes, points, [f"mixer_number_{i}" for i in range(60)])
    for i, (left, bottom, right, top) in enumerate(boxes):
        assert not any(a < right and left < c and b < top and bottom < d for a, b, c, d in boxes[:i])
        assert not any(
            left < x < right and bottom < y < top for x, y in (axes.transData.transform(point) for point in points)
        )


@pytest.mark.parametrize(("points", "height"), [(12, 4.5), (13, 16.0)])
def test_a_picture_is_as_wide_as_a_page_however_many_points_it_has(tmp_path, points, height):
    speeds = {"train_images_per_second": 100.0, "inference_images_per_second": 300.0}
    named = [{"model": f"h/{i}", "host": "h", "mixer": str(i), "top1": i, "top1_sd": None} for i in range(points)]
    comparison_report.draw([row | speeds for row in named], tmp_path / "picture.png")
    with Image.open(tmp_path / "picture.png") as picture:
        assert picture.size == (11 * 120, height * 120)


def test_a_section_has_parameters_of_small_models_and_the_data_that_were_used():
    run = {"model": POOL, "seed": 0, "status": "ok", "reason": "", "params_m": 0.0182, "top1": 50.0, "epochs": 2}
    run |= {"device": "cpu", "torch": "2", "timm": "1", "python": "3"}
    models = comparison_report.summarise([run], [], [])
    for flags in ("--dataset visionzoo/digits", "--data-dir TRAIN --val-data-dir VALIDATION"):
        config = compare_parser().parse_with_config(["--models", POOL, *flags.split()])
        text = comparison_report.section(models, [run], config, "tiny", 1)
        assert f"visionzoo compare CONFIG {flags}\n" in text
    assert f"| `{POOL}` | 0.018 | 50.00 |" in text


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        ([], ["model only, not compiled, batch 128"]),
        (["--torchcompile"], ["model only, compiled (torch.compile, inductor), batch 128"]),
        (["--variants", "a", "b torchcompile=eager"], ["only, compiled where the variant's flags have it, batch 128"]),
        (
            ["--mixers", "pool", "--torchcompile", "eager", "--torchcompile-mode", "default", "--cuda-graphs"],
            [
                "only, compiled (torch.compile, eager, mode default), replayed as CUDA graphs, on",
                "of only the mixer, compiled (torch.compile, eager, mode default), with 128 channels",
            ],
        ),
    ],
)
def test_a_section_says_whether_speeds_are_of_compiled_models(flags, said):
    run = {"model": POOL, "seed": 0, "status": "ok", "reason": "", "params_m": 0.0182, "top1": 50.0, "epochs": 2}
    run |= {"device": "cpu", "torch": "2", "timm": "1", "python": "3", "train_images_per_second": 1.0}
    apart = "--mixers" in flags
    run |= {"loader_images_per_second": None if apart else 2.0, "inference_images_per_second": 3.0}
    config = compare_parser().parse_with_config(["--models", POOL, *flags])
    text = comparison_report.section(comparison_report.summarise([run], [], []), [run], config, "tiny", 1)
    for words in said:
        assert words in " ".join(text.split())


def test_a_section_has_the_command_with_what_the_config_does_not_say_and_where_training_began(tmp_path):
    path = tmp_path / "tiny.yaml"
    path.write_text(f"models: ['{POOL}', '{LEVIT}']\nepochs: 3\namp: true\n")
    run = {"model": POOL, "seed": 0, "status": "ok", "reason": "", "params_m": 0.0182, "top1": 50.0, "epochs": 2}
    run |= {"device": "cpu", "torch": "2", "timm": "1", "python": "3"}
    models = comparison_report.summarise([run], [], [])
    for flags, said, begun in (
        ("--epochs 3 --jobs 4 --experiment tiny", "", "random"),
        (
            f"--models '{POOL}' --no-amp --epochs 2 --initial-checkpoint /a/b.pth.tar --output /c --experiment other",
            f" --models '{POOL}' --experiment other --initial-checkpoint START --no-amp --epochs 2",
            "trained",
        ),
    ):
        config = compare_parser().parse_with_config([str(path), *shlex.split(flags), "--data-dir", "/d"])
        text = comparison_report.section(models, [run], config, "tiny", 1)
        command = next(line for line in text.splitlines() if line.startswith("visionzoo compare"))
        assert sorted(shlex.split(command)) == sorted(
            shlex.split(f"visionzoo compare {path}{said} --data-dir TRAIN --val-data-dir VALIDATION")
        )
        assert f"2 epochs from {begun} weights for each" in text
