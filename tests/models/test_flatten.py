"""FLatten and its hosts: what differs between them, the class token, tables of other sizes."""

import pytest
import timm
import torch
from quick import MODELS, draw_weights, meta_model, quick_model

import visionzoo

HOSTS = {
    "pvt": "SpatialReductionMixer",
    "pvtv2": "SpatialReductionMixer",
    "swin": "WindowMixer",
    "cswin": "CrossWindowMixer",
}
TINY = {"depths": (1, 1, 1, 2), "embed_dims": (8, 16, 16, 32), "num_heads": (1, 2, 2, 4)}


@pytest.mark.parametrize("name", [name for name in MODELS if name.startswith("zoo_flatten")])
def test_only_the_mixers_differ_from_the_host(name):
    family = name.split("_")[2]
    kinds = [{type(block.mixer).__name__ for block in stage.blocks} for stage in meta_model(name).stages]
    linear = 2 if "swin" in family else 4
    assert kinds == [{"FocusedLinearMixer"}] * linear + [{HOSTS[family]}] * (4 - linear)


def test_a_stage_left_to_the_family_keeps_its_own_mixer():
    model = meta_model(
        "zoo_flatten_swin_t", mixers=(None, {"type": "focused_linear", "focusing_factor": 2}, "pool", None)
    )
    mixers = [stage.blocks[0].mixer for stage in model.stages]
    assert [type(mixer).__name__ for mixer in mixers] == [
        "FocusedLinearMixer", "FocusedLinearMixer", "PoolMixer", "WindowMixer"
    ]  # fmt: skip
    assert (mixers[0].focusing_factor, mixers[1].focusing_factor) == (3, 2)
    assert mixers[1].position.table.shape == (1, 28, 28, 192)


def test_every_second_block_of_swin_has_shifted_windows():
    mixers = [block.mixer for stage in meta_model("zoo_swin_b_384").stages for block in stage.blocks]
    assert [mixer.shift_size for mixer in mixers] == [0, 6] * 12
    assert {mixer.window_size for mixer in mixers} == {12}


# -- PVT's class token ------------------------------------------------------------------------------------------------


@torch.no_grad()
def test_pvts_last_map_is_the_map_and_its_logits_are_of_the_class_token():
    model = draw_weights(timm.create_model("zoo_pvt_t", **TINY)).double().eval()
    seen = []
    model.norm.register_forward_hook(lambda module, args, out: seen.append((args[0], out)))  # [B, 1 + N, C]
    image = torch.randn(2, 3, 96, 64, dtype=torch.float64)
    tokens, maps = model.forward_intermediates(image)
    ((before, after),) = seen
    assert torch.equal(maps[-1].flatten(2).mT, before[:, 1:]) and maps[-1].shape == (2, 32, 3, 2)
    assert torch.equal(model.forward_head(tokens), model.head.fc(after[:, 0]))
    (normed,) = model.forward_intermediates(image, [3], norm=True, intermediates_only=True)
    assert torch.equal(normed.flatten(2).mT, after[:, 1:])
    (pair,) = model.forward_intermediates(image, [3], return_prefix_tokens=True, intermediates_only=True)
    assert torch.equal(pair[1], before[:, :1])


def test_class_token_goes_with_global_attention_alone():
    has_token = {
        mixers: hasattr(meta_model("zoo_pvt_t", mixers=mixers).stages[3], "prefix")
        for mixers in (None, ("pool", "pool", "pool", None), "pool")
    }
    assert list(has_token.values()) == [True, True, False]
    with pytest.raises(ValueError, match=r"class_token=True needs mixer 'spatial_reduction' with reduction 1"):
        meta_model("zoo_pvt_t", mixers="pool", class_token=True)
    assert meta_model("zoo_pvt_t").no_weight_decay() == {"stages.3.prefix.cls_token", "stages.3.positions.table"}


# -- tables of positions ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "kwargs", "larger"),
    [
        ("zoo_pvt_t", TINY, {"img_size": (288, 320)}),
        ("zoo_pvt_t", {**TINY, "class_token": False}, {"img_size": (288, 320)}),
        ("zoo_flatten_pvtv2_b0", TINY, {"mixers": {"type": "focused_linear", "position_size": (72, 80)}}),
    ],
)
def test_a_model_for_another_size_loads_what_the_smaller_one_interpolates(name, kwargs, larger):
    source = draw_weights(timm.create_model(name, **kwargs)).double().eval()
    target = timm.create_model(name, **{**kwargs, **larger}).double().eval()
    report = visionzoo.load_weights(target, source.state_dict())
    assert report.adapted and all("resized to" in entry for entry in report.adapted)
    image = torch.randn(1, 3, 288, 320, dtype=torch.float64)
    last = slice(None, 1) if name != "zoo_pvt_t" else slice(None)  # later maps do not have the size of the tables
    with torch.no_grad():
        expected = source.forward_intermediates(image, intermediates_only=True)[last]
        for feature, other in zip(target.forward_intermediates(image, intermediates_only=True), expected, strict=False):
            torch.testing.assert_close(feature, other, rtol=1e-10, atol=1e-10)


def test_weights_of_another_window_load_with_resized_biases():
    source, target = (quick_model("zoo_swin_t", window_size=window, **TINY) for window in (7, 12))
    report = visionzoo.load_weights(target, source.state_dict())
    assert len(report.adapted) == 5 and "(169, 1) resized to (529, 1)" in report.adapted[0]
    old, new = (model.stages[0].blocks[0].mixer.relative_position_bias for model in (source, target))
    expected = torch.nn.functional.interpolate(
        old.table.view(1, 1, 13, 13), size=(23, 23), mode="bicubic", align_corners=False
    )
    assert torch.equal(new.table.view(1, 1, 23, 23), expected)
    assert visionzoo.load_weights(source, source.state_dict()).adapted == []


def test_other_modules_weights_are_not_resized():
    source, target = (
        quick_model("zoo_swin_t", **{**TINY, "embed_dims": dims}) for dims in ((8, 16, 16, 32), (8, 16, 16, 64))
    )
    with pytest.raises(ValueError, match="tensors of other shapes"):
        visionzoo.load_weights(target, source.state_dict())


def test_parts_of_a_projection_are_joined_whatever_their_order_in_the_file():
    model = timm.create_model("zoo_flatten_pvt_t", **TINY)
    mixer = "stages.0.blocks.0.mixer.qkv.weight"
    q, k, v = model.state_dict()[mixer].chunk(3)
    state = {name: value for name, value in model.state_dict().items() if name != mixer}
    theirs = {"block1.0.attn.kv.weight": torch.cat([k, v]), "block1.0.attn.q.weight": q}
    for order in (theirs, dict(reversed(theirs.items()))):
        renamed = visionzoo.models._checkpoint.rename({**state, **order}, model)[0]
        assert torch.equal(renamed[mixer], model.state_dict()[mixer])
