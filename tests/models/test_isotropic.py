"""Isotropic backbones: tokens beside the map, positions of any size, and what heads read."""

import logging

import pytest
import timm
import torch
from quick import draw_weights
from torch import nn

import visionzoo
from visionzoo.layers.heads import TokenHead
from visionzoo.layers.mixers import MIXERS, build_mixer
from visionzoo.layers.tokens import PrefixTokens, TokenPositions, Tokens, mix_tokens
from visionzoo.models._registry import TINY

SMALL = TINY["zoo_convit_t"]
# Mixers for which a token's place does not matter.
TAKE = {"channel", "dual_attention", "flow", "full", "hashed_linear", "linear", "spatial_reduction", "subspace"}
TAKE |= {"expert_choice", "kmeans", "score", "taylor_shift"}
# Mixers in which it matters, but not that of prefix tokens: they take part in all else.
TAKE_BESIDE = {"injective_linear", "nystrom", "sparsifiner"}
OPTIONS = {"levit": {"map_size": 4}, "sparsifiner": {"keep_rate": 1.0, "prefix_tokens": 0}}
OPTIONS["expert_choice"] = {"sparsity": 1}  # all tokens are chosen


def _model(**kwargs):
    return draw_weights(timm.create_model("zoo_convit_t", num_classes=5, **{**SMALL, **kwargs})).eval()


@pytest.mark.parametrize("name", MIXERS)
@torch.no_grad()
def test_prefix_tokens_take_part_where_places_do_not_matter_and_pass_by_elsewhere(name):
    mixer = build_mixer({"type": name, **OPTIONS.get(name, {})}, 16, 2).eval()
    x = torch.randn(2, 3 + 20, 16)
    tokens = Tokens(x, (4, 5), 3)
    out = mix_tokens(mixer, tokens)
    assert out.shape == x.shape and mixer.takes_prefix_tokens == (name in TAKE | TAKE_BESIDE)
    changed = mix_tokens(mixer, tokens._replace(x=torch.cat([x[:, :3] + 1, x[:, 3:]], 1)))
    if mixer.takes_prefix_tokens:
        assert out[:, :3].abs().amax() > 0 and (changed[:, 3:] - out[:, 3:]).norm() > 1e-4
        order = torch.randperm(23) if name in TAKE else torch.tensor([2, 0, 1, *range(3, 23)])
        torch.testing.assert_close(mix_tokens(mixer, Tokens(x[:, order], (4, 5), 3)), out[:, order])
    else:
        assert not out[:, :3].any() and torch.equal(changed, out)
        torch.testing.assert_close(out[:, 3:].unflatten(1, (4, 5)), mixer(tokens.map()))


def test_full_attention_with_local_positions_sees_the_map_alone():
    assert not build_mixer({"type": "full", "lepe_kernel": 3}, 16).takes_prefix_tokens
    assert not build_mixer({"type": "spatial_reduction", "reduction": 2}, 16).takes_prefix_tokens
    assert not build_mixer({"type": "injective_linear", "window_size": 2}, 16).takes_prefix_tokens


def test_a_class_token_that_nothing_takes_in_is_said_and_not_read(caplog):
    with caplog.at_level(logging.WARNING, "visionzoo"):
        model = _model(mixers="window")
    assert "1 prefix tokens pass by WindowMixer unchanged" in caplog.text and model.head.pool_type == "avg"
    with pytest.raises(ValueError, match=r"ConViT: the class token would never see the image.*global_pool='avg'"):
        _model(mixers="pool", global_pool="token")
    assert _model(mixers=(*["window"] * (SMALL["depth"] - 1), None)).head.pool_type == "token"


def test_a_mixer_of_tokens_only_says_why_it_does_not_fit_a_pyramid(monkeypatch):
    class Reading(MIXERS["full"]):
        needs_prefix_tokens = True

    monkeypatch.setitem(MIXERS, "reading", Reading)
    assert _model(mixers="reading").head.pool_type == "token"
    with pytest.raises(ValueError, match=r"mixer 'reading' works on tokens beside a map.*isotropic family"):
        timm.create_model("zoo_swin_t", mixers="reading")


