"""NAT and DiNAT: published numbers, dilations block by block, and the weights of Hugging Face transformers."""

from unittest import mock

import pytest
import timm
import torch
from quick import meta_model, quick_model
from safetensors.torch import save_file
from torch.utils.flop_counter import FlopCounterMode

import visionzoo
from visionzoo.models import dinat, nat

VARIANTS = {**nat.VARIANTS, **dinat.DINAT, **dinat.DINATS}
TINY = {"depths": (2, 1, 1, 2), "embed_dims": (8, 16, 24, 32), "num_heads": (1, 2, 2, 4)}


@pytest.mark.parametrize("name", VARIANTS)
def test_parameters_are_as_published(name):
    count = sum(p.numel() for p in meta_model(name).parameters()) / 1e6
    assert abs(count - VARIANTS[name].published.params_m) <= (1.2 if "dinat_large" in name else 0.5)  # 201 against 200


SHALLOW = ["zoo_nat_mini", "zoo_dinat_mini", "zoo_dinats_tiny"]  # and one each of every other width, kernel and size
DEEP = ["zoo_nat_small", "zoo_dinat_base", "zoo_dinat_large_384", "zoo_dinat_large_384_11x11", "zoo_dinats_large"]


@pytest.mark.parametrize("name", SHALLOW + DEEP)
def test_multiply_adds_are_as_published(name):
    published, attention = VARIANTS[name].published, []

    def count_attention(q, k, v, *, kernel_size, **options):  # the reference computes more than the definition needs
        attention.append(2 * q.numel() * kernel_size[0] * kernel_size[1])
        return v

    with (
        mock.patch("visionzoo.layers.mixers.neighborhood.neighborhood_attention", count_attention),
        FlopCounterMode(display=False) as counter,
    ):
        meta_model(name)(torch.empty(1, 3, published.size, published.size, device="meta"))
    assert abs(counter.get_total_flops() / 2e9 + sum(attention) / 1e9 - published.gmacs) <= 0.01 * published.gmacs


def test_every_second_block_is_dilated():
    def dilations(name, **kwargs):
        stages = meta_model(name, **kwargs).stages
        return [[block.mixer.dilation[0] for block in stage.blocks] for stage in stages]

    assert dilations("zoo_dinat_mini") == [[1, 8, 1], [1, 4, 1, 4], [1, 2] * 3, [1] * 5]
    assert dilations("zoo_dinats_large_384") == [[1, 13], [1, 6], [1, 3] * 9, [1, 1]]
    assert dilations("zoo_nat_mini") == [[1] * 3, [1] * 4, [1] * 6, [1] * 5]
    dense = ((1, 28, 1), (1, 7, 1, 14), (1, 3, 1, 5, 1, 7), (1, 3))
    assert dilations("zoo_dinat_mini", dilations=dense)[2:] == [[1, 3, 1, 5, 1, 7], [1, 3, 1, 3, 1]]
    assert dilations("zoo_dinat_mini", mixers={"type": "neighborhood", "kernel_size": 5})[0] == [1, 8, 1]


def _transformers_names(model):
    """State of `NatForImageClassification`, name by name, with the model's numbers."""
    stem, state = model.stem, {}

    def put(name, module):
        state.update({f"{name}.{key}": value for key, value in module.state_dict().items()})

    put("nat.embeddings.patch_embeddings.projection.0", stem[0])
    put("nat.embeddings.patch_embeddings.projection.1", stem[1].conv)
    put("nat.embeddings.norm", stem[1].norm)
    for i, stage in enumerate(model.stages):
        level = f"nat.encoder.levels.{i}"
        for j, block in enumerate(stage.blocks):
            layer, mixer = f"{level}.layers.{j}", block.mixer
            put(f"{layer}.layernorm_before", block.norm1)
            put(f"{layer}.layernorm_after", block.norm2)
            state[f"{layer}.attention.self.rpb"] = mixer.relative_position_bias.table.detach()
            for part, weight, bias in zip(
                ("query", "key", "value"), mixer.qkv.weight.chunk(3), mixer.qkv.bias.chunk(3), strict=True
            ):
                state[f"{layer}.attention.self.{part}.weight"] = weight.detach()
                state[f"{layer}.attention.self.{part}.bias"] = bias.detach()
            put(f"{layer}.attention.output.dense", mixer.proj)
            put(f"{layer}.intermediate.dense", block.mlp.fc1)
            put(f"{layer}.output.dense", block.mlp.fc2)
            state[f"{layer}.layer_scale_parameters"] = torch.stack([block.ls1.gamma, block.ls2.gamma]).detach()
        if i < 3:
            put(f"{level}.downsample.reduction", model.stages[i + 1].downsample.conv)
            put(f"{level}.downsample.norm", model.stages[i + 1].downsample.norm)
    put("nat.layernorm", model.norm)
    put("classifier", model.head.fc)
    return state


