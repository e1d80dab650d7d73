"""A mixer inside a network of [B, C, H, W] maps: a U-Net, a detector, a ResNet."""

from __future__ import annotations

from torch import Tensor, nn

from visionzoo.layers.mixers.base import Mixer
from visionzoo.layers.tracing import one_node


class MixerNCHW(nn.Module):
    """Any token mixer on [B, C, H, W] maps.

    A map in channels_last memory is taken as it is, any other is copied into that once; the output is in
    channels_last memory. Cost and dtypes are the mixer's. Its tensors are called `mixer.*` in the state_dict.

    Args:
        mixer: a mixer; its `dim` is C.

    >>> import torch
    >>> from visionzoo.layers.mixers import HaloMixer
    >>> layer = MixerNCHW(HaloMixer(64, 2, block_size=4, halo_size=1))
    >>> layer(torch.randn(1, 64, 5, 7)).shape
    torch.Size([1, 64, 5, 7])
    """

    def __init__(self, mixer: Mixer):
        super().__init__()
        self.mixer = mixer

    @one_node  # it looks at the shape, as the mixers do
    def forward(self, x: Tensor) -> Tensor:
        """[B, C, H, W] to [B, C', H', W'], of the same size but for mixers with a stride or an `out_dim`.

        Raises:
            ValueError: if x is not such a map, or of another dtype than the weights.
        """
        if x.ndim != 4 or x.shape[1] != self.mixer.dim:
            raise ValueError(
                f"MixerNCHW: expected a map [B, C, H, W] with C = {self.mixer.dim}, got {tuple(x.shape)}; "
                f"for maps [B, H, W, C] use the {type(self.mixer).__name__} itself"
            )
        return self.mixer(x.permute(0, 2, 3, 1).contiguous()).permute(0, 3, 1, 2)
