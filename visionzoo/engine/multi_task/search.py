"""Which widths a budget of multiply-adds allows, by what each task counts for."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import product

import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from visionzoo.engine.errors import UserError, closest
from visionzoo.engine.multi_task.task import PARTS, by_layers
from visionzoo.slimming import slim

TASKS = ("segmentation", "classification")
STEP = 1 / 8  # between the widths that are tried


@torch.no_grad()
def multiply_adds(network: nn.Module, input_size: Sequence[int]) -> float:
    """Count the multiply-adds of one image of (channels, height, width), as torch's `FlopCounterMode` does."""
    image = torch.zeros(1, *input_size, device=next(network.parameters()).device)
    with FlopCounterMode(display=False) as counter:
        network.eval()(image)
    return counter.get_total_flops() / 2


@dataclass(frozen=True)
class Costs:
    """Multiply-adds of a network at each width of each part, the others at full width.

    Attributes:
        full: at full width.
        saved: by a part at a share.
    """

    full: float
    saved: Mapping[str, Mapping[float, float]]

    def of(self, shares: Mapping[str, float]) -> float:
        """Return the multiply-adds at a share of each part."""
        return self.full - sum(self.saved[part][share] for part, share in shares.items())


def grid(min_width: float) -> list[float]:
    """Return the shares that are tried: the smallest, and the multiples of `STEP` above it."""
    return [min_width, *(k * STEP for k in range(1, round(1 / STEP) + 1) if k * STEP > min_width)]


def measure_costs(network: nn.Module, input_size: Sequence[int], widths: Sequence[float]) -> Costs:
    """Count the multiply-adds at each width of each part, on the network slimmed so."""
    full = multiply_adds(network, input_size)
    saved = {
        part: {
            share: full - multiply_adds(slim(network, by_layers({part: share})), input_size) if share < 1 else 0.0
            for share in widths
        }
        for part in PARTS
    }
    return Costs(full, saved)


def spread_budgets(costs: Costs, widths: Sequence[float], count: int = 5) -> list[float]:
    """Return budgets in equal steps, from what the smallest widths take, rounded up to a thousandth, to 1."""
    least = math.ceil(1000 * costs.of(dict.fromkeys(PARTS, widths[0])) / costs.full) / 1000
    return [round(least + (1 - least) * step / (count - 1), 3) for step in range(count)]


def read_preference(given: Mapping[str, object]) -> dict[str, float]:
    """Return how much each task counts over the one that counts most: 1 where nothing is given.

    Raises:
        UserError: there is no such task, or a weight is not a number above 0.
    """
    for name, weight in given.items():
        if name not in TASKS:
            raise UserError(f"--preference: no task {name!r}{closest(name, TASKS)}; there are {', '.join(TASKS)}")
        if isinstance(weight, bool) or not isinstance(weight, int | float) or not 0 < weight < float("inf"):
            raise UserError(f"--preference {name}: expected a number above 0, got {weight!r}")
    weights = {name: float(given.get(name, 1.0)) for name in TASKS}  # type: ignore[arg-type]
    return {name: weight / max(weights.values()) for name, weight in weights.items()}


def choose_widths(
    budget: float, preference: Mapping[str, float], costs: Costs, widths: Sequence[float]
) -> dict[str, float]:
    """Return a share of each part, of which the multiply-adds keep to a budget.

    The decoder of the task that counts most has some width, those of the others one in proportion to their preference,
    and the encoder the largest that is left. Of these, encoder and first decoder are as wide as they can be together.

    Args:
        budget: multiply-adds at most, over those at full width.
        preference: as `read_preference` returns it.
        costs: of the network.
        widths: shares that are tried, ascending.

    Raises:
        UserError: the smallest widths cost more.
    """
    fitting = []
    for width, encoder in product(widths, widths):
        decoders = {task: min(w for w in widths if w >= width * preference[task] - 1e-9) for task in TASKS}
        shares = {"encoder": encoder, **decoders}
        if costs.of(shares) <= budget * costs.full * (1 + 1e-9):
            fitting.append((min(width, encoder), encoder + width, encoder, shares))
    if not fitting:
        least = costs.of(dict.fromkeys(PARTS, widths[0])) / costs.full
        raise UserError(
            f"--budget {budget:g}: the smallest widths of this network, {widths[0]:g} of all heads and hidden "
            f"channels, take {least:.3f} of its multiply-adds; give that or more, or train with a smaller --min-width"
        )
    return max(fitting, key=lambda found: found[:3])[3]
