"""The benchmarks: what they write, that they say what failed, and that their judgements follow from the rows."""

import csv
import itertools
import math
import os
import sys
import time
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import pytest
import timm
import torch
from engine.helpers import run_tool
from torch import nn

from visionzoo.benchmark import baselines, commands, report, runner, timing
from visionzoo.benchmark.cases import Absent, Case, Measurement, Run, Settings, path, select
from visionzoo.benchmark.host import host_cases
from visionzoo.benchmark.implementations import Implementation, Problem
from visionzoo.benchmark.memory import biformer_builders, memory_cases, saved_bytes, step_case
from visionzoo.benchmark.models import Mode, Pair, Twins, model_cases, pair_cases
from visionzoo.benchmark.operations import attention_costs, operation_cases
from visionzoo.benchmark.reducers import reducer_cases
from visionzoo.benchmark.report import results_table, write_report
from visionzoo.benchmark.results import COLUMNS, Results, Row, read_rows
from visionzoo.benchmark.runner import run_cases
from visionzoo.benchmark.small import LIBRARY, TRITON, limits, small_cases, write_table
from visionzoo.benchmark.targets import QUANTITIES, Target, judge, targets
from visionzoo.benchmark.timing import Budget, Ceilings, Timing, host_timing, launch_timing
from visionzoo.benchmark.training import training_cases
from visionzoo.commands.benchmark import parser
from visionzoo.engine import UserError
from visionzoo.kernels import explain
from visionzoo.kernels.dispatch import OPERATIONS
from visionzoo.kernels.small_maps import read_table

CPU = torch.device("cpu")
SETTINGS = Settings(CPU, batch=2, quick=True)


def case_of(*measurements, name="made/up"):
    return Case(name, 2, "shape", "layout", "float32", list(measurements))


def measurement(implementation, call=lambda: None, **arguments):
    return Measurement(implementation, "forward", lambda: Run(call), **arguments)


def raise_(error):
    raise error


# -- the command -------------------------------------------------------------------------------------------------------


def test_a_run_leaves_rows_a_report_and_pictures(tmp_path, capsys):
    flags = ["--batch", "1", "--quick", "--device", "cpu", "--output", str(tmp_path)]
    chosen = ["--only", "routed/14x14,routing/14x14", "--skip", "compiled,triton,masked"]
    assert run_tool("benchmark", "operations", *chosen, *flags) == 0
    with (tmp_path / "operations.csv").open() as file:
        lines = list(csv.DictReader(file))
    assert list(lines[0]) == COLUMNS
    assert {line["case"] for line in lines} == {"routed/14x14-g8-d32-k16", "routing/14x14-g8-d32-k16"}
    assert {line["status"] for line in lines if line["implementation"] == "authors"} == {"absent"}
    ours = [row for row in read_rows(tmp_path / "operations.csv") if row.implementation == "visionzoo"]
    assert [(row.measure, row.status) for row in ours] == [
        ("forward", "ok"),
        ("forward+backward", "ok"),
        ("forward", "ok"),
    ]
    for row in ours:
        assert row.agrees and row.low_ms <= row.median_ms <= row.high_ms and row.repeats >= 3
        assert (row.gpu, row.dtype, row.batch, row.torch) == ("cpu", "float32", 1, torch.__version__)
        assert "by reference" in row.reason  # which backend ran, and why
        by_bytes, by_flops = row.floor_bytes / row.copy_gb_s / 1e6, row.floor_flops / row.matmul_tflop_s / 1e9
        assert row.floor_ms == pytest.approx(max(by_bytes, by_flops), rel=1e-4)
    assert {file.name for file in tmp_path.iterdir()} == {"operations.csv", "report.md", "routed.png", "routing.png"}
    assert "routed/14x14-g8-d32-k16 | sdpa | forward |" in (tmp_path / "report.md").read_text()
    assert "routed_attention by reference" in (tmp_path / "report.md").read_text()
    assert "[1/" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["operations", "--only", "ruoted"], "--only ruoted --skip  leave no measurement of operations"),
        (["report"], "no results in"),
        (["report", "--only", "x"], "--only: `benchmark report` draws what is measured already"),
        (["models", "--rivals", "nowhere"], "no folder nowhere: --baselines"),
    ],
)
def test_what_a_user_can_mend_is_one_message(argv, message, tmp_path, capsys):
    assert run_tool("benchmark", *argv, "--device", "cpu", "--output", str(tmp_path)) == 1
    said = capsys.readouterr().err
    assert said.startswith("error: ") and message in said and said.count("\n") == 1


@pytest.mark.parametrize("minutes", ["0", "-1", "nan", "inf"])
def test_a_time_limit_is_positive(minutes, capsys):
    with pytest.raises(SystemExit):
        parser().parse_args(["host", "--minutes", minutes])
    assert f"expected a positive number of minutes, got {minutes}" in capsys.readouterr().err


