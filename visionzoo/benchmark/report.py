"""A Markdown report and pictures of the results in a folder."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

from visionzoo.benchmark.results import Row, read_rows
from visionzoo.benchmark.targets import Verdict, judge, targets
from visionzoo.engine.checkpoints import write_atomically
from visionzoo.engine.errors import UserError, require
from visionzoo.text import count_of, markdown_table, some

SUITES = ("operations", "models", "training", "memory", "reducers", "host", "small")
REPORT = "report.md"
COLOURS = {"visionzoo": "tab:red", "authors": "tab:blue", "timm": "tab:blue", "flex": "tab:green", "natten": "tab:cyan"}


def write_report(folder: Path, *, pictures: bool = True) -> str:
    """Write report.md and pictures (which take matplotlib) from the CSV files in `folder`; return the table of aims.

    Raises:
        UserError: if there are no results.
    """
    suites = {suite: read_rows(folder / f"{suite}.csv") for suite in SUITES}
    rows = [row for suite in suites.values() for row in suite]
    if not rows:
        raise UserError(f"no results in {folder}: expected {', '.join(f'{suite}.csv' for suite in SUITES)}")
    verdicts = [judge(target, rows) for target in targets()]
    parts = ["# Benchmarks", *_environments(rows), "## Aims", aims_table(verdicts, whole=True)]
    for suite, own in suites.items():
        parts.append(f"## {suite.capitalize()}")
        if not own:
            parts.append(f"not measured; `visionzoo benchmark {suite}` measures it")
            continue
        for name, figure in DRAW[suite](own).items() if pictures else ():
            _save(figure, folder / f"{name}.png")
            parts.append(f"![{name}]({name}.png)")
        parts.append(results_table(own))
    text = "\n\n".join(parts) + "\n"
    write_atomically(folder / REPORT, lambda file: file.write(text.encode()))
    return aims_table(verdicts)


def _environments(rows: Sequence[Row]) -> list[str]:
    said = {
        f"{row.gpu}, torch {row.torch}, triton {row.triton}, timm {row.timm}, visionzoo {row.visionzoo}, "
        f"Python {row.python}"
        for row in rows
    }
    rates = {
        f"copy {row.copy_gb_s:.0f} GB/s, matrix product in {row.dtype} {row.matmul_tflop_s:.0f} TFLOP/s"
        for row in rows
        if row.copy_gb_s is not None and row.matmul_tflop_s is not None
    }
    how = (
        "Medians, in brackets the 20 % and 80 % quantiles. All rows of a case come from one process. The floor is the "
        "larger of bytes to move over the rate of a copy and FLOPs over the rate of a matrix product. Replayed are "
        "CUDA graphs of the same calls: where a call takes much longer, the host cannot launch it any faster. What was "
        "measured, and how, is stated in `visionzoo/benchmark`; `tools/benchmark.py` measures it again. Where the "
        "time of missed aims goes and what was tried: `Missed aims` in docs/kernels.md."
    )
    return [*(f"- {line}" for line in sorted(said) + sorted(rates)), how]


def aims_table(verdicts: Iterable[Verdict], *, whole: bool = False) -> str:
    """Lay out targets and what was measured as Markdown; unless `whole` count those of which ours was not measured."""
    lines, others = [], []
    for verdict in verdicts:
        target = verdict.target
        if not whole and verdict.met is None and verdict.reason == f"{target.ours} not measured":
            others.append(target.case)
            continue
        quantity = f"{target.ours}: {target.quantity} {target.baseline}".strip() + ", as graphs" * target.graphs
        measured = verdict.reason if verdict.measured is None else f"{verdict.measured:.3g}"
        word = {None: "not measured", True: "met", False: "**missed**"}[verdict.met]
        replayed = _number(verdict.replayed, ".3g")
        lines.append((target.case, target.measure, quantity, f"{target.aim:g}", measured, word, replayed))
    table = markdown_table(("Case", "What", "Quantity", "Aim", "Measured", "", "Replayed"), lines)
    if not others:
        return table
    return f"{table}\n\nnot measured: {count_of(len(others), 'further aim')}, of {some(list(dict.fromkeys(others)))}"


def results_table(rows: Iterable[Row]) -> str:
    """Lay out rows as Markdown."""
    header = [*("Case", "Implementation", "What", "ms", "Replayed ms", "GPU busy", "Launches", "img/s", "Floor ms")]
    header += ["Peak MiB", "First call s", "Error", "Remark"]
    lines = []
    for row in rows:
        error = "" if row.error is None else f"{row.error:.1e}" + ("" if row.agrees else " **differs**")
        time = "" if row.median_ms is None else f"{row.median_ms:.4g} ({row.low_ms:.4g} to {row.high_ms:.4g})"
        lines.append(
            (
                row.case,
                row.implementation,
                row.measure,
                time if row.status == "ok" else row.status,
                _number(row.replayed_ms, ".4g"),
                "" if row.busy_share is None else f"{row.busy_ms:.4g} ms, {row.busy_share:.0%}",
                _number(row.launches, ".3g"),
                _number(row.images_per_second, ".0f"),
                _number(row.floor_ms, ".3g"),
                _number(row.peak_mib, ".1f"),
                _number(row.first_call_s, ".2g"),
                error,
                row.reason,
            )
        )
    return markdown_table(header, lines)


def _number(value: float | None, style: str) -> str:
    return "" if value is None else format(value, style)


def draw_operations(rows: Sequence[Row]) -> dict[str, Any]:
    """Draw a picture an operation."""
    operations = dict.fromkeys(row.case.split("/")[0] for row in rows)
    return {name: _draw_operation([row for row in rows if row.case.startswith(f"{name}/")]) for name in operations}


def _draw_operation(rows: Sequence[Row]) -> Any:
    """Draw a panel a case: the median of each implementation as a dot with its number, the floors as lines."""
    cases = list(dict.fromkeys(row.case for row in rows if row.median_ms is not None))
    figure, panels = _figure(max(len(cases), 1), columns=3, height=2.6)
    for panel, case in zip(panels, cases, strict=False):
        own = [row for row in rows if row.case == case and row.median_ms is not None]
        labels = list(dict.fromkeys(row.implementation for row in own))
        for row in own:
            forward, place = row.measure == "forward", labels.index(row.implementation)
            colour = _colour(row.implementation)
            panel.plot(row.median_ms, place, "o", color=colour, fillstyle="full" if forward else "none", markersize=5)
            panel.annotate(
                f"{row.median_ms:.3g}",
                (row.median_ms, place),
                xytext=(0, 5 if forward else -9),
                textcoords="offset points",
                ha="center",
                fontsize=5,
            )
            if row.floor_ms is not None:
                panel.axvline(row.floor_ms, color="black", linewidth=0.8, linestyle="-" if forward else "--")
        panel.set_yticks(range(len(labels)), labels)
        panel.set_ylim(len(labels) - 0.4, -0.6)
        panel.set_xscale("log")
        panel.tick_params(which="both", labelsize=6)
        panel.grid(axis="y", alpha=0.3)
        panel.set_xlabel("ms; filled: forward, hollow: with backward; lines: their floors", fontsize=6)
        panel.set_title(f"{case}, {own[0].dtype}, batch {own[0].batch}", fontsize=7)
    return figure


def draw_models(rows: Sequence[Row]) -> dict[str, Any]:
    """Draw a panel a mode: bars of images a second of each model, for single images of the latency."""
    measured = [row for row in rows if row.median_ms is not None]
    modes = list(dict.fromkeys(row.case.split("/")[-1] for row in measured))
    most = max((sum(row.case.endswith(f"/{mode}") for row in measured) for mode in modes), default=1)
    figure, panels = _figure(max(len(modes), 1), columns=2, height=1 + 0.2 * most)
    for panel, mode in zip(panels, modes, strict=False):
        own = [row for row in measured if row.case.endswith(f"/{mode}")]
        latency = own[0].measure == "latency"
        values = [(row.median_ms if latency else row.images_per_second) or 0 for row in own]
        models = [row.case.split("/")[0] for row in own]
        gaps = [0.6 * list(dict.fromkeys(models)).index(model) for model in models]
        places = [i + gap for i, gap in enumerate(gaps)]
        bars = panel.barh(places, values, color=[_colour(row.implementation) for row in own])
        panel.bar_label(bars, fmt="%.3g" if latency else "%.0f", fontsize=6, padding=2)
        panel.set_yticks(places, [f"{m} {row.implementation}" for m, row in zip(models, own, strict=True)])
        panel.tick_params(labelsize=6)
        panel.margins(x=0.1, y=0.01)
        panel.invert_yaxis()
        panel.set_xlabel("ms" if latency else "images/s", fontsize=7)
        panel.set_title(f"{mode}: {own[0].dtype}, {own[0].layout}, batch {own[0].batch}", fontsize=8)
    return {"models": figure}


def draw_training(rows: Sequence[Row]) -> dict[str, Any]:
    """Draw a panel a model: what a step takes in each way, and in it what the GPU is busy for."""
    cases = list(dict.fromkeys(row.case for row in rows if row.median_ms is not None))
    figure, panels = _figure(max(len(cases), 1), columns=3, height=2.4)
    for panel, case in zip(panels, cases, strict=False):
        own = [row for row in rows if row.case == case]
        labels = [row.implementation for row in own]
        bars = panel.barh(
            labels, [row.median_ms or 0 for row in own], color=[_colour(name) for name in labels], alpha=0.4
        )
        written = ["not measured" if row.median_ms is None else f"{row.median_ms:.3g}" for row in own]
        panel.bar_label(bars, labels=written, fontsize=6, padding=2)
        panel.barh(labels, [row.busy_ms or 0 for row in own], height=0.4, color=[_colour(name) for name in labels])
        panel.tick_params(labelsize=6)
        panel.margins(x=0.2)
        panel.invert_yaxis()
        panel.set_xlabel("ms a step; full color: the GPU is busy", fontsize=6)
        panel.set_title(f"{case}, {own[0].dtype}, batch {own[0].batch}", fontsize=7)
    return {"training": figure}


def draw_memory(rows: Sequence[Row]) -> dict[str, Any]:
    """Draw time and memory against tokens for each series, and what training steps take and must hold."""
    series = list(dict.fromkeys(row.case.split("/")[0] for row in rows if row.tokens is not None))
    steps = [row for row in rows if row.held_mib is not None]
    figure, panels = _figure(2 * len(series) + bool(steps), columns=2, height=3.0)
    for i, name in enumerate(series):
        own = [row for row in rows if row.case.startswith(f"{name}/") and row.median_ms is not None]
        _lines(panels[2 * i], own, lambda row: row.median_ms, "ms", floor=True)
        _lines(panels[2 * i + 1], own, lambda row: row.peak_mib, "MiB beyond the inputs")
        for panel in panels[2 * i : 2 * i + 2]:
            panel.set_title(f"{name.removeprefix('tokens-')}, {own[0].dtype if own else ''}, one map", fontsize=8)
    if steps:
        panel = panels[2 * len(series)]
        labels = [f"{row.case.split('/')[-1]} {row.implementation}" for row in steps]
        peaks = [(row.fixed_mib or 0) + (row.peak_mib or 0) for row in steps]
        panel.barh(labels, peaks, color="tab:gray", label="peak")
        panel.barh(labels, [row.held_mib or 0 for row in steps], height=0.4, color="tab:red", label="must be held")
        panel.set_xlabel("MiB")
        panel.set_title(f"{steps[0].case.split('/')[0]}, {steps[0].shape}, training step", fontsize=8)
        panel.tick_params(labelsize=6)
        panel.legend(fontsize=6)
        panel.invert_yaxis()
    return {"memory": figure}


def draw_reducers(rows: Sequence[Row]) -> dict[str, Any]:
    """Draw images a second against the tokens that are left: a line for each reducer, from the model without."""
    measured = [row for row in rows if row.images_per_second is not None and row.tokens is not None]
    models = list(dict.fromkeys(row.case.split("/")[0] for row in measured))
    figure, panels = _figure(len(models), columns=2, height=3.5)
    for panel, model in zip(panels, models, strict=False):
        own = [row for row in measured if row.case.split("/")[0] == model]
        whole = [row for row in own if row.implementation == "none"]
        for name in dict.fromkeys(row.implementation for row in own if row not in whole):
            line = sorted(
                [*whole, *(row for row in own if row.implementation == name)], key=lambda row: row.tokens or 0
            )
            panel.plot([row.tokens for row in line], [row.images_per_second for row in line], marker=".", label=name)
        for row in whole:
            panel.axhline(row.images_per_second, color="black", linewidth=0.8, linestyle=":", label="without")
        panel.set_xlabel("tokens of the map after the last block", fontsize=7)
        panel.set_ylabel("images/s", fontsize=7)
        panel.set_ylim(bottom=0)
        panel.tick_params(labelsize=6)
        panel.grid(alpha=0.3)
        panel.legend(fontsize=6)
        panel.set_title(f"{model}: {own[0].dtype}, batch {own[0].batch}", fontsize=8)
    return {"reducers": figure}


def draw_host(rows: Sequence[Row]) -> dict[str, Any]:
    """Draw a panel a measure: bars of µs a call, and what an empty launch takes as a line."""
    measures = list(dict.fromkeys(row.measure for row in rows))
    most = max((sum(row.measure == measure for row in rows) for measure in measures), default=1)
    figure, panels = _figure(max(len(measures), 1), columns=2, height=1 + 0.17 * most)
    empty = [1e3 * row.median_ms for row in rows if row.implementation == "triton-empty" and row.median_ms]
    for panel, measure in zip(panels, measures, strict=False):
        own = [row for row in rows if row.measure == measure]
        colours = [_colour(row.implementation) for row in own]
        labels = [f"{row.case.removeprefix('host-')} {row.implementation}" for row in own]
        bars = panel.barh(range(len(own)), [1e3 * (row.median_ms or 0) for row in own], color=colours)
        written = ["not measured" if row.median_ms is None else f"{1e3 * row.median_ms:.0f}" for row in own]
        panel.bar_label(bars, labels=written, fontsize=6, padding=2)
        panel.set_yticks(range(len(own)), labels)
        panel.tick_params(labelsize=6)
        panel.margins(x=0.1, y=0.01)
        panel.invert_yaxis()
        for value in empty:
            panel.axvline(value, color="black", linewidth=0.8)
        panel.set_xlabel("µs until the call returns; line: an empty launch of Triton", fontsize=7)
        panel.set_title(f"{measure}: {own[0].dtype}, batch {own[0].batch}", fontsize=8)
    return {"host": figure}


def draw_small(rows: Sequence[Row]) -> dict[str, Any]:
    """Draw a picture a dtype with a panel an operation: time of calls against numbers of the map."""
    figures = {}
    for dtype in dict.fromkeys(row.dtype for row in rows):
        names = list(dict.fromkeys(row.case.split("/")[0] for row in rows if row.dtype == dtype))
        figure, panels = _figure(len(names), columns=3, height=2.8)
        for panel, name in zip(panels, names, strict=False):
            own = [row for row in rows if row.dtype == dtype and row.case.startswith(f"{name}/")]
            measured = [row for row in own if row.median_ms is not None]
            _lines(panel, measured, lambda row: row.median_ms, "ms a call", tokens=lambda row: row.all_tokens)
            panel.set_xlabel("tokens of all maps; dashed: with backward", fontsize=7)
            panel.legend(fontsize=6) if measured else panel.set_xlabel("not measured", fontsize=7)
            panel.set_title(name.removeprefix("small-"), fontsize=8)
        figures[f"small-{dtype}"] = figure
    return figures


DRAW: dict[str, Callable[[Sequence[Row]], dict[str, Any]]] = {
    "operations": draw_operations,
    "models": draw_models,
    "training": draw_training,
    "memory": draw_memory,
    "reducers": draw_reducers,
    "host": draw_host,
    "small": draw_small,
}


def _figure(count: int, *, columns: int, height: float) -> tuple[Any, list[Any]]:
    require("matplotlib")
    from matplotlib.figure import Figure  # not pyplot: no display, no global state

    columns = min(columns, count)
    lines = -(-count // columns)
    figure = Figure(figsize=(5 * columns, height * lines), layout="constrained")
    panels = list(figure.subplots(lines, columns, squeeze=False).flat)
    for panel in panels[count:]:
        panel.set_visible(False)
    return figure, panels


def _lines(
    panel: Any,
    rows: Sequence[Row],
    value: Callable[[Row], float | None],
    unit: str,
    floor: bool = False,
    tokens: Callable[[Row], float | None] = lambda row: row.tokens,
) -> None:
    names = list(dict.fromkeys(row.implementation for row in rows))
    for measure, style in (("forward", "-"), ("forward+backward", "--")):
        own = [row for row in rows if row.measure == measure]
        for i, name in enumerate(names):
            points = sorted((tokens(row), value(row)) for row in own if row.implementation == name and value(row))
            if points:
                label = name if measure == "forward" else None
                panel.plot(*zip(*points, strict=True), style, marker=".", color=f"C{i}", label=label)
        floors = sorted({(row.tokens, row.floor_ms) for row in own if row.floor_ms is not None})
        if floor and floors:
            label = "floor" if measure == "forward" else None
            panel.plot(*zip(*floors, strict=True), style, color="black", linewidth=0.8, label=label)
    panel.set_xscale("log", base=2)
    panel.set_yscale("log")
    panel.set_xlabel("tokens; dashed: with backward", fontsize=7)
    panel.set_ylabel(unit, fontsize=7)
    panel.tick_params(which="both", labelsize=6)
    panel.grid(alpha=0.3)
    if floor and panel.lines:  # the panel beside it has the same lines
        panel.legend(fontsize=6, loc="center right", bbox_to_anchor=(-0.15, 0.5))


def _colour(implementation: str) -> str:
    return COLOURS.get(implementation.split("-")[0], "tab:gray")


def _save(figure: Any, path: Path) -> None:
    write_atomically(path, lambda file: figure.savefig(file, format="png", dpi=120))
