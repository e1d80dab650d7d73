"""Every mixer is a [B, H, W, C] map's map, in every family, and says what it cannot do."""

import pytest
import timm
import torch
from golden import Record, relative_error, sample

from visionzoo.kernels import route_regions
from visionzoo.layers.mixers import MIXERS, RoutedMixer, WindowMixer, build_mixer, combine_mixers, resolve_mixers

SMALL = {  # options that suit tiny maps
    "halo": {"block_size": 4, "halo_size": 1},
    "cross_window": {"stripe_width": 2},
    "focused_linear": {"position_size": 3},
    "levit": {"map_size": 4},
    "neighborhood": {"kernel_size": 3, "dilation": 2},
    "spatial_reduction": {"reduction": 2},
    "routed": {"regions": 2, "topk": 2},
    "window": {"window_size": 3},
}
# one tiny instance of each hierarchical family
FAMILIES = {
    "zoo_biformer_t": {"depths": (1, 1, 1, 1), "embed_dims": (8, 16, 16, 24), "regions": 2, "topks": (1, 2, 4, -2)},
    "zoo_davit_t": {"depths": (2, 1, 1, 2), "embed_dims": (8, 16, 16, 24), "num_heads": (1, 2, 2, 4)},
    "zoo_halonet_h0": {
        "layout": ("a",) * 4,
        "embed_dims": (8, 16, 16, 24),
        "mid_dims": (8, 8, 16, 16),
        "num_heads": (1, 2, 2, 4),
        "stem_dims": (8,),
    },
    "zoo_cswin_t": {"depths": (1, 1, 1, 1), "embed_dims": (8, 16, 16, 24), "num_heads": (2, 2, 4, 4)},
    "zoo_flatten_swin_t": {"depths": (1, 2, 1, 1), "embed_dims": (8, 16, 16, 24), "num_heads": (1, 2, 2, 4)},
    "zoo_levit_128s": {"depths": (1, 1, 1), "embed_dims": (16, 16, 24), "num_heads": (1, 2, 3), "key_dim": 8},
    "zoo_nat_mini": {"depths": (1, 1, 1, 1), "embed_dims": (8, 16, 16, 24), "num_heads": (1, 2, 2, 4)},
    "zoo_dinats_tiny": {"depths": (2, 1, 1, 1), "embed_dims": (8, 16, 16, 24), "num_heads": (1, 2, 2, 4)},
    "zoo_poolformer_s12": {"depths": (1, 1, 1, 1), "embed_dims": (8, 16, 16, 24)},
    "zoo_pvt_t": {"depths": (1, 1, 1, 1), "embed_dims": (8, 16, 16, 24), "num_heads": (1, 2, 2, 4)},
    "zoo_pvtv2_b0": {"depths": (1, 1, 1, 1), "embed_dims": (8, 16, 16, 24), "num_heads": (1, 2, 2, 4)},
    "zoo_shvit_s1": {"depths": (1, 1, 1), "embed_dims": (16, 16, 24), "partial_dims": (0, 4, 6)},
    "zoo_swin_t": {"depths": (1, 2, 1, 1), "embed_dims": (8, 16, 16, 24), "num_heads": (1, 2, 2, 4)},
}


def _spec(name):
    return {"type": name, **SMALL.get(name, {})}


@pytest.mark.parametrize("name", MIXERS)
@pytest.mark.parametrize("size", [(1, 1), (5, 7), (8, 3), (2, 13)])
def test_any_height_and_width_keep_their_size_and_give_gradients(name, size):
    mixer = build_mixer(_spec(name), 16, 2)
    x = torch.randn(2, *size, 16, requires_grad=True)
    out = mixer(x)
    assert out.shape == x.shape and out.dtype == x.dtype
    out.square().sum().backward()
    assert x.grad.isfinite().all()
    assert all(p.grad is not None for p in mixer.parameters())


@pytest.mark.parametrize("name", MIXERS)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_low_precision_stays_near_float64(name, dtype):
    torch.manual_seed(0)
    mixer = build_mixer(_spec(name), 16, 2).double()
    x = torch.randn(1, 6, 9, 16, dtype=torch.float64)
    exact = mixer(x)
    low = mixer.to(dtype)(x.to(dtype))
    assert low.dtype == dtype
    assert (low.double() - exact).norm() < 40 * torch.finfo(dtype).eps * exact.norm()


@pytest.mark.parametrize("name", MIXERS)
def test_autocast_runs_and_stays_near_float32(name):
    torch.manual_seed(0)
    mixer = build_mixer(_spec(name), 16, 2)
    x = torch.randn(1, 6, 9, 16)
    exact = mixer(x)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = mixer(x)
    assert (out.float() - exact).norm() < 0.1 * exact.norm()


@pytest.mark.parametrize("name", MIXERS)
def test_compiles_into_one_graph_for_sizes_that_change(name):
    torch._dynamo.reset()
    mixer = build_mixer(_spec(name), 16, 2)
    compiled = torch.compile(mixer, fullgraph=True, dynamic=True, backend="eager")
    for size in [(6, 9), (11, 7)]:
        x = torch.randn(2, *size, 16)
        torch.testing.assert_close(compiled(x), mixer(x))


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("name", MIXERS)
def test_every_family_takes_every_mixer_forward_and_backward(family, name):
    model = timm.create_model(family, mixers=_spec(name), num_classes=3, **FAMILIES[family])
    kinds = {type(block.mixer) for stage in model.stages for block in stage.blocks}
    assert kinds == {MIXERS[name]}
    model(torch.randn(2, 3, 40, 56)).sum().backward()
    assert all(p.grad is not None for p in model.parameters())


