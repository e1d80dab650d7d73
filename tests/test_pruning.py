"""Weights of small magnitude become zero, where the method prunes and nowhere else."""

import pytest
import timm
import torch

from visionzoo.pruning import METHODS, prune_weights, remove_masks


def _model():
    torch.manual_seed(0)
    return timm.create_model("zoo_deit_t", depth=2, embed_dim=24, num_heads=2, num_classes=5)


def _zeros(model):
    return {name for name, value in model.named_parameters() if value.ndim > 1 and (value == 0).any()}


@pytest.mark.parametrize("method", METHODS)
def test_the_smallest_weights_of_all_pruned_layers_become_zero(method):
    model, before = _model(), dict(_model().named_parameters())
    layers = [
        name
        for name in before
        if name.endswith("weight") and (method == "sparse_then_prune" or ("blocks." in name and "norm" not in name))
    ]
    magnitudes = torch.cat([before[name].abs().flatten() for name in layers])
    count = prune_weights(model, 0.4, method=method)
    assert count == round(0.4 * len(magnitudes))
    threshold = magnitudes.kthvalue(count).values
    for name, value in model.named_parameters():
        kept = before[name].abs() > threshold if name in layers else torch.ones_like(value, dtype=torch.bool)
        assert torch.equal(value, before[name] * kept), name
    assert {*model.state_dict()} == {*_model().state_dict()}


def test_zeros_stay_zeros_in_training_until_the_masks_are_removed():
    model = _model()
    prune_weights(model, 0.5, masks=True)
    with pytest.raises(ValueError, match="has masks already; call remove_masks"):
        prune_weights(model, 0.5)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    model(torch.randn(2, 3, 32, 32)).square().sum().backward()
    optimizer.step()
    remove_masks(model)
    weight = model.blocks[0].mixer.qkv.weight
    assert isinstance(weight, torch.nn.Parameter) and 0.3 < (weight == 0).float().mean() < 0.7
    assert {*model.state_dict()} == {*_model().state_dict()}


@pytest.mark.parametrize(
    ("share", "method", "message"),
    [
        (1.0, "essential_sparsity", r"from 0 to below 1, got share=1.0"),
        (-0.1, "essential_sparsity", r"from 0 to below 1, got share=-0.1"),
        (0.5, "sparse_then_prun", r"unknown method='sparse_then_prun' \(did you mean 'sparse_then_prune'"),
    ],
)
def test_wrong_shares_and_methods_are_named(share, method, message):
    with pytest.raises(ValueError, match=message):
        prune_weights(_model(), share, method=method)
    with pytest.raises(ValueError, match="has no layers that 'essential_sparsity' prunes"):
        prune_weights(torch.nn.Linear(2, 2), 0.5)
