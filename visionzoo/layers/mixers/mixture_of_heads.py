"""Mixture-of-head attention (MoH, arXiv:2410.11842): heads as experts, of which each token takes some."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from visionzoo.layers.mixers.aggregated import AggregatedMixer
from visionzoo.layers.outputs import add_term, collecting


class HeadRouter(nn.Module):
    """How much each head counts for each token: all shared heads, and the most fitting of the others.

    The gates of the shared heads are a softmax times their number. Those of the others are a softmax of which the
    `routed_heads` largest are kept, divided by their sum and multiplied by their number. Where there are both kinds,
    two more numbers, a softmax times 2, weigh one kind against the other. Softmax is float32 at least.

    A model that collects terms (`visionzoo.layers.outputs`) gets `balance`, the loss that spreads tokens over heads,
    `routed_heads` where all are taken equally often; and `busiest_head`, the share of tokens that take the most taken.

    Args:
        dim: channels C.
        num_heads: heads G.
        shared_heads: heads that every token takes; they come first.
        routed_heads: how many of the others a token takes.

    Raises:
        ValueError: if there are not that many heads, or some that no token takes.
    """

    num_layers = 1  # over which the terms are means: the model says how many it has

    def __init__(self, dim: int, num_heads: int, shared_heads: int, routed_heads: int):
        super().__init__()
        rest = num_heads - shared_heads
        if shared_heads < 0 or not min(rest, 1) <= routed_heads <= rest:
            raise ValueError(
                f"HeadRouter: expected shared_heads from 0 to num_heads, and routed_heads from 1 to the number of the "
                f"other heads, or 0 where there are none, got {num_heads=}, {shared_heads=} and {routed_heads=}"
            )
        self.shared_heads, self.routed_heads = shared_heads, routed_heads
        self.shared = nn.Linear(dim, shared_heads, bias=False) if shared_heads > 1 else None
        self.routed = nn.Linear(dim, rest, bias=False) if rest else None
        self.kinds = nn.Linear(dim, 2, bias=False) if rest and shared_heads else None
        if rest:
            self.AUXILIARY = {"balance": 0.01, "busiest_head": 0.0}

    def forward(self, x: Tensor) -> Tensor:
        """[B, H, W, C] to gates [B, H, W, G], 0 for heads that are not taken."""
        wide = torch.promote_types(x.dtype, torch.float32)
        shared = x.new_ones((*x.shape[:3], self.shared_heads), dtype=wide)
        if self.shared is not None:
            shared = _softmax(self.shared(x)) * self.shared_heads
        if self.routed is None:
            return shared
        gates = _softmax(self.routed(x))
        taken = torch.zeros_like(gates).scatter(-1, gates.topk(self.routed_heads, dim=-1).indices, 1.0)
        if self.training and collecting():
            load = taken.mean((0, 1, 2))
            add_term("balance", (gates.mean((0, 1, 2)) * load).mean() * load.numel() ** 2 / self.num_layers)
            add_term("busiest_head", load.max() / self.num_layers)
        routed = gates * taken
        routed = routed / routed.sum(-1, keepdim=True).clamp(min=torch.finfo(wide).eps) * self.routed_heads
        if self.kinds is None:
            return routed
        weights = _softmax(self.kinds(x)) * 2
        return torch.cat([shared * weights[..., :1], routed * weights[..., 1:]], -1)


class MixtureOfHeadsMixer(AggregatedMixer):
    """Aggregated attention whose heads are experts: each token weighs them and takes some only.

        yᵢ = Σ_g gᵢ_g headᵍ(x)ᵢ, g the router's choice for token i

    Time: O(N·(k² + M)·C) with M = N/r², or `pool_size`²; memory: O(N·(k²·C + M·G)).

    With a `reduction` of r and no `pool_size` both grow with N². What a head says to a token is multiplied by a gate, 0
    for heads that the token does not take (`HeadRouter`, whose output a forward hook on `router` shows). Heads not
    taken are computed too, as released. Softmax and sums are float32 at least.

    Facts from https://github.com/SkyworkAI/MoH at 2cefd57 (Apache-2.0).

    Args:
        dim: channels C.
        num_heads: attention heads.
        shared_heads: heads that every token takes; None for a quarter, rounded up.
        routed_heads: how many of the others a token takes; None for two thirds of them, rounded up.
        options: of `AggregatedMixer`.

    Raises:
        ValueError: if there are not that many heads, or some that no token takes.

    >>> import torch
    >>> MixtureOfHeadsMixer(64, 4, reduction=2)(torch.randn(1, 5, 7, 64)).shape
    torch.Size([1, 5, 7, 64])
    """

    def __init__(
        self,
        dim: int,
        num_heads: int | None = None,
        *,
        shared_heads: int | None = None,
        routed_heads: int | None = None,
        window_size: int = 3,
        reduction: int = 4,
        pool_size: int | None = None,
        map_size: int | tuple[int, int] | None = None,
        bias_size: int | tuple[int, int] | None = None,
        qkv_bias: bool = True,
    ):
        super().__init__(
            dim,
            num_heads,
            window_size=window_size,
            reduction=reduction,
            pool_size=pool_size,
            map_size=map_size,
            bias_size=bias_size,
            qkv_bias=qkv_bias,
        )
        shared = -(-self.num_heads // 4) if shared_heads is None else shared_heads
        routed = -(-2 * (self.num_heads - shared) // 3) if routed_heads is None else routed_heads
        self.router = HeadRouter(dim, self.num_heads, shared, routed)

    def weigh_heads(self, heads: Tensor, x: Tensor) -> Tensor:
        """Multiply what the heads say, [B, H, W, G, D], by their gates."""
        return heads * self.router(x).to(heads.dtype)[..., None]


def _softmax(x: Tensor) -> Tensor:
    return x.to(torch.promote_types(x.dtype, torch.float32)).softmax(-1)
