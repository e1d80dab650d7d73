"""MLPs over the channels that also look at neighbors, or at all tokens, and what stands in their place."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from timm.layers import Mlp
from torch import Tensor, nn

from visionzoo.layers.arguments import Positive, Share
from visionzoo.layers.nhwc import DepthwiseConvNHWC
from visionzoo.layers.norm import LayerNorm
from visionzoo.layers.part import Part


class ConvMlp(Part):
    """MLP with a depthwise 3×3 convolution before its activation, on [B, H, W, C] (PVTv2, arXiv:2106.13797).

    Args:
        dim: channels in and out.
        hidden_dim: channels between.
        act_layer: activation.
        drop: dropout probability after the activation and at the end.
        first_act_layer: activation before the convolution; None for none.
        residual: add the convolution's input to its output (STViT, arXiv:2211.11167).
        gated: have a second map, which is not convolved, multiply the activation's; both of ⌊2·hidden_dim / 3⌋ channels
            (convolutional GLU of TransNeXt, arXiv:2311.17132).
    """

    def __init__(
        self,
        dim: Positive,
        hidden_dim: Positive,
        *,
        act_layer: type[nn.Module] = nn.GELU,
        drop: Share = 0.0,
        first_act_layer: type[nn.Module] | None = None,
        residual: bool = False,
        gated: bool = False,
    ):
        super().__init__()
        self.dim, self.gated = dim, gated
        hidden_dim = 2 * hidden_dim // 3 if gated else hidden_dim
        self.fc1 = nn.Linear(dim, 2 * hidden_dim if gated else hidden_dim)
        self.act1 = first_act_layer() if first_act_layer else nn.Identity()
        self.residual = residual
        self.dwconv = DepthwiseConvNHWC(hidden_dim, 3)
        self.act = act_layer()
        self.fc2 = nn.Linear(hidden_dim, dim)
        self.drop = nn.Dropout(drop)

    def forward(self, x: Tensor) -> Tensor:
        """[B, H, W, C] to [B, H, W, C]."""
        self.check_inputs("B H W C", x, any_dtype=True, C=self.dim)
        x = self.act1(self.fc1(x))
        x, gate = x.chunk(2, dim=-1) if self.gated else (x, None)
        x = self.act(self.dwconv(x, residual=x if self.residual else None))
        return self.drop(self.fc2(self.drop(x if gate is None else x * gate)))


class SqueezeExciteMlp(Part, Mlp):
    """MLP whose output is added to itself times factors for each channel, from its mean over all tokens (TNT's `se`).

    Args:
        dim: channels C.
        hidden: width of the MLP; that of the factors' own layers is C / 4.
        options: see timm's `Mlp`.
    """

    mixes_tokens = True  # a token's output depends on others

    def __init__(self, dim: Positive, hidden: Positive, **options: Any):
        super().__init__(dim, hidden, **options)
        self.dim = dim
        self.excite = nn.Sequential(
            LayerNorm(dim), nn.Linear(dim, dim // 4), nn.ReLU(), nn.Linear(dim // 4, dim), nn.Tanh()
        )

    def forward(self, x: Tensor) -> Tensor:
        """[B, P + N, C] to [B, P + N, C]."""
        self.check_inputs("B N C", x, any_dtype=True, C=self.dim)
        x = super().forward(x)
        return x + self.excite(x.mean(1, keepdim=True)) * x


GLU_ACTIVATIONS: dict[str, type[nn.Module]] = {"gelu": nn.GELU, "silu": nn.SiLU, "relu": nn.ReLU}


class NormedGlu(Part):
    """Gated linear unit whose two factors share one layer norm, on [..., C] (Activator, arXiv:2405.15953).

    Args:
        dim: channels in and out.
        hidden_dim: channels of the factors.
        act_layer: activation of the first factor, before its norm.
        drop: dropout probability at the end.
    """

    def __init__(self, dim: Positive, hidden_dim: Positive, *, act_layer: type[nn.Module] = nn.GELU, drop: Share = 0.0):
        super().__init__()
        self.dim = dim
        self.gate = nn.Linear(dim, hidden_dim)
        self.act = act_layer()
        self.value = nn.Linear(dim, hidden_dim)
        self.norm = LayerNorm(hidden_dim)
        self.proj = nn.Linear(hidden_dim, dim)
        self.drop = nn.Dropout(drop)

    def forward(self, x: Tensor) -> Tensor:
        """[..., C] to [..., C]."""
        self.check_inputs("... C", x, any_dtype=True, C=self.dim)
        return self.drop(self.proj(self.norm(self.act(self.gate(x))) * self.norm(self.value(x))))


class IstaStep(Part):
    """A step towards sparse codes of the tokens in a learned dictionary D, as shrinkage goes (CRATE, arXiv:2306.01129).

    Called as timm's `Mlp`, in whose place it stands: ReLU(x + η·((x - x·Dᵀ)·D - λ)), so that no output is negative. It
    is a step from x, which has a residual of its own.

    Args:
        dim: channels C.
        hidden_dim: ignored; the dictionary is square.
        act_layer: ignored; ReLU keeps codes from being negative.
        drop: ignored, as in the authors' code.
        step_size: η, positive.
        penalty: λ of the codes' absolute sum, not negative.

    Raises:
        ValueError: if one of the last two is out of its range.

    >>> IstaStep(8)(torch.randn(2, 5, 8)).shape
    torch.Size([2, 5, 8])
    """

    def __init__(
        self,
        dim: Positive,
        hidden_dim: int | None = None,
        *,
        act_layer: type[nn.Module] | None = None,
        drop: float = 0.0,
        step_size: float = 0.1,
        penalty: float = 0.1,
    ):
        super().__init__()
        if step_size <= 0 or penalty < 0:
            raise ValueError(
                f"IstaStep: step_size must be positive and penalty not negative, got {step_size=} and {penalty=}"
            )
        self.step_size, self.penalty = step_size, penalty
        self.weight = nn.Parameter(torch.empty(dim, dim))
        nn.init.kaiming_uniform_(self.weight)

    def forward(self, x: Tensor) -> Tensor:
        """[..., C] to [..., C]."""
        self.check_inputs("... C", x, any_dtype=True, C=self.weight.shape[1])
        ascent = F.linear(x - F.linear(x, self.weight), self.weight.mT)
        return F.relu(x + self.step_size * (ascent - self.penalty))
