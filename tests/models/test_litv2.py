"""LITv2's deformable merge is torchvision's deformable convolution, and its detection form takes the same weights."""

import pytest
import timm
import torch
from quick import quick_model
from torchvision.ops import deform_conv2d

import visionzoo
from visionzoo.layers.nhwc import on_nchw
from visionzoo.models.litv2 import DeformableTokenMerge, displace

TINY = {"depths": (1, 1, 1, 1), "embed_dims": (8, 16, 16, 32), "num_heads": (1, 2, 2, 4)}


@pytest.mark.parametrize("size", [(6, 8), (7, 9), (2, 3)])
def test_taps_move_as_in_torchvisions_deformable_convolution(size):
    torch.manual_seed(0)
    x = torch.randn(2, *size, 5, dtype=torch.float64)
    layer = DeformableTokenMerge(5, 6).double()
    offset = 2 * torch.randn(2, size[0] // 2, size[1] // 2, 8, dtype=torch.float64)  # also far out of the map
    conv = layer.merge.conv
    out = on_nchw(conv, displace(x, offset))
    expected = deform_conv2d(
        x.permute(0, 3, 1, 2), offset.permute(0, 3, 1, 2), conv.weight, conv.bias, stride=2
    ).permute(0, 2, 3, 1)
    torch.testing.assert_close(out, expected, rtol=1e-12, atol=1e-12)


def test_it_starts_as_a_plain_convolution_and_its_offsets_learn():
    torch.manual_seed(0)
    layer = DeformableTokenMerge(5, 6).eval()
    x = torch.randn(1, 6, 8, 5)
    torch.testing.assert_close(layer(x), layer.act(layer.merge(x)))
    layer(x).square().sum().backward()
    assert layer.offset.weight.grad.norm() > 0 and layer.offset.bias.grad.norm() > 0


@torch.no_grad()
def test_the_detection_form_has_another_window_and_takes_the_classifiers_weights():
    source = quick_model("zoo_litv2_s", **TINY)
    maps = timm.create_model("zoo_litv2_s", features_only=True, window_sizes=(0, 0, 4, 1), **TINY).eval()
    report = visionzoo.load_weights(maps, source.state_dict())
    assert sorted(report.dropped) == ["head.fc.bias", "head.fc.weight", "norm.bias", "norm.weight"]
    image = torch.randn(1, 3, 96, 160)
    expected = source.forward_intermediates(image, intermediates_only=True)
    got = maps(image)
    assert torch.equal(got[1], expected[1]) and (got[2] - expected[2]).norm() > 1e-3 * expected[2].norm()
