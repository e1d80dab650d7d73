"""Data-dependent convolution against the authors' operator, and as the convolution that it stands for."""

import re

import pytest
import torch
from golden import Record, relative_error

from visionzoo.layers.mixers import DataDependentConvMixer

NAMES = [
    (r"^in_linear", "in_proj"),
    (r"^out_linear", "out_proj"),
    (r"^conv1d_short", "short_conv"),
    (r"^fixed_conv_res", "residual"),
    (r"^fixed_conv", "filter"),
    (r"pos_emb\.z$", "positions"),
    (r"implicit_filter\.\d+\.freq$", "frequency"),
    (r"implicit_filter\.(\d)\.", lambda m: f"layers.{int(m[1]) // 2}."),
    (r"^conv_kernel_nn\.nn_model(_k)?\.", "first."),
    (r"^conv_kernel_nn\.nn_model(2|_q)\.", "second."),
    (r"conv1d_ls\.0", "conv"),
    (r"norm_ls\.0\.norm_conv_kernel", "norm"),
]
OPTIONS = {
    "orchid_fft": {"transform": "fft"},
    "orchid_fft_ortho": {"filter_depth": 2, "short_kernel": 5, "residual": False},
    "orchid_dct": {"transform": "dct"},
    "orchid_correlation": {"conditioning": "correlation"},
}


def _mixer(name, **options):
    """Build the mixer of a record, with its weights."""
    options = {"map_size": (3, 4), "position_dim": 5, "filter_dim": 8} | OPTIONS[name] | options
    mixer = DataDependentConvMixer(6, **options).double()
    state = {}
    for key, value in Record(f"orchid/{name}").state_dict().items():
        for pattern, replacement in NAMES:
            key = re.sub(pattern, replacement, key)
        state[re.sub(rf"layers\.{len(mixer.filter.layers)}\.", "last.", key)] = value
    mixer.load_state_dict(state)
    return mixer


@pytest.mark.parametrize("name", OPTIONS)
@torch.no_grad()
def test_the_operator_is_the_authors(name):
    record = Record(f"orchid/{name}")
    out = _mixer(name)(record.image().unflatten(1, (3, 4)))
    assert relative_error(out.flatten(1, 2), record.arrays["out"]) <= record.tolerance() == 1e-9


@torch.no_grad()
def test_the_start_of_the_positions_is_the_authors():
    """t from 0 to 1, cosines and sines of 0.0001 and of whole turns along the sequence."""
    places = DataDependentConvMixer(6, map_size=(2, 4), position_dim=7).filter.positions[0]
    t = torch.arange(8) / 8
    turns = 2 * torch.pi * torch.stack([0.0001 * t, t * 1.00005, 2 * t], 1)
    expected = torch.cat([torch.arange(8)[:, None] / 7, turns.cos(), -turns.sin()], 1)
    torch.testing.assert_close(places, expected, rtol=1e-5, atol=1e-5)


@torch.no_grad()
def test_what_the_magnitude_makes_of_the_input_ignores_shifts():
    mixer = _mixer("orchid_fft")
    x = torch.randn(1, 1, 12, 6, dtype=torch.float64)
    mixer.first.conv.weight[:, :, ::2] = 0  # whose zeros at both ends know of places
    made = mixer._conditioned(x, torch.float64)
    torch.testing.assert_close(mixer._conditioned(x.roll(3, 2), torch.float64), made)
    correlation = _mixer("orchid_correlation")
    for conv in (correlation.first.conv, correlation.second.conv):
        conv.weight[:, :, ::2] = 0
    made = correlation._conditioned(x, torch.float64)
    torch.testing.assert_close(correlation._conditioned(x.roll(3, 2), torch.float64), made)
    own = mixer.filter.bias
    torch.testing.assert_close(mixer._convolve(x.roll(3, 2), made, own), mixer._convolve(x, made, own).roll(3, 2))


@pytest.mark.parametrize("transform", ["fft", "fft_ortho", "dct"])
@torch.no_grad()
def test_transforms_come_back_and_their_products_are_circular_convolutions(transform):
    mixer = DataDependentConvMixer(2, transform=transform).double()
    for count in (1, 5, 8):
        x, kernel = torch.randn(2, 1, 1, count, 2, dtype=torch.float64)
        torch.testing.assert_close(mixer._inverse(mixer._forward(x), count), x)
        if transform != "dct":
            y = mixer._inverse(mixer._forward(x) * mixer._forward(kernel), count)
            expected = sum(kernel[:, :, [i]] * x.roll(i, 2) for i in range(count))
            torch.testing.assert_close(y, expected / (count if transform == "fft" else count**0.5))


@torch.no_grad()
def test_kernels_fit_maps_and_checkpoints_of_other_sizes():
    mixer = DataDependentConvMixer(6, map_size=(4, 4)).double()
    other = DataDependentConvMixer(6, map_size=(5, 7)).double()
    state = {
        name: other.filter.fit_weight("positions", value) if name.endswith("positions") else value
        for name, value in mixer.state_dict().items()
    }
    other.load_state_dict(state)
    x = torch.randn(2, 5, 7, 6, dtype=torch.float64)
    torch.testing.assert_close(other(x), mixer(x))
    with pytest.raises(ValueError, match="positions: expected the places of a square map"):
        other.filter.fit_weight("positions", torch.zeros(1, 12, 33))
