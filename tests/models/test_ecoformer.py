"""Weights go from PVTv2 and Twins to EcoFormer's softmax form, and from that to the hashed one."""

import pytest
import timm
import torch

import visionzoo

SIZE = {"depths": (1, 1, 1, 1), "embed_dims": (8, 16, 16, 24), "num_heads": (1, 2, 2, 4), "num_classes": 3}


@torch.no_grad()
@pytest.mark.parametrize(
    ("host", "form"), [("zoo_pvtv2_b0", "zoo_ecoformer_pvtv2_b0"), ("zoo_pcpvt_s", "zoo_ecoformer_twins_svt_s")]
)
def test_weights_of_the_host_become_softmax_and_those_become_hashed_attention(host, form):
    arguments = SIZE | {"mlp_ratios": (2, 2, 2, 2)}
    start = timm.create_model(host, **arguments)
    softmax = timm.create_model(f"{form}_msa", **arguments)
    report = visionzoo.load_weights(softmax, start.state_dict())
    assert report.names == "host, visionzoo" and not (report.missing or report.unexpected)
    for one, other in zip(start.blocks_in_order(), softmax.blocks_in_order(), strict=True):
        assert torch.equal(torch.cat([one.mixer.q.weight, one.mixer.kv.weight]), other.mixer.qkv.weight)
        assert torch.equal(one.mlp.fc1.weight, other.mlp.fc1.weight)

    hashed = timm.create_model(form, **arguments)
    with pytest.raises(ValueError, match=r"missing: stages.0.blocks.0.mixer.hash.weight"):
        visionzoo.load_weights(hashed, softmax.state_dict())
    report = visionzoo.load_weights(hashed, softmax.state_dict(), strict=False, allow_partial=True)
    assert report.names == "softmax form" and not report.unexpected
    assert all(".hash." in name for name in report.missing) and len(report.missing) == 9
    for one, other in zip(list(softmax.blocks_in_order())[:3], hashed.blocks_in_order(), strict=False):
        q, _, v = one.mixer.qkv.weight.chunk(3)
        assert torch.equal(q, other.mixer.qk.weight) and torch.equal(v, other.mixer.v.weight)
    assert torch.equal(softmax.stages[3].blocks[0].mixer.qkv.weight, hashed.stages[3].blocks[0].mixer.qkv.weight)
