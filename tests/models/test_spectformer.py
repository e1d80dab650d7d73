"""SpectFormer's second classifier, filters that fit the image, and prefix tokens that filters leave out."""

import pytest
import timm
import torch
from quick import quick_model

import visionzoo
from visionzoo.models._registry import TINY

SMALL = TINY["zoo_spectformer_h_s"]


@torch.no_grad()
def test_the_classifier_of_tokens_adds_half_its_largest_logits():
    model = quick_model("zoo_spectformer_h_s", num_classes=5, **SMALL)
    plain = timm.create_model("zoo_spectformer_h_s", num_classes=5, token_label=False, **SMALL).eval()
    report = visionzoo.load_weights(plain, model.state_dict())
    assert sorted(report.dropped) == ["head.fc_aux.bias", "head.fc_aux.weight"]
    image = torch.randn(2, 3, 64, 64)
    seen = []
    model.head.fc_aux.register_forward_hook(lambda module, args, out: seen.append(out))
    difference = model(image) - plain(image)
    assert seen[0].shape == (2, 4, 5)
    torch.testing.assert_close(difference, 0.5 * seen[0].max(1).values)
    model.reset_classifier(3)
    assert model(image).shape == (2, 3) and model.head.fc_aux.out_features == 3


@torch.no_grad()
def test_weights_for_one_image_size_serve_at_another():
    model = quick_model("zoo_spectformer_h_s", **SMALL)
    larger = timm.create_model("zoo_spectformer_h_s", **(SMALL | {"img_size": (96, 80)})).eval()
    report = visionzoo.load_weights(larger, model.state_dict())
    assert "(16, 9, 8, 2) resized to (24, 11, 8, 2)" in report.adapted[0]
    image = torch.randn(1, 3, 96, 80)
    torch.testing.assert_close(larger(image), model(image), rtol=1e-4, atol=1e-5)
    with pytest.raises(ValueError, match="img_size must be positive, got img_size=0"):
        timm.create_model("zoo_spectformer_h_s", img_size=0)


@torch.no_grad()
def test_prefix_tokens_of_a_plain_one_join_after_the_filters():
    small, image = TINY["zoo_spectformer_xs"], torch.randn(2, 3, 64, 64)
    model = quick_model("zoo_spectformer_xs", class_token=True, reg_tokens=1, **small)
    maps = model.forward_intermediates(image, return_prefix_tokens=True, intermediates_only=True)
    assert [isinstance(entry, tuple) for entry in maps] == [False, False, True] and model.head.pool_type == "token"
    plain = timm.create_model("zoo_spectformer_xs", **small).eval()
    report = visionzoo.load_weights(plain, model.state_dict())
    assert sorted(report.dropped) == ["prefix.cls_token", "prefix.reg_token"]
    assert torch.equal(plain.forward_intermediates(image, intermediates_only=True)[1], maps[1])
    for options in ({"spectral_depth": 4}, {"spectral_depth": 3, "class_token": True}, {"spectral_depth": -1}):
        with pytest.raises(ValueError, match=rf"must be from 0 to depth=3.*got {next(iter(options.items()))[0]}="):
            timm.create_model("zoo_spectformer_xs", **(small | options))


@torch.no_grad()
def test_a_spectral_block_without_its_filter_is_its_mlp():
    model = quick_model("zoo_spectformer_xs", mixers=("none", None, None), **TINY["zoo_spectformer_xs"])
    tokens = model.begin(torch.randn(1, 3, 64, 64))
    block = model.blocks[0]
    torch.testing.assert_close(block(tokens).x, tokens.x + block.mlp(block.norm2(tokens.x)))
