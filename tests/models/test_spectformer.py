"""SpectFormer's second classifier, and filters that fit the image."""

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
