"""Cases of whole models: ours against the authors' or timm's, with the same weights, images, dtype and layout.

Modes, each a case of every pair:

- agreement: no clock; logits in eval mode and the image's gradient in train mode agree in float64.
- eager: inference in the low dtype, channels-last, batch 256.
- autocast: inference in float32 under autocast to bfloat16, contiguous NCHW, batch 128.
- training: forward, cross entropy and backward under autocast to bfloat16, contiguous NCHW, batch 128; no optimizer.
- compiled: as eager, both by torch.compile(mode="reduce-overhead"), that is with CUDA graphs, and ours also by
  `visionzoo.optimize_for_inference`.
- latency: one image in the low dtype, channels-last, from the call to the finished result.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import timm
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import visionzoo
from visionzoo.benchmark.baselines import biformer_authors
from visionzoo.benchmark.cases import Absent, Case, Measurement, Run, Settings
from visionzoo.models._registry import FAMILIES, VARIANTS
from visionzoo.testing import relative_error

OURS = "visionzoo"


@dataclass(frozen=True)
class Pair:
    """A model of ours and the same network by others, where there is one.

    Args:
        ours: name in the registry.
        whose: "authors" or "timm"; empty where no other is measured.
        theirs: name of the factory in the authors' code, or timm's name.
        same_head: False where the heads differ, so that features are compared and not logits.
        options: of their factory, to have the same network.
    """

    ours: str
    whose: str = ""
    theirs: str = ""
    same_head: bool = True
    options: Mapping[str, Any] = field(default_factory=dict)

    @property
    def name(self) -> str:
        """Name of the cases."""
        return self.ours.removeprefix("zoo_")


# What is looked at first comes first: a run may be stopped at any time.
PAIRS = [
    Pair("zoo_biformer_t", "authors", "biformer_tiny"),
    Pair("zoo_davit_t", "timm", "davit_tiny"),
    Pair("zoo_halonet_50ts", "timm", "halonet50ts"),
    Pair("zoo_levit_128s", "timm", "levit_128s"),
    Pair("zoo_shvit_s1", "timm", "shvit_s1"),
    Pair("zoo_poolformer_s12", "timm", "poolformer_s12", same_head=False),  # timm pools before the last norm
    Pair("zoo_swin_t", "timm", "swin_tiny_patch4_window7_224", options={"drop_path_rate": 0.0}),  # 0.1 by itself
    Pair("zoo_pvtv2_b1", "timm", "pvt_v2_b1"),
    Pair("zoo_levit_256", "timm", "levit_256"),
    Pair("zoo_shvit_s4", "timm", "shvit_s4"),
    Pair("zoo_biformer_s", "authors", "biformer_small"),
    Pair("zoo_biformer_b", "authors", "biformer_base"),
    Pair("zoo_davit_s", "timm", "davit_small"),
    Pair("zoo_poolformer_s24", "timm", "poolformer_s24", same_head=False),
]


@dataclass(frozen=True)
class Mode:
    """What is timed of a pair; `ways` are suffixes of implementations, ours and theirs."""

    batch: int
    measure: str
    autocast: bool = False
    ours: tuple[str, ...] = ("",)
    theirs: tuple[str, ...] = ("",)


MODES = {
    "agreement": Mode(2, "agreement", theirs=()),
    "eager": Mode(256, "inference"),
    "autocast": Mode(128, "inference", autocast=True),
    "training": Mode(128, "training", autocast=True),
    "compiled": Mode(256, "inference", ours=("-compiled", "-optimized"), theirs=("-compiled",)),
    "latency": Mode(1, "latency", ours=("", "-optimized"), theirs=("", "-compiled")),
}


def pairs() -> list[Pair]:
    """Return `PAIRS`, and the first variant of each family that is not among them."""
    paired = {family for family, names in FAMILIES.items() for pair in PAIRS if pair.ours in names}
    return [*PAIRS, *(Pair(names[0]) for family, names in FAMILIES.items() if family not in paired)]


def smallest() -> list[Pair]:
    """Return the first pair of each family."""
    return [next(pair for pair in pairs() if pair.ours in names) for names in FAMILIES.values()]


def model_cases(settings: Settings) -> list[Case]:
    """List the cases of all pairs."""
    return [case for pair in pairs() for case in pair_cases(settings, pair)]


def pair_cases(settings: Settings, pair: Pair) -> Iterator[Case]:
    """Yield a case for each mode."""
    twins = Twins(settings, pair)
    for mode_name, mode in MODES.items():
        batch = mode.batch if mode.batch <= 2 else settings.batch or mode.batch
        names = [OURS + way for way in mode.ours] + [pair.whose + way for way in mode.theirs if pair.whose]
        if mode.measure == "agreement" and not pair.whose:
            continue
        size = twins.size
        yield Case(
            f"{pair.name}/{mode_name}",
            batch,
            f"{batch}x3x{size}x{size}",
            "NCHW" if mode.autocast or mode.measure == "agreement" else "channels_last",
            "float64" if mode.measure == "agreement" else twins.dtype_name(mode),
            [
                Measurement(
                    name,
                    mode.measure,
                    partial(twins.prepare, name, mode, batch),
                    items=batch,
                    wall=mode.measure == "latency",
                    timed=mode.measure != "agreement",
                    peak=not name.endswith(("-compiled", "-optimized")),  # graphs have taken their memory before
                    scale=3.0,
                )
                for name in names
            ],
            close=twins.close,
        )


class Twins:
    """The two models of a pair with the same weights, built on first use."""

    def __init__(self, settings: Settings, pair: Pair):
        self.settings = settings
        self.pair = pair
        self.size = VARIANTS[pair.ours].weights.get("input_size", (3, 224, 224))[-1]
        self._models: dict[str, nn.Module] = {}
        self._expected: dict[torch.dtype, tuple[Tensor, float]] = {}  # dtype -> logits, error that is allowed

    def dtype_name(self, mode: Mode) -> str:
        """Say which dtypes a mode computes in."""
        return "autocast bfloat16" if mode.autocast else str(self.settings.low_dtype).removeprefix("torch.")

    def close(self) -> None:
        """Let go of the models."""
        self._models.clear()
        self._expected.clear()

    def prepare(self, name: str, mode: Mode, batch: int) -> Run:
        """Make one implementation ready."""
        if mode.measure == "agreement":
            return Run(self.agree, check=lambda error: (error, 1e-9))
        base = self.ours() if name.startswith(OURS) else self.theirs()
        model, images = copy.deepcopy(base), self.images(batch)
        if mode.measure == "training":
            return self._training(model, images)
        if not mode.autocast:
            model = model.to(self.settings.low_dtype).to(memory_format=torch.channels_last)
            images = images.to(self.settings.low_dtype, memory_format=torch.channels_last)
        model.eval()
        fixed = storage_bytes([*model.parameters(), *model.buffers(), images])
        if name.endswith("-optimized"):
            model = visionzoo.optimize_for_inference(model, dtype=images.dtype, example_input=images)
        elif name.endswith("-compiled"):
            model = torch.compile(model, mode="reduce-overhead", dynamic=False)  # type: ignore[assignment]

        def call() -> Tensor:
            with torch.no_grad(), autocast(images.device, mode.autocast):
                return model(images)

        return Run(call, check=partial(self.check, mode) if self.pair.same_head else None, fixed_bytes=fixed)

    def _training(self, model: nn.Module, images: Tensor) -> Run:
        labels = torch.arange(len(images), device=images.device)
        step = partial(training_step, model.train(), images, lambda out: F.cross_entropy(out, labels))
        return Run(step, fixed_bytes=storage_bytes([*model.parameters(), *model.buffers(), images]))

    def theirs(self) -> nn.Module:
        """Return their model in float32, with weights that leave nothing without influence."""
        if "theirs" not in self._models:
            with torch.device(self.settings.device):
                if self.pair.whose == "authors":
                    create = getattr(biformer_authors("models.biformer"), self.pair.theirs)
                else:
                    create = partial(timm.create_model, self.pair.theirs)
                self._models["theirs"] = disturb(create(**self.pair.options))
        return self._models["theirs"]

    def ours(self) -> nn.Module:
        """Return our model in float32, with their weights where they are there."""
        if OURS not in self._models:
            model = timm.create_model(self.pair.ours, device=self.settings.device)
            try:
                weights = self.theirs().state_dict() if self.pair.whose else None
            except Absent:  # which takes none of our time away
                weights = None
            if weights is None:
                disturb(model)
            else:
                visionzoo.load_weights(model, weights)
            self._models[OURS] = model
        return self._models[OURS]

    def images(self, batch: int) -> Tensor:
        """Draw normal numbers; the first two images are the same for every batch."""
        generator = torch.Generator(self.settings.device).manual_seed(0)
        shapes = [(2, 3, self.size, self.size), (max(batch - 2, 0), 3, self.size, self.size)]
        parts = [torch.randn(shape, device=self.settings.device, generator=generator) for shape in shapes]
        return torch.cat(parts)[:batch]

    def check(self, mode: Mode, logits: Tensor) -> tuple[float, float]:
        """Compare the logits of the first two images with float64; return their relative error and the one allowed.

        Allowed is ten times the error that the other implementation (our own where there is none) has in the low
        dtype, 1e-3 at least. Routing and max pooling choose, so low precision can look at other tokens.
        """
        dtype = torch.bfloat16 if mode.autocast else self.settings.low_dtype
        if dtype not in self._expected:
            base, images = self.theirs() if self.pair.whose else self.ours(), self.images(2)
            with torch.no_grad():  # a copy for each dtype: timm's LeViT keeps its biases from one call to the next
                exact, low = (copy.deepcopy(base).to(d).eval()(images.to(d)) for d in (torch.float64, dtype))
            self._expected[dtype] = exact, max(1e-3, 10 * relative_error(low, exact))
        exact, limit = self._expected[dtype]
        logits = logits[:2].detach()
        return relative_error(logits, exact[: len(logits)]), limit

    def agree(self) -> float:
        """Return the largest relative difference between ours and theirs in float64: logits, gradient of the image."""
        results = []
        for base in (self.theirs(), self.ours()):
            model = copy.deepcopy(base).double()
            images = self.images(2).double().requires_grad_()
            with torch.no_grad():
                values = self._outputs(model.eval(), images)
            trained = self._outputs(model.train(), images)
            upstream = torch.linspace(-1, 1, trained.numel(), dtype=trained.dtype, device=trained.device)
            (gradient,) = torch.autograd.grad(trained, images, upstream.view_as(trained))
            results.append((values, gradient))
        return max(relative_error(ours, theirs) for theirs, ours in zip(*results, strict=True))

    def _outputs(self, model: Any, images: Tensor) -> Tensor:
        return (
            model(images) if self.pair.same_head else model.forward_intermediates(images, intermediates_only=True)[-1]
        )


def disturb(model: nn.Module) -> nn.Module:
    """Add noise to parameters that start at 0 or that scale: unless they act, differences behind them do not show."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            noise = torch.randn(parameter.shape, generator=generator, device="cpu").to(parameter.device)
            if parameter.ndim <= 1:
                parameter.add_(noise, alpha=0.1)
            elif not parameter.any():
                parameter.add_(noise, alpha=0.02)
    return model


def training_step(model: nn.Module, images: Tensor, loss: Callable[[Tensor], Tensor]) -> None:
    """Run forward, loss and backward under autocast to bfloat16, and let go of the gradients."""
    with autocast(images.device, True):
        out = model(images)
        total = loss(out.float())
    total.backward()
    model.zero_grad(set_to_none=True)


def autocast(device: torch.device, enabled: bool) -> torch.autocast:
    """Autocast to bfloat16, or nothing."""
    return torch.autocast(device.type, torch.bfloat16, enabled=enabled)


def storage_bytes(tensors: list[Tensor]) -> int:
    """Bytes that tensors take, shared memory counted once."""
    storages = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors}
    return sum(storages.values())
