"""The halo mixer, and the bottleneck block around it."""

import pytest
import torch
from timm.layers.halo_attn import HaloAttn

from visionzoo.layers.bottleneck import Bottleneck
from visionzoo.layers.mixers import HaloMixer, PoolMixer, build_mixer


def _copy_weights(mixer, theirs):
    mixer.load_state_dict(
        {
            "q.weight": theirs.q.weight.flatten(1),
            "kv.weight": theirs.kv.weight.flatten(1),
            "rel_height": theirs.pos_embed.height_rel,
            "rel_width": theirs.pos_embed.width_rel,
        }
    )


@pytest.mark.parametrize(
    ("ours", "theirs"),
    [
        ({}, {}),
        ({"stride": 2}, {"stride": 2}),
        ({"head_dim": 5}, {"dim_head": 5}),
        ({"value_dim": 48, "head_dim": 8}, {"dim_out": 48, "dim_head": 8}),
        ({"block_size": 4, "halo_size": 2, "stride": 2}, {"block_size": 4, "halo_size": 2, "stride": 2}),
    ],
)
def test_it_is_timms_halo_attention(ours, theirs):
    torch.manual_seed(0)
    reference = HaloAttn(24, num_heads=3, **theirs).double()
    mixer = HaloMixer(24, 3, proj=False, **ours).double()
    _copy_weights(mixer, reference)
    x = torch.randn(2, 24, 16, 24, dtype=torch.float64)
    out, expected = mixer(x.permute(0, 2, 3, 1)), reference(x).permute(0, 2, 3, 1)
    assert (out - expected).norm() <= 1e-12 * expected.norm()
    assert out.shape[-1] == mixer.out_dim


@pytest.mark.parametrize("size", [(1, 1), (5, 7), (8, 8), (9, 20)])
@pytest.mark.parametrize("stride", [1, 2])
def test_any_map_comes_out_in_its_size_over_the_stride(size, stride):
    out = HaloMixer(16, 2, block_size=4, halo_size=1, stride=stride)(torch.randn(1, *size, 16))
    assert out.shape == (1, -(-size[0] // stride), -(-size[1] // stride), 16)
    assert torch.isfinite(out).all()


def test_biases_do_not_reach_beyond_the_map():
    """Keys beyond the map are zeros, not projections of zeros: masking is the only way to tell a bias there is none."""
    torch.manual_seed(0)
    plain = HaloMixer(8, 2, block_size=4, halo_size=1, mask_padding=True)
    biased = HaloMixer(8, 2, block_size=4, halo_size=1, qkv_bias=True)
    values = biased.kv.bias.data.unflatten(0, (2, -1))[:, 4:]
    biased.kv.weight.data.zero_()
    x = torch.randn(1, 4, 4, 8)
    biased.proj = torch.nn.Identity()
    assert (biased(x).unflatten(-1, (2, -1)) / values).max() < 1  # part of the softmax went to zeros
    plain.kv = torch.nn.Linear(8, 16)
    plain.kv.weight.data.zero_()
    plain.proj = torch.nn.Identity()
    expected = plain.kv.bias.unflatten(0, (2, -1))[:, 4:].flatten()
    torch.testing.assert_close(plain(x), expected.expand(1, 4, 4, 8))


def test_it_learns_under_autocast():
    mixer = HaloMixer(16, 2, block_size=4, halo_size=1)
    with torch.autocast("cpu", torch.bfloat16):
        out = mixer(torch.randn(1, 5, 7, 16))
    assert out.dtype == torch.bfloat16
    out.float().square().sum().backward()
    for name, parameter in mixer.named_parameters():
        assert parameter.grad is not None and parameter.grad.norm() > 0, name


def test_it_compiles_as_one_graph_and_learns():
    torch.manual_seed(0)
    mixer = HaloMixer(8, 2, block_size=4, halo_size=1, stride=2).double()
    compiled = torch.compile(mixer, fullgraph=True, backend="aot_eager")
    x = torch.randn(1, 5, 7, 8, dtype=torch.float64)
    torch.testing.assert_close(compiled(x), mixer(x))
    gradients = []
    for run in (mixer, compiled):
        mixer.zero_grad()
        run(x).square().sum().backward()
        gradients.append([p.grad.clone() for p in mixer.parameters()])
    torch.testing.assert_close(gradients[1], gradients[0])


def test_position_tables_are_spared_weight_decay():
    mixer = HaloMixer(16, 2)
    assert set(mixer.NO_WEIGHT_DECAY) == {name for name, _ in mixer.named_parameters() if name.startswith("rel_")}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_heads": 3}, "num_heads must divide dim"),
        ({"block_size": 0}, "block_size must be positive"),
        ({"halo_size": -1}, "halo_size not negative"),
        ({"block_size": 7, "stride": 2}, "stride must be positive and divide block_size"),
        ({"value_dim": 15}, "num_heads must divide value_dim, got value_dim=15"),
        ({"head_dim": 0}, "head_dim must be positive"),
        ({"window_size": 7}, "does not take these options"),
    ],
)
def test_bad_options_are_refused_with_their_values(options, message):
    with pytest.raises(ValueError, match=message):
        build_mixer({"type": "halo", "num_heads": 2, **options}, 16)


@pytest.mark.parametrize("size", [(6, 8), (5, 7), (1, 1)])
def test_bottleneck_pools_after_a_mixer_without_stride(size):
    block = Bottleneck(8, 12, 16, mixer=PoolMixer(16), stride=2)
    assert block(torch.randn(2, *size, 8)).shape == (2, -(-size[0] // 2), -(-size[1] // 2), 12)
    assert block.pool(torch.ones(1, 5, 5, 16)).unique().tolist() == [1.0]  # positions beyond the border do not count


def test_bottleneck_refuses_a_mixer_of_another_stride():
    with pytest.raises(ValueError, match="the mixer's stride must be 1 or stride=1, got 2"):
        Bottleneck(8, 8, 16, mixer=HaloMixer(16, 2, stride=2))


def test_exports_for_maps_with_and_without_padding():
    mixer = HaloMixer(8, 2, block_size=2, halo_size=1).eval()
    any_size = {axis: torch.export.Dim.DYNAMIC for axis in (1, 2)}
    program = torch.export.export(mixer, (torch.randn(1, 5, 7, 8),), dynamic_shapes=(any_size,), strict=False).module()
    for size in [(6, 4), (5, 6), (8, 3)]:
        x = torch.randn(1, *size, 8)
        torch.testing.assert_close(program(x), mixer(x))
