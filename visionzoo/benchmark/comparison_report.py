"""What a comparison found as tables and pictures: a row for each model, means and spread over its seeds."""

from __future__ import annotations

import io
import math
import shlex
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from PIL import Image

from visionzoo.benchmark.comparison_rows import Row
from visionzoo.engine.checkpoints import write_atomically
from visionzoo.engine.errors import require
from visionzoo.engine.flags import CompareConfig, compare_parser
from visionzoo.engine.options import settings
from visionzoo.text import count_of, markdown_table

COLUMNS = {  # of the table: title, digits
    "params_m": ("Parameters (M)", 1),
    "trained_m": ("Trained (M)", 3),
    "top1": ("Top-1 (%)", 2),
    "train_images_per_second": ("Training (images/s)", 0),
    "inference_images_per_second": ("Inference (images/s)", 0),
    "peak_memory_mib": ("Peak memory (MiB)", 0),
    "time_exponent": ("Time ~ N^", 2),
    "memory_exponent": ("Memory ~ N^", 2),
}
MEANS = ("params_m", "trained_m", "train_images_per_second", "inference_images_per_second", "peak_memory_mib")
SMALL = 8  # points, of names in pictures that are 11 inches wide
OF_THE_PLACE = {  # flags that say where, and how many at a time: the next reader has others
    *("config", "output", "write", "report", "jobs", "cache_images", "workers", "device"),
    *("data_dir", "dataset", "val_data_dir"),
}
FILES = {"initial_checkpoint": "START", "pretrained_path": "START", "kd_checkpoint": "TEACHER"}
GROWN = ("time_exponent", "memory_exponent", "stops_at", "stops")


def summarise(rows: Sequence[Row], speeds: Sequence[Row], growth: Sequence[Row]) -> list[Row]:
    """Return a row for each model.

    Args:
        rows: of the runs, for each seed; numbers become means, and `top1_sd` is the standard deviation.
        speeds: of models, measured apart; they win over those of the runs.
        growth: of mixers.
    """
    apart = {row["model"]: row for row in speeds if row["status"] == "ok"}
    grown = {row["mixer"]: row for row in growth}
    models = []
    for name in dict.fromkeys(row["model"] for row in rows):
        own = [row for row in rows if row["model"] == name]
        good = [row for row in own if row["status"] == "ok"]
        first = own[0]
        model: Row = {"model": name, "host": first.get("host") or "", "mixer": first.get("mixer") or ""}
        model |= {"runs": len(good), "failed": "; ".join(dict.fromkeys(r["reason"] for r in own if r not in good))}
        top1 = [row["top1"] for row in good]
        model |= {"top1": statistics.mean(top1) if top1 else None}
        model |= {"top1_sd": statistics.stdev(top1) if len(top1) > 1 else None}
        for column in MEANS:
            values = [value for row in good if (value := row.get(column)) is not None]
            model[column] = apart.get(name, {}).get(column, statistics.mean(values) if values else None)
        for column in GROWN:
            model[column] = grown.get(model["mixer"], {}).get(column)
        models.append(model)
    return models


def table(models: Sequence[Row]) -> str:
    """Lay the rows of models out as Markdown: one table, or one for each host, by accuracy."""
    hosts = dict.fromkeys(row["host"] for row in models)
    tables = []
    for host in hosts:
        own = [row for row in models if row["host"] == host]
        shown = [name for name in COLUMNS if any(row.get(name) is not None for row in own)]
        if not any(" + " in row["model"] for row in own):
            shown = [name for name in shown if name != "trained_m"]
        if host:
            own.sort(key=lambda row: -math.inf if row["top1"] is None else row["top1"], reverse=True)
        shared = "" if host else _shared(own)
        kind = "Mixer" if host else "Variant" if shared else "Model"
        head = [kind, *(COLUMNS[name][0] for name in shown)]
        names = [row["mixer"] or row["model"].removeprefix(shared) for row in own]
        lines = [[f"`{name}`", *(_cell(row, c) for c in shown)] for name, row in zip(names, own, strict=True)]
        title = f"{kind}s in `{host}`:\n\n" if host else f"{kind}s of `{shared.strip()}`:\n\n" if shared else ""
        tables.append(title + markdown_table(head, lines, numbers=True) + "".join(_notes(own)))
    return "\n\n".join(tables)


