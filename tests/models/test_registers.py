"""Test-time registers: outliers that are planted are found, moved to a token of its own, and absence is said."""

import copy

import pytest
import timm
import torch
from torch import nn

import visionzoo
from visionzoo.models._registers import MovedActivation
from visionzoo.models._registry import TINY

NEURONS = (3, 5)  # of block 0 of the models below


def planted(name="zoo_cpvt_t"):
    """Build a model with a block that turns a token of two of the images into an outlier, and the images."""
    torch.manual_seed(0)
    alone = {"peg_after": ()} if "cpvt" in name else {}  # a convolution would spread it
    model = timm.create_model(name, num_classes=3, **{**TINY[name], **alone}).eval()
    images = torch.randn(3, 3, 64, 48)
    images[1, :, 16:32, 32:48] = images[0, :, 16:32, 32:48]  # the third image has none
    block = model.blocks[model.prefix_at]
    seen = []
    hook = block.norm2.register_forward_hook(lambda _module, _inputs, out: seen.append(out))
    with torch.no_grad():
        size = 2 * float(visionzoo.feature_norms(model, images).median()) / model.num_features**0.5
        hook.remove()
        token = seen[0][0, -12 + 5]  # row 1, column 2 of 4 x 3
        others = torch.cat([seen[0][2], seen[0][:2, -12:-7].flatten(0, 1), seen[0][:2, -6:].flatten(0, 1)])
        for neuron, sign in zip(NEURONS, (1, -1), strict=True):
            direction = token / token.norm()
            top, rest = float(direction @ token), float((others @ direction).max())
            block.mlp.fc1.weight[neuron] = direction * 8 / (top - rest)
            block.mlp.fc1.bias[neuron] = 4 - 8 * top / (top - rest)  # 4 at the token, -4 and less elsewhere
            block.mlp.fc2.weight[:, neuron] = torch.randn(model.num_features).sign() * size * sign
    return model, images


def ratio(norms):
    return float(norms.max() / norms.median())


@pytest.mark.parametrize("name", ["zoo_cpvt_t", "zoo_cpvt_t_gap", "zoo_tnt_s", "zoo_convit_t"])
def test_outliers_move_to_a_register(name):
    model, images = planted(name)
    before = visionzoo.feature_norms(model, images)
    assert ratio(before) > 3 and before.shape == (3, 4, 3)
    state = copy.deepcopy(model.state_dict())
    found = visionzoo.find_register_neurons(model, images, top_k=2)
    assert found.outliers == 2 and torch.equal(before > found.threshold, found.norms > found.threshold)
    assert (before > found.threshold).nonzero().tolist() == [[0, 1, 2], [1, 1, 2]]
    assert {i: sorted(chosen) for i, chosen in found.neurons.items()} == {model.prefix_at: sorted(NEURONS)}

    moved = visionzoo.with_test_registers(model, images, top_k=2)
    after = visionzoo.feature_norms(moved, images)
    assert ratio(after) < 3
    assert moved.num_prefix_tokens == model.num_prefix_tokens + 1
    _, prefix = moved.forward_intermediates(images, [-1], intermediates_only=True, return_prefix_tokens=True)[0]
    assert float(prefix[:2, -1].detach().norm(dim=-1).min()) > 3 * float(after.median())  # it is in the register
    assert all(torch.equal(value, moved.state_dict()[key]) for key, value in state.items())
    assert all(torch.equal(value, model.state_dict()[key]) for key, value in state.items())
    with torch.no_grad():
        logits = moved(images)
        again = visionzoo.move_to_registers(model, moved.register_neurons)
        assert torch.equal(again(images), logits)
        assert torch.equal(torch.fx.symbolic_trace(moved)(images), logits)
        torch.testing.assert_close(visionzoo.fuse(moved)(images), logits)
    moved.reset_classifier(5, "avg")
    torch.testing.assert_close(
        moved(images), moved.head.fc(moved.forward_features(images)[:, moved.num_prefix_tokens :].mean(1))
    )
    moved.load_state_dict(model.state_dict() | {f"head.fc.{k}": v for k, v in moved.head.fc.state_dict().items()})


