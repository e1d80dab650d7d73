"""Gates in every family: where they stand, what checkpoints make of them, and what is refused."""

import logging

import pytest
import timm
import torch
from quick import of_each_kind
from timm.optim import param_groups_layer_decay

import visionzoo
from visionzoo.layers.gates import CbamGate, EcaGate
from visionzoo.models._gating import PLACE, gate_tensors
from visionzoo.models._registry import TINY, VARIANTS

NAME = "zoo_davit_t"


def _tiny(name, gates=None, **kwargs):
    torch.manual_seed(0)
    return timm.create_model(name, gates=gates, num_classes=3, **{**TINY[name], **kwargs})


def _gates(model):
    return [[getattr(block, PLACE, None) for block in getattr(part, "blocks", [part])] for part in model.parts]


def _image(*size):
    return torch.randn(2, 3, *(size or (64, 64)))


@pytest.mark.parametrize("name", of_each_kind())
def test_every_family_takes_a_gate_forward_and_backward_and_keeps_its_names(name):
    plain, gated = _tiny(name), _tiny(name, "eca")
    places = [block for part in _gates(gated) for block in part if block is not None]
    assert places and all(isinstance(gate, EcaGate) for gate in places)
    own = gate_tensors(gated)
    assert list(plain.state_dict()) == [key for key in gated.state_dict() if key not in own]
    report = visionzoo.load_weights(gated, plain.state_dict(), new_gates=True)
    assert report.missing == own and not report.unexpected
    gated.train()
    gated(_image()).sum().backward()
    trained = [p.grad for key, p in gated.named_parameters() if key in own]
    assert trained and all(grad is not None for grad in trained)


@pytest.mark.parametrize("name", of_each_kind())
def test_gates_act_in_every_block(name):
    """A gate that zeroes its branch changes the features, in whichever block."""
    model = _tiny(name, "eca").eval()
    x = _image()
    for norm in model.modules():  # branches that start as nothing would hide it
        weight = getattr(norm, "weight", None)
        if weight is not None and not weight.detach().any():
            torch.nn.init.ones_(weight)
        if hasattr(norm, "gamma"):
            torch.nn.init.ones_(norm.gamma)

    def features():
        found = model.forward_features(x)
        return torch.cat([each.flatten() for each in (found if isinstance(found, tuple) else (found,))])

    with torch.no_grad():
        expected = features()  # a head may read a prefix token, which gates of the last block don't see
        for module in [module for module in model.modules() if isinstance(module, EcaGate)]:
            handle = module.register_forward_hook(lambda _module, _args, out: torch.zeros_like(out))
            assert not torch.allclose(features(), expected, rtol=1e-6, atol=0)
            handle.remove()


def test_entries_go_part_by_part_and_blocks_take_them_in_turn():
    model = timm.create_model(NAME, device="meta", gates=("eca", None, [{"type": "cbam"}, None], "triplet"))
    kinds = [[type(gate).__name__ for gate in part] for part in _gates(model)]
    assert kinds == [
        ["EcaGate"] * 2,
        ["Identity"] * 2,
        ["CbamGate", "Identity"] * 3,
        ["TripletGate"] * 2,
    ]


def test_gates_stand_at_the_end_of_the_last_branch():
    block = timm.create_model(NAME, gates="eca", **TINY[NAME]).eval().stages[0].blocks[0]
    x = torch.randn(1, 7, 7, block.dim)
    with torch.no_grad():
        before = block(x) - (branch := block.branch_gate(block.mlp(block.norm2(_before_mlp(block, x)))))
        torch.testing.assert_close(before, _before_mlp(block, x))
    assert branch.any()


def _before_mlp(block, x):
    x = block.cpe1(x, residual=x) if block.cpe1 is not None else x
    x = x + block.mixer(block.norm1(x))
    return block.cpe2(x, residual=x) if block.cpe2 is not None else x


@pytest.mark.parametrize("gates", ["eca", {"type": "triplet", "kernel_size": 3}])
def test_features_only_pruning_checkpointing_and_layer_decay(gates):
    getter = timm.create_model(NAME, features_only=True, out_indices=(1, 2), gates=gates, **TINY[NAME])
    assert len(getter.model.stages) == 3 and gate_tensors(getter.model)
    x = _image()
    model = _tiny(NAME, gates).eval()
    model.load_state_dict({**model.state_dict(), **getter.model.state_dict()})
    expected = model.forward_intermediates(x, indices=[1, 2], intermediates_only=True)
    for feature, other in zip(getter.eval()(x), expected, strict=True):
        torch.testing.assert_close(feature, other)

    model.train()
    gradients = []
    for checkpointing in (False, True):
        model.set_grad_checkpointing(checkpointing)
        model.zero_grad()
        torch.manual_seed(0)
        model(x).sum().backward()
        gradients.append([p.grad.clone() for p in model.parameters()])
    torch.testing.assert_close(*gradients)

    groups = param_groups_layer_decay(model, layer_decay=0.5)
    scale = {id(p): group["lr_scale"] for group in groups for p in group["params"]}
    for part in model.stages:
        for block in part.blocks:
            assert len({scale[id(p)] for p in block.parameters()}) == 1