def test_list_prints_names_and_measures_nothing(tmp_path, capsys):
    arguments = ["memory", "--list", "--device", "cpu", "--output", str(tmp_path / "none"), "--skip", "tokens"]
    assert run_tool("benchmark", *arguments) == 0
    assert "biformer_s-800x1333/regions-7/authors/training" in capsys.readouterr().out.splitlines()
    assert not (tmp_path / "none").exists()


def test_patterns_select_by_parts_or_whole_names():
    cases = operation_cases(SETTINGS)
    everything = [path(case, m) for case in cases for m in case.measurements]
    kept = [path(c, m) for c in select(cases, ["routed/*/sdpa/*", "halo/8"], ["backward"]) for m in c.measurements]
    assert kept == [
        name
        for name in everything
        if ((name.startswith("routed/") and "/sdpa/" in name) or "halo/8" in name) and "backward" not in name
    ]
    assert 3 < len(kept) < len(everything)


# -- running -----------------------------------------------------------------------------------------------------------


def test_what_fails_is_a_row_with_its_reason_and_the_rest_is_measured(tmp_path):
    broken = Measurement("rival", "forward", lambda: raise_(Absent("not installed")))
    failing = measurement("worse", lambda: raise_(RuntimeError("out of\n memory. Stack trace: File a.py")))
    wrong = Measurement("wrong", "forward", lambda: Run(lambda: 0.3, check=lambda error: (error, 0.1)))
    alone = Measurement("alone", "forward", lambda: Run(lambda: 0, check=lambda _: raise_(Absent("no reference"))))
    results = Results(tmp_path / "r.csv")
    run_cases([case_of(broken, failing, wrong, alone, measurement("good", items=4))], SETTINGS, results)
    rows = {row.implementation: row for row in read_rows(tmp_path / "r.csv")}
    assert (rows["rival"].status, rows["rival"].reason) == ("absent", "not installed")
    assert (rows["worse"].status, rows["worse"].reason) == ("failed", "RuntimeError: out of memory.")
    assert rows["wrong"].status == "ok" and rows["wrong"].agrees is False
    assert rows["alone"].median_ms is not None and rows["alone"].reason == "not compared: Absent: no reference"
    assert rows["good"].status == "ok" and rows["good"].agrees is None
    assert rows["good"].images_per_second == pytest.approx(4e3 / rows["good"].median_ms, rel=1e-4)


def test_a_run_that_is_stopped_keeps_what_it_had(tmp_path):
    results = Results(tmp_path / "r.csv")
    with pytest.raises(KeyboardInterrupt):
        stop = measurement("second", lambda: raise_(KeyboardInterrupt()))
        run_cases([case_of(measurement("first"), stop)], SETTINGS, results)
    assert [row.implementation for row in read_rows(tmp_path / "r.csv")] == ["first"]


def test_a_case_is_replaced_whole_and_others_stay(tmp_path):
    results = Results(tmp_path / "r.csv")
    run_cases([case_of(measurement("a"), measurement("b")), case_of(measurement("c"), name="x")], SETTINGS, results)
    run_cases([case_of(measurement("a"))], SETTINGS, Results(tmp_path / "r.csv"))
    assert [(row.case, row.implementation) for row in read_rows(tmp_path / "r.csv")] == [("x", "c"), ("made/up", "a")]


def test_results_of_another_version_are_not_overwritten(tmp_path):
    (tmp_path / "r.csv").write_text("case,speed\na,1\n")
    with pytest.raises(UserError, match="other columns"):
        Results(tmp_path / "r.csv")


@pytest.mark.parametrize(
    ("damage", "line"),
    [
        (lambda text: text[:-9], 3),  # within a line
        (lambda text: text[:-40] + "\n", 3),  # cells that are not there
        (lambda text: text.replace(",ok,", ",ok,1,", 1), 2),
        (lambda text: text.replace(",7,", ",seven,", 1), 2),
    ],
)
def test_damaged_results_are_refused(tmp_path, damage, line):
    results = Results(tmp_path / "r.csv")
    run_cases([case_of(measurement("a"), measurement("b"))], SETTINGS, results)
    text = (tmp_path / "r.csv").read_text().replace(f",{results.rows[0].repeats},", ",7,")
    (tmp_path / "r.csv").write_text(damage(text))
    with pytest.raises(UserError, match=f"r.csv is damaged in line {line}; remove the line"):
        Results(tmp_path / "r.csv")


def test_missing_cases_are_those_without_an_end(tmp_path):
    done, cut, new = (case_of(measurement("a"), measurement("b"), name=name) for name in ("done", "cut", "new"))
    results = Results(tmp_path / "r.csv")
    run_cases([done], SETTINGS, results)
    results.add(Row("cut", "a", "forward"))
    results.add(Row("cut", "b", "forward", status="skipped"))
    assert [results.has(case) for case in (done, cut, new)] == [True, False, False]


