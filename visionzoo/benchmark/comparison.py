"""Train models alike and compare accuracy, speed and memory; tools/compare.py is the command over it.

Each model is a run of the training engine in a folder of its own, and its row of results.csv is written when it is
done: a comparison that was stopped goes on, within a model too, when it is started again.
"""

from __future__ import annotations

import argparse
import csv
import gc
import io
import platform
import time
from pathlib import Path
from typing import Any

import timm
import torch

import visionzoo
from visionzoo.benchmark.results import device_name
from visionzoo.benchmark.timing import Budget, host_timing
from visionzoo.engine.checkpoints import LAST, write_atomically
from visionzoo.engine.errors import Interrupted, UserError, closest, require
from visionzoo.engine.flags import PROBES
from visionzoo.engine.images import announce_epoch, batches
from visionzoo.engine.models import autocast, build_model
from visionzoo.engine.options import key_values
from visionzoo.engine.parallel import Process, start_process
from visionzoo.engine.probing import choose_head
from visionzoo.engine.reporting import insert_between
from visionzoo.engine.run import Run
from visionzoo.engine.training import Training
from visionzoo.text import markdown_table

RESULTS, PICTURE = "results.csv", "results.png"
NOT_OF_THE_RECIPE = {"models", "write", "config", "output", "experiment", "resume", "workers", "model", "model_kwargs"}
LOADER_SECONDS = 5.0  # how long the loader is watched at most
INFERENCE = Budget(warmup_ms=500, repeat_ms=2000)
COLUMNS = {  # of the table: title, digits
    "model": ("Model", None),
    "params_m": ("Parameters (M)", 1),
    "trained_m": ("Trained (M)", 3),
    "top1": ("Top-1 (%)", 2),
    "train_images_per_second": ("Training (images/s)", 0),
    "inference_images_per_second": ("Inference (images/s)", 0),
    "peak_memory_mib": ("Peak memory (MiB)", 0),
}

Row = dict[str, Any]


def compare(args: argparse.Namespace) -> list[Row]:
    """Train and measure what `args` name (tools/compare.py); write the results and return them.

    Raises:
        UserError: the models are not named, or the folder holds results of another recipe; or as training.
        Interrupted: by a signal; what is done is kept.
    """
    folder = Path(args.output or "output/compare") / (args.experiment or Path(args.config or "comparison").stem)
    runs: dict[str, argparse.Namespace] = {}
    for spec in args.models:
        runs[spec] = _run_args(args, spec, folder)
        runs |= {f"{spec} + {probe}": _probe_args(runs[spec], probe, args) for probe in args.probes}
    process = start_process(args)
    _check(args, runs, process, folder.name)
    _keep_recipe(args, folder)
    rows = read_rows(folder / RESULTS)
    for number, (spec, run_args) in enumerate(runs.items(), 1):
        done = any(row["model"] == spec for row in rows)
        print(f"{spec} ({number} of {len(runs)}){': done before' if done else ''}", flush=True)
        if not done:
            rows.append({"model": spec, **_train_and_measure(run_args, process)})
            _write_rows(rows, folder / RESULTS)
    rows = [row for spec in runs for row in rows if row["model"] == spec]
    draw(rows, folder / PICTURE)
    print(table(rows))
    if args.write:
        target = Path(args.write)
        _write_rows(rows, target.with_name(f"{folder.name}.csv"))
        draw(rows, target.with_name(f"{folder.name}.png"))
        text = _written(target, folder.name, section(rows, args, folder.name))
        write_atomically(target, lambda file: file.write(text.encode()))
    print(f"results in {folder}{f', and in {args.write}' if args.write else ''}")
    return rows


def _run_args(args: argparse.Namespace, spec: str, folder: Path) -> argparse.Namespace:
    """Return the arguments of one model's training."""
    name, *options = spec.split() or [""]
    own = {
        "model": name,
        "model_kwargs": {**args.model_kwargs, **key_values(options, f"--models {spec!r}")},
        "output": str(folder),
        "experiment": spec.replace(" ", ","),
        "resume": "auto",
    }
    return argparse.Namespace(**{**vars(args), **own})


def _probe_args(trained: argparse.Namespace, probe: str, args: argparse.Namespace) -> argparse.Namespace:
    """Return the arguments of a probe of a model, which begins where its training ended."""
    name, *options = probe.split() or [""]
    if name not in PROBES:
        raise UserError(f"--probes: expected some of {', '.join(PROBES)}, got {probe!r}{closest(name, PROBES)}")
    own = {
        "freeze": True,
        "probe": name,
        "head_kwargs": key_values(options, f"--probes {probe!r}"),
        "initial_checkpoint": str(Path(trained.output) / trained.experiment / LAST),
        "pretrained": False,
        "experiment": f"{trained.experiment},{probe.replace(' ', ',')}",
        "epochs": args.probe_epochs or args.epochs,
    }
    return argparse.Namespace(**{**vars(trained), **own})