def _shared(models: Sequence[Row]) -> str:
    """Return the words with which all names begin, where each has just one more: a model under several settings."""
    names = [row["model"].split(" ") for row in models]
    first = names[0][:-1]
    alike = len(names) > 1 and all(name[:-1] == first for name in names)
    return " ".join([*first, ""]) if alike and first else ""


def _cell(row: Row, name: str) -> str:
    value, digits = row.get(name), COLUMNS[name][1]
    if value is None:
        return "—"
    text = f"{value:.2g}" if name == "params_m" and 0 < value < 0.095 else f"{value:,.{digits}f}"
    if name == "top1" and row["top1_sd"] is not None:
        text += f" ± {row['top1_sd']:.2f}"
    return text


def _notes(models: Sequence[Row]) -> list[str]:
    """Return what the cells do not say: mixers that stop before the largest map, and runs that failed."""
    notes = [
        f"\n\n`{row['mixer']}` stops at {row['stops_at']:,.0f} tokens: {row['stops']}."
        for row in models
        if row["stops_at"] is not None
    ]
    return notes + [f"\n\n`{row['model']}`, runs that failed: {row['failed']}." for row in models if row["failed"]]


def section(models: Sequence[Row], rows: Sequence[Row], config: CompareConfig, name: str, runs: int) -> str:
    """Return the table, how its numbers came about, and the picture, for a Markdown file beside CSV and picture.

    Args:
        models: a row for each, from `summarise`.
        rows: of the runs.
        config: what was compared.
        name: of CSV and picture.
        runs: how many there are to be in the end.
    """
    rows = [row for row in rows if row["status"] == "ok"]
    machines = {f"{r['device']}, torch {r['torch']}, timm {r['timm']}, Python {r['python']}" for r in rows}
    precision = f"{config.train.device.amp_dtype} autocast" if config.train.device.amp else "float32"
    fit = config.train.fit
    given = fit.initial_checkpoint or fit.pretrained_path or config.train.model.pretrained
    trained = f"{rows[0]['epochs']:g} epochs from {'trained' if given else 'random'} weights for each"
    if config.comparison.seeds:
        seeds = {row["seed"] for row in rows}
        trained += (
            f" of {count_of(len(seeds), 'seed')} (mean ± standard deviation)" if len(seeds) > 1 else " with one seed"
        )
    if config.comparison.probes:
        epochs = config.comparison.probe_epochs or config.train.schedule.epochs
        trained += f", then {epochs} of each probe on the frozen features of that very model and data set"
    if len(rows) < runs:
        trained += f"; not done yet: {runs - len(rows)} of {count_of(runs, 'run')}"
    batch = config.train.fit.validation_batch_size or config.train.fit.batch_size
    loader = [row["loader_images_per_second"] for row in rows if row.get("loader_images_per_second")]
    compiled = _compiled(config)
    if loader:
        speed = f"""The speed of training is that of the last epoch with its
loading (by itself, loading gives {min(loader):,.0f} to {max(loader):,.0f} images/s); that of inference is of the
model only, {compiled}, batch {batch}, in the same precision. Peak memory is that of training."""
        data = f"[{name}.csv]({name}.csv)"
    else:
        replayed = ", replayed as CUDA graphs" if config.train.fit.cuda_graphs else ""
        speed = f"""Speeds are of the model
only, {compiled}{replayed}, on images that are on the device, in the same precision,
measured after the trainings with nothing else on the device: steps of training with the optimizer's, and inference,
batch {batch}. Peak memory is that of training."""
        data = f"of each run [{name}.csv]({name}.csv), of each model [{name}_models.csv]({name}_models.csv)"
    if config.comparison.mixers:
        (smallest, largest), dim = config.comparison.growth_tokens, config.comparison.growth_dim
        grown = f", {compiled}," if config.train.model.torchcompile else ""
        speed += f"""
Exponents are slopes in log-log of time and memory of a map against its tokens N, of only the mixer{grown} with
{dim} channels, forward and backward, from {smallest:,} to {largest:,} tokens; each step has {largest:,}
tokens, in many maps or few."""
    picture = f"![top-1 against throughput]({name}.png)\n\nThe numbers behind the picture: {data}."
    if not any(row["train_images_per_second"] for row in models):
        speed, picture = "Speeds and growth are not measured yet.", f"The numbers: {data}."
    flags = _own_flags(config)
    if config.train.data.data_dir:
        flags += " --data-dir TRAIN --val-data-dir VALIDATION"
    elif config.train.data.dataset:
        flags += f" --dataset {config.train.data.dataset}"
    return f"""{table(models)}

{trained}, batch {config.train.fit.batch_size}, {precision}; {"; ".join(sorted(machines))}.
Top-1 is that of the last epoch on the validation split. {speed}

<!-- not run: needs a GPU and data -->
```bash
visionzoo compare {config.train.config or "CONFIG"}{flags}
```

{picture}"""