def test_after_the_time_limit_nothing_starts_and_what_was_there_stays(tmp_path):
    run_cases([case_of(measurement("a"))], SETTINGS, Results(tmp_path / "r.csv"))
    before = read_rows(tmp_path / "r.csv")
    run_cases([case_of(measurement("a"))], SETTINGS, Results(tmp_path / "r.csv"), minutes=0)
    assert read_rows(tmp_path / "r.csv") == before


def test_quantiles_of_times():
    assert Timing.of([5.0, 1.0, 2.0, 3.0, 4.0, 6.0]) == Timing(3.5, 2.0, 5.0, 6)
    assert Timing.of([7.0]) == Timing(7.0, 7.0, 7.0, 1)


# -- operations --------------------------------------------------------------------------------------------------------


def test_floors_follow_from_counted_bytes_and_flops():
    costs = attention_costs(tokens=56 * 56, heads=2, depth=32, keys=64)(64, 2)
    tensor = 64 * 56 * 56 * 64 * 2
    assert costs["forward"].bytes == 4 * tensor  # q, k, v, output
    assert costs["forward+backward"].bytes == (4 + 4 + 1 + 3) * tensor  # and these, the output's gradient, three more
    assert costs["forward"].flops == 2 * (2 * 64 * 56 * 56 * 2 * 64 * 32)  # scores; weighted sums
    assert costs["forward+backward"].flops == 3.5 * costs["forward"].flops
    assert costs["forward"].floor_ms(Ceilings(copy=3019e9, matmul=735e12)) == pytest.approx(0.034, abs=5e-4)
    assert costs["forward"].floor_ms(Ceilings(copy=1e30, matmul=735e12)) == pytest.approx(0.0044, abs=1e-4)


def test_every_implementation_that_says_so_computes_the_same():
    skip = ["compiled", "triton", "flex", "natten", "authors", "/sdpa/", "neighborhood"]
    cases = select(operation_cases(SETTINGS), ["14x14", "7x7", "8x8"], skip)
    checked = set()
    for case in cases:
        for m in case.measurements:
            run = m.prepare()
            if run.check is not None:
                error, allowed = run.check(run.call())
                assert error < 1e-5 < allowed, path(case, m)
                checked.add(m.implementation)
        case.close()
    assert checked == {"visionzoo", "visionzoo-reference", "visionzoo-apart", "sdpa-masked", "partition-sdpa", "timm"}


@pytest.mark.parametrize("measure", ["forward", "forward+backward"])
def test_another_function_is_found_out(measure):
    def draw(normal):
        return {"x": normal(normal.batch, 3, 3), "table": normal(3, 3)}

    functions = {
        "visionzoo-reference": lambda x, table: x * table,
        "same": lambda x, table: table * x,
        "gradient forgotten": lambda x, table: x.detach() * table + 0 * x,
        "other": lambda x, table: x * table * 1.1,
    }
    implementations = {name: Implementation(lambda inputs, f=f: f) for name, f in functions.items()}
    problem = Problem(
        SETTINGS,
        "name",
        8,
        "shape",
        draw,
        implementations,
        lambda batch, itemsize: {"forward": None, "forward+backward": None},
        shared=("table",),
    )
    agrees = {}
    for name in implementations:
        run = problem.prepare(name, measure)
        error, allowed = run.check(run.call())
        agrees[name] = error <= allowed
    assert agrees == {
        "visionzoo-reference": True,
        "same": True,
        "gradient forgotten": measure == "forward",
        "other": False,
    }


