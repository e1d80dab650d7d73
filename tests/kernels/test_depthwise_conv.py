"""The depthwise convolution does what its docstring says, by an oracle that loops over the kernel."""

import pytest
import torch

from visionzoo.kernels import depthwise_conv, explain
from visionzoo.layers.nhwc import DepthwiseConvNHWC, on_nchw


def _tensors(kernel=3, height=5, width=6, channels=4, dtype=torch.float64):
    generator = torch.Generator().manual_seed(0)
    shapes = {
        "x": (2, height, width, channels),
        "weight": (channels, 1, kernel, kernel),
        "bias": (channels,),
        "residual": (2, height, width, channels),
    }
    return {name: torch.randn(shape, generator=generator, dtype=dtype) for name, shape in shapes.items()}


def _loops(x, weight, bias=None, residual=None, regions=(1, 1)):
    """One tap after the other, from the definition."""
    _, height, width, _ = x.shape
    reach = weight.shape[-1] // 2
    tall, wide = height // regions[0], width // regions[1]
    out = torch.zeros_like(x)
    for y in range(height):
        for column in range(width):
            for dy in range(-reach, reach + 1):
                for dx in range(-reach, reach + 1):
                    row, other = y + dy, column + dx
                    if row // tall == y // tall and other // wide == column // wide:
                        out[:, y, column] += x[:, row, other] * weight[:, 0, dy + reach, dx + reach]
    out = out if bias is None else out + bias
    return out if residual is None else out + residual


@pytest.mark.parametrize("kernel", [1, 3, 5, 13])
@pytest.mark.parametrize("regions", [None, (1, 3), (5, 2)])
def test_taps_are_weighted_and_zero_beyond_the_map_or_region(kernel, regions):
    tensors = _tensors(kernel)
    expected = _loops(**tensors, regions=regions or (1, 1))
    torch.testing.assert_close(depthwise_conv(**tensors, regions=regions), expected, rtol=1e-12, atol=1e-12)
    tensors.update(bias=None, residual=None)
    expected = _loops(**tensors, regions=regions or (1, 1))
    torch.testing.assert_close(depthwise_conv(**tensors, regions=regions), expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("regions", [None, (5, 2)])
def test_gradients_are_those_of_finite_differences(regions):
    tensors = [t.requires_grad_() for t in _tensors().values()]

    def conv(x, weight, bias, residual):
        return depthwise_conv(x, weight, bias, residual=residual, regions=regions)

    assert torch.autograd.gradcheck(conv, tensors, fast_mode=True)


def test_is_the_convolution_of_torch_with_its_parameters():
    torch.manual_seed(0)
    own = DepthwiseConvNHWC(8, 5)
    torch.manual_seed(0)
    theirs = torch.nn.Conv2d(8, 8, 5, padding=2, groups=8)
    assert all(torch.equal(a, b) for a, b in zip(own.parameters(), theirs.parameters(), strict=True))
    theirs.load_state_dict(own.state_dict())
    x = torch.randn(2, 7, 6, 8)
    torch.testing.assert_close(own(x), on_nchw(theirs, x))
    torch.testing.assert_close(own(x, residual=x), x + on_nchw(theirs, x))


def test_autocast_casts_as_torch_does_and_keeps_a_wider_residual():
    tensors = _tensors(dtype=torch.float32)
    residual = tensors.pop("residual")
    with torch.autocast("cpu", torch.bfloat16):
        assert depthwise_conv(**tensors).dtype == torch.bfloat16
        assert depthwise_conv(**tensors, residual=residual).dtype == torch.float32
        assert depthwise_conv(**tensors, residual=residual.bfloat16()).dtype == torch.bfloat16


def test_even_kernels_are_refused_by_the_layer():
    with pytest.raises(ValueError, match="kernel_size must be odd and positive, got kernel_size=4"):
        DepthwiseConvNHWC(8, 4)


def test_what_ran_is_told():
    with explain() as decisions:
        depthwise_conv(**_tensors(dtype=torch.float32))
    assert str(decisions[0]).startswith("depthwise_conv [2, 5, 6, 4] ran reference: the tensors are on cpu")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"x": torch.zeros(5, 6, 4)}, r"x must be floating point \[B, H, W, C\], got torch.float32 \(5, 6, 4\)"),
        ({"x": torch.zeros(2, 5, 6, 4).long()}, r"x must be floating point .* got torch.int64"),
        (
            {"weight": torch.zeros(4, 1, 3, 5)},
            r"must be \[C, 1, k, k\] with C = 4 and odd k, got \(4, 1, 3, 5\)",
        ),
        ({"weight": torch.zeros(4, 1, 4, 4)}, r"odd k, got \(4, 1, 4, 4\)"),
        ({"weight": torch.zeros(4, 4, 3, 3)}, r"got \(4, 4, 3, 3\)"),
        ({"weight": torch.zeros(9)}, r"got \(9,\)"),
        ({"weight": torch.zeros(4, 1, 3, 3)}, r"weight must have x's dtype torch.float64, got torch.float32"),
        ({"weight": torch.zeros(4, 1, 3, 3).long()}, r"weight must be floating point on cpu, got torch.int64 on cpu"),
        ({"weight": torch.zeros(4, 1, 3, 3, device="meta")}, r"weight must be .* on cpu, got torch.float32 on meta"),
        ({"bias": torch.zeros(5)}, r"bias must be \[C\] = \[4\], got \(5,\)"),
        ({"bias": torch.zeros(4)}, r"bias must have x's dtype torch.float64, got torch.float32"),
        ({"residual": torch.zeros(2, 5, 6, 3)}, r"residual must be floating point like x, \(2, 5, 6, 4\) on cpu, got"),
        ({"regions": (2, 2)}, r"regions must be positive and divide the map, got regions=\(2, 2\) for height 5"),
        ({"backend": "cudnn"}, r"unknown backend 'cudnn'"),
        ({"backend": "triton"}, r"backend 'triton' cannot run: its kernels take .*, got torch.float64"),
    ],
)
def test_wrong_arguments_are_named(change, message):
    with pytest.raises(ValueError, match=message):
        depthwise_conv(**{**_tensors(), **change})
