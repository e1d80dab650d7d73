"""Three poolings are their definition in loops; a map of one row is PoNet's sequence."""

import numpy as np
import pytest
import torch

from visionzoo.layers.mixers import MultiPoolMixer


@pytest.mark.parametrize(
    ("size", "segments", "pool_size"), [((1, 12), 3, 3), ((1, 7), 2, 5), ((6, 9), (2, 3), 3), ((5, 7), 8, 3)]
)
@torch.no_grad()
def test_it_is_its_definition(size, segments, pool_size):
    torch.manual_seed(0)
    mixer = MultiPoolMixer(8, 2, segments=segments, pool_size=pool_size).double()
    x = torch.randn(2, *size, 8, dtype=torch.float64)
    query, key, own, local, segment = (t.numpy() for t in mixer.in_proj(x).chunk(5, -1))
    rows, columns = (s // n + 1 for s, n in zip(size, mixer.segments, strict=True))
    reach = pool_size // 2
    pooled = np.zeros(x.shape)
    for b in range(2):
        whole = np.zeros(8)
        for head in (slice(0, 4), slice(4, 8)):
            scores = np.exp(key[b, ..., head] @ query[b, ..., head].mean((0, 1)) / 2)
            whole[head] = (scores[..., None] * key[b, ..., head]).sum((0, 1)) / scores.sum()
        for i in range(size[0]):
            for j in range(size[1]):
                top, left = i // rows * rows, j // columns * columns
                most = segment[b, top : top + rows, left : left + columns].max((0, 1))
                near = local[b, max(i - reach, 0) : i + reach + 1, max(j - reach, 0) : j + reach + 1].max((0, 1))
                pooled[b, i, j] = (whole + most) * own[b, i, j] + near
    torch.testing.assert_close(mixer(x), mixer.proj(torch.from_numpy(pooled)), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@torch.no_grad()
def test_it_is_finite_on_large_maps_in_half_precision(dtype):
    mixer = MultiPoolMixer(16, 2).to(dtype)
    assert mixer(10 * torch.randn(1, 256, 256, 16, dtype=dtype)).isfinite().all()
