"""Attention whose activation is learned, in place of softmax (KArAt, arXiv:2503.10632)."""

from __future__ import annotations

from collections.abc import Callable
from math import isqrt

import torch
import torch.nn.functional as F
from timm.layers import to_2tuple
from torch import Tensor, nn

from visionzoo.kernels.precision import without_autocast
from visionzoo.layers.mixers.base import Mixer
from visionzoo.layers.position import resize_table

BASES: dict[str, Callable[[Tensor], Tensor] | None] = {
    "zero": None,
    "identity": nn.Identity(),
    "silu": F.silu,
    "gelu": F.gelu,
}


class LearnedActivation(nn.Module):
    """A function of each pair of score and output, Fourier series, that turns rows of scores into weights of tokens.

    Row A of scores becomes W·y, where yₚ = Σ_q (b(A_q) + Σₘ a_pqm·cos(m·A_q) + b_pqm·sin(m·A_q)) has `rank` values. The
    series and W belong to tokens by their place; for maps of other sizes they are interpolated (bicubic), and scaled so
    that sums over more tokens stay what they were.

    Args:
        num_heads: heads G, each with functions of its own.
        map_size: height and width of the map that they are made for.
        prefix_tokens: how many tokens come before those of the map.
        rank: values r between.
        grid_size: m goes from 1 to this.
        base: b, a name of `BASES`.
        project: bring y to the nearest point whose values are not negative and sum to 1.
    """

    def __init__(
        self,
        num_heads: int,
        map_size: tuple[int, int],
        *,
        prefix_tokens: int = 0,
        rank: int = 12,
        grid_size: int = 3,
        base: str = "zero",
        project: bool = False,
    ):
        super().__init__()
        self.map_size, self.prefix_tokens = map_size, prefix_tokens
        self.grid_size, self.project = grid_size, project
        self.base = BASES[base]
        tokens = prefix_tokens + map_size[0] * map_size[1]
        self.series = nn.Parameter(torch.randn(num_heads, 2 * grid_size, tokens, rank))  # of cosines, then of sines
        self.weight = nn.Parameter(torch.empty(num_heads, tokens, rank).uniform_(-(rank**-0.5), rank**-0.5))

    def forward(self, scores: Tensor, v: Tensor, size: tuple[int, int]) -> Tensor:
        """Scores [B, G, N, N] and values [B, G, N, D] of P + H·W = N tokens with (H, W) = `size` to [B, G, N, D]."""
        series, weight = (self._fit(t.to(v.dtype), size) for t in (self.series, self.weight))
        hidden = torch.zeros((), dtype=v.dtype, device=v.device)
        if self.base is not None:
            hidden = self.base(scores).sum(-1, keepdim=True)
        for m in range(1, self.grid_size + 1):
            hidden = hidden + (m * scores).cos() @ series[:, m - 1]
            hidden = hidden + (m * scores).sin() @ series[:, self.grid_size + m - 1]
        if self.project:
            hidden = project_to_simplex(hidden)
        return hidden @ (weight.mT @ v)

    def fit_weight(self, name: str, weight: Tensor) -> Tensor:
        """Bring a checkpoint's parameter [..., P + N, r], of a square map of another size, to the size of ours."""
        side = isqrt(max(0, weight.shape[-2] - self.prefix_tokens))
        if side * side != weight.shape[-2] - self.prefix_tokens:
            raise ValueError(
                f"{name}: expected the tokens of a square map behind {self.prefix_tokens} others, got "
                f"{tuple(weight.shape)}"
            )
        return _resize(weight, self.prefix_tokens, (side, side), self.map_size)

    def _fit(self, table: Tensor, size: tuple[int, int]) -> Tensor:
        return _resize(table, self.prefix_tokens, self.map_size, size)


def _resize(table: Tensor, prefix: int, old: tuple[int, int], new: tuple[int, int]) -> Tensor:
    """Interpolate [..., P + h·w, r] to [..., P + H·W, r], scaled so that sums over the map stay."""
    if not isinstance(new[0], torch.SymInt) and old == tuple(new):
        return table
    lead, on_map = table.shape[:-2], table[..., prefix:, :]
    on_map = on_map.unflatten(-2, old).flatten(0, -4).permute(1, 2, 0, 3)  # [h, w, lead, r]
    on_map = resize_table(on_map.flatten(2).unsqueeze(0), new, "bicubic")[0].unflatten(2, (-1, table.shape[-1]))
    on_map = on_map.flatten(0, 1).transpose(0, 1).reshape(*lead, -1, table.shape[-1])
    on_map = on_map * ((old[0] * old[1]) / (new[0] * new[1]))
    return torch.cat([table[..., :prefix, :], on_map], -2) if prefix else on_map


def project_to_simplex(x: Tensor) -> Tensor:
    """Return the nearest points to [..., N] whose values are not negative and sum to 1, found by sorting."""
    ordered = x.sort(dim=-1, descending=True).values
    count = torch.arange(1, x.shape[-1] + 1, device=x.device, dtype=x.dtype)
    excess = (ordered.cumsum(-1) - 1) / count
    kept = (ordered > excess).sum(-1, keepdim=True).clamp(min=1)  # none for NaN, which must not end in an index of -1
    return F.relu(x - excess.gather(-1, kept - 1))


