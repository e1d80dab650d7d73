"""Cases of training steps: ours against the authors' or timm's, as they are, as CUDA graphs, compiled, and both.

A step is forward, cross entropy and backward under autocast to bfloat16, contiguous NCHW, batch 128, and AdamW's
update. The clock is looked at every eight steps, so that the host may run ahead of the GPU as it does in a training.
Beside it stands what the GPU was busy for in a step: where that is much less, the host launches too slowly.
The last rows are trainings by `visionzoo train` that load images, on one GPU and on two, see
`visionzoo.benchmark.commands`.
Models in which a norm follows a residual sum have these in one launch ("joined") and in two ("apart"), whatever "auto"
takes.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from contextlib import nullcontext
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from visionzoo.benchmark.cases import Absent, Case, Measurement, Run, Settings
from visionzoo.benchmark.commands import prepare_training
from visionzoo.benchmark.models import OURS, PAIRS, Mode, Pair, Twins, autocast, storage_bytes
from visionzoo.graphs import WARMUP, CudaRecorder, TrainingStep
from visionzoo.kernels.dispatch import as_if_paying

MODE = Mode(128, "training", autocast=True)
WAYS = ("", "-graph", "-compiled", "-compiled-graph")
JOINED = ("zoo_biformer_t", "zoo_swin_t", "zoo_pvtv2_b1", "zoo_nat_mini")
JOINED_WAYS = ("-joined-graph", "-apart-graph")
COMMANDED = {  # by the number of GPUs: what is trained by the command, too
    1: ("biformer_t", "davit_t", "pvtv2_b1", "shvit_s1", "levit_128s", "poolformer_s12", "swin_t"),
    2: ("biformer_t",),
}
STEPS = 8  # between two looks at the clock
TRAINED = (*PAIRS, Pair("zoo_nat_mini"))


def training_cases(settings: Settings, pairs: Sequence[Pair] = TRAINED) -> Iterator[Case]:
    """Yield a case for each pair of models."""
    for pair in pairs:
        twins = Twins(settings, pair)
        batch = settings.batch or MODE.batch
        yield Case(
            f"{pair.name}/step",
            batch,
            f"{batch}x3x{twins.size}x{twins.size}",
            "NCHW",
            twins.dtype_name(MODE),
            [
                Measurement(
                    whose + way,
                    MODE.measure,
                    partial(_prepare, twins, whose, way, batch),
                    items=batch,
                    wall=True,
                    calls=STEPS,
                    busy=True,
                    peak=not way,  # graphs have taken their memory before
                    scale=3.0,
                )
                for whose in filter(None, (OURS, pair.whose))
                for way in (WAYS + JOINED_WAYS if whose == OURS and pair.ours in JOINED else WAYS)
            ]
            + [
                Measurement(
                    f"{OURS}-command{f'-{gpus}-gpus' * (gpus > 1)}",
                    MODE.measure,
                    partial(prepare_training, settings, pair.ours, batch, gpus),
                    items=batch,
                    tells=True,
                )
                for gpus, names in COMMANDED.items()
                if pair.name in names
            ],
            close=twins.close,
        )


def _prepare(twins: Twins, whose: str, way: str, batch: int) -> Run:
    device, graph = twins.settings.device, way.endswith("-graph")
    if graph and device.type != "cuda":
        raise Absent(f"CUDA graphs need a CUDA device, this is {device}")
    model = copy.deepcopy(twins.ours() if whose == OURS else twins.theirs()).train()
    images = twins.images(batch)
    labels = torch.arange(batch, device=images.device) % 10
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-5, weight_decay=0.05)
    called: nn.Module = torch.compile(model, dynamic=False) if "-compiled" in way else model  # type: ignore[assignment]

    def forward(images: Tensor, labels: Tensor) -> Tensor:
        joined = as_if_paying("residual_norm", "-joined" in way) if way in JOINED_WAYS else nullcontext()
        with joined, autocast(images.device, True):
            return F.cross_entropy(called(images).float(), labels)

    step = TrainingStep(forward, optimizer, recorder=CudaRecorder(images.device) if graph else None)
    if graph:
        while step.recorded == 0:  # the warm-up, and the recording
            step(images, labels)
        for _ in range(WARMUP):  # and that of the update
            step(images, labels)
    return Run(
        partial(step, images, labels), fixed_bytes=storage_bytes([*model.parameters(), *model.buffers(), images])
    )
