"""Triton's linear attention is the reference's, in every dtype, for every feature map."""

import pytest
import torch
from kernels.triton_checks import DEVICE, check_against_float64, check_repeats

from visionzoo.kernels import linear_attention

MAPS = ["relu", "elu", "softmax", "focused"]
SHAPES = {  # (height, width) of queries, of keys, heads, head width
    "one block": ((4, 4), (4, 4), 2, 16),
    "several blocks and odd widths": ((13, 17), (13, 17), 3, 24),
    "fewer keys": ((9, 10), (3, 5), 2, 32),
    "more keys, narrow heads": ((2, 3), (7, 9), 2, 3),
    "wide heads": ((5, 5), (5, 5), 1, 128),
}


def _case(name, feature_map, temperature=False):
    size, key_size, heads, dim = SHAPES[name]
    generator = torch.Generator().manual_seed(0)

    def draw(*shape):
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    tensors = {"q": draw(2, *size, heads, dim), "k": draw(2, *key_size, heads, dim), "v": draw(2, *key_size, heads, dim)}
    if temperature:
        tensors["temperature"] = draw(heads, dim).sigmoid() + 0.5
    return {name: t.requires_grad_() for name, t in tensors.items()}, {"feature_map": feature_map}


@pytest.mark.parametrize("feature_map", MAPS)
@pytest.mark.parametrize("name", SHAPES)
def test_is_as_exact_as_plain_torch(name, feature_map):
    tensors, options = _case(name, feature_map, temperature=feature_map == "focused")
    check_against_float64(linear_attention, tensors, **options)
