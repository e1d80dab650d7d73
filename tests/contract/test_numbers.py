"""What every model computes is consistent with itself: one build a model, real numbers, small images."""

import copy
import itertools

import pytest
import torch
from quick import MODELS, quick_model
from timm.models import get_notrace_functions, get_notrace_modules
from torchvision.models.feature_extraction import NodePathTracer


@pytest.fixture(scope="module", params=MODELS)
def model(request):
    return quick_model(request.param, num_classes=5)


@pytest.fixture
def image():
    return torch.randn(3, 3, 72, 56, generator=torch.Generator().manual_seed(1))


def _close(out, expected, rtol=1e-4):
    assert torch.isfinite(expected).all()
    assert (out - expected).norm() <= rtol * expected.norm()


@torch.no_grad()
def test_parts_make_the_whole(model, image):
    logits = model(image)
    features = model.forward_features(image)
    last, taps = model.forward_intermediates(image)
    assert torch.equal(model.forward_head(features), logits)
    assert torch.equal(last, features)
    only = model.forward_intermediates(image, intermediates_only=True, stop_early=True, indices=[0, -1])
    assert torch.equal(only[0], taps[0]) and torch.equal(only[1], taps[-1])
    nhwc = model.forward_intermediates(image, intermediates_only=True, indices=1, output_fmt="NHWC")[0]
    assert torch.equal(nhwc.permute(0, 3, 1, 2), taps[-1])
    normed = model.forward_intermediates(image, intermediates_only=True, indices=1, norm=True)[0]
    assert torch.equal(normed, features)


@torch.no_grad()
def test_any_subset_of_features_comes_alone(model, image):
    image = image[:1, :, :32, :32]
    taps = model.forward_intermediates(image, intermediates_only=True)
    for length in range(1, len(taps) + 1):
        for indices in itertools.combinations(range(len(taps)), length):
            maps = model.forward_intermediates(image, indices=indices, stop_early=True, intermediates_only=True)
            assert len(maps) == length and all(torch.equal(m, taps[i]) for m, i in zip(maps, indices, strict=True))


@torch.no_grad()
def test_a_sample_does_not_depend_on_its_batch(model, image):
    _close(model(image[1:2]), model(image)[1:2])


@torch.no_grad()
def test_output_depends_on_the_image_and_its_layout_in_memory_does_not_matter(model, image):
    logits = model(image)
    assert (logits[0] - logits[1]).norm() > 1e-3 * logits[0].norm()
    _close(model(image.contiguous(memory_format=torch.channels_last)), logits)


def test_all_parameters_learn_and_checkpointing_changes_no_gradient(model, image):
    model.train()
    try:
        gradients = []
        for checkpointing in (False, True):
            for module in model.modules():  # the same statistics go in for both runs
                if isinstance(module, torch.nn.modules.batchnorm._BatchNorm):
                    module.reset_running_stats()
            model.zero_grad(set_to_none=True)
            model.set_grad_checkpointing(checkpointing)
            model(image[:2]).square().mean().backward()
            dead = [name for name, p in model.named_parameters() if p.requires_grad and p.grad is None]
            assert not dead
            total = torch.stack([p.grad.double().norm() for p in model.parameters()])
            assert torch.isfinite(total).all() and total.norm() > 0
            gradients.append(total)
        _close(gradients[1], gradients[0], 1e-5)
    finally:
        model.zero_grad(set_to_none=True)
        model.set_grad_checkpointing(False)
        model.eval()


@torch.no_grad()
def test_fx_graph_computes_the_same(model, image):
    tracer = NodePathTracer(leaf_modules=get_notrace_modules(), autowrap_functions=get_notrace_functions())
    graph = tracer.trace(model)
    traced = torch.fx.GraphModule(tracer.root, graph)
    assert torch.equal(traced(image), model(image))


@torch.no_grad()
def test_pruned_model_gives_the_same_features_and_can_be_used(model, image):
    taps = model.forward_intermediates(image, intermediates_only=True)
    if sum(p.numel() for p in model.parameters()) < 3e8:  # a copy of the largest would not fit beside it
        pruned = copy.deepcopy(model)
        assert pruned.prune_intermediate_layers([1], prune_norm=True) == [1]
        assert torch.equal(pruned.forward_intermediates(image, indices=[1], intermediates_only=True)[0], taps[1])
        assert torch.equal(pruned.forward_features(image), taps[1])
        assert len(list(pruned.parameters())) < len(list(model.parameters()))
    else:
        stopped = model.forward_intermediates(image, indices=[1], stop_early=True, intermediates_only=True)[0]
        assert torch.equal(stopped, taps[1])