class KolmogorovArnoldMixer(Mixer):
    """Attention with learned functions of the scores in place of softmax, of low rank.

        yᵢ = Σⱼ (W·Φ(sᵢ))ⱼ vⱼ, Φ Fourier series of the row of scores sᵢ

    Time: O(N²·C + N²·r·m·G) for m terms and rank r; memory: O(N²·G).

    Scores, series and sums are float32 at least. The functions belong to places of one map; see `LearnedActivation`
    for maps of other sizes.

    Facts from the paper; https://github.com/MaitySubhajit/KArAt at 39142d6 (MIT) has no code yet.

    Args:
        dim: channels C.
        num_heads: attention heads.
        map_size: side of the maps that the functions are made for, in tokens, or (height, width).
        prefix_tokens: how many prefix tokens take part, with functions of their own; 0 lets them pass by.
        rank: values r between a row of scores and its weights.
        grid_size: terms m of the Fourier series.
        base: function that is added to each series: "zero", "identity", "silu" or "gelu".
        project: bring the r values to the probability simplex (the paper's ℓ1 projection, in none of its results).
        qkv_bias: whether the projection to q, k, v has a bias.

    Raises:
        ValueError: if the base is unknown or a size out of its range, or, in `forward`, if there are not as many prefix
            tokens as `prefix_tokens` says.

    >>> import torch
    >>> KolmogorovArnoldMixer(64, 2)(torch.randn(1, 5, 7, 64)).shape
    torch.Size([1, 5, 7, 64])
    """

    needs_places = True

    def __init__(
        self,
        dim: int,
        num_heads: int | None = None,
        *,
        map_size: int | tuple[int, int] = 14,
        prefix_tokens: int = 0,
        rank: int = 12,
        grid_size: int = 3,
        base: str = "zero",
        project: bool = False,
        qkv_bias: bool = True,
    ):
        super().__init__(dim, num_heads)
        height, width = to_2tuple(map_size)
        if base not in BASES:
            raise ValueError(f"KolmogorovArnoldMixer: unknown {base=}, expected one of {tuple(BASES)}")
        if min(height, width, rank, grid_size) < 1 or prefix_tokens < 0:
            raise ValueError(
                f"KolmogorovArnoldMixer: map_size, rank and grid_size must be positive and prefix_tokens not negative, "
                f"got {map_size=}, {rank=}, {grid_size=} and {prefix_tokens=}"
            )
        self.prefix_tokens = prefix_tokens
        self.qkv = nn.Linear(dim, 3 * dim, bias=qkv_bias)
        self.activation: LearnedActivation | None = LearnedActivation(
            self.num_heads,
            (height, width),
            prefix_tokens=prefix_tokens,
            rank=rank,
            grid_size=grid_size,
            base=base,
            project=project,
        )
        self.borrowed: tuple[LearnedActivation, ...] = ()
        self.proj = nn.Linear(dim, dim)

    @property
    def pair_bytes(self) -> int:
        """Scores and a term of their series."""
        return 8 * self.num_heads

    @property
    def takes_prefix_tokens(self) -> bool:
        """Yes, where there are functions for them."""
        return self.prefix_tokens > 0

    @property
    def functions(self) -> LearnedActivation:
        """The activation: the mixer's own, or the one that it borrowed."""
        return self.borrowed[0] if self.activation is None else self.activation

    def borrow(self, functions: LearnedActivation) -> None:
        """Use these functions in place of the mixer's own, which go; the lender keeps them among its modules."""
        self.activation, self.borrowed = None, (functions,)

    def forward(
        self, x: Tensor, *, map_size: tuple[int, int] | None = None, prefix: int = 0, source: Tensor | None = None
    ) -> Tensor:
        """[B, H, W, C] to [B, H, W, C]; with `map_size` (H, W) x is [B, 1, P + H·W, C], P = `prefix` tokens first.

        `source` is that of dropped tokens, which the mixer does not take: it is None.
        """
        self.check_input(x)
        size = (x.shape[1], x.shape[2]) if map_size is None else map_size
        if prefix != self.prefix_tokens:
            raise ValueError(
                f"KolmogorovArnoldMixer: expected {self.prefix_tokens} prefix tokens, as prefix_tokens says, got "
                f"{prefix}"
            )
        # [B, H, W, G, D] -> [B, G, N, D]
        q, k, v = (t.flatten(1, 2).transpose(1, 2) for t in self.split_heads(self.qkv(x)))
        dtype, wide = v.dtype, torch.promote_types(v.dtype, torch.float32)
        with without_autocast(x.device):
            scores = q.to(wide) * self.head_dim**-0.5 @ k.to(wide).mT
            out = self.functions(scores, v.to(wide), size).to(dtype)
        return self.proj(out.transpose(1, 2).reshape(x.shape))
