"""Shifted windows see what Swin's detection code lets them see, by an oracle that cuts the map without rolling it."""

import pytest
import torch

from visionzoo.layers.mixers import WindowMixer
from visionzoo.layers.position import RelativePositionBias


def _loops(mixer, x, shift, masked):
    """Attention of each token to those of its window; the windows start `shift` tokens from the corner."""
    window, dim = mixer.window_size, mixer.head_dim
    height, width = x.shape[1:3]
    tall, wide = -(-height // window) * window, -(-width // window) * window
    padded = torch.zeros(1, tall, wide, x.shape[3], dtype=x.dtype)
    padded[:, :height, :width] = x
    qkv = mixer.qkv(padded)[0]  # [H, W, 3·C]
    shift = [shift if size > window else 0 for size in (height, width)]
    table = mixer.relative_position_bias.table if mixer.relative_position_bias else None
    out = torch.zeros_like(x)
    tokens = [(r, c) for r in range(tall) for c in range(wide)]
    for y, z in [(y, z) for y in range(height) for z in range(width)]:
        near = [
            (r, c)
            for r, c in tokens
            if (r - shift[0]) // window == (y - shift[0]) // window
            and (c - shift[1]) // window == (z - shift[1]) // window
            and not (masked and (r >= height or c >= width))
        ]
        for g in range(mixer.num_heads):
            q = qkv[y, z, g * dim : (g + 1) * dim]
            k, v = (torch.stack([qkv[r, c, part * mixer.dim + g * dim :][:dim] for r, c in near]) for part in (1, 2))
            scores = k @ q * dim**-0.5
            if table is not None:
                places = [(y - r + window - 1) * (2 * window - 1) + z - c + window - 1 for r, c in near]
                scores = scores + table[places, g]
            out[0, y, z, g * dim : (g + 1) * dim] = scores.softmax(0) @ v
    return mixer.proj(out)


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("size", [(8, 12), (7, 9), (3, 10), (4, 4), (2, 3)])
@pytest.mark.parametrize(("shift", "bias"), [(0, True), (2, True), (3, False)])
def test_attention_stays_in_windows_of_the_shifted_grid(size, shift, bias, masked):
    torch.manual_seed(0)
    mixer = WindowMixer(
        8, 2, window_size=4, shift_size=shift, relative_position_bias=bias, mask_padding=masked
    ).double()
    for parameter in mixer.parameters():
        torch.nn.init.normal_(parameter)
    x = torch.randn(1, *size, 8, dtype=torch.float64)
    torch.testing.assert_close(mixer(x), _loops(mixer, x, shift, masked), rtol=1e-11, atol=1e-11)


def test_no_shift_size_means_half_a_window():
    assert WindowMixer(8, window_size=7, shift_size=None).shift_size == 3


def test_relative_position_bias_is_the_table_at_the_offset():
    bias = RelativePositionBias(2, (3, 4))
    out = bias()
    assert out.shape == (2, 12, 12)
    for query in range(12):
        for key in range(12):
            down, right = query // 4 - key // 4, query % 4 - key % 4
            assert torch.equal(out[:, query, key], bias.table[(down + 2) * 7 + right + 3])


@pytest.mark.parametrize("shift", [-1, 4])
def test_wrong_shifts_are_named(shift):
    with pytest.raises(ValueError, match=f"shift_size must be from 0 to 3, got shift_size={shift}"):
        WindowMixer(8, window_size=4, shift_size=shift)


def test_shifted_windows_compile_into_one_graph_for_sizes_that_change():
    torch._dynamo.reset()
    mixer = WindowMixer(8, 2, window_size=4, shift_size=2, relative_position_bias=True, mask_padding=True)
    compiled = torch.compile(mixer, fullgraph=True, dynamic=True, backend="eager")
    for size in [(6, 9), (11, 7)]:
        x = torch.randn(2, *size, 8)
        torch.testing.assert_close(compiled(x), mixer(x))
