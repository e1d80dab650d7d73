"""Clamped linear attention against the whole matrix of weights."""

import torch

from visionzoo.layers.mixers import ClampedLinearMixer


@torch.no_grad()
def test_it_is_attention_with_relu_features_and_a_clamped_sum():
    torch.manual_seed(0)
    mixer = ClampedLinearMixer(8, 2, min_denominator=5.0).double()
    mixer.temperature.copy_(torch.tensor([0.3, 0.7]).view(2, 1, 1))
    x = 3 * torch.randn(1, 4, 5, 8, dtype=torch.float64)
    q, k, v = mixer.qkv(x).reshape(20, 3, 2, 4).unbind(1)
    out = []
    sums = []
    for head in range(2):
        weights = q[:, head].relu() @ k[:, head].relu().T
        sums.append(weights.sum(1))
        out.append(mixer.temperature[head] * (weights @ v[:, head]) / weights.sum(1, keepdim=True).clamp(min=5.0))
    assert 0 < (torch.stack(sums) < 5).sum() < 40  # both sides of the clamp are met
    torch.testing.assert_close(mixer(x).view(20, 8), mixer.proj(torch.cat(out, dim=1)), rtol=1e-12, atol=1e-12)


@torch.no_grad()
def test_it_stays_finite_in_half_precision_on_large_maps():
    torch.manual_seed(0)
    mixer = ClampedLinearMixer(16, 2)
    x = 10 * torch.randn(1, 256, 256, 16) + 5  # the sums over all tokens exceed what half precision holds
    exact = mixer(x)
    low = mixer.half()(x.half())
    assert (low.float() - exact).norm() < 0.01 * exact.norm()
