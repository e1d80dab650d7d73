"""ULSAM (Saini et al., arXiv:2006.15102): a spatial attention map for each subspace of the channels.

Facts from ulsam.py of https://github.com/Nandan91/ULSAM at 9a07d68 (no license file, so only facts are taken); the code
here is our own, with the subspaces as groups of layers over all channels.
"""

from __future__ import annotations

from functools import partial

import torch.nn.functional as F
from torch import Tensor, nn

from visionzoo.layers.conv_norm import ConvNorm
from visionzoo.layers.gates.base import Gate, softmax_over_positions
from visionzoo.layers.nhwc import OnNCHW


class UlsamGate(Gate):
    """Add to each subspace of the channels its product with a softmax over the positions; O(N·C).

    The scores of a subspace: a scale and shift of each channel, batch norm, ReLU, 3×3 max pooling, one linear
    combination of the subspace's channels, batch norm, ReLU. The softmax is float32 at least, the rest has the
    dtype of the input or of autocast. Since the softmax sums to 1 over the map, large maps hardly change.

    Args:
        dim: channels C.
        num_splits: subspaces; they divide the channels.

    Raises:
        ValueError: if the subspaces do not divide the channels.

    >>> import torch
    >>> UlsamGate(64)(torch.randn(1, 5, 7, 64)).shape
    torch.Size([1, 5, 7, 64])
    """

    def __init__(self, dim: int, *, num_splits: int = 4):
        super().__init__(dim)
        self.check_divides(dim, num_splits=num_splits)
        self.num_splits = num_splits
        norm = partial(nn.BatchNorm2d, momentum=0.9)
        self.depthwise = ConvNorm(dim, dim, 1, groups=dim, norm_layer=norm)
        self.pool = OnNCHW(nn.MaxPool2d(3, 1, 1))
        self.point = ConvNorm(dim, num_splits, 1, groups=num_splits, norm_layer=norm)

    def forward(self, x: Tensor) -> Tensor:
        """[B, H, W, C] to [B, H, W, C]."""
        self.check_input(x)
        scores = F.relu(self.point(self.pool(F.relu(self.depthwise(x)))))
        weights = softmax_over_positions(scores.flatten(1, 2)).to(x.dtype).unflatten(1, x.shape[1:3])
        return x + (x.unflatten(3, (self.num_splits, -1)) * weights.unsqueeze(-1)).flatten(3)
