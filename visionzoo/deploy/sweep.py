"""`visionzoo export --all`: every model to every format, each in a process of its own, as a table."""

from __future__ import annotations

import csv
import fnmatch
import multiprocessing
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import asdict, dataclass
from pathlib import Path
from platform import python_version
from tempfile import TemporaryDirectory
from typing import Any

import timm
import torch
from torch import nn

import visionzoo
from visionzoo._torch_private import BatchNorm
from visionzoo.deploy import FORMATS, Reference, Shape, export
from visionzoo.deploy.files import check_flags, shape_of, versions
from visionzoo.deploy.flags import ExportConfig
from visionzoo.engine.errors import UserError, require
from visionzoo.engine.options import changed, given_flags
from visionzoo.engine.outputs import add_rows, check_table
from visionzoo.engine.reporting import write_between
from visionzoo.models._registry import VARIANTS
from visionzoo.text import count_of, markdown_table

BEGIN = "<!-- table of exports: written by tools/export.py --all -->"
END = "<!-- end of the table of exports -->"
COLUMNS = ("model", "format", "input", "axes", "error", "spread", "seconds", "megabytes", "failure", "versions")
HEADINGS = {"pt2": "torch.export", "onnx": "ONNX", "aoti": "AOTInductor"}


@dataclass(frozen=True)
class Row:
    """One model in one format.

    Attributes:
        model: its name.
        format: a name of `FORMATS`.
        input: height x width of the image that was traced.
        axes: which of the input's are dynamic.
        error: largest error of an output, empty where the export failed.
        spread: largest difference between the outputs for two images, of which the error is to be a small part.
        seconds: of tracing and writing.
        megabytes: of the file.
        failure: what was the matter.
        versions: of what took part.
    """

    model: str
    format: str
    input: str
    axes: str
    error: float | None
    spread: float | None
    seconds: float | None
    megabytes: float | None
    failure: str
    versions: str


OF_ALL = (  # flags that act with --all, beside its own
    *("--format", "--output", "--batch-size", "--static-batch", "--dynamic-size", "--opset", "--no-fuse"),
    *("--img-size", "--input-size", "--random-weights"),
)


def sweep(config: ExportConfig) -> list[Row]:
    """Export all models that `config.sweep.all` names, with random weights, and return a row for each and format.

    Rows are added to `config.sweep.results_csv` as they come; what it has already is not done again.

    Raises:
        UserError: no model has such a name, or flags do not go together.
    """
    check_flags(config.files, torchcompile=config.model.torchcompile or config.model.torchcompile_mode)
    tqdm = require("tqdm").tqdm
    if config.model.model or config.source.weights.checkpoint:
        raise UserError("--all together with --model or --checkpoint; give one")
    parts = (config.files, config.model, config.input, config.source, config.tasks)
    for flag in (flag for part in parts for flag in given_flags(part)):
        if flag not in OF_ALL:
            raise UserError(f"{flag} has no effect on --all, which exports each model as it is; leave it out")
    patterns = config.sweep.all or ["*"]
    names = [name for name in VARIANTS if any(fnmatch.fnmatch(name, pattern) for pattern in patterns)]
    if not names:
        raise UserError(f"--all: no model matches {' or '.join(patterns)}; `visionzoo models` lists them")
    table = Path(config.sweep.results_csv or Path(config.files.output) / "export.csv")
    rows = read_rows(table)
    done = {(row.model, row.format, row.axes) for row in rows}
    axes = "+".join(shape_of(config.files, (3, 224, 224)).dynamic_axes.values())
    formats = list(dict.fromkeys(config.files.format))
    for name in (bar := tqdm(names, unit="model", disable=None)):
        missing = [format for format in formats if (name, format, axes) not in done]
        if not missing:
            continue
        bar.set_postfix_str(name)
        new = _in_its_own_process(name, axes, changed(config, format=missing))
        for row in new:
            bar.write(_line(row))
        rows += new
        add_rows(table, COLUMNS, map(asdict, new))
    chosen = [row for row in rows if row.model in names]
    failed = [row for row in chosen if row.failure]
    print(f"{len(chosen) - len(failed)} of {count_of(len(chosen), 'export')} compute what their models do; {table}")
    print(families(chosen))
    if config.sweep.write:
        write_between(Path(config.sweep.write), BEGIN, END, markdown(rows))
    return chosen


def markdown(rows: list[Row]) -> str:
    """Return the table, one line a model: the largest error of an output and its change with the image, or why not."""
    columns = list(dict.fromkeys((row.format, row.axes) for row in rows))
    found = {(row.model, row.format, row.axes): row for row in rows}
    header = ["Model", "Input", *(f"{HEADINGS[format]}, dynamic {axes or 'nothing'}" for format, axes in columns)]
    lines = []
    for model in [name for name in VARIANTS if name in {row.model for row in rows}]:
        own = [found.get((model, *column)) for column in columns]
        size = next(row.input for row in own if row)
        lines.append([f"`{model}`", size, *("—" if row is None else _cell(row) for row in own)])
    said = sorted({row.versions for row in rows})
    return "\n".join([*(f"Measured with {line}." for line in said), "", markdown_table(header, lines)])


