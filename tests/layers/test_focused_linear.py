"""The focused linear mixer: what it adds to linear attention, and maps of other sizes than its table."""

import pytest
import torch
import torch.nn.functional as F

from visionzoo.kernels import linear_attention
from visionzoo.layers.mixers import FocusedLinearMixer, LinearMixer


def _mixer(**options):
    torch.manual_seed(0)
    mixer = FocusedLinearMixer(8, 2, **options).double()
    for parameter in mixer.parameters():
        torch.nn.init.normal_(parameter)
    return mixer


def _attention(mixer, x, positions):
    q, k, v = mixer.qkv(x).chunk(3, dim=-1)
    q, k, values = ((t + extra).unflatten(-1, (2, 4)) for t, extra in ((q, 0), (k, positions), (v, 0)))
    temperature = F.softplus(mixer.scale).view(2, 4)
    return linear_attention(q, k, values, feature_map="focused", temperature=temperature).flatten(3), v


def test_heads_share_a_convolution_of_v_and_channels_have_their_own():
    mixer = _mixer(kernel_size=3, lepe_kernel=5)
    x = torch.randn(2, 4, 7, 8, dtype=torch.float64)
    out, v = _attention(mixer, x, 0)
    for g in range(2):
        head = v[..., 4 * g : 4 * g + 4].permute(0, 3, 1, 2)
        local = F.conv2d(head, mixer.dwc.weight, mixer.dwc.bias, padding=1, groups=4)
        out[..., 4 * g : 4 * g + 4] += local.permute(0, 2, 3, 1)
    lepe = F.conv2d(v.permute(0, 3, 1, 2), mixer.lepe.weight, mixer.lepe.bias, padding=2, groups=8)
    torch.testing.assert_close(mixer(x), mixer.proj(out + lepe.permute(0, 2, 3, 1)), rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize("size", [(3, 4), (5, 7)])
def test_keys_alone_carry_positions_interpolated_to_the_map(size):
    mixer = _mixer(kernel_size=None, position_size=(3, 4))
    table = mixer.position.table.permute(0, 3, 1, 2)
    positions = F.interpolate(table, size=size, mode="bicubic").permute(0, 2, 3, 1) if size != (3, 4) else None
    positions = mixer.position.table if positions is None else positions
    x = torch.randn(1, *size, 8, dtype=torch.float64)
    out, _ = _attention(mixer, x, positions)
    torch.testing.assert_close(mixer(x), mixer.proj(out), rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_finite_at_detection_sizes(dtype):
    mixer = FocusedLinearMixer(16, 2, position_size=7).to(dtype)
    x = (torch.randn(1, 256, 256, 16) * 10).to(dtype)
    out = mixer(x)
    assert out.dtype == dtype and out.isfinite().all()


@pytest.mark.parametrize(
    ("mixer", "options", "message"),
    [
        (FocusedLinearMixer, {"kernel_size": 4}, "kernel_size must be odd and positive, got kernel_size=4"),
        (FocusedLinearMixer, {"lepe_kernel": 0}, "lepe_kernel must be odd and positive, got lepe_kernel=0"),
        (FocusedLinearMixer, {"focusing_factor": 0}, "focusing_factor must be positive, got focusing_factor=0"),
        (FocusedLinearMixer, {"position_size": (7, -1)}, r"size must be positive, got size=\(7, -1\)"),
        (LinearMixer, {"feature_map": "focused"}, "unknown feature_map='focused', expected one of"),
    ],
)
def test_wrong_options_are_named(mixer, options, message):
    with pytest.raises(ValueError, match=message):
        mixer(8, 2, **options)


def test_reduced_keys_come_from_patches_and_the_convolution_sees_their_values_stretched():
    mixer = _mixer(kernel_size=3, reduction=2, position_size=(2, 3))
    x = torch.randn(2, 5, 7, 8, dtype=torch.float64, requires_grad=True)  # a row and a column have no part in keys
    patches = F.conv2d(x[:, :4, :6].permute(0, 3, 1, 2), mixer.sr.conv.weight, mixer.sr.conv.bias, stride=2)
    k, v = mixer.kv(F.layer_norm(patches.permute(0, 2, 3, 1), (8,), mixer.sr.norm.weight, mixer.sr.norm.bias)).split(
        8, -1
    )
    heads = [t.unflatten(-1, (2, 4)) for t in (mixer.q(x), k + mixer.position.table, v)]
    temperature = F.softplus(mixer.scale).view(2, 4)
    out = linear_attention(*heads, feature_map="focused", temperature=temperature).flatten(3)
    stretched = torch.empty(2, 35, 8, dtype=torch.float64)
    for i in range(35):  # token i lies at this place among the 6 values
        place = min(max((i + 0.5) * 6 / 35 - 0.5, 0), 5)
        left = int(place)
        right = min(left + 1, 5)
        values = v.flatten(1, 2)
        stretched[:, i] = values[:, left] + (place - left) * (values[:, right] - values[:, left])
    for g in range(2):
        head = stretched.unflatten(1, (5, 7))[..., 4 * g : 4 * g + 4].permute(0, 3, 1, 2)
        local = F.conv2d(head, mixer.dwc.weight, mixer.dwc.bias, padding=1, groups=4)
        out[..., 4 * g : 4 * g + 4] += local.permute(0, 2, 3, 1)
    torch.testing.assert_close(mixer(x), mixer.proj(out), rtol=1e-11, atol=1e-11)
    mixer(x).square().sum().backward()
    assert all(p.grad.isfinite().all() for p in mixer.parameters()) and x.grad.isfinite().all()
    assert mixer(torch.randn(1, 1, 3, 8, dtype=torch.float64)).shape == (1, 1, 3, 8)  # smaller than a patch
