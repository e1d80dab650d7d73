"""Multi-aspect global context (MASTER, Lu et al., arXiv:1910.02562): what each group of channels gathers, for all.

Facts from model/context_block.py of https://github.com/wenwenyu/MASTER-pytorch at 7fe140f (MIT license), which calls
itself a reimplementation, different from the authors' own unpublished one; the code here is our own. Its argument
`att_scale` is ignored (always False), so there is none here.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from visionzoo.layers.gates.base import Gate, pool_by_scores


class MagcGate(Gate):
    """Add to a map, or scale it by, an MLP of its context, which attention gathers for each head; O(N·C + C²·ratio).

    The context of a head is the mean of its channels, weighted by a softmax over the positions of one linear
    combination of them, the same for all heads. Softmax and sums are float32 at least, the rest has the
    dtype of the input or of autocast.

    Args:
        dim: channels C.
        ratio: width of the MLP over C.
        num_heads: groups of channels with a context of their own; they divide C.
        pooling: "att" for that context, "avg" for the plain mean.
        fusion: how the MLP's output joins the map: "add"; "mul" by its sigmoid; "concat" beside it, with a linear layer
            to C channels, a norm over the whole map without parameters and a ReLU, at O(N·C²).

    Raises:
        ValueError: if the heads do not divide the channels, nothing remains of them, or a name is unknown.

    >>> import torch
    >>> MagcGate(64)(torch.randn(1, 5, 7, 64)).shape
    torch.Size([1, 5, 7, 64])
    """

    def __init__(
        self, dim: int, *, ratio: float = 0.0625, num_heads: int = 8, pooling: str = "att", fusion: str = "add"
    ):
        super().__init__(dim)
        if pooling not in ("att", "avg") or fusion not in ("add", "mul", "concat"):
            raise ValueError(
                f"MagcGate: expected pooling 'att' or 'avg' and fusion 'add', 'mul' or 'concat', "
                f"got {pooling=} and {fusion=}"
            )
        self.check_positive(ratio=ratio)
        self.check_divides(dim, num_heads=num_heads)
        self.num_heads, self.fusion = num_heads, fusion
        hidden = int(dim * ratio)
        if hidden < 1:
            raise ValueError(
                f"MagcGate: nothing remains of {dim=} channels with {ratio=}; pass a ratio of {1 / dim:.3g} or more"
            )
        self.scores = nn.Linear(dim // num_heads, 1) if pooling == "att" else None
        self.mlp = nn.Sequential(nn.Linear(dim, hidden), nn.LayerNorm(hidden), nn.ReLU(), nn.Linear(hidden, dim))
        self.merge = nn.Linear(2 * dim, dim) if fusion == "concat" else None

    def forward(self, x: Tensor) -> Tensor:
        """[B, H, W, C] to [B, H, W, C]."""
        self.check_input(x)
        tokens = x.flatten(1, 2)
        if self.scores is None:
            context = tokens.mean(1)
        else:
            heads = tokens.unflatten(-1, (self.num_heads, -1))
            context = pool_by_scores(self.scores(heads).squeeze(-1), heads).flatten(1)
        term = self.mlp(context)[:, None, None]
        if self.fusion == "mul":
            return x * torch.sigmoid(term)
        if self.merge is None:
            return x + term
        merged = self.merge(torch.cat([x, term.to(x.dtype).expand_as(x)], -1))
        return F.relu(F.layer_norm(merged, merged.shape[1:]))