@pytest.mark.parametrize(
    ("length", "kernel", "dilation", "stride"),
    [
        (7, 3, 1, 1),
        (9, 3, 2, 1),
        (14, 7, 2, 1),
        (7, 7, 1, 1),
        (13, 3, 4, 1),
        (9, 4, 1, 4),
        (13, 5, 2, 2),
        (11, 3, 3, 3),
    ],
)
def test_baselines_see_the_neighborhood_of_natten(length, kernel, dilation, stride):
    seen = baselines.neighborhood(length, kernel, dilation, stride, CPU)
    for query in range(length):
        group = [key for key in range(length) if key % dilation == query % dilation]
        # the window of `kernel` members around the middle of those that share it, moved inside where it would stick out
        first = group.index(query) - group.index(query) % stride
        leader = min(first + stride // 2, len(group) - 1)
        start = min(max(leader - kernel // 2, 0), len(group) - kernel)
        assert seen[query].nonzero().flatten().tolist() == group[start : start + kernel]


# -- models and memory -------------------------------------------------------------------------------------------------


def test_models_of_a_pair_agree_and_are_measured(tmp_path):
    cases = select(pair_cases(SETTINGS, Pair("zoo_shvit_s1", "timm", "shvit_s1")), skip=["compiled", "optimized"])
    run_cases(cases, SETTINGS, Results(tmp_path / "r.csv"))
    rows = read_rows(tmp_path / "r.csv")
    assert [(row.case, row.implementation) for row in rows] == [
        ("shvit_s1/agreement", "visionzoo"),
        *itertools.product(
            (f"shvit_s1/{mode}" for mode in ("eager", "autocast", "training", "latency")), ("visionzoo", "timm")
        ),
    ]
    assert all(row.status == "ok" and row.agrees is not False for row in rows)
    assert rows[0].error < 1e-9 and rows[0].median_ms is None
    assert [row.agrees for row in rows if row.measure in ("inference", "latency")] == [True] * 6
    assert [row.batch for row in rows] == [2] * 7 + [1] * 2


def test_steps_are_measured_and_graphs_said_to_be_absent_on_the_cpu(tmp_path, monkeypatch):
    tiny = {"depths": (1, 1), "embed_dims": (8, 16), "num_classes": 10}
    monkeypatch.setattr(timm, "create_model", partial(timm.create_model, **tiny))
    monkeypatch.setattr(Twins, "images", lambda self, batch: torch.randn(batch, 3, 32, 32))
    cases = select(training_cases(SETTINGS, [Pair("zoo_poolformer_s12")]), skip=["/visionzoo-compiled/"])
    results = Results(tmp_path / "training.csv")
    run_cases(cases, SETTINGS, results)
    rows = {row.implementation: row for row in read_rows(tmp_path / "training.csv")}
    assert list(rows) == [f"visionzoo{way}" for way in ("", "-graph", "-compiled-graph", "-command")]
    assert rows["visionzoo-command"].reason == "1 GPU needed, torch sees 0 here"
    assert rows["visionzoo"].status == "ok" and rows["visionzoo"].busy_share is None
    assert rows["visionzoo-graph"].status == "absent" and "this is cpu" in rows["visionzoo-graph"].reason
    assert results.has(cases[0])
    write_report(tmp_path)
    assert (tmp_path / "training.png").stat().st_size > 5000


def test_a_whole_training_is_timed_by_what_it_writes(tmp_path, monkeypatch):
    monkeypatch.setattr(commands, "EPOCHS", 2)
    monkeypatch.setattr(commands, "BATCHES", 2)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    ran = []

    def run(command, **_):
        start, flags = command[:4], [flag for flag in command[4:] if flag not in ("--cuda-graphs", "--torchcompile")]
        ran.append(start)
        at = flags.index("--output") + 1
        assert sum(1 for _ in Path(flags[at]).glob("train/*/*.jpg")) == 8
        code = run_tool("train", *flags, "-j", "0", "--device", "cpu", "--img-size", "32", "--no-amp")
        return SimpleNamespace(returncode=code, stderr="")

    monkeypatch.setattr(commands, "subprocess", SimpleNamespace(run=run))
    settings = replace(SETTINGS, device=torch.device("cuda"))
    training = commands.prepare_training(settings, "zoo_shvit_s1", 4, 1)
    timed = Measurement("visionzoo-command", "training", lambda: training, items=4, tells=True)
    results = Results(tmp_path / "training.csv")
    run_cases([case_of(timed)], SETTINGS, results)
    (row,) = results.rows
    assert row.status == "ok" and row.repeats == 1 and ran == [[sys.executable, "-m", "visionzoo", "train"]]
    assert row.images_per_second == pytest.approx(4e3 / row.median_ms)
    failing = SimpleNamespace(returncode=1, stderr="a\nb\n")
    monkeypatch.setattr(commands, "subprocess", SimpleNamespace(run=lambda *_, **__: failing))
    with pytest.raises(RuntimeError, match=r"^visionzoo train: b$"):
        training.call()


def test_a_training_on_two_gpus_is_the_same_command_in_two_processes():
    one, two = (commands.training_command(Path("d"), "zoo_deit_t", 4, gpus, commands.FAST) for gpus in (1, 2))
    assert two[:7] == [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m"]
    assert two[7:19] == one[2:14] and {"--cuda-graphs", "--torchcompile"} < {*two} & {*one}


def test_the_first_call_has_a_time_of_its_own_and_an_aim(tmp_path, monkeypatch):
    waits = iter([0.03])
    results = Results(tmp_path / "host.csv")
    case = case_of(measurement("visionzoo", lambda: time.sleep(next(waits, 0))), name="host-routed/14x14")
    run_cases([case], SETTINGS, results)
    (row,) = results.rows
    assert row.first_call_s >= 0.03 and f"{row.first_call_s:.2g} |" in results_table([row])
    target = Target("host-routed/14x14", "forward", "s of a first call", 0.01)
    assert judge(target, [row]).met is False and judge(replace(target, aim=1e9), [row]).met
    row.first_call_s = None
    assert judge(target, [row]).reason == "first call not measured"


def test_suites_of_first_calls_compile_into_a_folder_that_goes(tmp_path, monkeypatch):
    folders = []
    monkeypatch.setenv("TRITON_CACHE_DIR", "own")
    monkeypatch.setattr(runner, "run_cases", lambda *_, **__: folders.append(Path(os.environ["TRITON_CACHE_DIR"])))
    monkeypatch.setattr(report, "write_report", lambda *_, **__: "")
    for suite in ("host", "operations"):
        assert run_tool("benchmark", suite, "--device", "cpu", "--output", str(tmp_path)) == 0
        monkeypatch.setenv("TRITON_CACHE_DIR", "own")
    assert folders[0].name != "own" and not folders[0].exists() and folders[1].name == "own"


def test_what_was_not_measured_is_said(tmp_path):
    results = Results(tmp_path / "host.csv")
    results.add(Row("host-routed/14x14", "visionzoo", "forward", "absent", batch=1, dtype="bfloat16"))
    table = write_report(tmp_path)
    text = (tmp_path / "report.md").read_text()
    assert "## Training\n\nnot measured; `visionzoo benchmark training` measures it" in text
    assert "## Host\n\n![host](host.png)" in text and (tmp_path / "host.png").stat().st_size > 5000
    count = sum(1 for _ in targets())
    assert f"not measured: {count} further aims, of routed/56x56-g2-d32-k1, " in table
    assert text.count("| not measured |") == count  # the file has a row for each
    assert (
        "| host-routed/14x14 | forward+backward | visionzoo: s of a first call | 2 | visionzoo not measured |" in text
    )
    labels = [text.get_text() for panel in report.draw_host(results.rows)["host"].axes for text in panel.texts]
    assert labels == ["not measured"]


def test_the_clock_is_looked_at_after_several_calls():
    calls = []
    timing = host_timing(lambda: calls.append(1), CPU, Budget(0, 0), calls=5)
    assert timing.repeats == 3 and len(calls) == 4 * 5  # one time more to warm up


def test_the_share_of_the_gpu_is_told_and_files_without_it_are_read(tmp_path):
    row = Row("c/step", "visionzoo", "training", median_ms=8.0, low_ms=8.0, high_ms=8.0, busy_ms=6.0)
    assert row.busy_share == 0.75 and "6 ms, 75%" in results_table([row])
    results = Results(tmp_path / "r.csv")
    results.add(row)
    assert read_rows(tmp_path / "r.csv")[0].busy_ms == 6.0
    for busy in (6.0, 6.0, None):  # each version wrote a column more
        lines = [line.rpartition(",")[0] for line in (tmp_path / "r.csv").read_text().splitlines()]
        (tmp_path / "r.csv").write_text("".join(f"{line}\n" for line in lines))
        (row,) = read_rows(tmp_path / "r.csv")
        assert row.busy_ms == busy and row.first_call_s is None and row.launches is None


def test_reducers_are_measured_against_the_tokens_that_are_left(tmp_path):
    small = {"depth": 4, "embed_dim": 24, "num_heads": 2, "size": 80}
    cases = reducer_cases(SETTINGS, "zoo_deit_t", rates=(0.5,), names=("class_attention", "token_pooling"), **small)
    assert [(case.name, case.tokens) for case in cases] == [("deit_t-80/keep-1", 25), ("deit_t-80/keep-0.5", 4)]
    run_cases(cases, SETTINGS, Results(tmp_path / "reducers.csv"))
    rows = read_rows(tmp_path / "reducers.csv")
    assert [row.implementation for row in rows] == ["none", "class_attention", "token_pooling"]
    assert all(row.status == "ok" and row.images_per_second > 0 for row in rows)
    write_report(tmp_path)
    assert (tmp_path / "reducers.png").stat().st_size > 5000 and "keep-0.5" in (tmp_path / "report.md").read_text()


def test_the_host_is_measured_beside_launches_that_nobody_here_wrote(tmp_path):
    named = {case.name.partition("/")[0].removeprefix("host-") for case in host_cases(SETTINGS)}
    assert named == {"launch", "window", "linear", "channel", "routing", "routed", "neighborhood", "halo"} | {
        *("layer_norm", "group_norm", "residual_norm", "score"),
        *("depthwise", "depthwise-k7", "depthwise-k9", "depthwise-k11"),
    }
    cases = select(host_cases(SETTINGS), only=["host-launch/*", "host-layer_norm/7x7/visionzoo/*"], skip=["sdpa"])
    run_cases(cases, SETTINGS, Results(tmp_path / "host.csv"))
    rows = read_rows(tmp_path / "host.csv")
    both = ("forward", "forward+backward")
    assert [(row.implementation, row.measure, row.status) for row in rows] == [
        ("triton-empty", "forward", "absent"),
        *((name, measure, "ok") for name in ("torch-add", "torch-linear", "visionzoo") for measure in both),
    ]
    assert all(row.median_ms > 0 and row.replayed_ms is None for row in rows[1:])
    write_report(tmp_path)
    assert (tmp_path / "host.png").stat().st_size > 5000 and "host-layer_norm" in (tmp_path / "report.md").read_text()


def test_the_hosts_clock_stops_before_the_device_is_done(monkeypatch):
    clock, waited = [0.0], []
    monkeypatch.setattr(timing.time, "perf_counter", lambda: clock[0])

    def pass_(seconds):
        clock[0] += seconds

    monkeypatch.setattr(timing, "synchronize", lambda device: waited.append(device) or pass_(1.0))
    assert launch_timing(lambda: pass_(0.002), CPU, Budget(0, 1)).median_ms == pytest.approx(2.0)
    assert waited


def small_rows(operation, times, dtype="bfloat16", measure="forward", setting="k3"):
    """Rows of maps of 49 tokens: times of torch's operation, of Triton's kernels, and of the GPU for torch's."""
    for batch, (theirs, ours, busy) in enumerate(times, start=1):
        for name, milliseconds in ((LIBRARY, theirs), (TRITON, ours)):
            row = Row(f"small-{operation}-{setting}/{batch}x7x7-{dtype}", name, measure, median_ms=milliseconds)
            row.error, row.allowed_error, row.replayed_ms, row.dtype = 0.0, 1.0, busy, dtype
            row.batch, row.tokens, row.gpu, row.torch = batch, 49, "GPU", "2.11"
            yield row


FAST, SLOW, BUSY, NO_GRAPH = (0.02, 0.05, 0.01), (0.06, 0.05, 0.01), (0.02, 0.05, 0.011), (0.02, 0.05, None)


@pytest.mark.parametrize(
    ("times", "expected"),
    [
        ([FAST, FAST, FAST], 3),
        ([FAST, SLOW, FAST], 1),
        ([FAST, FAST, BUSY], 2),  # the GPU takes more than half of the time
        ([FAST, NO_GRAPH], 1),
        ([SLOW, FAST], 0),
        ([FAST, (0.02, None, 0.01), FAST], 1),  # Triton's kernels have no time there
    ],
)
def test_a_limit_is_as_far_as_torchs_operation_was_the_faster(times, expected):
    (limit,) = limits(list(small_rows("depthwise_conv", times)), "command")
    assert limit[:5] == ("GPU", "depthwise_conv", "forward", "bfloat16", expected * 49 * 128)
    assert limit.command == "command" and limit.torch == "2.11"
    at = times[max(expected, 1) - 1]
    assert (limit.library_us, limit.triton_us) == (1e3 * at[0], 1e3 * at[1])


def test_limits_hold_for_every_case_of_an_operation_and_for_each_measure_and_dtype():
    rows = [*small_rows("linear_attention", [FAST, FAST]), *small_rows("linear_attention", [FAST, SLOW], setting="elu")]
    rows += small_rows("linear_attention", [FAST, FAST], dtype="float32")
    rows += small_rows("linear_attention", [SLOW], measure="forward+backward")
    rows += small_rows("halo_attention", [(0.02, None, 0.01), FAST])
    wrong = list(small_rows("group_norm", [FAST]))
    wrong[0].error = 2.0
    found = limits([*rows, *wrong], "command")
    assert [(limit.measure, limit.dtype, limit.numbers) for limit in found] == [
        ("forward", "bfloat16", 49 * 128),
        ("forward", "float32", 2 * 49 * 128),
        ("forward+backward", "bfloat16", 0),
    ]


def test_a_table_keeps_other_gpus_and_gets_this_one_anew(tmp_path):
    (own,) = limits(list(small_rows("depthwise_conv", [FAST])), "command")
    other = own._replace(gpu="other")
    write_table(tmp_path / "new/t.csv", [own])
    write_table(tmp_path / "t.csv", [own, other])
    write_table(tmp_path / "t.csv", [own._replace(numbers=7)])
    assert read_table(tmp_path / "t.csv") == [other, own._replace(numbers=7)]
    (tmp_path / "t.csv").write_text("something else")
    with pytest.raises(UserError, match="expected the columns"):
        write_table(tmp_path / "t.csv", [own])


def test_small_maps_are_measured_in_a_suite_that_writes_the_table(tmp_path, capsys):
    chosen = [
        "--only",
        "small-layer_norm/1x7x7-float32/*/forward",
        "--quick",
        "--device",
        "cpu",
        "--output",
        str(tmp_path),
    ]
    assert run_tool("benchmark", "small", *chosen, "--table", str(tmp_path / "t.csv")) == 0
    rows = read_rows(tmp_path / "small.csv")
    assert {row.implementation for row in rows} == {LIBRARY, TRITON} and all(row.agrees for row in rows)
    assert "by triton" in next(row.reason for row in rows if row.implementation == TRITON)
    assert (tmp_path / "small-float32.png").stat().st_size > 5000 and "## Small" in (tmp_path / "report.md").read_text()
    table = read_table(tmp_path / "t.csv")
    assert [limit[:5] for limit in table] == [("cpu", "layer_norm", "forward", "float32", 0)]  # for want of graphs
    assert run_tool("benchmark", "host", "--table", "--device", "cpu") == 1
    assert "--table: the suite small measures" in capsys.readouterr().err


def test_every_operation_is_measured_on_small_maps():
    cases = small_cases(SETTINGS)
    assert {case.name.split("/")[0].removeprefix("small-").split("-")[0] for case in cases} == set(OPERATIONS)
    assert {case.dtype for case in cases} == {"bfloat16", "float32"}
    for case in cases:
        assert {m.implementation for m in case.measurements} == {LIBRARY, TRITON}
        assert case.shape.startswith(f"{int(case.tokens**0.5)}x") and case.batch == 2


def test_models_that_differ_do_not_agree():
    twins = Twins(SETTINGS, Pair("zoo_shvit_s1", "timm", "shvit_s1"))
    with torch.no_grad():
        twins.ours().stages[1].blocks[0].mlp.fc2.norm.bias[0] += 0.01
    assert twins.agree() > 1e-6
    with torch.no_grad():
        twins.ours().head.fc.bias += 1
    error, allowed = twins.check(Mode(2, "inference"), twins.ours().eval()(twins.images(2)))
    assert error > allowed


def test_a_training_step_says_what_it_must_hold():
    build = partial(timm.create_model, "zoo_shvit_s1", num_classes=10)
    case = step_case(SETTINGS, "small", {"visionzoo": build}, (64, 64))
    run = case.measurements[0].prepare()
    run.call()
    weights = sum(t.nbytes for t in build().state_dict().values())
    assert run.fixed_bytes == weights + 2 * 3 * 64 * 64 * 4
    assert run.held_bytes > run.fixed_bytes + sum(p.nbytes for p in build().parameters()) / 2  # weights in bfloat16


def test_the_row_of_plain_torch_runs_nothing_else(monkeypatch):
    monkeypatch.setenv("VISIONZOO_BACKEND", "triton")
    tiny = {"depths": (1, 1, 1, 1), "embed_dims": (8, 16, 16, 24), "topks": (1, 2, 4, -2), "num_classes": 3}
    monkeypatch.setattr(timm, "create_model", partial(timm.create_model, **tiny))
    case = step_case(SETTINGS, "small", biformer_builders(2), (64, 64))
    run = {m.implementation: m for m in case.measurements}["visionzoo-reference"].prepare()
    with explain() as decisions:
        run.call()
    assert {d.operation for d in decisions} == {"depthwise_conv", "layer_norm", "route_regions", "routed_attention"}
    assert {d.backend for d in decisions} == {"reference"}


def test_saved_bytes_count_each_storage_once_and_only_what_is_kept():
    model = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2, bias=False))
    x = torch.randn(3, 4)
    known = [*model.parameters(), x]
    hidden = 3 * 8 * 4  # of ReLU, which saves its output, and of the linear layer, which saves its input
    assert saved_bytes(lambda: model(x), known) == hidden
    assert saved_bytes(lambda: model(x), list(model.parameters())) == hidden + x.nbytes

    def forgetful():
        model(x * 2).sum()  # whose graph is gone at the end
        return model(x)

    assert saved_bytes(forgetful, known) == hidden


# -- aims --------------------------------------------------------------------------------------------------------------


def rows_of(**medians):
    return [
        Row("c", name.replace("_", "-"), "forward", median_ms=value, floor_ms=0.5) for name, value in medians.items()
    ]


def test_speed_is_their_median_over_ours():
    target = Target("c", "forward", "times as fast as", 2.0, "authors")
    verdict = judge(target, rows_of(visionzoo=2.0, authors=5.0, visionzoo_triton=1.0))
    assert verdict.measured == 2.5 and verdict.met is True
    assert judge(target, rows_of(visionzoo=2.0, authors=3.9)).met is False
    assert judge(Target("c", "forward", "times the floor", 2.5), rows_of(visionzoo=2.0)).measured == 4.0
    assert judge(Target("c", "forward", "ms", 2.0), rows_of(visionzoo=2.0)).met is True


def test_cuda_graphs_are_compared_beside_calls_and_change_no_verdict():
    target = Target("c", "forward", "times as fast as", 2.0, "authors")
    rows = rows_of(visionzoo=2.0, authors=3.0)
    assert judge(target, rows).replayed is None
    rows[0].replayed_ms, rows[1].replayed_ms = 0.5, 2.5
    assert judge(target, rows).replayed == 5.0 and judge(target, rows).met is False
    assert judge(Target("c", "forward", "times the floor", 2.5), rows).replayed == 1.0
    graphs = replace(target, graphs=True)
    assert judge(graphs, rows).measured == 5.0 and judge(graphs, rows).met is True
    assert "visionzoo: times as fast as authors, as graphs | 2 | 5 | met |" in report.aims_table([judge(graphs, rows)])
    rows[1].replayed_ms = None
    assert judge(graphs, rows).met is None and judge(graphs, rows).reason == "no CUDA graphs of both were measured"
    assert judge(graphs, rows[:1]).reason == "authors not measured"


def test_launches_are_counted_in_those_of_an_empty_kernel():
    target = Target("host-c/14x14", "forward", "empty launches a kernel", 2.0, ours="visionzoo-triton")
    ours = Row("host-c/14x14", "visionzoo-triton", "forward", median_ms=0.09, launches=3.0)
    assert judge(target, [ours]).reason == "triton-empty not measured"
    empty = Row("host-launch/14x14", "triton-empty", "forward", median_ms=0.02)
    assert judge(target, [ours, empty]).measured == pytest.approx(1.5)
    ours.launches = None
    assert judge(target, [ours, empty]).reason == "launches not counted"


def test_first_calls_of_an_operation_are_added_up():
    rows = [
        Row("host-c/14x14", name, measure, median_ms=1.0, first_call_s=seconds)
        for name, measure, seconds in (
            ("visionzoo", "forward", 0.5),
            ("visionzoo", "forward+backward", 1.0),
            ("visionzoo-triton", "forward+backward", 0.25),
            ("visionzoo-reference", "forward", 9.0),
        )
    ]
    target = Target("host-c/14x14", "forward+backward", "s of a first call", 2.0)
    assert judge(target, rows).measured == 1.75 and judge(target, rows[3:]).met is None


def test_a_table_has_a_cell_for_each_heading():
    row = Row("c", "visionzoo", "forward", status="absent", launches=7.0, first_call_s=0.5, reason="remark")
    header, _, line = results_table([row]).splitlines()
    cells = dict(zip(header.split("|"), line.split("|"), strict=True))
    assert (cells[" Launches "], cells[" First call s "], cells[" Remark "]) == (" 7 ", " 0.5 ", " remark ")


def test_aims_without_results_that_count_are_not_judged():
    target = Target("c", "forward", "times as fast as", 2.0, "authors")
    rows = rows_of(visionzoo=1.0, authors=5.0)
    assert judge(target, rows[:1]).met is None and judge(target, []).reason == "visionzoo not measured"
    rows[1].status, rows[1].reason = "absent", "not installed"
    assert judge(target, rows).reason == "authors absent: not installed"
    rows = rows_of(visionzoo=1.0, authors=5.0)
    rows[0].error, rows[0].allowed_error = math.nan, 0.1
    assert judge(target, rows).met is None and "off by" in judge(target, rows).reason
    target = Target("m/training", "training", "times as fast as", 2.0, "timm")
    rows = [Row("m/training", name, "training", median_ms=1.0) for name in ("visionzoo", "timm")]
    assert judge(target, rows).met is False
    rows.append(Row("m/agreement", "visionzoo", "agreement", error=0.1, allowed_error=1e-9))
    assert judge(target, rows).met is None and "differ by 1.0e-01" in judge(target, rows).reason


def test_memory_is_judged_by_what_must_be_held_and_by_its_growth():
    step = Row("c", "visionzoo", "training", median_ms=1, fixed_mib=100, peak_mib=160, held_mib=200)
    assert judge(Target("c", "training", "times what must be held", 1.3), [step]).measured == pytest.approx(1.3)
    series = [
        Row(f"tokens-routed/{n}", "visionzoo", "forward", tokens=n, peak_mib=m)
        for n, m in ((1024, 9), (4096, 10), (16384, 40))
    ]
    growth = Target("tokens-routed/", "forward", "growth exponent", 1.05)
    assert judge(growth, series).measured == pytest.approx(1.0)  # between the two largest
    series[-1].peak_mib = 160
    assert judge(growth, series).measured == pytest.approx(2.0) and judge(growth, series).met is False
    assert judge(growth, series[:1]).met is None


def test_every_aim_names_measurements_that_exist():
    cases = [*operation_cases(SETTINGS), *model_cases(SETTINGS), *training_cases(SETTINGS), *memory_cases(SETTINGS)]
    cases += host_cases(SETTINGS)
    names = [path(case, m) for case in cases for m in case.measurements]
    assert len(names) == len(set(names))
    for target in targets():
        assert target.quantity in QUANTITIES
        if target.quantity == "growth exponent":
            ending = f"/{target.ours}/{target.measure}"
            assert sum(name.startswith(target.case) and name.endswith(ending) for name in names) == 4
            continue
        for implementation in filter(None, (target.ours, target.baseline)):
            assert f"{target.case}/{implementation}/{target.measure}" in names


@pytest.mark.parametrize("variable", ["VISIONZOO_BASELINES", "VISIONZOO_RIVALS"])
def test_a_folder_of_baselines_must_exist(monkeypatch, variable):
    monkeypatch.setenv(variable, "nowhere")
    with pytest.raises(UserError, match="no folder nowhere"):
        baselines.use_folder(None)
