"""Triton's neighborhood attention is the reference's, in every dtype, for every kind of call."""

import pytest
import torch
from kernels.triton_checks import DEVICE, check_against_float64, check_repeats

from visionzoo.kernels import neighborhood_attention

CASES = {  # (batch, height, width, heads, head width), kernel size, dilation, stride
    "tiles with borders": ((2, 5, 11, 1, 16), (3, 3), (1, 1), (1, 1)),
    "the whole map": ((1, 5, 7, 2, 24), (5, 7), (1, 1), (1, 1)),
    "dilated, with groups of unequal length": ((1, 7, 9, 1, 32), (3, 5), (2, 1), (1, 1)),
    "an even kernel": ((1, 6, 8, 1, 16), (4, 2), (1, 2), (1, 1)),
    "windows wider than a tile": ((1, 9, 12, 1, 16), (9, 11), (1, 1), (1, 1)),
    "stride and dilation": ((1, 5, 8, 1, 16), (2, 5), (2, 1), (2, 3)),
    "a stride over several tiles": ((1, 2, 70, 1, 16), (1, 36), (1, 1), (1, 35)),
}


def _case(name, bias=False):
    shape, kernel, dilation, stride = CASES[name]
    generator = torch.Generator().manual_seed(0)

    def draw(*shape):
        return torch.randn(*shape, generator=generator, dtype=torch.float64).requires_grad_()

    tensors = {key: draw(*shape) for key in "qkv"}
    tensors["bias"] = draw(shape[3], 2 * kernel[0] - 1, 2 * kernel[1] - 1) if bias else None
    return tensors, {"kernel_size": kernel, "dilation": dilation, "stride": stride}


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("bias", [False, True], ids=["no bias", "bias"])
def test_is_as_exact_as_plain_torch(name, bias):
    tensors, options = _case(name, bias)
    check_against_float64(neighborhood_attention, tensors, **options)


def test_runs_repeat_bit_for_bit():
    tensors, options = _case("tiles with borders", bias=True)
    check_repeats(neighborhood_attention, tensors, **options)


def test_takes_views_of_one_projection_and_other_strides():
    generator = torch.Generator().manual_seed(0)
    q, k, v = torch.randn(2, 6, 8, 3, 2, 16, generator=generator).to(DEVICE).unbind(3)
    expected = neighborhood_attention(q, k, v, kernel_size=3, backend="reference")
    views = [q, k.transpose(1, 2).contiguous().transpose(1, 2), v.transpose(3, 4).contiguous().transpose(3, 4)]
    out = neighborhood_attention(*views, kernel_size=3, backend="triton")
    torch.testing.assert_close(out, expected, rtol=1e-5, atol=1e-5)