@pytest.mark.parametrize("prefix", ["nat.", "dinat.", ""])
def test_weights_of_transformers_load(prefix):
    source, target = (quick_model("zoo_nat_base", **TINY) for _ in range(2))
    with torch.no_grad():
        for parameter in target.parameters():
            parameter.zero_()
    theirs = {name.replace("nat.", prefix, 1): value for name, value in _transformers_names(source).items()}
    report = visionzoo.load_weights(target, theirs)
    assert report.names == "transformers" and not report.missing and not report.unexpected
    for name, value in source.state_dict().items():
        assert torch.equal(target.state_dict()[name], value), name


def test_timm_loads_the_hubs_files(tmp_path):
    source = quick_model("zoo_dinat_base", **TINY)
    theirs = {name: value.contiguous() for name, value in _transformers_names(source).items()}
    save_file(theirs, tmp_path / "model.safetensors")
    overlay = {"file": str(tmp_path / "model.safetensors")}
    target = timm.create_model("zoo_dinat_base", pretrained=True, pretrained_cfg_overlay=overlay, num_classes=7, **TINY)
    state = target.state_dict()
    assert state["head.fc.weight"].shape[0] == 7
    for name, value in source.state_dict().items():
        assert name.startswith("head.fc") or torch.equal(state[name], value), name


def test_layer_scales_of_the_authors_load():
    source, target = (quick_model("zoo_nat_small", **TINY) for _ in range(2))
    with torch.no_grad():
        target.stages[3].blocks[1].ls2.gamma.zero_()
    theirs = {
        name.replace("stages.", "levels.").replace("ls1.gamma", "gamma1").replace("ls2.gamma", "gamma2"): value
        for name, value in source.state_dict().items()
        if "stem" not in name and "downsample" not in name and "head" not in name
    }
    theirs = {name.replace(".mixer.relative_position_bias.table", ".attn.rpb"): v for name, v in theirs.items()}
    theirs = {name.replace(".mixer.", ".attn."): value for name, value in theirs.items()}
    report = visionzoo.load_weights(target, theirs, strict=False, allow_partial=True)
    assert report.names == "authors" and not report.unexpected
    assert torch.equal(target.stages[3].blocks[1].ls2.gamma, source.stages[3].blocks[1].ls2.gamma)


def test_a_larger_kernel_loads_the_biases_of_a_smaller_one():
    source, target = (quick_model("zoo_dinat_mini", kernel_size=size, **TINY) for size in (7, 11))
    report = visionzoo.load_weights(target, source.state_dict())
    assert len(report.adapted) == 6 and "(1, 13, 13) resized to (1, 21, 21)" in report.adapted[0]
    old, new = (model.stages[0].blocks[1].mixer.relative_position_bias for model in (source, target))
    assert torch.equal(new.table, new.fit_weight("table", old.table))


def test_weights_with_other_heads_are_refused():
    source = quick_model("zoo_dinat_mini", kernel_size=5, **{**TINY, "num_heads": (2, 2, 2, 4)})
    with pytest.raises(ValueError, match="tensors of other shapes"):
        visionzoo.load_weights(quick_model("zoo_dinat_mini", **TINY), source.state_dict())


def test_a_stage_without_dilations_is_named():
    with pytest.raises(ValueError, match=r"one entry for each stage, got .*dilations=\(\(1,\), \(1,\), \(1,\)\)"):
        timm.create_model("zoo_dinat_mini", dilations=((1,), (1,), (1,)))
