"""Features of queries and keys whose products are the weights of linear attention.

A feature map takes queries and keys [B, N, G, D], float32 at least, and gives their features [B, N, G, F]. It says what
the sums of weights are divided by, and whether the tokens' places matter to it. The sums themselves are
`visionzoo.kernels.linear_attention`'s.
"""

from __future__ import annotations

import math
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class FeatureMap(nn.Module):
    """Base of the feature maps.

    Args:
        key_dim: width D of queries and keys.
        num_features: features F of random ones.
    """

    knows_places: ClassVar[bool] = False  # whether the tokens' places on the map matter
    added: ClassVar[float | None] = 1e-6  # what `denominator` adds to any mean; None where it does something else
    is_random: ClassVar[bool] = False  # whether there is a projection to random features

    def __init__(self, key_dim: int, num_features: int):
        super().__init__()
        del key_dim, num_features

    def forward(self, q: Tensor, k: Tensor, size: tuple[int, int], there: Tensor | None) -> tuple[Tensor, Tensor]:
        """Features of queries and keys.

        Args:
            q: queries [B, N, G, D].
            k: keys [B, N, G, D].
            size: height and width of the map.
            there: [B, N, 1, 1], False for keys whose features the caller puts to 0; None for none.
        """
        raise NotImplementedError

    def denominator(self, total: Tensor, count: int | Tensor) -> Tensor:
        """Return what a query's values are divided by, of its mean weight `total` over `count` keys."""
        del count
        assert self.added is not None
        return total + self.added


class Relu(FeatureMap):
    """max(x, 0)."""

    def forward(self, q: Tensor, k: Tensor, size: tuple[int, int], there: Tensor | None) -> tuple[Tensor, Tensor]:
        """See `FeatureMap`."""
        return q.relu(), k.relu()


class Elu(FeatureMap):
    """elu(x) + 1 (Katharopoulos et al., arXiv:2006.16236)."""

    def forward(self, q: Tensor, k: Tensor, size: tuple[int, int], there: Tensor | None) -> tuple[Tensor, Tensor]:
        """See `FeatureMap`."""
        return F.elu(q) + 1, F.elu(k) + 1


class Softmax(FeatureMap):
    """Softmax of a query over D, of a key over all keys, times N (Shen et al., arXiv:1812.01243)."""

    def forward(self, q: Tensor, k: Tensor, size: tuple[int, int], there: Tensor | None) -> tuple[Tensor, Tensor]:
        """See `FeatureMap`."""
        count: int | Tensor = k.shape[1]
        if there is not None:
            k, count = k.masked_fill(~there, float("-inf")), there.sum(1, keepdim=True, dtype=k.dtype)
        return q.softmax(-1), k.softmax(1) * count


class Cosformer(FeatureMap):
    """max(x, 0), weighed by cos(π/2·Δy/H)·cos(π/2·Δx/W) of the offset from query to key (cosFormer, arXiv:2202.08791).

    The authors' is over a row of tokens (https://github.com/OpenNLPLab/cosFormer at 8e12da1, Apache-2.0): this is it on
    a map of one row. F = 4·D, or 2·D in effect on one row.
    """

    knows_places = True
    added = None
    LEAST = 1e-6  # of a sum of weights

    def forward(self, q: Tensor, k: Tensor, size: tuple[int, int], there: Tensor | None) -> tuple[Tensor, Tensor]:
        """See `FeatureMap`."""
        rows, columns = (
            math.pi / 2 * torch.arange(side, device=q.device, dtype=q.dtype)[:, None] / side for side in size
        )
        rows, columns = (torch.cat([angle.cos(), angle.sin()], -1) for angle in (rows, columns))  # [H, 2], [W, 2]
        places = (rows[:, None, :, None] * columns[None, :, None, :]).flatten(2).flatten(0, 1)  # [N, 4]
        places = places[:, None, :, None]  # [N, 1, 4, 1]
        q, k = ((t.relu()[..., None, :] * places).flatten(-2) for t in (q, k))
        return q, k

    def denominator(self, total: Tensor, count: int | Tensor) -> Tensor:
        """At least 1e-6 for the sum, as released."""
        least = self.LEAST / count
        return torch.maximum(total, least) if isinstance(least, Tensor) else total.clamp(min=least)


