"""PoolFormer and MetaFormer: options, and what is refused."""

import pytest
import timm
import torch
from quick import meta_model
from torch import nn

from visionzoo.layers.mixers import FullMixer, PoolMixer
from visionzoo.layers.norm import LayerNorm

TINY = {"depths": (1, 1, 1, 1), "embed_dims": (8, 16, 16, 24)}


@pytest.mark.parametrize(
    ("name", "kinds"),
    [
        ("zoo_metaformer_id_s12", [nn.Identity] * 4),
        ("zoo_metaformer_pppa_s12", [PoolMixer, PoolMixer, PoolMixer, FullMixer]),
        ("zoo_metaformer_ppaa_s12", [PoolMixer, PoolMixer, FullMixer, FullMixer]),
    ],
)
def test_letters_are_the_mixers_of_the_stages(name, kinds):
    assert [type(stage.blocks[0].mixer) for stage in meta_model(name).stages] == kinds


def test_without_layer_scale_branches_have_no_weights_for_it():
    model = timm.create_model("zoo_poolformer_s12", layer_scale=0.0, norm_layer="layer_norm", **TINY)
    assert not [name for name, _ in model.named_parameters() if "gamma" in name]
    assert isinstance(model.norm, LayerNorm) and isinstance(model.stages[0].blocks[0].norm1, LayerNorm)
    assert model(torch.randn(1, 3, 33, 47)).isfinite().all()


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        (
            "zoo_poolformer_s12",
            {"norm_layer": "rms"},
            r"PoolFormer: unknown norm_layer='rms', expected one of \('group_",
        ),
        (
            "zoo_metaformer_pppa_s12",
            {"token_mixers": ("pool", "fc") * 2},
            r"unknown token_mixers \['fc', 'fc'\], expec",
        ),
        ("zoo_metaformer_pppa_s12", {"token_mixers": ("attention",) * 4}, r"the first stage cannot attend, got token_"),
    ],
)
def test_wrong_options_are_named(name, options, message):
    with pytest.raises(ValueError, match=message):
        timm.create_model(name, **TINY, **options)