def families(rows: list[Row]) -> str:
    """Say for which models each kind of export holds."""
    lines = []
    for format, axes in dict.fromkeys((row.format, row.axes) for row in rows):
        own = [row for row in rows if (row.format, row.axes) == (format, axes)]
        good, bad = ([row.model for row in own if bool(row.failure) is failed] for failed in (False, True))
        lines.append(f"{HEADINGS[format]} with dynamic {axes or 'nothing'} holds for: {', '.join(good) or 'none'}")
        lines += [f"  and not for: {', '.join(bad)}"] if bad else []
    return "\n".join(lines)


def read_rows(path: Path) -> list[Row]:
    """Read what earlier sweeps wrote, nothing where there is no file.

    Raises:
        UserError: it is another table.
    """
    check_table(path, COLUMNS)
    if not path.exists():
        return []
    numbers = ("error", "spread", "seconds", "megabytes")
    rows = []
    with path.open(newline="", encoding="utf-8-sig") as file:
        for number, line in enumerate(csv.DictReader(file), start=2):
            try:
                if len([value for value in line.values() if value is not None]) != len(COLUMNS) or None in line:
                    raise ValueError(f"expected {count_of(len(COLUMNS), 'entry', 'entries')}")
                values: dict[str, Any] = {k: (float(v) if v else None) if k in numbers else v for k, v in line.items()}
                rows.append(Row(**values))
            except (TypeError, ValueError) as error:
                raise UserError(f"{path}, row {number}: {error}; fix it, or name another --results-csv") from error
    return rows


def randomise(model: nn.Module, shape: Shape) -> nn.Module:
    """Draw what is constant in a new model, so that each of its branches and the image count; in place.

    Batch norms get the statistics of random images: without, what a deep model does to its input would fade. Those that
    exports are compared with are among them, for what the model does to others can explode, rounding errors with it.
    """
    generator = torch.Generator().manual_seed(0)
    norms = [module for module in model.modules() if isinstance(module, BatchNorm)]
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.ndim == 1 and name.endswith(("weight", "gamma")):
                parameter.uniform_(0.5, 1.0, generator=generator)
            elif parameter.ndim == 1:
                parameter.normal_(0.0, 0.1, generator=generator)
        if norms:
            for norm in norms:
                norm.momentum = 1.0
            others = torch.randn(12, *shape.size, generator=generator)
            model.train()(torch.cat([*shape.images()[:2], others]))  # further ones of the shape have other sizes
    return model.eval()


def _in_its_own_process(name: str, axes: str, config: ExportConfig) -> list[Row]:
    """Export one model; where it takes too much memory only that process is killed."""
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
        try:
            return pool.submit(_export_one, name, axes, config).result()
        except BrokenProcessPool:
            failure = "the process was killed, for which too little memory is the usual reason"
            return [_row(name, format, "", axes, failure=failure) for format in config.files.format]


def _export_one(name: str, axes: str, config: ExportConfig) -> list[Row]:
    torch.set_num_threads(1)
    torch.manual_seed(0)
    model: Any = timm.create_model(name)
    size = config.input.input_size or (
        3,
        *([config.input.img_size] * 2 if config.input.img_size else model.pretrained_cfg["input_size"][1:]),
    )
    shape = shape_of(config.files, size)
    model = randomise(model, shape)
    reference = Reference.of(model, shape)
    if not config.files.no_fuse:
        model = visionzoo.fuse(model)
    rows = []
    sides = "x".join(map(str, shape.size[1:]))
    for format in config.files.format:
        with TemporaryDirectory() as folder:
            path = Path(folder) / (name + FORMATS[format].suffix)
            try:
                file = export(model, path, format, shape, reference, opset=config.files.opset)
            except UserError as error:
                rows.append(_row(name, format, sides, axes, failure=str(error)))
                continue
            numbers = {key: getattr(file, key) for key in ("error", "spread", "seconds", "megabytes")}
            rows.append(_row(name, format, sides, axes, **numbers))
    return rows


def _row(model: str, format: str, input: str, axes: str, *, failure: str = "", **numbers: float) -> Row:
    said = {"visionzoo": visionzoo.__version__, **versions(), "Python": python_version()}
    used = ", ".join(f"{name} {number}" for name, number in said.items())
    values: dict[str, Any] = dict.fromkeys(("error", "spread", "seconds", "megabytes"))
    values |= {key: float(f"{value:.4g}") for key, value in numbers.items()}
    return Row(model, format, input, axes, **values, failure=" ".join(failure.split()), versions=used)


def _line(row: Row) -> str:
    result = row.failure or f"error {row.error:.1e} of {row.spread:.2g}, {row.seconds:.0f} s, {row.megabytes:.0f} MB"
    return f"{row.model} {row.format}: {result}"


def _cell(row: Row) -> str:
    return f"no: {row.failure}" if row.failure else f"{row.error:.1e} of {row.spread:.2g}"
