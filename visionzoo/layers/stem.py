"""Stems that several families share: from the image to the first map."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import pairwise

from torch import Tensor, nn

from visionzoo.layers.arguments import Positive
from visionzoo.layers.conv_norm import ConvNorm
from visionzoo.layers.nhwc import OnNCHW, on_nhwc
from visionzoo.layers.norm import LayerNorm
from visionzoo.layers.padding import pad_to_multiple
from visionzoo.layers.part import Part


def _in_channels_last(layer: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    return on_nhwc(lambda image: layer(image.contiguous()), x)  # torch.func.vmap knows no memory format


class Stem(Part, nn.ModuleList):
    """Layers on [B, H, W, C] that in turn make the first map of an image; no `nn.Sequential`, which is cut anywhere."""

    def __init__(self, *layers: nn.Module):
        super().__init__(layers)

    def forward(self, x: Tensor) -> Tensor:
        """Image [B, in_chans, H, W] to [B, C, H', W'], in channels_last memory."""
        self.check_inputs("B C H W", x)
        return _in_channels_last(self.forward_map, x)

    def forward_map(self, x: Tensor) -> Tensor:
        """Image [B, H, W, in_chans] to [B, H', W', C]."""
        for layer in self:
            x = layer(x)
        return x


class ConvNormStem(ConvNorm):
    """A convolution and its norm that make the first map of an image."""

    def forward(self, x: Tensor) -> Tensor:
        """Image [B, in_chans, H, W] to [B, C, H', W'], in channels_last memory."""
        self.check_inputs("B C H W", x, C=self.in_dim)
        return _in_channels_last(super().forward, x)


def cut_patches(image: Tensor, side: int) -> Tensor:
    """Cut an image [B, in_chans, H, W], filled up with zeros, into patches [B, H', W', side, side, in_chans]."""
    x = pad_to_multiple(image.permute(0, 2, 3, 1), (side, side))
    return x.unflatten(2, (-1, side)).unflatten(1, (-1, side)).transpose(2, 3)


class PixelsToTokens(Part):
    """Norm, projection and norm that make a token of a patch's pixels, all their channels in one (TNT, CRATE).

    Args:
        pixels: pixels of a patch, h·w.
        inner_dim: their channels C'.
        dim: channels C of the tokens.
        bias: whether the projection has a bias.
    """

    def __init__(self, pixels: Positive, inner_dim: Positive, dim: Positive, *, bias: bool = False):
        super().__init__()
        self.inner_dim = inner_dim
        self.norm1 = LayerNorm(pixels * inner_dim)
        self.proj = nn.Linear(pixels * inner_dim, dim, bias=bias)
        self.norm2 = LayerNorm(dim)

    def forward(self, pixels: Tensor) -> Tensor:
        """[..., h, w, C'] to [..., C]."""
        self.check_inputs("... H W C", pixels, C=self.inner_dim)
        return self.norm2(self.proj(self.norm1(pixels.flatten(-3))))


class NormedPatchStem(PixelsToTokens):
    """Patches that are normalized before and after they are projected, their pixels row by row with channels last.

    Args:
        in_chans: image channels.
        dim: channels C.
        patch_size: side of the patches in pixels; images are padded with zeros to whole ones.
    """

    def __init__(self, in_chans: Positive, dim: Positive, patch_size: Positive):
        super().__init__(patch_size * patch_size, in_chans, dim, bias=True)
        self.patch_size = patch_size

    def forward(self, image: Tensor) -> Tensor:
        """Image [B, in_chans, H, W] to [B, C, H', W'], in channels_last memory."""
        self.check_inputs("B C H W", image, C=self.inner_dim)
        return super().forward(cut_patches(image, self.patch_size)).permute(0, 3, 1, 2)


class PatchStem(ConvNormStem):
    """A convolution of whole patches, which checkpoints may have as a linear layer of flattened ones.

    Args:
        in_chans: image channels.
        dim: channels C of the map.
        patch_size: side of the patches in pixels; images are padded with zeros to whole ones.
        channels_last: whether flattened patches have channels as their last axis, after rows and columns, or first.
    """

    def __init__(self, in_chans: Positive, dim: Positive, patch_size: Positive, *, channels_last: bool = False):
        super().__init__(in_chans, dim, patch_size, patch_size, pad_to_stride=True)
        self.channels_last = channels_last

    def fit_child_weight(self, name: str, weight: Tensor) -> Tensor:
        """Bring the weight [C, p·p·in_chans] of a linear layer to that of the convolution."""
        if name != "conv.weight" or weight.ndim != 2:
            return weight
        side = self.conv.kernel_size
        if self.channels_last:
            return weight.unflatten(1, (*side, -1)).permute(0, 3, 1, 2).contiguous()
        return weight.unflatten(1, (-1, *side))


def conv_stem(
    in_chans: int,
    dims: Sequence[int],
    kernel_size: int,
    strides: Sequence[int],
    act_layer: type[nn.Module],
    *,
    last_act: bool = True,
    pool: bool = False,
) -> Stem:
    """Build a stem of batch-normalized convolutions: [B, in_chans, H, W] to [B, dims[-1], ⌈H/s⌉, ⌈W/s⌉].

    Args:
        in_chans: image channels.
        dims: channels of each convolution.
        kernel_size: side of their kernels, odd.
        strides: stride of each; s above is their product, times 2 with `pool`.
        act_layer: activation after each convolution.
        last_act: whether the last has one too.
        pool: end with 3×3 max pooling of stride 2.
    """
    layers: list[nn.Module] = []
    for (in_dim, out_dim), stride in zip(pairwise((in_chans, *dims)), strides, strict=True):
        conv = ConvNorm(in_dim, out_dim, kernel_size, stride, kernel_size // 2, bias=False, norm_layer=nn.BatchNorm2d)
        layers += [conv, act_layer()]
    if not last_act:
        layers.pop()
    return Stem(*layers, *([OnNCHW(nn.MaxPool2d(3, 2, 1))] if pool else []))
