"""Gated attention of one head over moving averages of the sequence of tokens (Mega, arXiv:2209.10655)."""

from __future__ import annotations

from math import sqrt

import torch
import torch.nn.functional as F
from timm.layers import to_2tuple
from torch import Tensor, nn

from visionzoo.kernels.precision import without_autocast
from visionzoo.layers.fourier import irfft2, rfft2
from visionzoo.layers.mixers.base import Mixer
from visionzoo.layers.position import resize_table


class MovingAverage(nn.Module):
    """Damped exponential moving averages of a sequence, forwards and backwards, several for each channel, summed.

    y_t = Σ_{s ≤ t} a_{t-s}·x_s + Σ_{s > t} b_{s-t-1}·x_s, where a and b are sums of decaying exponentials with learned
    weights and rates; then SiLU of y plus x times a learned factor. By Fourier transforms, O(N·C·log N).

    Args:
        dim: channels C.
        num_averages: exponentials of each channel and direction.
    """

    def __init__(self, dim: int, num_averages: int):
        super().__init__()
        shape = (2 * dim, num_averages, 1)  # forwards, then backwards
        self.alpha = nn.Parameter(0.2 * torch.randn(shape))
        self.delta = nn.Parameter(0.2 * torch.randn(shape))
        signs = 1.0 - 2 * (torch.arange(num_averages) % 2)
        self.beta = nn.Parameter(signs[:, None] + 0.02 * torch.randn(shape))
        self.gamma = nn.Parameter(torch.randn(shape[:2]))
        self.omega = nn.Parameter(torch.randn(dim))

    def forward(self, x: Tensor) -> Tensor:
        """[B, N, C] to [B, N, C]; transforms are float32 at least."""
        count = x.shape[1]
        with without_autocast(x.device):
            spectrum = rfft2(F.pad(x, (0, 0, 0, count)).unsqueeze(1)) * rfft2(self.kernel(count)[None, None])
            y = irfft2(spectrum, 2 * count)[:, 0, :count] * (2 * count) ** 0.5  # the transforms are orthonormal
        return F.silu(y.to(x.dtype) + x * self.omega)

    def kernel(self, count: int) -> Tensor:
        """Weights [2N, C]: of tokens before, by their distance, then of those behind, the next one last."""
        wide = torch.promote_types(self.alpha.dtype, torch.float32)
        alpha, delta, beta, gamma = (t.to(wide) for t in (self.alpha, self.delta, self.beta, self.gamma))
        alpha, delta = alpha.sigmoid(), delta.sigmoid()
        steps = torch.arange(count, device=alpha.device, dtype=wide)
        powers = torch.exp(steps * torch.log(1 - alpha * delta))  # [2C, K, N]
        forwards, backwards = ((alpha * beta * gamma.unsqueeze(-1) * powers).sum(1) * gamma.shape[1] ** -0.5).chunk(2)
        return torch.cat([forwards, backwards.flip(-1)], 1).mT