def test_routed_mixer_is_the_authors_layer():
    record = Record("biformer/bra_layer")
    names = {"qkv.qkv.": "qkv.", "wo.": "proj."}
    state = record.state_dict()
    for theirs, ours in names.items():
        state = {(ours + n.removeprefix(theirs) if n.startswith(theirs) else n): t for n, t in state.items()}
    mixer = RoutedMixer(64, 2, topk=4).double()
    mixer.load_state_dict(state)
    with torch.no_grad():
        out = mixer(record.image())
        q, k, _ = mixer.split_heads(mixer.qkv(record.image()))
    assert relative_error(sample(out), record.arrays["output"]) <= record.tolerance()
    index = route_regions(q, k, regions=7, topk=4)
    assert torch.equal(index, torch.from_numpy(record.arrays["routing_index"]))


@pytest.mark.parametrize("mixer", [RoutedMixer(8, 2, regions=3, topk=2), WindowMixer(8, 2, window_size=4)])
def test_padding_takes_part_by_default_and_not_when_masked(mixer):
    """With masked padding nothing beyond the map is seen; without, the padded tokens' biases are."""
    torch.manual_seed(0)
    torch.nn.init.normal_(mixer.qkv.bias, std=2.0)
    x = torch.randn(1, 7, 10, 8)  # neither 3 regions nor windows of 4 divide it
    released = mixer(x)
    mixer.mask_padding = True
    assert (mixer(x) - released).norm() > 1e-2 * released.norm()
    whole = torch.randn(1, 12, 12, 8)
    masked = mixer(whole)
    mixer.mask_padding = False
    torch.testing.assert_close(mixer(whole), masked)


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("poool", r"unknown mixer 'poool' \(did you mean 'pool'\?\); expected a name of \['channel', "),
        ({"window_size": 7}, r"unknown mixer None; expected a name of"),
        ({"type": "pool", "window_size": 7}, r"mixer 'pool' does not take these options: .*window_size"),
        ({"type": "routed", "regions": 2, "topk": 5}, r"topk must be from 1 to the number of regions \(2·2 = 4\)"),
        ({"type": "routed", "regions": 0}, r"regions must be positive"),
        ({"type": "window", "window_size": 0}, r"window_size must be positive"),
        ({"type": "pool", "pool_size": 4}, r"pool_size must be odd and positive, got pool_size=4"),
        ({"type": "full", "num_heads": 3}, r"num_heads must divide dim, got dim=16 and num_heads=3"),
    ],
)
def test_wrong_specs_are_named(spec, message):
    with pytest.raises(ValueError, match=message):
        build_mixer(spec, 16, 2)


def test_overrides_go_stage_by_stage_and_keep_the_familys_options():
    own = [[{"type": "window", "window_size": 5}, {"type": "channel"}], [{"type": "full"}], [{"type": "full"}]]
    assert resolve_mixers(own, None) == own
    assert resolve_mixers(own, "pool") == [[{"type": "pool"}]] * 3
    mixed = resolve_mixers(own, ("window", ["pool", {"type": "full", "lepe_kernel": 3}], None))
    assert mixed == [
        [{"type": "window", "window_size": 5}],
        [{"type": "pool"}, {"type": "full", "lepe_kernel": 3}],
        [{"type": "full"}],
    ]
    turns = [[{"type": "window", "shift_size": 0}, {"type": "window", "shift_size": None}]]
    assert resolve_mixers(turns, "window") == resolve_mixers(turns, [["window", "window"]]) == turns
    assert [spec["shift_size"] for spec in resolve_mixers(turns, {"type": "window", "window_size": 5})[0]] == [0, None]
    with pytest.raises(ValueError, match="one entry for each of the 3 stages, got 2"):
        resolve_mixers(own, ("pool", "pool"))
    with pytest.raises(ValueError, match="at least one mixer"):
        resolve_mixers(own, ("pool", [], "pool"))


def test_overrides_lie_over_those_of_a_variant():
    own = [[{"type": "focused_linear", "position_size": 56}], None]
    assert combine_mixers(own, None) == [own[0], None]
    assert combine_mixers(own, {"type": "focused_linear", "focusing_factor": 4}) == [
        [{"type": "focused_linear", "position_size": 56, "focusing_factor": 4}],
        {"type": "focused_linear", "focusing_factor": 4},
    ]
    assert combine_mixers(own, (None, "pool")) == [own[0], "pool"]
    assert combine_mixers(own, ("pool", None)) == [[{"type": "pool"}], None]
    with pytest.raises(ValueError, match="one entry for each of the 2 stages, got 1"):
        combine_mixers(own, ("pool",))


def test_blocks_of_a_stage_take_its_mixers_in_turn():
    model = timm.create_model("zoo_davit_t", device="meta", mixers=(None, "pool", ["pool", "routed"], "full"))
    names = [[type(block.mixer).__name__ for block in stage.blocks] for stage in model.stages]
    assert names == [
        ["WindowMixer", "ChannelMixer"],
        ["PoolMixer"] * 2,
        ["PoolMixer", "RoutedMixer"] * 3,
        ["FullMixer"] * 2,
    ]
