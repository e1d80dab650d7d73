"""What every gate is: [B, H, W, C] -> [B, H, W, C], any height and width."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from visionzoo.kernels.precision import without_autocast
from visionzoo.layers.maps import MapLayer


class Gate(MapLayer):
    """Base of the gates; `forward` of each begins with `check_input`.

    Args:
        dim: channels C of the map.
    """

    ADAPTER = "gates.GateNCHW"

    @classmethod
    def check_positive(cls, **numbers: float) -> None:
        """Check numbers that must be positive.

        Raises:
            ValueError: if one is not.
        """
        for name, number in numbers.items():
            if number <= 0:
                raise ValueError(f"{cls.__name__}: {name} must be positive, got {name}={number}")

    def check_divides(self, width: int, of: str = "dim", **counts: int) -> None:
        """Check counts that cut `width` channels into equal parts; `of` is the name of the width.

        Raises:
            ValueError: if one does not divide it.
        """
        for name, count in counts.items():
            if count < 1 or width % count:
                raise ValueError(
                    f"{type(self).__name__}: {name} must divide {of}, got {of}={width} and {name}={count}; "
                    f"pass one of {[n for n in range(1, width + 1) if width % n == 0]} for {name}"
                )

    @classmethod
    def reduced(cls, reduction: float, width: int, name: str = "dim") -> int:
        """Return the width of a bottleneck of `width` channels (`name` in messages), rounded down.

        Raises:
            ValueError: if nothing remains of the width.
        """
        cls.check_positive(**{name: width}, reduction=reduction)
        if width < reduction:
            raise ValueError(
                f"{cls.__name__}: nothing remains of {name}={width} channels with {reduction=}; "
                f"pass a reduction of at most {width}"
            )
        return int(width // reduction)


def softmax_over_positions(scores: Tensor) -> Tensor:
    """Return the softmax of [B, N, ...] over N, float32 at least."""
    return scores.to(torch.promote_types(scores.dtype, torch.float32)).softmax(1)


def pool_by_scores(scores: Tensor, values: Tensor) -> Tensor:
    """Return the mean of values [B, N, G, D] weighted by the softmax of scores [B, N, G] over N: [B, G, D]."""
    weights = softmax_over_positions(scores)
    with without_autocast(values.device):
        return torch.einsum("bng,bngd->bgd", weights, values.to(weights.dtype)).to(values.dtype)


def init_by_inputs(*layers: nn.Linear) -> None:
    """Initialize weights by He's normal distribution for the inputs' number, as for layers before ReLUs."""
    for layer in layers:
        nn.init.kaiming_normal_(layer.weight, mode="fan_in", nonlinearity="relu")
