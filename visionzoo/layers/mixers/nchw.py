"""A mixer inside a network of [B, C, H, W] maps: a U-Net, a detector, a ResNet."""

from __future__ import annotations

from visionzoo.layers.maps import AdapterNCHW


class MixerNCHW(AdapterNCHW):
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

    ROLE = "mixer"