def test_what_is_moved_is_as_defined():
    x = torch.randn(2, 1 + 2 + 4, 6)
    out = {
        rest: MovedActivation(nn.Identity(), [4, 1], 1, 2, scale=0.5, rest=rest)(x) for rest in ("zero", "mean", "same")
    }
    for b in range(2):
        for t in range(7):
            for c in range(6):
                for rest, values in out.items():
                    expected = x[b, t, c]
                    if c in (1, 4) and 1 <= t < 3:
                        expected = 0.5 * max(x[b, :, c].tolist(), key=abs)
                    elif c in (1, 4) and t >= 3:
                        expected = {"zero": torch.tensor(0.0), "mean": x[b, 3:, c].mean(), "same": x[b, t, c]}[rest]
                    assert float(values[b, t, c]) == pytest.approx(float(expected), abs=1e-6)


def test_a_register_of_nothing_that_keeps_the_rest_is_a_token_of_zeros():
    model, images = planted()
    same = visionzoo.move_to_registers(model, {0: [0]}, scale=0.0, rest="same", num_registers=2)
    tokens = torch.zeros(1, 2, model.num_features)
    state = model.begin(images)
    state = state._replace(x=torch.cat([state.x[:, :1], tokens.expand(3, -1, -1), state.x[:, 1:]], 1), prefix=3)
    hook = model.blocks[0].mlp.act.register_forward_hook(_silence)
    for i in range(len(model.blocks)):
        state = model.advance(i, state)
    hook.remove()
    torch.testing.assert_close(same.forward_features(images), model.finish(state))


def _silence(_module, _inputs, out):
    out = out.clone()
    out[:, 1:3, 0] = 0
    return out


def test_a_model_without_outliers_says_so():
    model, images = planted()
    with pytest.raises(visionzoo.NoOutliersError, match=r"no outliers on 1 image: after block 1 the largest norm"):
        visionzoo.with_test_registers(model, images[2:])
    with pytest.raises(visionzoo.NoOutliersError, match=r"and 1e\+09 would make one; there is nothing to move"):
        visionzoo.with_test_registers(model, images, threshold=1e9)
    assert visionzoo.find_register_neurons(model, images, threshold=1e-3).outliers == images.shape[0] * 12


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("zoo_davit_t", {}, "for isotropic models, .* DaViT is a pyramid"),
        ("zoo_iared2_deit_s", {}, "has reducers, which drop tokens: .* build it without"),
        ("zoo_memory_vit_t", {}, "has a memory: .* build it without"),
        ("zoo_karat_t_g3b", {}, "no place for more tokens beside it"),
        ("zoo_cpvt_t", {"block": 2}, "has 2 blocks: expected from -2 to 1, got 2"),
        ("zoo_cpvt_t", {"top_k": 0}, "top_k must be 1 or more, got top_k=0"),
        ("zoo_cpvt_t", {"num_registers": 0}, "num_registers must be 1 or more, got num_registers=0"),
        ("zoo_cpvt_t", {"rest": "none"}, "rest must be 'zero', 'mean' or 'same', got rest='none'"),
        ("zoo_cpvt_t", {"mixers": "pool"}, "a register would not meet the map, .* such as zoo_deit_s"),
    ],
)
def test_what_does_not_fit_is_named(name, options, message):
    mixers = {"mixers": options.pop("mixers")} if "mixers" in options else {}
    model, images = planted() if name == "zoo_cpvt_t" and not mixers else (None, torch.randn(1, 3, 64, 64))
    model = model or timm.create_model(name, **{**TINY[name], **mixers})
    with pytest.raises(ValueError, match=message):
        visionzoo.with_test_registers(model, images, **options)


def test_neurons_that_are_not_there_and_second_registers_are_refused():
    model, _ = planted()
    with pytest.raises(ValueError, match=r"from 0 to 63 of blocks from 0 to 1, got \[64\] of block 1"):
        visionzoo.move_to_registers(model, {1: [64]})
    moved = visionzoo.move_to_registers(model, {1: [3]})
    with pytest.raises(ValueError, match="has 1 test-time registers already: give the model before"):
        visionzoo.move_to_registers(moved, {1: [3]})