def _compiled(config: CompareConfig) -> str:
    """Say whether what was measured was compiled, and by what."""
    if any("torchcompile" in variant for variant in config.comparison.variants):
        return "compiled where the variant's flags have it"
    model = config.train.model
    if not model.torchcompile:
        return "not compiled"
    mode = f", mode {model.torchcompile_mode}" if model.torchcompile_mode else ""
    return f"compiled (torch.compile, {model.torchcompile}{mode})"


def _own_flags(config: CompareConfig) -> str:
    """Return the flags that the command line adds to the config, each after a space."""
    path = config.train.config
    if not path:
        return " --cuda-graphs" if config.train.fit.cuda_graphs else ""
    usual = settings(compare_parser().parse_with_config([path]))
    words: list[str] = []
    for name, value in settings(config).items():
        if name in OF_THE_PLACE or value == usual[name] or (name == "experiment" and value == Path(path).stem):
            continue
        flag = f"--{name.replace('_', '-')}"
        if isinstance(value, bool):
            words.append(flag if value else f"--no-{flag[2:]}")
        elif isinstance(value, Mapping):
            words += [flag, *(f"{key}={one}" for key, one in value.items())]
        elif isinstance(value, Sequence) and not isinstance(value, str):
            words += [flag, *map(str, value)]
        else:
            words += [flag, FILES.get(name, str(value))]
    return f" {shlex.join(words)}" if words else ""


def draw(models: Sequence[Row], path: Path) -> None:
    """Draw accuracy against the throughput of training and of inference, for each host.

    The two are side by side, or, with more than twelve points each, one above the other, for names to be readable.
    """
    require("matplotlib")
    from matplotlib.figure import Figure  # not pyplot: no display, no global state

    models = [row for row in models if row["top1"] is not None and row["train_images_per_second"]]
    hosts = list(dict.fromkeys(row["host"] for row in models)) or [""]
    most = max([sum(row["host"] == host for row in models) for host in hosts], default=0)
    beside = most <= 12
    figure = Figure(figsize=(11.0, (4.5 if beside else 16.0) * len(hosts)), layout="constrained")
    rows = (len(hosts), 2) if beside else (2 * len(hosts), 1)
    panels = figure.subplots(*rows, sharey="row", squeeze=False).reshape(len(hosts), 2)
    for host, pair in zip(hosts, panels, strict=True):
        for axes, what in zip(pair, ("train", "inference"), strict=True):
            own = [row for row in models if row["host"] == host]
            points = [(row[f"{what}_images_per_second"], row["top1"]) for row in own]
            for row, (x, y) in zip(own, points, strict=True):
                axes.errorbar(x, y, yerr=row["top1_sd"], color="grey", elinewidth=0.8, alpha=0.6)
                axes.scatter(x, y, s=8 * row["params_m"] if not host else 18, alpha=0.7, zorder=3)
            axes.set_xlabel(f"{'training' if what == 'train' else what}, images/s")
            axes.set_xlim(0, 1.08 * max((x for x, _ in points), default=1))
            axes.xaxis.set_major_formatter("{x:,.0f}")
            axes.margins(y=0.12)
            axes.grid(alpha=0.3)
        for axes in pair[: 1 if beside else 2]:
            axes.set_ylabel(f"{host}: top-1, %" if host else "top-1, %")
    machine = "area of a point: parameters" if hosts == [""] else "bars: standard deviation over seeds"
    figure.suptitle(machine, fontsize=10)
    figure.draw_without_rendering()  # so that positions on the page are known
    for host, pair in zip(hosts, panels, strict=True):
        for axes, what in zip(pair, ("train", "inference"), strict=True):
            own = [row for row in models if row["host"] == host]
            places = [(row[f"{what}_images_per_second"], row["top1"]) for row in own]
            shared = _shared(own)
            names = [row["mixer"] or row["model"].removeprefix(shared).split()[0].removeprefix("zoo_") for row in own]
            place_labels(axes, places, names)
    drawn = io.BytesIO()
    figure.savefig(drawn, format="png", dpi=120)
    few = Image.open(drawn).convert("RGB").quantize(256, Image.Quantize.FASTOCTREE)  # colors: half the size, for pages
    write_atomically(path, lambda file: few.save(file, format="png", optimize=True))


