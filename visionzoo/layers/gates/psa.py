"""Polarized self-attention (Liu et al., arXiv:2107.00782), parallel and sequential.

Facts from semantic-segmentation/network/PSA.py of https://github.com/DeLightCMU/PSA at 20e307a (Apache-2.0); the code
here is our own. As there, no softmax is taken over the channels of the spatial query, which the paper's formula has.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from visionzoo.layers.gates.base import Gate, init_by_inputs, pool_by_scores, softmax_over_positions


class PsaGate(Gate):
    """Scale channels by what attention over the positions gathers, and positions by a query of the whole map.

    "p", parallel: both gates see the input and the results are added. "s", sequential: the spatial gate sees the result
    of the channel gate. Either is O(N·C²). They differ in more than order: the channel gate of "s" has a bottleneck
    with layer norm; the softmax over positions is taken of the spatial scores in "p", of each channel of the spatial
    values in "s". Softmaxes and their sums are float32 at least, the rest has the dtype of the input or of autocast.

    Linear layers without bias come after means over positions where the authors have them before, which saves work.

    Args:
        dim: channels C, at least 2, and 2·`reduction` for "s".
        variant: "p" or "s".
        reduction: C / 2 over the width of the bottleneck of "s".

    Raises:
        ValueError: if the variant is unknown, or nothing remains of the channels.

    >>> import torch
    >>> PsaGate(64, variant="s")(torch.randn(1, 5, 7, 64)).shape
    torch.Size([1, 5, 7, 64])
    """

    def __init__(self, dim: int, *, variant: str = "p", reduction: float = 4):
        super().__init__(dim)
        if variant not in ("p", "s"):
            raise ValueError(f"PsaGate: variant must be 'p' (parallel) or 's' (sequential), got {variant=}")
        self.variant = variant
        half = self.reduced(2, dim)
        self.channel_q = nn.Linear(dim, 1, bias=False)
        self.channel_v = nn.Linear(dim, half, bias=False)
        if variant == "p":
            self.channel_up: nn.Module = nn.Linear(half, dim, bias=False)
        else:
            hidden = self.reduced(reduction, half, "half of dim")
            self.channel_up = nn.Sequential(
                nn.Linear(half, hidden), nn.LayerNorm(hidden), nn.ReLU(), nn.Linear(hidden, dim)
            )
        self.spatial_q = nn.Linear(dim, half, bias=False)
        self.spatial_v = nn.Linear(dim, half, bias=False)
        init_by_inputs(self.channel_q, self.channel_v, self.spatial_q, self.spatial_v)

    def forward(self, x: Tensor) -> Tensor:
        """[B, H, W, C] to [B, H, W, C]."""
        self.check_input(x)
        channels = self._channels(x)
        if self.variant == "p":
            return x * (channels + self._positions(x))
        x = (x * channels).to(x.dtype)
        return x * self._positions(x)

    def _channels(self, x: Tensor) -> Tensor:
        """Factors of the channels, [B, 1, 1, C]."""
        tokens = x.flatten(1, 2)
        context = pool_by_scores(self.channel_q(tokens), tokens.unsqueeze(2))
        return torch.sigmoid(self.channel_up(self.channel_v(context))).unsqueeze(1)

    def _positions(self, x: Tensor) -> Tensor:
        """Factors of the positions, [B, H, W, 1]."""
        tokens = x.flatten(1, 2)
        query = self.spatial_q(tokens.mean(1)).unsqueeze(-1)  # [B, C / 2, 1]
        values = self.spatial_v(tokens)
        if self.variant == "p":
            scores = softmax_over_positions(values @ query)
        else:
            values = softmax_over_positions(values)
            scores = values @ query.to(values.dtype)
        return torch.sigmoid(scores).to(x.dtype).unflatten(1, x.shape[1:3])
