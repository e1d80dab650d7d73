"""Kernels of each place's own, against their definition place by place."""

import pytest
import torch
from torch.autograd import gradcheck

from visionzoo.layers.mixers import DynamicLocalMixer
from visionzoo.layers.mixers.dynamic_local import convolve_by_place


def test_each_place_sums_its_window_by_its_own_weights():
    torch.manual_seed(0)
    mixer = DynamicLocalMixer(6, 2, kernel_size=5, reduction=3).double()
    x = torch.randn(1, 3, 4, 6, dtype=torch.float64)
    with torch.no_grad():
        inner = mixer.in_proj(x)[0]
        weights = mixer.to_weights(mixer.conv(mixer.reduce(inner).permute(2, 0, 1)[None])[0].permute(1, 2, 0))
        out = torch.zeros_like(inner)
        for y, z, channel in ((y, z, c) for y in range(3) for z in range(4) for c in range(6)):
            group = channel // 3
            for a, b in ((a, b) for a in range(5) for b in range(5)):
                if 0 <= y + a - 2 < 3 and 0 <= z + b - 2 < 4:
                    weight = weights[y, z, group * 25 + a * 5 + b]
                    out[y, z, channel] += weight * inner[y + a - 2, z + b - 2, channel]
        torch.testing.assert_close(mixer(x)[0], mixer.proj(out), rtol=1e-12, atol=1e-12)


def test_gradients_are_those_of_differences():
    x = torch.randn(1, 2, 3, 4, dtype=torch.float64, requires_grad=True)
    weights = torch.randn(1, 2, 3, 2, 9, dtype=torch.float64, requires_grad=True)
    gradcheck(lambda x, w: convolve_by_place(x, w, (3, 3)), (x, weights), fast_mode=True)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@torch.no_grad()
def test_65536_large_tokens_in_half_precision_stay_finite(dtype):
    mixer = DynamicLocalMixer(2, 1, kernel_size=3, reduction=1).to(dtype)
    out = mixer((torch.randn(1, 256, 256, 2) * 10).to(dtype))
    assert out.isfinite().all() and out.std() > 0
