"""Wrong arguments are answered by name, value and remedy before anything is built."""

import re
from collections.abc import Sequence
from inspect import signature

import numpy as np
import pytest
import timm
from quick import meta_model

from visionzoo.layers.arguments import fits
from visionzoo.layers.gates import EcaGate
from visionzoo.layers.mixers import FullMixer
from visionzoo.models._registry import TINY

FREE = {"mixers", "symbols", "global_pool"}  # specs, and a name that the head refuses


@pytest.mark.parametrize("name", TINY)
def test_every_argument_of_every_family_refuses_other_types_by_name(name):
    cls = type(meta_model(name, **TINY[name]))
    names = [name for name in signature(cls).parameters if name not in FREE]
    assert {"num_classes", "in_chans", "drop_rate"} <= {*names}
    for argument in names:
        with pytest.raises(ValueError, match=rf"^{cls.__name__}: {argument} must be .*, got {argument}=<object"):
            cls(**{argument: object()})


@pytest.mark.parametrize(
    ("name", "wrong", "error", "message"),
    [
        (
            "zoo_tnt_s",
            {"depht": 2},
            TypeError,
            "zoo_tnt_s: TNT has no argument 'depht' (did you mean 'depth'?); it takes",
        ),
        ("zoo_tnt_s", {"gate": "eca"}, TypeError, "TNT has no argument 'gate' (did you mean 'gates'?)"),
        (
            "zoo_tnt_s",
            {"depth": (2, 2)},
            ValueError,
            "zoo_tnt_s: TNT: depth must be int, got depth=(2, 2); leave it out for 12",
        ),
        ("zoo_tnt_s", {"qkv_bias": 1}, ValueError, "qkv_bias must be bool, got qkv_bias=1; leave it out for False"),
        ("zoo_tnt_s", {"inner_stride": 0}, ValueError, "TNT: inner_stride must be 1 or more, got inner_stride=0"),
        ("zoo_tnt_s", {"in_chans": 0}, ValueError, "TNT: in_chans must be 1 or more, got in_chans=0"),
        ("zoo_tnt_s", {"drop_rate": 1.5}, ValueError, "TNT: drop_rate must be from 0 to 1, got drop_rate=1.5"),
        ("zoo_tnt_s", {"mlp_ratio": float("nan")}, ValueError, "mlp_ratio must be a number, got mlp_ratio=nan"),
        ("zoo_swin_t", {"depths": (2, 2, -1, 2)}, ValueError, "depths must be 0 or more, got depths=(2, 2, -1, 2)"),
        ("zoo_swin_t", {"depths": ()}, ValueError, "depths must have an entry, got depths=()"),
        ("zoo_swin_t", {"window_size": (7, 7)}, ValueError, "one for each of 4 stages, got window_size=(7, 7)"),
        (
            "zoo_transnext_micro",
            {"img_size": 31, "pretrain_size": 224},
            ValueError,
            "must be 32 px at least, got img_s",
        ),
        (
            "zoo_deit_t",
            {"distilled": True, "class_token": False},
            ValueError,
            "DeiT: distilled=True needs a class token beside that of distillation, got class_token=False; leave",
        ),
        (
            "zoo_deit_t",
            {"distilled": True, "global_pool": "avg"},
            ValueError,
            "DeiT cannot have global_pool='avg', expected one of ('token', '')",
        ),
        ("zoo_stvit_s", {"projection": 0}, ValueError, "projection must be 1 or more, got projection=0"),
        ("zoo_nat_mini", {"dilations": ((1,), (), (1,), (1,))}, ValueError, "stages 1 have blocks, but no mixer"),
        ("zoo_affnet_t", {"depths": (0, 1, 1, 1, 1)}, ValueError, "every stage must have a block, got depths=(0, 1"),
        ("zoo_shvit_s1", {"embed_dims": (7, 16, 24)}, ValueError, "embed_dims must begin with 8 or more"),
        ("zoo_shvit_s1", {"qk_dim": (16, 16)}, ValueError, "one for each of 3 stages, got qk_dim=(16, 16)"),
        ("zoo_halonet_h0", {"act": "rleu"}, ValueError, "HaloNet: unknown act='rleu', expected timm's name of one"),
        ("zoo_halonet_h0", {"value_ratio": 0.0}, ValueError, "value_ratio must be more than 0, got value_ratio=0.0"),
        ("zoo_ghostnetv2_100", {"layout": (((2, 8, 8, False),),)}, ValueError, "got layout[0]=((2, 8, 8, False),)"),
        ("zoo_ghostnetv2_100", {"layout": (((3, 8, 8, False),), ())}, ValueError, "layout must have a block in every"),
        ("zoo_flowformer", {"mlp_ratio": (4.0, 2.0)}, ValueError, "one for each of 4 stages, got mlp_ratio=(4.0, 2.0)"),
        ("zoo_swin_t", {"depths": 2}, ValueError, "depths must be Sequence[int], got depths=2; leave it out for (2, 2"),
        (
            "zoo_swin_t",
            {"embed_dims": [96, None]},
            ValueError,
            "embed_dims must be Sequence[int], got embed_dims=[96, N",
        ),
        (
            "zoo_swin_t",
            {"depths": (2, 2)},
            ValueError,
            "expected one entry for each stage, got depths=(2, 2), embed_dims",
        ),
        (
            "zoo_ghostnetv2_100",
            {"mixers": ("pool", None, None, None, None)},
            ValueError,
            "GhostNetV2: mixers stand in attention, and the blocks of stage 0 have none; expected None there",
        ),
        (
            "zoo_ghostnetv2_100",
            {"drop_path_rate": 1.0},
            ValueError,
            "drop_path_rate must be from 0 to below 1, got drop_p",
        ),
        ("zoo_swin_t", {"img_size": "x"}, ValueError, "img_size must be pixels or (height, width), got 'x'"),
    ],
)
def test_what_is_wrong_is_said_with_the_remedy(name, wrong, error, message):
    with pytest.raises(error, match=re.escape(message)):
        timm.create_model(name, **wrong)


