"""Injective linear attention against its matrix of weights, in windows too, and what its kernels are predicted from."""

from unittest import mock

import pytest
import torch
import torch.nn.functional as F
from quick import meta_model

from visionzoo.layers.block import Block
from visionzoo.layers.mixers import InjectiveLinearMixer


def _by_definition(mixer, x, source, phi):
    """One window [h, w, C] from the weights of all pairs of tokens."""
    height, width, channels = x.shape
    count, heads = height * width, mixer.num_heads
    q, k, v = mixer.qkv(x).reshape(count, 3, heads, -1).unbind(1)
    scale = mixer.head_dim**-0.5 / count
    out = []
    for head in range(heads):
        products = phi(q[:, head]) @ phi(k[:, head]).T * scale
        weights = products - products.mean(1, keepdim=True) + 1 / count
        torch.testing.assert_close(weights.sum(1), torch.ones(count, dtype=x.dtype))
        out.append(weights @ v[:, head])
    kernels = mixer.residual(source.reshape(1, count, channels).mean(1).unsqueeze(-1)).view(channels, 1, 3, 3)
    local = F.conv2d(v.reshape(height, width, channels).permute(2, 0, 1)[None], kernels, padding=1, groups=channels)
    return torch.cat(out, dim=1).view(height, width, channels) + local[0].permute(1, 2, 0)


@pytest.mark.parametrize(
    ("name", "phi"),
    [
        ("identity", lambda x: x),
        ("relu", F.relu),
        ("leaky_relu", F.leaky_relu),
        ("exp", lambda x: torch.exp(0.2 * x)),
    ],
)
@torch.no_grad()
def test_weights_are_shifted_to_a_sum_of_one(name, phi):
    torch.manual_seed(0)
    mixer = InjectiveLinearMixer(8, 2, feature_map=name).double()
    x, unnormed = torch.randn(2, 1, 4, 5, 8, dtype=torch.float64)
    for source in (x, unnormed):
        expected = mixer.proj(_by_definition(mixer, x[0], source[0], phi))
        torch.testing.assert_close(mixer(x, source)[0], expected, rtol=1e-11, atol=1e-11)


@torch.no_grad()
def test_windows_are_maps_of_their_own():
    torch.manual_seed(0)
    mixer = InjectiveLinearMixer(8, 2, window_size=4, shift_size=1).double()
    x = torch.randn(1, 8, 3, 8, dtype=torch.float64)  # two windows down, one of the map's width
    rolled = x.roll(-1, 1)
    parts = [_by_definition(mixer, part, part, lambda t: t) for part in rolled[0].split(4)]
    expected = mixer.proj(torch.cat(parts).roll(1, 0))
    torch.testing.assert_close(mixer(x)[0], expected, rtol=1e-11, atol=1e-11)


@torch.no_grad()
def test_prefix_tokens_take_part_in_attention_and_not_in_convolutions():
    torch.manual_seed(0)
    mixer = InjectiveLinearMixer(8, 2, lepe_kernel=3).double()
    x = torch.randn(1, 1, 2 + 4 * 5, 8, dtype=torch.float64)
    with mock.patch.object(mixer, "lepe", None), mock.patch.object(mixer, "proj", torch.nn.Identity()):
        alone = mixer(x)  # one row: its convolution is one along the tokens
        kernels = mixer.residual(x.mean((1, 2)).unsqueeze(-1)).view(8, 1, 3, 3)
    v = mixer.qkv(x)[..., 16:].permute(0, 3, 1, 2)
    attention = alone - F.conv2d(v, kernels, padding=1, groups=8).permute(0, 2, 3, 1)
    local = F.conv2d(v[..., 2:].unflatten(-1, (4, 5)).squeeze(2), kernels, padding=1, groups=8)
    local = local.permute(0, 2, 3, 1) + mixer.lepe(v[..., 2:].unflatten(-1, (4, 5)).squeeze(2).permute(0, 2, 3, 1))
    expected = mixer.proj(attention + F.pad(local.flatten(1, 2), (0, 0, 2, 0)))
    torch.testing.assert_close(mixer(x, map_size=(4, 5)), expected, rtol=1e-11, atol=1e-11)


@torch.no_grad()
def test_a_block_shows_its_input_to_a_mixer_that_asks_for_it():
    torch.manual_seed(0)
    plain, seeing = (Block(8, InjectiveLinearMixer(8, 2, sees_input=sees)) for sees in (False, True))
    seeing.load_state_dict(plain.state_dict())
    x = 3 * torch.randn(1, 4, 5, 8) + 1
    assert not torch.allclose(plain(x), seeing(x))
    seeing.norm1 = plain.norm1 = torch.nn.Identity()
    torch.testing.assert_close(plain(x), seeing(x))


def test_hosts_keep_their_mixers_where_the_paper_does():
    kinds = {
        name: [[type(block.mixer).__name__[0] for block in stage.blocks] for stage in meta_model(name).stages]
        for name in ("zoo_inline_pvt_t", "zoo_inline_swin_t", "zoo_inline_swin_b", "zoo_inline_cswin_t")
    }
    assert {kind for stage in kinds["zoo_inline_pvt_t"] for kind in stage} == {"I"}
    assert [set(stage) for stage in kinds["zoo_inline_swin_t"]] == [{"I"}, {"I"}, {"I"}, {"W"}]
    assert kinds["zoo_inline_swin_b"][2] == ["I", "I"] + ["W"] * 16
    assert [set(stage) for stage in kinds["zoo_inline_cswin_t"]] == [{"I"}, {"I"}, {"C"}, {"C"}]
    shifts = [block.mixer.shift_size for block in meta_model("zoo_inline_swin_b").stages[2].blocks[2:]]
    assert shifts == [0, 3] * 8
