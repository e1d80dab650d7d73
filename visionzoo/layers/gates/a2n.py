"""Attention in attention (A²N, Chen et al., arXiv:2104.09497): branches with and without attention, weighed by the map.

Facts from code/model/aan.py of https://github.com/haoyuc/A2N at 210b38c (no license at its root, so only facts are
taken); the code here is our own. Its argument `K`, the number of weights, has a meaning for 2 only: further ones would
take a share and weigh nothing.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from visionzoo.layers.gates.base import Gate
from visionzoo.layers.nhwc import on_nchw


def _conv(dim: int, kernel_size: int) -> nn.Conv2d:
    return nn.Conv2d(dim, dim, kernel_size, padding=kernel_size // 2, bias=False)


class PixelGate(Gate):
    """Scale every number by the sigmoid of a linear layer of its position's channels; O(N·C²), dtype of the input.

    Pixel attention, which A²N has where it enlarges maps.

    Args:
        dim: channels C.

    Raises:
        ValueError: if there are no channels.

    >>> import torch
    >>> PixelGate(64)(torch.randn(1, 5, 7, 64)).shape
    torch.Size([1, 5, 7, 64])
    """

    def __init__(self, dim: int):
        super().__init__(dim)
        self.linear = nn.Linear(dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        """[B, H, W, C] to [B, H, W, C]."""
        self.check_input(x)
        return x * torch.sigmoid(self.linear(x))


class A2nGate(Gate):
    """Add a branch with and one without attention, each with a weight that depends on the map; O(N·C²·k²).

    After a linear layer with leaky ReLU, one branch is a convolution times a gate of two more convolutions, and a
    convolution of that; the other is one convolution. Their weights are a softmax of an MLP of the mean over positions.
    The sum passes a leaky ReLU and a linear layer and is added to the input. The softmax is float32 at least, the rest
    has the dtype of the input or of autocast.

    Args:
        dim: channels C.
        reduction: C over the width of the MLP.
        temperature: what its outputs are divided by before the softmax.
        kernel_size: side of the kernels of the branch with attention, odd.
        plain_kernel: of the branch without, odd; 3 in A²N, 1 in A²N-M.

    Raises:
        ValueError: if a kernel is even, a number not positive, or nothing remains of the channels.

    >>> import torch
    >>> A2nGate(64)(torch.randn(1, 5, 7, 64)).shape
    torch.Size([1, 5, 7, 64])
    """

    def __init__(
        self,
        dim: int,
        *,
        reduction: float = 4,
        temperature: float = 30.0,
        kernel_size: int = 3,
        plain_kernel: int = 3,
    ):
        super().__init__(dim)
        self.check_kernels(kernel_size=kernel_size, plain_kernel=plain_kernel)
        self.check_positive(temperature=temperature)
        self.temperature = temperature
        hidden = self.reduced(reduction, dim)
        self.first = nn.Linear(dim, dim, bias=False)
        self.weights = nn.Sequential(nn.Linear(dim, hidden, bias=False), nn.ReLU(), nn.Linear(hidden, 2, bias=False))
        self.gate = nn.Sequential(_conv(dim, kernel_size), nn.LeakyReLU(0.2), nn.Conv2d(dim, dim, 1), nn.Sigmoid())
        self.attended = _conv(dim, kernel_size)
        self.attended_out = _conv(dim, kernel_size)
        self.plain = _conv(dim, plain_kernel)
        self.last = nn.Linear(dim, dim, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """[B, H, W, C] to [B, H, W, C]."""
        self.check_input(x)
        y = F.leaky_relu(self.first(x), 0.2)
        scores = self.weights(y.mean((1, 2))) / self.temperature
        scores = scores.to(torch.promote_types(scores.dtype, torch.float32)).softmax(1).to(y.dtype)
        attended, plain = scores[:, :, None, None, None].unbind(1)
        branch = on_nchw(self.attended, y) * on_nchw(self.gate, y)
        y = attended * on_nchw(self.attended_out, branch) + plain * on_nchw(self.plain, y)
        return x + self.last(F.leaky_relu(y, 0.2))