@pytest.mark.parametrize(
    ("layer", "args", "kwargs", "error", "message"),
    [
        (FullMixer, ("64",), {}, ValueError, "FullMixer: dim must be int, got dim='64'"),
        (FullMixer, (64, 2.0), {}, ValueError, "FullMixer: num_heads must be int | None, got num_heads=2.0"),
        (
            FullMixer,
            (64,),
            {"num_head": 2},
            TypeError,
            "FullMixer has no argument 'num_head' (did you mean 'num_heads'?)",
        ),
        (EcaGate, (None,), {}, ValueError, "EcaGate: dim must be int, got dim=None"),
    ],
)
def test_layers_alone_say_the_same(layer, args, kwargs, error, message):
    with pytest.raises(error, match=re.escape(message)):
        layer(*args, **kwargs)


def test_none_is_refused_where_the_class_is_called():
    """By timm.create_model None means that nothing was given."""
    cls = type(meta_model("zoo_swin_t", **TINY["zoo_swin_t"]))
    with pytest.raises(ValueError, match=re.escape("depths must be Sequence[int], got depths=None; leave it out for")):
        cls(depths=None)


def test_types_are_those_of_the_hints():
    assert fits(np.int64(3), int) and fits(np.float32(3), float) and fits(3, float)
    assert not fits(True, int) and not fits(3.0, int) and not fits(True, float)
    assert fits([1, 2], tuple[int, int]) and not fits((1, 2, 3), tuple[int, int])
    assert fits((), Sequence[int]) and not fits("12", Sequence[str]) and not fits({1: 2}, Sequence[int])
    assert fits([None, 2], Sequence[int | None]) and not fits([[1], 2], Sequence[Sequence[int]])


def test_mixers_of_ghostnet_stand_where_there_is_attention():
    def kinds(mixers):
        model = meta_model("zoo_ghostnetv2_100", **TINY["zoo_ghostnetv2_100"], mixers=mixers)
        return [type(block.mixer).__name__ for block in model.blocks_in_order()]

    pool, own, none = "PoolMixer", "DecoupledFcMixer", "NoneType"
    assert kinds("pool") == [none, none, pool, pool, pool, pool, pool]  # the first two blocks have no attention
    assert kinds((None, "pool", None, None, None)) == [none, none, pool, own, own, own, own]
