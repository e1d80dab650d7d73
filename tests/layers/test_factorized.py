"""Factorized attention's local part against torch's own padding, unfolding and pooling, and maps that those refuse."""

import pytest
import torch
import torch.nn.functional as F

from visionzoo.layers.mixers import FactorizedMixer
from visionzoo.layers.mixers.factorized import _windows


@pytest.mark.parametrize(("size", "window", "step"), [((9, 7), 3, 1), ((8, 11), 3, 2), ((6, 6), 3, 1), ((7, 9), 2, 4)])
def test_windows_are_those_of_reflection_and_unfolding(size, window, step):
    x = torch.randn(2, *size, 4, dtype=torch.float64)
    span = step * (window - 1) + 1
    padding = [-length % span for length in size]
    padded = F.pad(x.permute(0, 3, 1, 2), (0, padding[1], 0, padding[0]), mode="reflect")
    expected = F.unfold(padded, window, dilation=step, stride=span).unflatten(1, (4, window, window))
    cut = _windows(x, window, step)  # [B, rows, w, columns, w, C]
    assert torch.equal(cut.permute(0, 5, 2, 4, 1, 3).flatten(4), expected)


def test_a_map_smaller_than_a_window_is_reflected_repeatedly():
    x = torch.arange(3.0).view(1, 3, 1, 1)
    assert _windows(x, 7, 1)[0, 0, :, 0, 0, 0].tolist() == [0, 1, 2, 1, 0, 1, 2]
    assert _windows(x[:, :1], 3, 2)[0, 0, :, 0, 0, 0].tolist() == [0, 0, 0]


@torch.no_grad()
def test_the_average_over_windows_is_torchs_adaptive_pooling_of_windows_and_channels():
    torch.manual_seed(0)
    mixer = FactorizedMixer(32, 2, reduction=2, window_size=3).double()
    x = torch.randn(1, 8, 13, 2 * mixer.width, dtype=torch.float64)  # 2 x 3 windows with reflection
    q = torch.randn(1, 8, 13, 2, mixer.width, dtype=torch.float64)
    pooled = F.pad(x.permute(0, 3, 1, 2), (0, 2, 0, 2), mode="reflect")
    pooled = F.unfold(pooled, 3, dilation=2, stride=5).unflatten(1, (2, mixer.width, 9)).permute(0, 1, 3, 4, 2)
    pooled = F.adaptive_avg_pool2d(pooled.flatten(3), (None, mixer.width))
    k, v = mixer.local_fc2[1](mixer.local_fc1[1](pooled)).chunk(2, dim=-1)
    conv = mixer.local_conv[1]
    places = v.transpose(2, 3).reshape(1, -1, 3, 3)
    places = places + F.conv2d(places, conv.weight, conv.bias, padding=1, groups=len(conv.weight))
    v = places.reshape(1, 2, mixer.width, 9).transpose(2, 3)
    weights = (q.flatten(1, 2).transpose(1, 2) @ k.mT * mixer.width**-0.5).softmax(-1)
    expected = (weights @ v).transpose(1, 2).reshape(1, 8, 13, -1)
    torch.testing.assert_close(mixer._attend_locally(1, q, x), expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(
    ("dim", "heads", "reduction", "parts"),
    [(32, 1, 8, (4, 28)), (96, 1, 8, (12, 84)), (128, 4, 2, (16, 112)), (256, 8, 1, (32, 224)), (24, 4, 2, (8, 16))],
)
def test_channels_are_split_as_published_where_they_can_be(dim, heads, reduction, parts):
    mixer = FactorizedMixer(dim, heads, reduction=reduction)
    assert (mixer.global_dim, mixer.local_dim) == parts
