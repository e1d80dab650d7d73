"""Filters over frequencies are the circular convolutions that they stand for, for maps of any size."""

import numpy as np
import pytest
import torch

from visionzoo.layers.fourier import irfft2, rfft2
from visionzoo.layers.mixers import SpectralGateMixer


@pytest.mark.parametrize("size", [(1, 1), (4, 6), (5, 7), (6, 5), (1, 8)])
def test_spectra_that_are_of_no_real_map_come_back_as_in_numpy(size):
    x = torch.randn(2, *size, 3, dtype=torch.float64)
    spectrum = rfft2(x)
    np.testing.assert_allclose(spectrum, np.fft.rfft2(x, axes=(1, 2), norm="ortho"), atol=1e-12)
    torch.testing.assert_close(irfft2(spectrum, size[1]), x)
    spectrum = torch.randn_like(spectrum)
    expected = np.fft.irfft2(spectrum.numpy(), s=size, axes=(1, 2), norm="ortho")
    np.testing.assert_allclose(irfft2(spectrum, size[1]), expected, atol=1e-12)


def test_imaginary_parts_that_a_real_map_cannot_have_are_dropped_and_not_left_to_the_library(monkeypatch):
    """On a GPU torch's own inverse lets some of them through."""
    seen = []
    irfft = torch.fft.irfft
    monkeypatch.setattr(torch.fft, "irfft", lambda x, **kwargs: (seen.append(x), irfft(x, **kwargs))[1])
    for width in (6, 7):
        irfft2(torch.randn(1, 4, width // 2 + 1, 2, dtype=torch.complex128), width)
        columns = seen.pop().imag.abs().sum((0, 1, 3))
        assert columns.bool().tolist() == [False, True, True, width % 2 == 1]


@pytest.mark.parametrize("size", [(4, 6), (5, 7)])
@torch.no_grad()
def test_a_filter_is_a_circular_convolution_with_its_transform(size):
    height, width = size
    kernel = torch.randn(*size, 2, dtype=torch.float64)
    mixer = SpectralGateMixer(2, map_size=size).double()
    mixer.complex_weight.copy_(torch.view_as_real(torch.fft.rfft2(kernel, dim=(0, 1))))
    x = torch.randn(1, *size, 2, dtype=torch.float64)
    expected = torch.zeros_like(x)
    for i in range(height):
        for j in range(width):
            expected += kernel[i, j] * x.roll((i, j), (1, 2))
    torch.testing.assert_close(mixer(x), expected)


@torch.no_grad()
def test_filters_fit_maps_and_checkpoints_of_other_sizes_and_keep_their_corners():
    mixer = SpectralGateMixer(3, map_size=(6, 8)).double()
    other = SpectralGateMixer(3, map_size=(9, 13)).double()
    other.complex_weight.copy_(other.fit_weight("complex_weight", mixer.complex_weight))
    assert other.complex_weight.shape == (9, 7, 3, 2)
    corners = (slice(None, None, 8), slice(None, None, 6)), (slice(None, None, 5), slice(None, None, 4))
    torch.testing.assert_close(other.complex_weight[corners[0]], mixer.complex_weight[corners[1]])
    x = torch.randn(2, 9, 13, 3, dtype=torch.float64)
    torch.testing.assert_close(mixer(x), other(x))
    assert torch.equal(mixer.fit_weight("complex_weight", mixer.complex_weight), mixer.complex_weight)


@torch.no_grad()
def test_float64_stays_unless_the_filter_is_to_be_the_authors():
    mixer = SpectralGateMixer(3, map_size=4).double()
    rounding = SpectralGateMixer(3, map_size=4, always_float32=True).double()
    rounding.load_state_dict(mixer.state_dict())
    x = torch.randn(1, 4, 4, 3, dtype=torch.float64)
    assert 1e-9 < (mixer(x) - rounding(x)).norm() / mixer(x).norm() < 1e-6
    assert torch.equal(mixer.float()(x.float()), rounding.float()(x.float()))


def test_half_precision_of_any_size_is_transformed_in_float32():
    for dtype in (torch.float16, torch.bfloat16):
        x = torch.randn(1, 5, 7, 2).to(dtype)
        assert torch.equal(rfft2(x), rfft2(x.float()))
        mixer = SpectralGateMixer(2, map_size=5).to(dtype)
        assert mixer(x).dtype == dtype