@pytest.mark.parametrize(
    "gates", ["eca", "triplet", {"type": "ulsam", "num_splits": 2}, {"type": "cbam", "reduction": 4}]
)
def test_fused_and_exported_models_say_the_same(gates):
    model = _tiny(NAME, gates)
    model.train()(_image())  # statistics
    model.eval()
    x = _image()
    with torch.no_grad():
        expected = model(x)
        fused = visionzoo.fuse(model)
        torch.testing.assert_close(fused(x), expected, rtol=1e-4, atol=1e-5)
        assert gates == "eca" or len(fused.state_dict()) < len(model.state_dict())
        program = torch.export.export(model, (x,))
        torch.testing.assert_close(program.module()(x), expected)


# -- checkpoints ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("gates", ["eca", "triplet"])  # few tensors a block, and more than the block itself
def test_checkpoints_without_gates_load_when_asked_and_say_what_is_missing(gates):
    plain, gated = _tiny(NAME), _tiny(NAME, gates)
    own = [key for key in gate_tensors(gated) if not key.endswith("num_batches_tracked")]
    with pytest.raises(
        ValueError, match=rf"{len(own)} missing: stages.0.*Only the gates are missing: pass new_gates=True"
    ):
        visionzoo.load_weights(gated, plain.state_dict())
    for permission in ({"new_gates": True}, {"strict": False}):
        report = visionzoo.load_weights(gated, plain.state_dict(), **permission)
        assert report.missing == own
        assert all(torch.equal(gated.state_dict()[key], value) for key, value in plain.state_dict().items())


def test_new_gates_allow_nothing_else():
    plain, gated = _tiny(NAME), _tiny(NAME, "eca")
    state = plain.state_dict()
    name, value = state.popitem()
    with pytest.raises(ValueError, match=f"missing: .*{name}.*Pass strict=False"):
        visionzoo.load_weights(gated, state, new_gates=True)
    some = dict(gated.state_dict())
    some.pop(gone := gate_tensors(gated)[0])
    with pytest.raises(ValueError, match=f"1 missing: {gone}.*Pass strict=False"):  # no checkpoint without gates
        visionzoo.load_weights(gated, some, new_gates=True)
    with pytest.raises(ValueError, match="The checkpoint is of a model with gates: build it with the same gates="):
        visionzoo.load_weights(plain, gated.state_dict())
    assert value is not None


def test_pretrained_weights_keep_the_gates_and_say_so(tmp_path, caplog):
    plain = _tiny(NAME)
    torch.save(plain.state_dict(), tmp_path / "weights.pth")
    overlay = {"file": str(tmp_path / "weights.pth"), "num_classes": 3}
    with caplog.at_level(logging.WARNING):
        gated = _tiny(NAME, "eca", pretrained=True, pretrained_cfg_overlay=overlay)
    assert f"the {len(gate_tensors(gated))} tensors of its gates keep their initial values" in caplog.text
    for key, value in plain.state_dict().items():
        assert torch.equal(gated.state_dict()[key], value)
    torch.save(gated.state_dict(), tmp_path / "weights.pth")
    caplog.clear()
    again = _tiny(NAME, "eca", pretrained=True, pretrained_cfg_overlay=overlay)
    assert all(torch.equal(again.state_dict()[key], value) for key, value in gated.state_dict().items())
    assert "gates" not in caplog.text


# -- bad input --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("gates", "message"),
    [
        ("eka", r"stages.0 of DaViT has \d+ channels. unknown gate 'eka'"),
        (("eca", None), "gates: expected one entry for each of the 4 stages, got 2"),
        (5, "gates: expected one entry for each of the 4 stages, got int: 5"),
        (("eca", [], None, None), "gates: a stage needs at least one gate, got "),
        (
            (None, None, {"type": "ulsam", "num_splits": 7}, None),
            r"stages.2 of DaViT has \d+ channels. .*must divide dim",
        ),
        ((None, 3, None, None), "gates: a stage needs at least one gate, got 3"),
    ],
)
def test_wrong_gates_are_named(gates, message):
    with pytest.raises(ValueError, match=message):
        _tiny(NAME, gates)


def test_a_misspelt_argument_has_a_hint():
    with pytest.raises(TypeError, match=r"no argument 'gatess' \(did you mean 'gates'\?\)"):
        timm.create_model(NAME, gatess="eca")


@pytest.mark.full
@pytest.mark.parametrize("name", VARIANTS)
def test_every_variant_takes_gates_of_all_its_widths(name):
    model = timm.create_model(name, device="meta", gates={"type": "cbam"})
    assert any(isinstance(module, CbamGate) for module in model.modules())
