"""Learnable memory in any isotropic model: the old task stays what it was, and the new one learns from all it may."""

import copy
import pickle

import pytest
import timm
import torch
from quick import meta_model, quick_model
from torch.utils.flop_counter import FlopCounterMode

import visionzoo
from visionzoo.engine.probing import freeze
from visionzoo.layers.mixers import MIXERS, build_mixer
from visionzoo.models._isotropic import Isotropic
from visionzoo.models._memory import add_memory
from visionzoo.models._registry import FAMILIES, TINY

SMALL = {"depth": 3, "local_depth": 1, "embed_dim": 16}
IMAGE = torch.randn(2, 3, 40, 56, generator=torch.Generator().manual_seed(0))
# Those that take a memory must keep their logits, the others say why not.
REFUSED = {
    **dict.fromkeys(
        (
            *("zoo_activator_glu", "zoo_activator_geglu", "zoo_gmm_vit", "zoo_gmm_cait_tiny", "zoo_mega_t"),
            *("zoo_ninformer_cifar", "zoo_orchid_t", "zoo_isodinat_s", "zoo_vitrpb_s"),
        ),
        "nothing would read the image",
    ),
    "zoo_dat_s": "DualAttentionTransformer has blocks that take no further token through: DualAttentionBlock",
    "zoo_iared2_deit_s": "this InterpretableTransformer drops tokens by reducers",
    "zoo_karat_t_g3b": "KArAt has blocks that take no further token through: TokenBlock with Kolmogorov",
    "zoo_karat_t_g3u": "KArAt has blocks that take no further token through: TokenBlock with Kolmogorov",
    "zoo_sparsifiner_s": "this Sparsifiner drops tokens by reducers",
}
HOSTS = [name for name in TINY if name not in FAMILIES["memory_vit"]]


def _host(name="zoo_convit_t", **kwargs):
    return quick_model(name, num_classes=7, **{**(SMALL if name == "zoo_convit_t" else TINY[name]), **kwargs})


@pytest.mark.parametrize("name", HOSTS)
def test_old_logits_stay_bit_for_bit_and_only_the_new_task_learns(name):
    model = _host(name)
    if why := REFUSED.get(name, "" if isinstance(model, Isotropic) else "expected an isotropic model"):
        with pytest.raises(ValueError, match=f"memory: {why}"):
            add_memory(model)
        return
    state = copy.deepcopy(model.state_dict())
    with torch.no_grad():
        old = model(IMAGE)
    add_memory(model, 3, num_classes=4)
    model.train()
    logits, kept = model.forward_tasks(IMAGE)
    assert torch.equal(kept, old) and logits.shape == (2, 4)
    model(IMAGE).square().sum().backward()
    learn = {key for key, p in model.named_parameters() if p.requires_grad}
    assert learn == {
        *("memory.token", "memory.norm.weight", "memory.norm.bias", "head.fc.weight", "head.fc.bias"),
        *(f"blocks.{i}.memory" for i, block in enumerate(model.blocks) if block.memory is not None),
    }
    assert not [key for key in learn if not model.get_parameter(key).grad.any()]
    assert not [key for key, p in model.named_parameters() if key not in learn and p.grad is not None]
    with torch.no_grad():  # of a host whose weights are the same to the last bit, also those that training would move
        for key in learn:
            model.get_parameter(key).sub_(model.get_parameter(key).grad)
        assert torch.equal(model.forward_tasks(IMAGE)[1], old)
    now = model.state_dict()
    assert all(torch.equal(now[f"memory.{key}" if key.startswith("head.") else key], state[key]) for key in state)


