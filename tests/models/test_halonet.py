"""HaloNet: timm's networks as timm has them, the paper's by their published numbers, and other mixers in both."""

import pytest
import timm
import torch
from golden import relative_error
from quick import meta_model
from torch.utils.flop_counter import FlopCounterMode

import visionzoo
from visionzoo.layers.mixers import HaloMixer, PoolMixer, WindowMixer
from visionzoo.models.halonet import VARIANTS

TWINS = {
    "zoo_halonet_26t": ("halonet26t", {}),
    "zoo_halonet_50ts": ("halonet50ts", {}),
    "zoo_sehalonet_33ts": ("sehalonet33ts", {}),
    "zoo_eca_halonext_26ts": ("eca_halonext26ts", {}),
    "zoo_halonet_h1": ("halonet_h1", {"num_heads": (8, 8, 8, 8)}),
}


@pytest.mark.parametrize("name", TWINS)
def test_timm_weights_give_timm_outputs(name):
    twin, options = TWINS[name]
    torch.manual_seed(0)
    theirs = timm.create_model(twin).double().eval()
    for key, parameter in theirs.named_parameters():
        if parameter.ndim == 1:  # norms must not be blind, nor last ones zero; SiLU needs them above one
            torch.nn.init.normal_(parameter, 1.6 if key.endswith("weight") else 0.0, 0.2)
    ours = timm.create_model(name, **options).double().eval()
    report = visionzoo.load_weights(ours, theirs.state_dict())
    assert report.names == "timm" and not report.missing and not report.unexpected
    image = torch.randn(2, 3, 256, 256, dtype=torch.float64)  # timm takes multiples of 256 only
    with torch.no_grad():
        expected, features = theirs.forward_intermediates(image)
        out, own_features = ours.forward_intermediates(image)
        logits = theirs.forward_head(expected)
    assert (logits[0] - logits[1]).norm() > 1e-2 * logits[0].norm()
    assert relative_error(ours.forward_head(out).detach(), logits) <= 1e-9
    for feature, own in zip(features[1:], own_features, strict=True):  # timm's first is the stem's
        assert relative_error(own, feature) <= 1e-9


@pytest.mark.parametrize("name", VARIANTS)
def test_parameters_are_as_published(name):
    count = sum(p.numel() for p in meta_model(name).parameters()) / 1e6
    digits = 2 if name in TWINS and name != "zoo_halonet_h1" else 1
    # the published 43.4 million of H6 may be cut off, or do without the table entries that no offset reaches
    assert abs(count - VARIANTS[name].published.params_m) <= (0.06 if name.endswith("h6") else 0.51 * 10**-digits)


@pytest.mark.parametrize("name", [name for name, variant in VARIANTS.items() if variant.published.gmacs])
def test_multiply_adds_are_as_published(name):
    published = VARIANTS[name].published
    with FlopCounterMode(display=False) as counter:
        meta_model(name)(torch.empty(1, 3, published.size, published.size, device="meta"))
    assert abs(counter.get_total_flops() / 2e9 - published.gmacs) <= 0.02 * published.gmacs


def _mixers(**options):
    model = meta_model("zoo_halonet_26t", **options)
    return [[block.mixer for block in stage.blocks] for stage in model.stages]


def test_other_mixers_take_the_place_of_attention_and_of_nothing_else():
    kinds = [[type(mixer) for mixer in stage] for stage in _mixers(mixers="pool")]
    nothing = type(None)
    assert kinds == [[nothing] * 2, [nothing] * 2, [nothing, PoolMixer], [PoolMixer] * 2]
    stages = _mixers(mixers=(None, None, "window", ["halo", "pool"]))
    assert isinstance(stages[2][1], WindowMixer)
    assert isinstance(stages[3][0], HaloMixer) and isinstance(stages[3][1], PoolMixer)
    with pytest.raises(ValueError, match=r"blocks of stage 1 \('cc'\) have none; expected None there"):
        _mixers(mixers=(None, "pool", "pool", "pool"))
    with pytest.raises(ValueError, match="one entry for each of the 4 stages, got 2"):
        _mixers(mixers=("pool", "pool"))


def test_halo_attention_with_other_options_keeps_the_familys():
    (mixer, _) = _mixers(mixers=(None, None, None, {"type": "halo", "halo_size": 1}))[3]
    assert (mixer.halo_size, mixer.block_size, mixer.stride, mixer.num_heads) == (1, 8, 2, 8)
    assert isinstance(mixer.proj, torch.nn.Identity)


def test_blocks_of_odd_size_attend_at_full_resolution_and_are_pooled():
    model = meta_model("zoo_halonet_26t", block_size=7)
    first = model.stages[3].blocks[0]
    assert first.mixer.stride == 1 and isinstance(first.pool, torch.nn.AvgPool2d)
    assert model.forward_features(torch.empty(1, 3, 96, 130, device="meta")).shape == (1, 2048, 3, 5)


def test_masked_padding_reaches_every_attention_and_changes_outputs():
    torch.manual_seed(0)
    plain = timm.create_model("zoo_halonet_26t").eval()
    masked = timm.create_model("zoo_halonet_26t", mask_padding=True).eval()
    for parameter in plain.parameters():
        if parameter.ndim == 1:
            torch.nn.init.normal_(parameter, 1.0, 0.1)
    masked.load_state_dict(plain.state_dict())
    assert all(block.mixer is None or block.mixer.mask_padding for stage in masked.stages for block in stage.blocks)
    image = torch.randn(1, 3, 64, 96)
    with torch.no_grad():
        assert relative_error(masked(image), plain(image)) > 1e-3


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"layout": ("cc", "cb", "ca", "aa")}, r"a string of 'c' and 'a' for each stage, got layout=\('cc', 'cb'"),
        ({"layout": ("cc", "", "ca", "aa")}, "a string of 'c' and 'a'"),
        ({"layout": ("cc", "ca", "aa")}, "one entry for each stage, got layout="),
        ({"gate": "cbam"}, "expected gate 'se', 'eca' or None, got gate='cbam'"),
        ({"num_heads": (8, 8, 8, 7)}, "num_heads must divide dim"),
        ({"halo_size": -1}, "halo_size not negative"),
        ({"value_ratio": 0.51}, "num_heads must divide value_dim"),
        ({"mixers": "none"}, "without token mixing do not exist, got mixers='none'"),
    ],
)
def test_bad_arguments_are_refused_with_their_values(options, message):
    with pytest.raises(ValueError, match=message):
        meta_model("zoo_halonet_26t", **options)
