"""The neighborhood mixer: small maps are padded as the authors' are, and its table of biases fits other kernels."""

import pytest
import torch
from torch._dynamo.testing import CompileCounterWithBackend

from visionzoo.kernels import neighborhood_attention
from visionzoo.layers.mixers import NeighborhoodMixer, build_mixer
from visionzoo.layers.position import NeighborhoodBias


def _mixer(**options):
    torch.manual_seed(0)
    mixer = NeighborhoodMixer(8, 2, **options).double()
    for parameter in mixer.parameters():
        torch.nn.init.normal_(parameter)
    return mixer


@pytest.mark.parametrize("size", [(2, 9), (9, 3), (4, 5), (1, 1)])
def test_a_small_map_is_a_corner_of_one_that_is_just_large_enough(size):
    mixer = _mixer(kernel_size=3, dilation=2)
    x = torch.randn(1, *size, 8, dtype=torch.float64)
    padded = torch.zeros(1, max(size[0], 6), max(size[1], 6), 8, dtype=torch.float64)
    padded[:, : size[0], : size[1]] = x
    torch.testing.assert_close(mixer(x), mixer(padded)[:, : size[0], : size[1]])


def test_kernel_dilation_and_stride_for_each_axis_and_the_bias_reach_attention():
    options = {"kernel_size": (3, 5), "dilation": (2, 1), "stride": (1, 4)}
    mixer = _mixer(**options)
    assert mixer.relative_position_bias.table.shape == (2, 5, 9)
    x = torch.randn(1, 7, 8, 8, dtype=torch.float64)
    q, k, v = mixer.qkv(x).view(1, 7, 8, 3, 2, 4).unbind(3)
    table = mixer.relative_position_bias.table
    expected = neighborhood_attention(q, k, v, **options, bias=table)
    torch.testing.assert_close(mixer(x), mixer.proj(expected.flatten(3)))
    without = build_mixer({"type": "neighborhood", "kernel_size": 3, "relative_position_bias": False}, 8, 2)
    assert not [name for name, _ in without.named_parameters() if "bias.table" in name]


@pytest.mark.parametrize("stride", [0, (1, 4)])
def test_a_stride_that_leaves_tokens_without_a_window_is_refused(stride):
    with pytest.raises(ValueError, match="NeighborhoodMixer: stride must be from 1 to kernel_size, got stride="):
        _mixer(kernel_size=3, stride=stride)


def test_it_compiles_once_for_maps_that_are_large_enough():
    torch._dynamo.reset()
    mixer = NeighborhoodMixer(16, 2, kernel_size=3, dilation=2)
    counter = CompileCounterWithBackend("eager")
    compiled = torch.compile(mixer, fullgraph=True, dynamic=True, backend=counter)
    for size in [(9, 7), (11, 6), (6, 20), (16, 16)]:
        x = torch.randn(2, *size, 16)
        torch.testing.assert_close(compiled(x), mixer(x))
    assert counter.frame_count == 1


def test_biases_of_another_kernel_are_resized_bicubically():
    torch.manual_seed(0)
    small, large = NeighborhoodBias(3, (7, 7)), NeighborhoodBias(3, (11, 9))
    fitted = large.fit_weight("table", small.table.detach())
    expected = torch.nn.functional.interpolate(
        small.table.detach()[:, None], size=(21, 17), mode="bicubic", align_corners=False
    )
    assert torch.equal(fitted, expected[:, 0])
    with pytest.raises(ValueError, match=r"table: expected the offsets of a neighborhood \[G, h, w\], got \(169, 3\)"):
        large.fit_weight("table", torch.zeros(169, 3))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"kernel_size": 0}, "kernel_size and dilation must be positive, got kernel_size=0"),
        ({"dilation": (1, -1)}, r"got kernel_size=7 and dilation=\(1, -1\)"),
        ({"num_heads": 3}, "num_heads must divide dim"),
        ({"window_size": 7}, "does not take these options"),
    ],
)
def test_bad_options_are_refused_with_their_values(options, message):
    with pytest.raises(ValueError, match=message):
        build_mixer({"type": "neighborhood", "num_heads": 2, **options}, 16)
