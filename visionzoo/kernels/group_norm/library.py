"""torch's own layer norm over whole samples: two launches, for maps on which these take the time."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from visionzoo.kernels.precision import without_autocast


def forward(x: Tensor, weight: Tensor, bias: Tensor, *, eps: float, out_dtype: torch.dtype) -> Tensor:
    """Normalise [B, H, W, C] as `group_norm` says, with statistics in float32, rounded before and after the scale."""
    with without_autocast(x.device):
        return torch.addcmul(bias, F.layer_norm(x, x.shape[1:], eps=eps), weight).to(out_dtype)