@torch.no_grad()
def test_classes_come_from_the_token_and_registers_change_them():
    image = torch.randn(2, 3, 48, 40)
    model = _model(reg_tokens=2)
    tokens, maps = model.forward_intermediates(image, return_prefix_tokens=True)
    assert tokens.shape == (2, 3 + 9, 16) and model.num_prefix_tokens == 3
    assert [m.shape if isinstance(m, torch.Tensor) else m[1].shape for m in maps][-1] == (2, 3, 16)
    assert torch.equal(model.forward_head(tokens), model.head.fc(tokens[:, 0]))
    assert model.no_weight_decay() == {"positions.table", "prefix.cls_token", "prefix.reg_token"}
    before = model(image)
    model.prefix.reg_token.add_(torch.randn(1, 2, 16))
    assert (model(image) - before).norm() > 1e-4
    model.reset_classifier(7, "avg")
    tokens = model.forward_features(image)
    assert torch.equal(model(image), model.head.fc(tokens[:, 3:].mean(1)))
    without = _model(class_token=False)
    assert without.head.pool_type == "avg" and without.forward_features(image).shape == (2, 9, 16)


@torch.no_grad()
def test_positions_are_interpolated_and_fitted_to_any_size():
    source, target = _model(img_size=64), _model(img_size=(96, 64))
    report = visionzoo.load_weights(target, source.state_dict())
    assert report.adapted == ["positions.table (1, 16, 16) resized to (1, 24, 16)"]
    image = torch.randn(1, 3, 96, 64)
    torch.testing.assert_close(target(image), source(image))  # resized once, or whenever needed
    source.set_input_size((96, 64))
    assert source.positions.table.shape == (1, 24, 16)
    torch.testing.assert_close(target(image), source(image))
    assert source(torch.randn(1, 3, 33, 70)).shape == (1, 5)


def test_positions_of_prefix_tokens_are_kept_added_or_left_out():
    table = torch.randn(1, 1 + 9, 8)
    own = TokenPositions(8, (3, 3), prefix=1)
    assert torch.equal(own.fit_weight("table", table), table)
    assert torch.equal(TokenPositions(8, (3, 3)).fit_weight("table", table), table[:, 1:])
    padded = TokenPositions(8, (3, 3), prefix=1).fit_weight("table", table[:, 1:])
    assert not padded[:, 0].any() and torch.equal(padded[:, 1:], table[:, 1:])
    with pytest.raises(ValueError, match=r"table: expected positions \[1, P \+ N, C\] of a square map with 1 prefix"):
        own.fit_weight("table", torch.randn(1, 15, 8))
    with pytest.raises(ValueError, match=r"size must be positive, got size=\(0, 3\)"):
        TokenPositions(8, (0, 3))
    with pytest.raises(ValueError, match="reg_tokens must not be negative, got reg_tokens=-1"):
        PrefixTokens(8, reg_tokens=-1)


@torch.no_grad()
def test_a_distilled_head_reads_two_tokens():
    head = TokenHead(8, 5, prefix_tokens=2, distilled=True)
    nn.init.normal_(head.fc.weight)
    nn.init.normal_(head.fc_dist.weight)
    x = torch.randn(3, 2 + 4, 8)
    a, b = head.fc(x[:, 0]), head.fc_dist(x[:, 1])
    assert torch.equal(head(x), (a + b) / 2) and torch.equal(head(x, pre_logits=True), (x[:, 0] + x[:, 1]) / 2)
    head.distilled_training = True
    assert all(torch.equal(own, expected) for own, expected in zip(head.train()(x), (a, b), strict=True))
    with pytest.raises(ValueError, match="distilled head reads its two tokens, got global_pool='avg'"):
        head.reset(5, "avg")
    with pytest.raises(ValueError, match="needs a class token, and the model has none; pass 'avg'"):
        TokenHead(8, 5, "token", prefix_tokens=0)


def test_gradients_are_the_same_with_checkpointing():
    model, image = _model().train(), torch.randn(2, 3, 48, 48)
    grads = []
    for enable in (False, True):
        model.set_grad_checkpointing(enable)
        model.zero_grad()
        model(image).square().sum().backward()
        grads.append(torch.cat([p.grad.flatten() for p in model.parameters()]))
    torch.testing.assert_close(*grads)


def test_a_model_of_few_blocks_gives_the_features_that_it_has():
    model = timm.create_model("zoo_taylorshift_na", features_only=True, device="meta")
    assert len(model(torch.empty(1, 3, 64, 64, device="meta"))) == len(model.feature_info.channels()) == 2
    with pytest.raises(ValueError, match=r"feature indices must be from -2 to 1 \(2 blocks\)"):
        timm.create_model("zoo_taylorshift_na", features_only=True, out_indices=4, device="meta")