class SequenceBias(nn.Module):
    """A learned number for each distance of two tokens in the sequence of a map's rows; any map.

    The table is made for maps of one size. For others it is read as a table of offsets on that map, and interpolated.

    Args:
        size: height and width of the map.
    """

    def __init__(self, size: tuple[int, int]):
        super().__init__()
        self.size = size
        self.table = nn.Parameter(0.02 * torch.randn(2 * size[0] * size[1] - 1))

    def forward(self, size: tuple[int, int] | torch.Size) -> Tensor:
        """Bias [N, N] of queries and keys of a map of (height, width) = `size`."""
        offsets = _offsets(self.table, self.size, size)
        places = (torch.arange(length, device=offsets.device) for length in size)
        rows, columns = (at - at[:, None] + length - 1 for at, length in zip(places, size, strict=True))  # key - query
        return offsets[rows][:, :, columns].transpose(1, 2).flatten(2).flatten(0, 1)

    def fit_weight(self, name: str, weight: Tensor) -> Tensor:
        """Bring a checkpoint's table, of a square map of another size, to the size of ours.

        A distance is that of several offsets; the one of the fewest columns counts.
        """
        side = round(((weight.shape[0] + 1) // 2) ** 0.5)
        if 2 * side * side - 1 != weight.shape[0]:
            raise ValueError(f"{name}: expected the distances on a square map, got {tuple(weight.shape)}")
        height, width = self.size
        offsets = _offsets(weight, (side, side), self.size)
        distance = torch.arange(1 - height * width, height * width, device=weight.device)
        rows = torch.round(distance / width).long().clamp(1 - height, height - 1)
        return offsets[rows + height - 1, distance - rows * width + width - 1]


def _offsets(table: Tensor, old: tuple[int, int], new: tuple[int, int] | torch.Size) -> Tensor:
    """Read a table of distances as one of offsets on a map, key minus query: [2H - 1, 2W - 1] with (H, W) = `new`."""
    rows, columns = (torch.arange(1 - length, length, device=table.device) for length in old)
    offsets = table[rows[:, None] * old[1] + columns + old[0] * old[1] - 1]
    size = (2 * new[0] - 1, 2 * new[1] - 1)
    return resize_table(offsets[None, ..., None], size, "bilinear", align_corners=True)[0, ..., 0]


def _laplace(scores: Tensor) -> Tensor:
    return 0.5 * (1 + torch.erf((scores - 0.707107) / (0.282095 * sqrt(2))))


class MovingAverageMixer(Mixer):
    """Every token attends to every token, by what moving averages say of their surroundings.

        y = gate(x, f(q kᵀ + b) v), q and k from damped moving averages of x

    Time: O(N²·C); memory: O(N²).

    Tokens are a sequence, row by row. Averages, scores and attention are float32 at least. The attention has one head
    and no softmax unless asked for: every pair has a weight by itself. What a token takes from others replaces it as
    far as a gate says; so the mixer takes the map before the norm too, and its output is to be added to that.

    Facts from https://github.com/XuezheMax/mega-image at df6b22f (MIT).

    Args:
        dim: channels C.
        num_heads: ignored: there is one.
        value_ratio: channels of the values over C.
        qk_dim: channels of queries and keys.
        num_averages: moving averages of each channel and direction.
        attention: what makes weights of scores: "laplace", "relu2" (squared ReLU), both of scores over N, or "softmax".
        position_bias: add a learned number for each distance in the sequence to the scores.
        map_size: side of the maps that these are made for, in tokens, or (height, width); others interpolate.

    Raises:
        ValueError: if a number is not positive, or the attention is another.

    >>> import torch
    >>> MovingAverageMixer(64)(torch.randn(1, 5, 7, 64)).shape
    torch.Size([1, 5, 7, 64])
    """

    ATTENTION = ("laplace", "relu2", "softmax")
    sees_input = True

    def __init__(
        self,
        dim: int,
        num_heads: int | None = None,
        *,
        value_ratio: float = 2.0,
        qk_dim: int = 64,
        num_averages: int = 16,
        attention: str = "laplace",
        position_bias: bool = True,
        map_size: int | tuple[int, int] = 14,
    ):
        super().__init__(dim, num_heads)
        size = to_2tuple(map_size)
        self.value_dim, self.qk_dim = int(dim * value_ratio), qk_dim
        if min(self.value_dim, qk_dim, num_averages, *size) < 1:
            raise ValueError(
                f"MovingAverageMixer: value_ratio, qk_dim, num_averages and map_size must give one or more, got "
                f"{value_ratio=} of {dim=}, {qk_dim=}, {num_averages=} and {map_size=}"
            )
        if attention not in self.ATTENTION:
            raise ValueError(f"MovingAverageMixer: unknown {attention=}, expected one of {self.ATTENTION}")
        self.kind = attention
        self.average = MovingAverage(dim, num_averages)
        self.v_proj = nn.Linear(dim, self.value_dim)
        self.mx_proj = nn.Linear(dim, qk_dim + self.value_dim + 2 * dim)
        self.h_proj = nn.Linear(self.value_dim, dim)
        self.gamma = nn.Parameter(0.02 * torch.randn(2, qk_dim))
        self.beta = nn.Parameter(torch.zeros(2, qk_dim))
        self.bias = SequenceBias(size) if position_bias else None

    @property
    def pair_bytes(self) -> int:
        """Scores and weights."""
        return 8

    def forward(self, x: Tensor, unnormed: Tensor | None = None) -> Tensor:
        """[B, H, W, C] to [B, H, W, C]; `unnormed` is x before the norm, and x itself where it is not given."""
        self.check_input(x)
        tokens = x.flatten(1, 2)
        gate, shared, own = self.mx_proj(self.average(tokens)).split(
            [self.dim, self.qk_dim + self.value_dim, self.dim], -1
        )
        z, r = F.silu(shared).split([self.qk_dim, self.value_dim], -1)
        q, k = (z.unsqueeze(2) * self.gamma + self.beta).unbind(2)
        taken = self._attend(q, k, F.silu(self.v_proj(tokens)), x.shape[1:3])
        found = F.silu(own + self.h_proj(taken * r)).unflatten(1, x.shape[1:3])
        return gate.sigmoid().unflatten(1, x.shape[1:3]) * (found - (x if unnormed is None else unnormed))

    def _attend(self, q: Tensor, k: Tensor, v: Tensor, size: torch.Size) -> Tensor:
        wide = torch.promote_types(v.dtype, torch.float32)
        with without_autocast(v.device):
            scores = q.to(wide) @ k.to(wide).mT * (self.qk_dim**-0.5 if self.kind == "softmax" else 1 / k.shape[1])
            if self.bias is not None:
                scores = scores + self.bias(size).to(wide)
            weights = {"laplace": _laplace, "relu2": lambda s: F.relu(s) ** 2, "softmax": lambda s: s.softmax(-1)}
            return (weights[self.kind](scores) @ v.to(wide)).to(v.dtype)
