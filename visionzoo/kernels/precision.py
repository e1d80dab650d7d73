"""Autocast: what it wants, and where it must not reach (sums and states that low precision would overflow)."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor


def without_autocast(device: torch.device) -> AbstractContextManager:
    """Context in which matrix products keep the dtype of their inputs, also inside torch.autocast."""
    return nullcontext() if autocast_dtype(device) is None else torch.autocast(device.type, enabled=False)


def autocast_dtype(device: torch.device) -> torch.dtype | None:
    """Dtype that torch.autocast gives convolutions and matrix products on a device; None where it is off."""
    # Asked by name: torch 2.11 cannot compile a call of torch.amp.is_autocast_available.
    if device.type == "meta" or not torch.is_autocast_enabled(device.type):
        return None
    return torch.get_autocast_dtype(device.type)


def double(tensor: Tensor | None) -> Any:
    """To float64, so that arithmetic costs one rounding at the end; Apple's devices have none. None stays None."""
    if tensor is None:
        return None
    return tensor.to(torch.float32 if tensor.device.type == "mps" else torch.float64)
