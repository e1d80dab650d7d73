"""Cases of small maps: Triton's kernels beside torch's operation, and the table of limits that "auto" goes by.

Calls follow each other as in a model and the clock is looked at after twenty, when the last result is there. Beside
them stands what the GPU needs for a call, as a CUDA graph. All maps have 128 channels; a limit counts numbers.
"""

from __future__ import annotations

import csv
import datetime
import io
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch

from visionzoo.benchmark import operations
from visionzoo.benchmark.cases import Case, Measurement, Run, Settings
from visionzoo.benchmark.host import DEPTH, HEADS, layer_norm_case
from visionzoo.benchmark.results import Row
from visionzoo.engine.checkpoints import make_folder, write_atomically
from visionzoo.engine.errors import UserError
from visionzoo.kernels.small_maps import Limit, always, read_table

DIM = HEADS * DEPTH
SIZES = ((1, 7), (1, 14), (1, 28), (1, 56), (16, 14), (64, 14))  # batch, side; from 6,272 to 1.6 million numbers
DTYPES = (torch.bfloat16, torch.float32)
TRITON, LIBRARY = "visionzoo-triton", "visionzoo-library"
CALLS = 20  # between two looks at the clock
MOST_BUSY = 0.5  # share of its time in which torch's operation may keep the GPU busy for the host to be the limit


def small_cases(settings: Settings) -> list[Case]:
    """List all cases of small maps, in bfloat16 and float32 unless the settings name a dtype."""
    cases = []
    for dtype in DTYPES if settings.dtype is None else (settings.dtype,):
        for batch, side in SIZES:
            own = replace(settings, dtype=dtype, batch=settings.batch or batch)
            cases += [_of_host(case) for case in _operations(own, side)]
    return cases


def _operations(settings: Settings, side: int) -> Iterator[Case]:
    def name(operation: str) -> str:
        return f"small-{operation}/{settings.batch}x{side}x{side}-{str(settings.dtype).removeprefix('torch.')}"

    sizes: dict[str, Any] = {"batch": settings.batch, "side": side, "heads": HEADS, "depth": DEPTH}
    yield layer_norm_case(settings, name("layer_norm"), side, DIM)
    yield operations.group_norm_case(settings, name("group_norm"), side, DIM)
    yield operations.residual_norm_case(settings, name("residual_norm"), side, DIM, batch=1)
    for kernel in (3, 7):
        yield operations.depthwise_case(settings, name(f"depthwise_conv-k{kernel}"), side, DIM, kernel, "itself")
    yield operations.channel_case(settings, name("channel_attention"), side, HEADS)
    for feature_map in ("relu", "focused"):
        yield operations.linear_case(
            settings, name(f"linear_attention-{feature_map}"), **sizes, feature_map=feature_map
        )
    yield operations.score_case(settings, name("score_attention-sigmoid"), **sizes, normalizer="sigmoid")
    yield operations.window_case(settings, name("routed_attention-windows"), side, HEADS)
    yield operations.routed_case(settings, name("routed_attention-routed"), **sizes, regions=7, topk=4)
    yield operations.routing_case(settings, name("route_regions"), side=side, heads=HEADS, topk=4)
    yield operations.neighborhood_case(settings, name("neighborhood_attention-k7"), **sizes, kernel_size=7)
    yield operations.halo_case(settings, name("halo_attention"), side, HEADS, DEPTH)


def _of_host(case: Case) -> Case:
    """Leave Triton's kernels, and what "auto" takes for them where it takes torch's operation."""
    prepare: dict[str, Callable[[Measurement], Callable[[], Run]]] = {
        TRITON: lambda own: own.prepare,
        "visionzoo": lambda own: partial(_of_torch, own.prepare),
    }
    measurements = [
        replace(
            measurement,
            implementation=LIBRARY if measurement.implementation == "visionzoo" else TRITON,
            prepare=prepare[measurement.implementation](measurement),
            wall=True,
            calls=CALLS,
            scale=0.1,  # there are many, and all are short
            peak=False,
        )
        for measurement in case.measurements
        if measurement.implementation in prepare
    ]
    return replace(case, measurements=measurements, costs={})


def _of_torch(prepare: Callable[[], Run]) -> Run:
    run = prepare()
    return replace(run, call=always(run.call))


def limits(rows: Sequence[Row], command: str) -> list[Limit]:
    """Say up to how many numbers torch's operation was the faster, for each GPU, operation, measure and dtype.

    It was so on maps of that many numbers and on all smaller ones, in every case of the operation: its calls took less
    time, of which the GPU was busy for at most half, and both computed the same. Where one of the two has no time, for
    whatever reason, nothing is known of maps of that many numbers and more.
    """
    groups: dict[tuple[str, str, str, str], dict[int, list[tuple[Row, Row]]]] = {}
    pairs: dict[tuple[str, str], dict[str, Row]] = {}
    for row in rows:
        pairs.setdefault((row.case, row.measure), {})[row.implementation] = row
    for (case, measure), pair in pairs.items():
        if set(pair) != {TRITON, LIBRARY}:
            continue
        library, triton = pair[LIBRARY], pair[TRITON]
        operation = case.split("/")[0].removeprefix("small-").split("-")[0]
        numbers = library.all_tokens * DIM
        group = groups.setdefault((library.gpu, operation, measure, library.dtype), {})
        group.setdefault(numbers, []).append((library, triton))
    today = datetime.date.today().isoformat()
    found = []
    for key, sizes in groups.items():
        measured = [n for n in sorted(sizes) if all(_us(row) is not None for pair in sizes[n] for row in pair)]
        if not measured or measured[0] != min(sizes):
            continue  # not even the smallest maps
        most = 0
        for numbers in sorted(sizes):
            if numbers not in measured or not all(_is_faster(*pair) for pair in sizes[numbers]):
                break
            most = numbers
        library, triton = max(sizes[most or measured[0]], key=lambda pair: (_us(pair[0]) or 0) / (_us(pair[1]) or 1))
        times = round(_us(library) or 0, 1), round(_us(triton) or 0, 1)
        found.append(Limit(*key, most, *times, library.torch, library.triton, library.visionzoo, today, command))
    return found


def _us(row: Row) -> float | None:
    return 1e3 * row.median_ms if row.status == "ok" and row.agrees and row.median_ms is not None else None


def _is_faster(library: Row, triton: Row) -> bool:
    ours, theirs, busy = _us(triton), _us(library), library.replayed_ms
    return (
        ours is not None
        and theirs is not None
        and theirs < ours
        and busy is not None
        and 1e3 * busy <= MOST_BUSY * theirs
    )


def write_table(path: Path, found: Sequence[Limit]) -> None:
    """Put limits into a table, instead of those that it has of the same GPUs.

    Raises:
        UserError: if the file is no such table.
    """
    try:
        kept = read_table(path) if path.exists() else []
    except ValueError as error:
        raise UserError(str(error)) from None
    gpus = {limit.gpu for limit in found}
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(Limit._fields)
    writer.writerows([*(limit for limit in kept if limit.gpu not in gpus), *found])
    make_folder(path.parent)
    write_atomically(path, lambda file: file.write(text.getvalue().encode()))