def _check(args: argparse.Namespace, runs: dict[str, argparse.Namespace], process: Process, name: str) -> None:
    """Find before hours of training what would stop it, or what comes behind it."""
    if not runs or len(runs) < len(args.models) * (1 + len(args.probes)):
        probes = f" and --probes {args.probes}" if args.probes else ""
        raise UserError(f"--models: expected names, each once, got {args.models}{probes}")
    if args.probe or args.head_kwargs:
        raise UserError("a comparison takes probes and their options by --probes; leave --probe and --head-kwargs out")
    if process.distributed or not args.val_split:
        raise UserError("a comparison runs in one process and validates: start it without torchrun, with --val-split")
    if args.write:
        _written(Path(args.write), name, "")
    for run_args in runs.values():
        tried = argparse.Namespace(**{**vars(run_args), "pretrained": False})
        choose_head(tried)
        with torch.device("meta"):
            build_model(tried)


def _keep_recipe(args: argparse.Namespace, folder: Path) -> None:
    """Write down the recipe, or compare it with that of the results that are there."""
    yaml, path = require("yaml"), folder / "recipe.yaml"
    recipe = {name: value for name, value in vars(args).items() if name not in NOT_OF_THE_RECIPE}
    recipe["model_kwargs"] = args.model_kwargs
    if path.exists():
        before = yaml.safe_load(path.read_text())
        changed = [name for name in recipe if recipe[name] != before.get(name)]
        if changed:
            differences = ", ".join(f"{name} {before.get(name)!r} instead of {recipe[name]!r}" for name in changed)
            raise UserError(f"{folder} holds a comparison with {differences}; name another --experiment")
    folder.mkdir(parents=True, exist_ok=True)
    write_atomically(path, lambda file: file.write(yaml.safe_dump(recipe, sort_keys=False).encode()))


def _train_and_measure(args: argparse.Namespace, process: Process) -> Row:
    run = Run(args, process)
    try:
        Training(run).fit()
    except Interrupted as error:
        raise Interrupted(error.signum, "what is done is kept; start the same command again to go on") from error
    assert run.reporter is not None
    last = run.reporter.rows[-1]
    row = {
        "params_m": sum(p.numel() for p in run.trainable.parameters()) / 1e6,
        "trained_m": sum(p.numel() for p in run.trainable.parameters() if p.requires_grad) / 1e6,
        "top1": float(last["eval_top1"]),
        "train_images_per_second": float(last["images_per_second"]),  # of the last epoch, with its loading
        "loader_images_per_second": _loader_rate(run),
        "inference_images_per_second": _inference_rate(run),
        "peak_memory_mib": float(last["peak_memory_mib"]) if "peak_memory_mib" in last else None,
        "epochs": run.num_epochs,
        "device": device_name(process.device),
        "torch": torch.__version__,
        "timm": timm.__version__,
        "visionzoo": visionzoo.__version__,
        "python": platform.python_version(),
    }
    del run  # with all that it holds on the device, before the next one
    gc.collect()
    if process.device.type == "cuda":
        torch.cuda.empty_cache()
    return row


def _loader_rate(run: Run) -> float:
    """Images a second that the training loader gives to a model that takes no time."""
    announce_epoch(run.loader, run.args.seed, run.num_epochs)
    images, started = 0, time.perf_counter()
    for batch, _ in batches(run.loader):
        images += len(batch)
        if time.perf_counter() - started > LOADER_SECONDS:
            break
    return images / (time.perf_counter() - started)


def _inference_rate(run: Run) -> float:
    """Images a second of the model alone, in training's precision, on a batch that is on the device."""
    args, device = run.args, run.process.device
    model = run.task.get_eval_model()
    assert model is not None
    size = _inference_batch(args)
    images = torch.randn(size, *run.data_config["input_size"], device=device)
    if args.channels_last:
        images = images.contiguous(memory_format=torch.channels_last)

    def infer() -> None:
        with torch.inference_mode(), autocast(args, device):
            model(images)

    model.eval()
    return 1e3 * size / host_timing(infer, device, INFERENCE).median_ms


def _inference_batch(args: argparse.Namespace) -> int:
    return int(args.validation_batch_size or args.batch_size)