class Random(FeatureMap):
    """Base of random features: projections on rows that are orthogonal, D at a time, and as long as Gaussian ones.

    The projection is saved with the weights. `redraw` replaces it. Signs are such that all directions are as likely;
    those of the bare QR decomposition, as in lucidrains' code, prefer some, and weights are then not softmax's on
    average.

    Args:
        key_dim: width D of queries and keys.
        num_features: features F.
    """

    is_random = True
    added = 0.0  # features are positive
    EPS: ClassVar[float]  # of a feature

    def __init__(self, key_dim: int, num_features: int):
        super().__init__(key_dim, num_features)
        self.projection: Tensor
        self.register_buffer("projection", torch.empty(num_features, key_dim))
        self.redraw()

    @torch.no_grad()
    def redraw(self, generator: torch.Generator | None = None) -> None:
        """Draw another projection, in place.

        Args:
            generator: of the CPU; None for torch's own, which `torch.manual_seed` sets.
        """
        count, dim = self.projection.shape
        blocks = -(-count // dim)
        numbers = torch.randn(blocks * dim + count, dim, generator=generator, device="cpu", dtype=torch.float64)
        squares, rows = numbers.split([blocks * dim, count])
        columns, triangle = torch.linalg.qr(squares.unflatten(0, (blocks, dim)))
        columns = columns * triangle.diagonal(dim1=-2, dim2=-1).sign().unsqueeze(-2)  # no direction is preferred
        directions = columns.mT.flatten(0, 1)[:count]
        lengths = rows.norm(dim=1, keepdim=True)
        self.projection.copy_(directions * lengths)

    def project(self, x: Tensor) -> Tensor:
        """[..., D] to [..., F]."""
        return x @ self.projection.to(x.dtype).mT


class Favor(Random):
    """(exp(w·x - |x|²/2 - max) + 1e-4) / √F, x divided by D^¼: softmax attention on average (Performer's FAVOR+).

    The maximum of w·x, over the features for a query and over keys too for a key, keeps exponents below 0; no gradient
    passes through it. Paper arXiv:2009.14794; facts from https://github.com/lucidrains/performer-pytorch at fc8b784
    (MIT), a transcription of the authors' code.
    """

    EPS = 1e-4

    def forward(self, q: Tensor, k: Tensor, size: tuple[int, int], there: Tensor | None) -> tuple[Tensor, Tensor]:
        """See `FeatureMap`."""
        return self._features(q, (-1,), None), self._features(k, (-1, -3), there)

    def _features(self, x: Tensor, over: tuple[int, ...], there: Tensor | None) -> Tensor:
        x = x * x.shape[-1] ** -0.25
        products, half = self.project(x), x.square().sum(-1, keepdim=True) / 2
        seen = products.detach()
        largest = (seen if there is None else seen.masked_fill(~there, float("-inf"))).amax(over, keepdim=True)
        exponent = products - half - largest
        if there is not None:
            exponent = exponent.masked_fill(~there, 0.0)  # a key that is not there may pass the largest
        return (exponent.exp() + self.EPS) * self.projection.shape[0] ** -0.5


class FavorRelu(Random):
    """max(w·x, 0) + 1e-3, x divided by D^¼ (Performer's generalized attention, arXiv:2009.14794; code as `Favor`)."""

    EPS = 1e-3

    def forward(self, q: Tensor, k: Tensor, size: tuple[int, int], there: Tensor | None) -> tuple[Tensor, Tensor]:
        """See `FeatureMap`."""
        scale = q.shape[-1] ** -0.25
        return self.project(q * scale).relu() + self.EPS, self.project(k * scale).relu() + self.EPS


class LogNormal(FeatureMap):
    """exp(α·q) and exp(β·k), whose weights have the variance of softmax's (linear log-normal, arXiv:2311.13541).

    α = s/σ(q) and β = s/σ(k) with s² = (σ(q)²σ(k)² - b) / 2a, deviations over all numbers of a sample, a and b as the
    authors fitted them for D = 64; no gradient passes through them. The largest number of a query, and of a head's
    keys, is taken off. The authors' code has deviations over the whole batch: it is this for a batch of one.
    """

    added = None
    EPS = 1e-8  # added to the sum
    SLOPE, OFFSET = 0.14855178144710912, -0.35487039130661086

    def forward(self, q: Tensor, k: Tensor, size: tuple[int, int], there: Tensor | None) -> tuple[Tensor, Tensor]:
        """See `FeatureMap`."""
        of_q, of_k = (_variance(t.detach(), there) for t in (q, k))  # under no_grad, tangents would pass
        wanted = (of_q * of_k - self.OFFSET) / (2 * self.SLOPE)
        tiny = torch.finfo(q.dtype).tiny
        alpha, beta = ((wanted / of.clamp(min=tiny)).sqrt() for of in (of_q, of_k))
        # differences first: the factors of tokens that are nearly alike are large
        q = alpha * (q - q.amax(-1, keepdim=True))
        hidden = k if there is None else k.masked_fill(~there, float("-inf"))
        k = beta * (hidden - hidden.amax((-3, -1), keepdim=True))
        return q.exp(), k.exp()

    def denominator(self, total: Tensor, count: int | Tensor) -> Tensor:
        """1e-8 is added to the sum, as released."""
        return total + self.EPS / count


def _variance(x: Tensor, there: Tensor | None) -> Tensor:
    """Variance of all numbers of a sample, [B, N, G, D] to [B, 1, 1, 1]."""
    if there is None:
        numbers: int | Tensor = x.shape[1] * x.shape[2] * x.shape[3]
        apart = x - x.mean((1, 2, 3), keepdim=True)
    else:
        numbers = there.sum(1, keepdim=True, dtype=x.dtype) * x.shape[2] * x.shape[3]
        apart = (x - (x * there).sum((1, 2, 3), keepdim=True) / numbers) * there
    free = (numbers - 1).clamp(min=1) if isinstance(numbers, Tensor) else max(numbers - 1, 1)
    return apart.square().sum((1, 2, 3), keepdim=True) / free


FEATURE_MAPS: dict[str, type[FeatureMap]] = {
    "relu": Relu,
    "elu": Elu,
    "softmax": Softmax,
    "cosformer": Cosformer,
    "favor": Favor,
    "favor_relu": FavorRelu,
    "log_normal": LogNormal,
}


def redraw_projections(model: nn.Module, seed: int) -> int:
    """Draw the projections of all random features in a model anew, which depend only on the seed and on their order.

    Performers do so every 1,000 steps of training: `if step % 1000 == 0: redraw_projections(model, seed=step)`. With
    the step as the seed, a training that was resumed, or that runs on several GPUs, draws the same.

    Args:
        model: any module.
        seed: at least 0.

    Returns:
        How many there are.
    """
    maps = [part for part in model.modules() if isinstance(part, Random)]
    generator = torch.Generator().manual_seed(seed)
    for part in maps:
        part.redraw(generator)
    return len(maps)
