"""FFNified attention: convolutions as keys and values, an activation as softmax (FFNet, arXiv:2406.02021)."""

from __future__ import annotations

from torch import Tensor, nn

from visionzoo.layers.conv_norm import BranchedDepthwiseConv, LinearNorm
from visionzoo.layers.mixers.base import Mixer
from visionzoo.layers.nhwc import DepthwiseConvNHWC


class LargeKernelFfnMixer(Mixer):
    """Linear layer with batch norm, then depthwise convolutions around an activation.

        y = dwconvₖ(act(dwconvₖ(BN(W x))))

    Time: O(N·C·(C + k²)); memory: O(N·C).

    In the dtype of the input. Kernels of 7 are trained as the sum of themselves and a 3×3 kernel, each with
    batch norm, which `visionzoo.fuse` makes one; others have a bias and no norm.

    Facts from https://github.com/ysj9909/FFNet at f3c3e4c (Apache-2.0).

    Args:
        dim: channels C.
        num_heads: ignored, for the shared signature.
        kernel_sizes: sides of the two convolutions, odd; of the keys and of the values.
        act_layer: activation between them.

    Raises:
        ValueError: if a kernel is even or not positive.

    >>> import torch
    >>> LargeKernelFfnMixer(64).eval()(torch.randn(1, 5, 7, 64)).shape
    torch.Size([1, 5, 7, 64])
    """

    def __init__(
        self,
        dim: int,
        num_heads: int | None = None,
        *,
        kernel_sizes: tuple[int, int] = (7, 7),
        act_layer: type[nn.Module] = nn.GELU,
    ):
        super().__init__(dim, 1)
        self.check_kernels(**{f"kernel_sizes[{i}]": kernel for i, kernel in enumerate(kernel_sizes)})
        self.fc = LinearNorm(dim, dim)
        self.conv1, self.conv2 = (
            BranchedDepthwiseConv(dim, dim, kernel) if kernel == 7 else DepthwiseConvNHWC(dim, kernel)
            for kernel in kernel_sizes
        )
        self.act = act_layer()

    def forward(self, x: Tensor) -> Tensor:
        """[B, H, W, C] to [B, H, W, C]."""
        self.check_input(x)
        return self.conv2(self.act(self.conv1(self.fc(x))))