@torch.no_grad()
def test_the_reader_sees_all_and_is_seen_by_none():
    """One more token in the whole attention of a block, with the memory tokens as keys alone."""
    model = _host(local_depth=0, reg_tokens=1).double()
    add_memory(model, 3, num_classes=4)
    before = model.begin(IMAGE.double())
    block, x = model.blocks[0], torch.cat([before.reader, before.x], 1)
    q, k, v = (
        block.mixer.qkv(torch.cat([block.norm1(x), block.memory.expand(2, -1, -1)], 1)).view(2, -1, 3, 4, 4).unbind(2)
    )
    seen = torch.zeros(x.shape[1], k.shape[1], dtype=torch.bool)
    seen[0] = True
    seen[1:, 1 : x.shape[1]] = True
    scores = torch.einsum("bigd,bjgd->bgij", q[:, : x.shape[1]], k) / 2
    weights = scores.masked_fill(~seen, float("-inf")).softmax(-1)
    x = x + block.mixer.proj(torch.einsum("bgij,bjgd->bigd", weights, v).flatten(2))
    x = x + block.mlp(block.norm2(x))
    after = block(before)
    torch.testing.assert_close(torch.cat([after.reader, after.x], 1), x, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("name", MIXERS)
@torch.no_grad()
def test_the_first_of_tokens_is_mixed_as_among_all(name):
    options = {"map_size": 4} if name in ("forward_cross", "levit") else {}
    mixer = build_mixer({"type": name, **options}, 16, 2).eval()
    x, beside = torch.randn(2, 3 + 6, 16), {"map_size": (2, 3)} if mixer.needs_map_size else {}
    if mixer.takes_prefix_tokens:
        torch.testing.assert_close(mixer.mix_first(x, **beside), mixer(x.unsqueeze(1), **beside)[:, 0, :1])


def test_a_further_task_costs_its_projections():
    model = meta_model("zoo_cpvt_t", num_classes=7, **TINY["zoo_cpvt_t"])
    image, costs = torch.zeros(1, 3, 224, 224, device="meta"), []
    for tokens in (0, 5):
        if tokens:
            add_memory(model, tokens)
        with FlopCounterMode(display=False) as counter, torch.no_grad():
            model(image)
        costs.append(counter.get_total_flops())
    seen, depth = 1 + 1 + 196 + 5, 2
    projections, reader = 2 * seen * 16 * 48, 2 * 2 * seen * 16 + 2 * 16 * 16 + 2 * 2 * 16 * 64
    assert costs[1] - costs[0] == depth * (projections + reader)


def test_batch_norms_of_the_host_keep_their_statistics_in_training():
    model = _host("zoo_taylorshift_s")
    add_memory(model)
    before = {key: value.clone() for key, value in model.named_buffers()}
    model.train()(IMAGE)
    assert before and all(torch.equal(value, before[key]) for key, value in model.named_buffers())
    assert model.head.training and model.training


def test_a_host_is_given_by_name_and_its_checkpoint_fits(tmp_path):
    host, memory = _host(), {"tokens": 2, "host_classes": 7}
    model = timm.create_model("zoo_convit_t", memory=memory, num_classes=3, **SMALL).eval()
    with pytest.raises(ValueError, match="Only the memory is missing: pass new_memory=True to keep"):
        visionzoo.load_weights(model, host.state_dict())
    report = visionzoo.load_weights(model, host.state_dict(), new_memory=True)
    assert len(report.missing) == 2 + 5 and not report.unexpected  # tokens of two blocks; reader, its norm and new head
    with torch.no_grad():
        assert torch.equal(model.forward_tasks(IMAGE)[1], host(IMAGE))
        torch.save(host.state_dict(), tmp_path / "host.pth")
        overlay = {"file": str(tmp_path / "host.pth"), "num_classes": 7}
        other = timm.create_model(
            "zoo_convit_t", pretrained=True, pretrained_cfg_overlay=overlay, memory=memory, num_classes=3, **SMALL
        ).eval()
        assert torch.equal(other.forward_tasks(IMAGE)[1], host(IMAGE))
        other.load_state_dict(model.state_dict())
        for twin in (other, pickle.loads(pickle.dumps(model)), copy.deepcopy(model)):
            assert torch.equal(twin(IMAGE), model(IMAGE))


def test_freezing_leaves_the_memory_and_the_classifier_to_train():
    model = timm.create_model("zoo_memory_vit_t", num_classes=3, **TINY["zoo_memory_vit_t"])
    freeze(model, "zoo_memory_vit_t", has_weights=True)
    learn = {key for key, p in model.named_parameters() if p.requires_grad}
    assert learn == {"memory.token", "blocks.0.memory", "blocks.1.memory", "head.fc.weight", "head.fc.bias"}


def test_features_are_the_hosts_and_pruned_models_forget():
    model = _host()
    maps = model.forward_intermediates(IMAGE, intermediates_only=True)
    add_memory(model)
    for own, host in zip(model.forward_intermediates(IMAGE, intermediates_only=True), maps, strict=True):
        assert torch.equal(own, host)
    getter = timm.create_model("zoo_convit_t", memory=5, features_only=True, **SMALL)
    assert not [name for name, _ in getter.named_parameters() if "memory" in name]


def test_what_cannot_have_a_memory_is_said(caplog):
    for tokens in (0, -1):
        with pytest.raises(ValueError, match=f"expected 1 token or more in each block, got tokens={tokens}"):
            add_memory(_host(), tokens)
    model = _host()
    with pytest.raises(ValueError, match="forward_tasks: this ConViT has one task; build it with memory=5"):
        model.forward_tasks(IMAGE)
    add_memory(model)
    with pytest.raises(ValueError, match="this ConViT has one already"):
        add_memory(model)
    with pytest.raises(ValueError, match="nothing would read the image, for none of the mixers of this ConViT"):
        add_memory(_host(mixers="window"))
    timm.create_model("zoo_memory_vit_t", mixers="window", **TINY["zoo_memory_vit_t"])
    assert "MemoryViT: none of the mixers has a place for memory, the model is built without" in caplog.text
    with pytest.raises(ValueError, match="TNT has blocks that take no further token through: TNTBlock"):
        add_memory(_host("zoo_tnt_s", squeeze_excite=True))
    for wrong in ("5", {"token": 5}, {"tokens": 2.5}, True):
        with pytest.raises(
            ValueError, match="memory: expected a number of tokens, or a mapping with tokens and host_cl"
        ):
            timm.create_model("zoo_convit_t", memory=wrong)
