"""A gate inside a network of [B, C, H, W] maps: a U-Net, a detector, a ResNet."""

from __future__ import annotations

from visionzoo.layers.maps import AdapterNCHW


class GateNCHW(AdapterNCHW):
    """Any gate on [B, C, H, W] maps.

    A map in channels_last memory is taken as it is, any other is copied into that once; the output is in
    channels_last memory. Cost and dtypes are the gate's. Its tensors are called `gate.*` in the state_dict.

    Args:
        gate: a gate; its `dim` is C.

    >>> import torch
    >>> from visionzoo.layers.gates import TripletGate
    >>> GateNCHW(TripletGate(64))(torch.randn(1, 64, 5, 7)).shape
    torch.Size([1, 64, 5, 7])
    """

    ROLE = "gate"
