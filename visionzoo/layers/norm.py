"""Norms over the last axis, whatever comes before it."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from visionzoo.kernels import layer_norm
from visionzoo.layers.arguments import Positive
from visionzoo.layers.part import Part
from visionzoo.layers.tracing import one_node


class LayerNorm(nn.LayerNorm):
    """`nn.LayerNorm` of [..., C] over C, by `visionzoo.kernels.layer_norm`: faster for narrow rows on a GPU.

    Under autocast the output has autocast's dtype, not float32. With several axes, or without scale or shift, it is
    torch's own.

    >>> import torch
    >>> LayerNorm(64)(torch.randn(1, 5, 7, 64)).shape
    torch.Size([1, 5, 7, 64])
    """

    @one_node  # as torch's own layers are
    def forward(self, x: Tensor) -> Tensor:
        """Normalize [..., C]."""
        if self.weight is None or self.bias is None or len(self.normalized_shape) > 1:
            return super().forward(x)
        return layer_norm(x, self.weight, self.bias, eps=self.eps)


class ScaleNorm(Part):
    """Division of [..., C] by its root mean square over C, times one learned number (Mega, arXiv:2209.10655).

    Args:
        dim: channels C.
        eps: added to the mean square.
    """

    def __init__(self, dim: Positive, eps: float = 1e-5):
        super().__init__()
        self.dim, self.eps = dim, eps
        self.scalar = nn.Parameter(torch.ones(1))

    def forward(self, x: Tensor) -> Tensor:
        """Normalize [..., C], in float32 at least."""
        self.check_inputs("... C", x, any_dtype=True, C=self.dim)
        wide = x.to(torch.promote_types(x.dtype, torch.float32))
        return (wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + self.eps)).to(x.dtype) * self.scalar


class TokenBatchNorm(Part):
    """Batch normalization of [..., C] over everything but C.

    Args:
        dim: channels C.
    """

    def __init__(self, dim: Positive):
        super().__init__()
        self.bn = nn.BatchNorm1d(dim)

    def forward(self, x: Tensor) -> Tensor:
        """Normalize [..., C]."""
        self.check_inputs("... C", x, any_dtype=True, C=self.bn.num_features)
        return self.bn(x.flatten(0, -2)).reshape(x.shape)


class DeviationNorm(Part):
    """Layer norm of [..., C] over C that adds its ε to the standard deviation, not to the variance (CVNets).

    Rows of equal numbers have derivatives, too, see `standardize`.

    Args:
        dim: channels C.
        eps: ε.
    """

    def __init__(self, dim: Positive, eps: float = 1e-5):
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(dim))
        self.bias = nn.Parameter(torch.zeros(dim))

    def forward(self, x: Tensor) -> Tensor:
        """Normalize [..., C], in float32 at least."""
        self.check_inputs("... C", x, any_dtype=True, C=self.weight.shape[0])
        wide = x.to(torch.promote_types(x.dtype, torch.float32))
        return standardize(wide, self.eps).to(x.dtype) * self.weight + self.bias


def standardize(x: Tensor, eps: float) -> Tensor:
    """Bring the last axis to mean 0 and deviation 1; ε is added to the deviation, not to the variance.

    A row of equal numbers, whose deviation has no derivative, gets derivatives of 0, the first as in torch, and the
    second, which torch's has not.
    """
    var, mean = torch.var_mean(x, dim=-1, keepdim=True, correction=0)
    spread = var > 0
    std = torch.where(spread, torch.where(spread, var, 1.0).sqrt(), 0.0)
    return (x - mean) / (std + eps)


def in_groups(norm: nn.GroupNorm, x: Tensor) -> Tensor:
    """Return what a group norm makes of [B, C, ...], also of groups of one number, which the module refuses.

    A group has one number where it has one channel, and the map one place. Hooks on the module are not called.
    """
    return torch.group_norm(x, norm.num_groups, norm.weight, norm.bias, norm.eps)
