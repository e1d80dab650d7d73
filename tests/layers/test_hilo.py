"""HiLo attention is the authors' layer; its two groups of heads also where one is empty or windows do not fit."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from golden import Record, relative_error, sample

from visionzoo.layers.mixers import HiLoMixer


@torch.no_grad()
def test_the_layer_is_the_authors():
    record = Record("litv2/hilo_384")
    mixer = HiLoMixer(384, 12, alpha=0.9).double()
    mixer.load_state_dict(
        {name.replace("l_", "low_").replace("h_", "high_"): value for name, value in record.state_dict().items()}
    )
    x = np.random.RandomState(1).standard_normal(record.meta["input_shape"]).astype(np.float32)
    out = mixer(torch.from_numpy(x).double().unflatten(1, (14, 14)))
    assert relative_error(sample(out.flatten(1, 2)), record.arrays["out"]) <= record.tolerance()


def _attend(q, k, v):
    return (q @ k.mT * q.shape[-1] ** -0.5).softmax(-1) @ v


@pytest.mark.parametrize(("alpha", "low"), [(0.0, 0), (0.4, 1), (0.5, 2), (1.0, 4)])
@torch.no_grad()
def test_it_follows_the_definition_where_windows_do_not_divide_the_map(alpha, low):
    torch.manual_seed(0)
    mixer = HiLoMixer(16, 4, window_size=3, alpha=alpha).double()
    x = torch.randn(1, 4, 5, 16, dtype=torch.float64)
    padded = F.pad(x, (0, 0, 0, 1, 0, 2))  # 6 x 6
    expected = torch.zeros(4, 5, 16, dtype=torch.float64)
    high = 4 - low
    for head in range(high):
        rows = slice(4 * head, 4 * head + 4)
        q, k, v = (part[..., rows] for part in mixer.high_qkv(padded).split(4 * high, dim=-1))
        out = torch.zeros(6, 6, 4, dtype=torch.float64)
        for top in (0, 3):
            for left in (0, 3):
                window = (0, slice(top, top + 3), slice(left, left + 3))
                inside = _attend(*(part[window].reshape(9, 4) for part in (q, k, v)))
                out[window[1:]] = inside.view(3, 3, 4)
        expected[..., rows] = out[:4, :5]
    means = torch.stack([padded[0, i : i + 3, j : j + 3].mean((0, 1)) for i in (0, 3) for j in (0, 3)])
    for head in range(low):
        rows = slice(4 * head, 4 * head + 4)
        k, v = (part[..., rows] for part in mixer.low_kv(means).split(4 * low, dim=-1))
        place = slice(4 * (high + head), 4 * (high + head) + 4)
        expected[..., place] = _attend(mixer.low_q(x)[0, ..., rows].reshape(20, 4), k, v).view(4, 5, 4)
    parts = expected.split([4 * high, 4 * low], dim=-1)
    projections = (mixer.high_proj, mixer.low_proj)
    expected = torch.cat(
        [proj(part) for proj, part in zip(projections, parts, strict=True) if proj is not None], dim=-1
    )
    torch.testing.assert_close(mixer(x)[0], expected, rtol=1e-12, atol=1e-12)


def test_windows_of_one_token_are_plain_attention():
    mixer = HiLoMixer(16, 4, window_size=1, alpha=0.5)
    assert mixer.high_qkv is None and mixer.low_kv.out_features == 32
