"""Samples stop at the first exit that is sure: each gets what it gets by itself, and costs nothing after it stopped."""

import math

import pytest
import timm
import torch
from early_exit import NAME
from quick import quick_model
from torch.utils.flop_counter import FlopCounterMode

import visionzoo
from visionzoo.exits import END, EarlyExitModel, ExitModel, confidence, exit_costs, take_samples
from visionzoo.models._registry import TINY

HOSTS = [name for name in TINY if "dynperceiver" in name]
SHAPE = (3, 40, 56)


def _tiny(name=HOSTS[0], **kwargs):
    return quick_model(name, **{"num_classes": 4, **TINY.get(name, {}), **kwargs}).double()


def _images(count=5):
    return torch.randn(count, *SHAPE, dtype=torch.float64, generator=torch.Generator().manual_seed(0))


def _thresholds(model, images):
    """For each exit the middle between two of how sure it is of the images, so that samples stop at different ones."""
    thresholds = {}
    for name in model.exit_places():
        with torch.no_grad():
            sure = confidence(ExitModel(model, name)(images)).sort().values
        thresholds[name] = float(sure[len(sure) // 2 - 1 : len(sure) // 2 + 1].mean())
    return thresholds


def _count(call):
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        call()
    return counter.get_total_flops() / 2


@pytest.mark.parametrize("name", [HOSTS[0], NAME])
def test_a_batch_gives_what_each_sample_gives_alone_and_costs_what_they_cost(name):
    model, images = _tiny(name), _images()
    early = EarlyExitModel(model, _thresholds(model, images))
    logits, exits = early.answer(images)
    assert len(set(exits.tolist())) >= 2 and torch.equal(early(images), logits)
    costs, total = exit_costs(model, SHAPE), 0.0
    for i, image in enumerate(images):
        alone = early.answer(image[None])
        assert int(alone.exits) == int(exits[i])
        torch.testing.assert_close(alone.logits[0], logits[i], rtol=1e-11, atol=1e-11)
        total += costs.until(early.names[int(exits[i])])
    assert _count(lambda: early(images)) == total < len(images) * costs.until(END)


def test_exits_that_are_not_named_are_not_asked_and_all_or_none_may_stop():
    model, images = _tiny(), _images(3)
    costs = exit_costs(model, SHAPE)
    for thresholds, name in (({"latent": 0.0}, "latent"), ({}, END), ({"early": 1.0}, END)):
        early = EarlyExitModel(model, thresholds)
        logits, exits = early.answer(images)
        assert {early.names[i] for i in exits.tolist()} == {name}
        expected = model(images) if name == END else ExitModel(model, name)(images)
        torch.testing.assert_close(logits, expected, rtol=1e-11, atol=1e-11)
        assert _count(lambda early=early: early(images)) == 3 * costs.until(name, thresholds)


@pytest.mark.parametrize("name", HOSTS)
def test_an_exit_alone_is_what_training_sees_without_what_comes_after(name):
    model, images = _tiny(name), _images(2)
    costs = exit_costs(model, SHAPE)
    model.set_auxiliary()
    for module in model.modules():  # its own forward in training, with norms as in evaluation
        module.training = isinstance(module, type(model))
    with torch.no_grad():
        out = model(images)
    model.eval()
    assert [exit.name for exit in out.exits] == ["early", "latent", "cnn"]
    for exit in out.exits:
        alone = ExitModel(model, exit.name)
        torch.testing.assert_close(alone(images), exit.logits, rtol=1e-12, atol=1e-12)
        assert _count(lambda alone=alone: alone(images[:1])) == costs.until(exit.name, {})
    sizes = [sum(p.numel() for p in ExitModel(model, exit.name).parameters()) for exit in out.exits]
    assert sizes == sorted(sizes) and sizes[0] < sizes[2] == sum(p.numel() for p in model.parameters())


def test_the_loss_is_the_authors():
    """Classifiers weigh 0.5, 0.5, 1 and 1; half of KL(last ‖ earlier) at temperature 1, a mean over images."""
    model = _tiny()
    model.train().set_auxiliary()
    logits, exits, terms = model(_images(3))
    labels = torch.tensor([0, 3, 1])
    target = logits.softmax(-1)
    expected = torch.nn.functional.cross_entropy(logits, labels)
    for exit, weight in zip(exits, (0.5, 0.5, 1.0), strict=True):
        said = exit.logits.log_softmax(-1)
        expected = expected + weight * -said[range(3), labels].mean()
        expected = expected + 0.5 * (target * (target.log() - said)).sum(-1).mean()
    weights = model.auxiliary_weights()
    found = torch.nn.functional.cross_entropy(logits, labels) + weights["distillation"] * terms["distillation"]
    found = found + sum(weights[e.name] * torch.nn.functional.cross_entropy(e.logits, labels) for e in exits)
    torch.testing.assert_close(found, expected)
    (grad,) = torch.autograd.grad(terms["distillation"], model.head.merged.fc.weight, allow_unused=True)
    assert grad is None  # the last classifier teaches, and does not learn from it


def test_models_without_classes_or_later_parts_have_no_exits():
    for change in (lambda m: m.reset_classifier(0), lambda m: m.prune_intermediate_layers([1])):
        model = _tiny()
        assert model.exit_places() and model.auxiliary_weights()
        change(model)
        assert not model.exit_places() and not model.auxiliary_weights()
        with pytest.raises(ValueError, match="DynPerceiverResNet as built has no exits"):
            EarlyExitModel(model, {})


def test_features_depend_on_no_latents_that_nobody_asks_for():
    for i in range(4):
        model = _tiny().float()
        getter = timm.create_model(HOSTS[0], features_only=True, out_indices=(i,), **TINY[HOSTS[0]]).train()
        report = visionzoo.load_weights(getter, model.state_dict())
        assert not report.missing and not report.unexpected
        getter(_images(2).float())[0].square().mean().backward()
        assert all(parameter.grad is not None for parameter in getter.parameters())


@pytest.mark.parametrize(
    ("thresholds", "message"),
    [
        ({"erly": 0.5}, r"no exit 'erly' \(did you mean 'early'\?\); it has early, latent, cnn"),
        ({"end": 0.5}, "no exit 'end'"),
        *(
            ({"early": value}, "'early' must be a probability from 0 to 1")
            for value in (1.01, -0.1, math.nan, "0.5", True)
        ),
    ],
)
def test_wrong_thresholds_are_named(thresholds, message):
    with pytest.raises(ValueError, match=message):
        EarlyExitModel(_tiny(), thresholds)


def test_what_has_no_exits_or_is_no_batch_is_named():
    plain = timm.create_model("zoo_poolformer_s12", **TINY["zoo_poolformer_s12"])
    for build in (
        lambda: EarlyExitModel(plain, {}),
        lambda: ExitModel(plain, "early"),
        lambda: exit_costs(plain, SHAPE),
    ):
        with pytest.raises(ValueError, match="PoolFormer as built has no exits: models such as zoo_dynperceiver"):
            build()
    with pytest.raises(ValueError, match=r"expected tensors of 3 samples, got \(4, 2\)"):
        take_samples((torch.zeros(3), torch.zeros(4, 2)), torch.tensor([0]), 3)
    with pytest.raises(RuntimeError, match="stop early in evaluation only"):
        EarlyExitModel(_tiny(), {}).train()


def test_weights_of_other_classes_leave_what_depends_on_their_number():
    source, model = _tiny(), _tiny(num_classes=7)
    before = model.head.early_shortcut.fc.weight.clone()
    with pytest.raises(ValueError, match="has 4 classes, the model 7"):
        visionzoo.load_weights(model, source.state_dict())
    report = visionzoo.load_weights(model, source.state_dict(), strict=False)
    assert torch.equal(model.head.early_shortcut.fc.weight, before) and not report.missing
    assert torch.equal(model.latents.latent, source.latents.latent)
