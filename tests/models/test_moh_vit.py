"""MoH-ViT: how many heads are taken, and what it returns in training."""

import pytest
import timm
import torch

from visionzoo.models._registry import TINY
from visionzoo.models.moh_vit import VARIANTS


@pytest.mark.parametrize("name", VARIANTS)
def test_the_share_of_heads_that_are_taken_is_that_of_the_name(name):
    kwargs = VARIANTS[name].kwargs
    heads, depths = kwargs["num_heads"], kwargs["depths"]
    small = {"depths": (1, 1, 1, 1), "embed_dims": [8 * count for count in heads], "num_classes": 3}
    shares = timm.create_model(name, **small).eval().head_shares(torch.randn(1, 3, 32, 32)).values()
    assert [len(share) for share in shares] == list(heads)
    taken = sum(depth * share.sum().item() for depth, share in zip(depths, shares, strict=True))
    every = sum(depth * count for depth, count in zip(depths, heads, strict=True))
    assert round(100 * taken / every) == int(name[-2:])


def test_terms_are_means_over_the_layers_that_route():
    name, tiny = next((name, tiny) for name, tiny in TINY.items() if name in VARIANTS)
    model = timm.create_model(name, num_classes=3, **{**tiny, "depths": (1, 1, 2, 1)}).train()
    assert model.auxiliary_weights() == {"balance": 0.01, "busiest_head": 0.0}
    model.set_auxiliary()
    terms = model(torch.randn(2, 3, 64, 64)).terms
    assert 1.8 < terms["balance"] < 2.6 and 2 / 4 <= terms["busiest_head"] <= 1  # of three or four heads two are taken
    dense = timm.create_model(name, num_classes=3, mixers="aggregated", **tiny)
    assert dense.auxiliary_weights() == {}


def test_numbers_of_heads_are_checked():
    with pytest.raises(ValueError, match=r"expected one entry for each stage, got .*shared_heads=\(1, 2\)"):
        timm.create_model("zoo_moh_vit_s_75", device="meta", shared_heads=(1, 2))
    with pytest.raises(ValueError, match=r"num_heads=12, shared_heads=3 and routed_heads=10"):
        timm.create_model("zoo_moh_vit_s_75", device="meta", routed_heads=(0, 0, 10, 12))
    with pytest.raises(ValueError, match=r"img_size and pretrain_size must be 32 px at least, got img_size=16"):
        timm.create_model("zoo_moh_vit_s_75", device="meta", img_size=16)