def read_rows(path: Path) -> list[Row]:
    """Read results; an empty list where there are none."""
    if not path.exists():
        return []
    with path.open(newline="", encoding="utf-8") as file:
        return [{name: _number(text) for name, text in row.items()} for row in csv.DictReader(file)]


def _number(text: str) -> Any:
    try:
        return float(text) if text else None
    except ValueError:
        return text


def _write_rows(rows: list[Row], path: Path) -> None:
    text = io.StringIO()
    names = dict.fromkeys(name for row in rows for name in row)  # earlier versions wrote fewer
    writer = csv.DictWriter(text, list(names))
    writer.writeheader()
    writer.writerows([{name: f"{x:.7g}" if isinstance(x, float) else x for name, x in row.items()} for row in rows])
    write_atomically(path, lambda file: file.write(text.getvalue().encode()))


def table(rows: list[Row]) -> str:
    """Lay results out as a Markdown table."""
    shown = {name: column for name, column in COLUMNS.items() if name != "trained_m" or _are_probed(rows)}
    lines = []
    for row in rows:
        line = [f"`{row['model']}`"]
        for name, (_, digits) in list(shown.items())[1:]:
            line.append("—" if row.get(name) is None else f"{row[name]:,.{digits}f}")
        lines.append(line)
    return markdown_table([title for title, _ in shown.values()], lines, numbers=True)


def _are_probed(rows: list[Row]) -> bool:
    return any(" + " in row["model"] for row in rows)


def section(rows: list[Row], args: argparse.Namespace, name: str) -> str:
    """Return the table, how its numbers came about, and the picture, for a Markdown file beside CSV and picture."""
    machines = {f"{r['device']}, torch {r['torch']}, timm {r['timm']}, Python {r['python']}" for r in rows}
    loader = [row["loader_images_per_second"] for row in rows]
    precision = f"{args.amp_dtype} autocast" if args.amp else "float32"
    trained = f"{rows[0]['epochs']:g} epochs from nothing for each"
    if args.probes:
        epochs = args.probe_epochs or args.epochs
        trained += f", then {epochs} of each probe on the frozen features of that very model and data set"
    return f"""{table(rows)}

{trained}, batch {args.batch_size}, {precision}; {"; ".join(sorted(machines))}.
Top-1 is that of the last epoch on the validation split. The speed of training is that of the last epoch with its
loading (the loader alone gives {min(loader):,.0f} to {max(loader):,.0f} images/s); that of inference is of the model
alone, not compiled, batch {_inference_batch(args)}, in the same precision. Peak memory is that of training.

    python tools/compare.py {args.config or "CONFIG"} --data-dir TRAIN --val-data-dir VALIDATION

![top-1 against throughput]({name}.png)

The numbers behind the picture: [{name}.csv]({name}.csv)."""


def _written(path: Path, name: str, content: str) -> str:
    begin, end = f"<!-- {name}: written by tools/compare.py -->", f"<!-- end of {name} -->"
    try:
        return insert_between(path.read_text(encoding="utf-8"), begin, end, content)
    except (OSError, UserError) as error:
        raise UserError(f"--write {path}: {error}") from error


def draw(rows: list[Row], path: Path) -> None:
    """Draw accuracy against the throughput of training and of inference."""
    require("matplotlib")
    from matplotlib.figure import Figure  # not pyplot: no display, no global state

    figure = Figure(figsize=(11, 4.5), layout="constrained")
    panels = figure.subplots(1, 2, sharey=True)
    for axes, what in zip(panels, ("train", "inference"), strict=True):
        fastest = max(row[f"{what}_images_per_second"] for row in rows)
        for row in rows:
            x, y = row[f"{what}_images_per_second"], row["top1"]
            axes.scatter(x, y, s=8 * row["params_m"], alpha=0.7)
            side = "right" if x > fastest / 2 else "left"
            at = {"xytext": (0, 8), "textcoords": "offset points", "ha": side, "fontsize": 8}
            axes.annotate(row["model"].split()[0].removeprefix("zoo_"), (x, y), **at)
        axes.set_xlim(0, 1.05 * fastest)
        axes.set_xlabel(f"{'training' if what == 'train' else what}, images/s")
        axes.xaxis.set_major_formatter("{x:,.0f}")
        axes.margins(y=0.15)
        axes.grid(alpha=0.3)
    panels[0].set_ylabel("top-1, %")
    figure.suptitle(f"{rows[0]['device']}; area of a point: parameters", fontsize=10)
    write_atomically(path, lambda file: figure.savefig(file, format="png", dpi=120))
