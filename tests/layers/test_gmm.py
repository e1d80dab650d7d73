"""Attention with a mixture of Gaussians is its definition, in loops; windows, shifts and padding are those of Swin."""

from math import exp

import pytest
import torch

from visionzoo.layers.mixers import GmmMixer, WindowMixer


def _defined(mixer, x):
    """Compute the mixer of a map [H, W, C] pair by pair."""
    height, width, _ = x.shape
    places = [(i, j) for i in range(height) for j in range(width)]
    q, k, v = mixer.split_heads(mixer.qkv(x))
    scores = torch.zeros(mixer.num_heads, len(places), len(places), dtype=x.dtype)
    for g in range(mixer.num_heads):
        for a, (i, j) in enumerate(places):
            for b, (s, t) in enumerate(places):
                factor = sum(
                    alpha * exp(-((i - s) ** 2 + (j - t) ** 2) / (2 * (sigma**2 + 1e-5)))
                    for alpha, sigma in zip(
                        mixer.mixture.alpha[:, g].flatten().tolist(),
                        mixer.mixture.sigma[:, g].flatten().tolist(),
                        strict=True,
                    )
                )
                scores[g, a, b] = factor * (q[i, j, g] @ k[s, t, g]) * mixer.head_dim**-0.5
    if mixer.talk_before is not None:
        scores = torch.stack(
            [sum(mixer.talk_before[h, g] * scores[h] for h in range(len(scores))) for g in range(len(scores))]
        )
    attention = scores.softmax(-1)
    if mixer.talk_after is not None:
        attention = torch.stack(
            [sum(mixer.talk_after[h, g] * attention[h] for h in range(len(scores))) for g in range(len(scores))]
        )
    out = torch.einsum("gab,bgd->agd", attention, v.flatten(0, 1))
    return mixer.proj(out.flatten(1)).unflatten(0, (height, width))


def _mixer(*args, **kwargs):
    torch.manual_seed(0)
    mixer = GmmMixer(*args, num_kernels=2, **kwargs).double()
    torch.nn.init.uniform_(mixer.mixture.sigma, 0.5, 3.0)
    return mixer


@pytest.mark.parametrize("options", [{}, {"head_dim": 3, "talking_heads": True, "qkv_bias": True}])
@torch.no_grad()
def test_scores_are_multiplied_by_gaussians_of_the_distance(options):
    mixer = _mixer(8, 2, **options)
    x = torch.randn(3, 4, 8, dtype=torch.float64)
    torch.testing.assert_close(mixer(x[None])[0], _defined(mixer, x))


@torch.no_grad()
def test_windows_are_maps_by_themselves():
    mixer = _mixer(8, 2, window_size=3)
    alone = _mixer(8, 2)
    x = torch.randn(2, 6, 9, 8, dtype=torch.float64)
    alone.load_state_dict(mixer.state_dict())
    torch.testing.assert_close(mixer(x)[:, 3:6, 6:9], alone(x[:, 3:6, 6:9]))


@pytest.mark.parametrize(
    "options", [{"shift_size": None}, {"mask_padding": True}, {"shift_size": 2, "mask_padding": True}]
)
@torch.no_grad()
def test_with_a_flat_mixture_it_is_attention_in_windows(options):
    mixer = _mixer(8, 2, window_size=4, relative_position_bias=True, **options)
    plain = WindowMixer(8, 2, window_size=4, relative_position_bias=True, qkv_bias=False, **options).double()
    mixer.mixture.sigma.fill_(1e6)
    mixer.mixture.alpha.fill_(0.5)  # of two
    plain.load_state_dict({name: value for name, value in mixer.state_dict().items() if "mixture" not in name})
    x = torch.randn(2, 6, 9, 8, dtype=torch.float64)
    torch.testing.assert_close(mixer(x), plain(x), rtol=1e-9, atol=1e-9)