def place_labels(axes: Any, points: Sequence[tuple[float, float]], names: Sequence[str]) -> list[Any]:
    """Write a name beside each point where it covers no other name and no point, with a line where that is far.

    Names take the first free place on rings around their point, those of the densest points first; one that finds none
    stays at the nearest.

    Args:
        axes: of matplotlib, drawn once.
        points: in data units.
        names: as many.

    Returns:
        The boxes of the labels in pixels, (left, bottom, right, top).
    """
    pixels = [tuple(map(float, axes.transData.transform(point))) for point in points]
    unit = axes.figure.dpi / 72
    frame = axes.get_window_extent()
    dots = [(x - 3 * unit, y - 3 * unit, x + 3 * unit, y + 3 * unit) for x, y in pixels]
    taken: list[tuple[float, float, float, float]] = []
    boxes: list[Any] = [None] * len(points)
    crowd = [sum(math.dist(a, b) < 60 * unit for b in pixels) for a in pixels]
    for index in sorted(range(len(points)), key=lambda i: -crowd[i]):
        x, y = pixels[index]
        text = axes.text(0, 0, names[index], fontsize=SMALL, zorder=4)
        extent = text.get_window_extent()
        width, height = extent.width + 2 * unit, extent.height
        text.remove()
        best = None
        for ring in range(24):
            radius = (4 + 7 * ring) * unit
            for step in range(8 + 4 * ring):
                angle = 2 * math.pi * step / (8 + 4 * ring)
                dx, dy = radius * math.cos(angle), radius * math.sin(angle)
                left = x + dx - (0 if math.cos(angle) > 0.3 else width if math.cos(angle) < -0.3 else width / 2)
                bottom = y + dy - height / 2
                box = (left, bottom, left + width, bottom + height)
                inside = frame.x0 <= box[0] and box[2] <= frame.x1 and frame.y0 <= box[1] and box[3] <= frame.y1
                best = best or (box, radius)
                if inside and not any(_overlap(box, other) for other in (*taken, *dots)):
                    best = (box, radius)
                    break
            else:
                continue
            break
        assert best is not None
        box, radius = best
        taken.append(box)
        boxes[index] = box
        at = axes.transData.inverted().transform((box[0] + unit, (box[1] + box[3]) / 2))
        axes.text(*at, names[index], fontsize=SMALL, va="center", zorder=4)
        if radius > 12 * unit:
            end = axes.transData.inverted().transform((min(max(x, box[0]), box[2]), min(max(y, box[1]), box[3])))
            axes.plot(*zip(points[index], end, strict=True), color="grey", linewidth=0.5, zorder=2)
    return boxes


def _overlap(a: Sequence[float], b: Sequence[float]) -> bool:
    return a[0] < b[2] and b[0] < a[2] and a[1] < b[3] and b[1] < a[3]
