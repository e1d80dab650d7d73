"""The implementations of an operation on one problem: inputs, what is called, and how results are compared."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from visionzoo.benchmark.baselines import Inputs, Maker
from visionzoo.benchmark.cases import Case, Measurement, Run, Settings
from visionzoo.benchmark.timing import Cost
from visionzoo.testing import relative_error

FORWARD, BOTH = "forward", "forward+backward"


@dataclass(frozen=True)
class Implementation:
    """An implementation in a case.

    Args:
        make: makes the function from the case's inputs.
        same: whether it computes what our reference computes; its error is then measured.
        rearrange: gives it inputs in a layout of its own, made before the clock starts.
    """

    make: Maker
    same: bool = True
    rearrange: Callable[[Inputs], Inputs] | None = None


class Draw:
    """Draws the tensors of a case: `normal(*shape)`, always the same ones on a kind of device."""

    def __init__(self, batch: int, dtype: torch.dtype, device: torch.device):
        self.batch = batch
        self.dtype = dtype
        self.device = device
        self.generator = torch.Generator(device).manual_seed(0)

    def __call__(self, *shape: int, scale: float = 1.0, mean: float = 0.0) -> Tensor:
        """Return normal numbers that require gradients."""
        x = torch.randn(shape, device=self.device, generator=self.generator) * scale + mean
        return x.to(self.dtype).requires_grad_()


class Problem:
    """One problem of an operation: its tensors, drawn on first use, and what is measured of each implementation.

    Args:
        settings: of the run.
        name: of the case.
        batch: samples, where the settings do not say otherwise.
        shape: for readers.
        draw: draws the inputs, which the functions take by name.
        implementations: implementations by name; errors are measured against "visionzoo-reference" in float64, on the
            first sample.
        costs: from batch and bytes a number to the least work of each measure; what is measured are its keys.
        shared: inputs that do not have the batch as their first axis.
    """

    def __init__(
        self,
        settings: Settings,
        name: str,
        batch: int,
        shape: str,
        draw: Callable[[Draw], Inputs],
        implementations: Mapping[str, Implementation],
        costs: Callable[[int, int], dict[str, Cost]],
        shared: tuple[str, ...] = (),
    ):
        self.settings = settings
        self.name = name
        self.batch = settings.batch or batch
        self.shape = shape
        self.implementations = implementations
        self.shared = shared
        self.dtype = settings.low_dtype
        self.costs = costs(self.batch, self.dtype.itemsize)
        self._draw = draw
        self._inputs: Inputs | None = None
        self._expected: dict[str, tuple[list[Tensor], float]] = {}  # measure -> values, error that is allowed

    def case(self, tokens: int) -> Case:
        """Return the case with its measurements."""
        measurements = [
            Measurement(name, measure, partial(self.prepare, name, measure), replay=True)
            for name in self.implementations
            for measure in self.costs
        ]
        return Case(
            self.name,
            self.batch,
            self.shape,
            "NHWC",
            str(self.dtype).removeprefix("torch."),
            measurements,
            tokens,
            self.costs,
            self.close,
        )

    def close(self) -> None:
        """Let go of the tensors."""
        self._inputs = None
        self._expected.clear()

    def prepare(self, name: str, measure: str) -> Run:
        """Make one implementation ready."""
        implementation, inputs = self.implementations[name], self.inputs()
        if implementation.rearrange is not None:
            inputs = {key: value.detach().requires_grad_() for key, value in implementation.rearrange(inputs).items()}
        function = implementation.make(inputs)
        run = Run(
            self.call(function, inputs, measure),
            fixed_bytes=sum(value.nbytes for value in inputs.values()),
        )
        if implementation.same:
            run.check = partial(self.check, measure)
        return run

    def inputs(self) -> Inputs:
        """Return the tensors of the case."""
        if self._inputs is None:
            self._inputs = self._draw(Draw(self.batch, self.dtype, self.settings.device))
        return self._inputs

    def call(self, function: Callable[..., Any], inputs: Inputs, measure: str) -> Callable[[], list[Tensor]]:
        """Return the call that is timed; it gives the outputs, or the gradients of the inputs that can have some."""
        if measure == FORWARD:
            plain = {name: value.detach() for name, value in inputs.items()}

            def forward() -> list[Tensor]:
                with torch.no_grad():
                    return _several(function(**plain))

            return forward
        leaves = [value for value in inputs.values() if value.requires_grad]
        upstream: list[Tensor] = []

        def both() -> list[Tensor]:
            outs = _several(function(**inputs))
            if not upstream:
                upstream.extend(_upstream(out, self.dtype) for out in outs)
            return list(torch.autograd.grad(outs, leaves, upstream, allow_unused=True))  # SDPA has no use for a bias

        return both

    def check(self, measure: str, values: list[Tensor]) -> tuple[float, float]:
        """Compare the first sample with our reference in float64; return the relative error and the one allowed.

        Allowed is ten times the error of the reference in the dtype that is measured, 1e-3 at least: this tells
        whether both compute the same thing, how exactly they do is for the tests of the kernels.
        """
        if measure not in self._expected:
            exact = self._reference(measure, torch.float64)
            rounded = self._reference(measure, self.dtype)
            self._expected[measure] = exact, max(1e-3, 10 * _error(rounded, exact))
        expected, limit = self._expected[measure]
        return _error(self._first(values, measure), expected), limit

    def _first(self, values: list[Tensor], measure: str) -> list[Tensor]:
        """Leave only the first sample of results; gradients of shared inputs, sums over all samples, are left out."""
        if measure == BOTH:
            names = [name for name, value in self.inputs().items() if value.requires_grad]
            values = [value for name, value in zip(names, values, strict=True) if name not in self.shared]
        return [value.detach()[:1] for value in values]

    def _reference(self, measure: str, dtype: torch.dtype) -> list[Tensor]:
        inputs: Inputs = {}
        for name, value in self.inputs().items():
            first = (value if name in self.shared else value[:1]).detach()
            inputs[name] = first.to(dtype).requires_grad_() if value.requires_grad else first
        function = self.implementations["visionzoo-reference"].make(inputs)
        return self._first(self.call(function, inputs, measure)(), measure)


def _several(out: Tensor | tuple[Tensor, ...]) -> list[Tensor]:
    return list(out) if isinstance(out, tuple) else [out]


def _upstream(out: Tensor, dtype: torch.dtype) -> Tensor:
    """Return a gradient of an output: normal numbers of `dtype`, the same for the first sample of any batch."""
    generator = torch.Generator(out.device).manual_seed(1)
    shape = out.shape[1:]
    first = torch.randn(shape, device=out.device, generator=generator)
    rest = torch.randn((out.shape[0] - 1, *shape), device=out.device, generator=generator)
    return torch.cat([first[None], rest]).to(dtype).to(out.dtype)


def _error(values: list[Tensor], expected: list[Tensor]) -> float:
    """Largest relative error over pairs of tensors; for integers the share that differs."""
    return max(
        relative_error(value, wanted) if wanted.is_floating_point() else float((value != wanted).double().mean())
        for value, wanted in zip(values, expected, strict=True)
    )
