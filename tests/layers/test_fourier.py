"""Mixing by Fourier transforms alone is the product with their matrices."""

import numpy as np
import pytest
import torch

from visionzoo.layers.mixers import FourierMixer


def _matrix(count):
    index = np.arange(count)
    return np.exp(-2j * np.pi * np.outer(index, index) / count)


@pytest.mark.parametrize("size", [(4, 6), (5, 7), (1, 8)])
@pytest.mark.parametrize("sequence", [False, True])
@pytest.mark.parametrize("orthonormal", [False, True])
def test_it_is_the_real_part_of_the_products_with_the_transforms_matrices(size, sequence, orthonormal):
    height, width = size
    x = torch.randn(2, *size, 6, dtype=torch.float64)
    tokens = _matrix(height * width) if sequence else np.kron(_matrix(height), _matrix(width))
    expected = (tokens @ x.flatten(1, 2).numpy() @ _matrix(6)).real.reshape(x.shape)
    if orthonormal:
        expected /= (height * width * 6) ** 0.5
    out = FourierMixer(6, sequence=sequence, orthonormal=orthonormal)(x)
    np.testing.assert_allclose(out, expected, atol=1e-11)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_the_orthonormal_transform_of_a_large_map_is_finite_in_half_precision(dtype):
    x = 10 * torch.randn(1, 256, 256, 16)
    low = FourierMixer(16)(x.to(dtype))
    assert low.isfinite().all()
    assert (low.float() - FourierMixer(16)(x)).norm() < 0.01 * x.norm()
