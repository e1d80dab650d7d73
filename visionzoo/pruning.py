"""Weights of small magnitude set to zero: one-shot pruning of any model, without retraining or for it."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import nn
from torch.nn.utils import prune

from visionzoo.text import did_you_mean

# What is pruned, by whose choice. Essential sparsity: The Emergence of Essential Sparsity in Large Pre-trained Models,
# arXiv:2306.03805, https://github.com/VITA-Group/essential_sparsity at 2f85c27 (no license), whose code is for BERT and
# OPT: the linear layers of the blocks. Sparse then Prune, arXiv:2307.11988, https://github.com/yogiprsty/Sparse-ViT at
# 63a3401 (no license): the patches' convolution, norms and linear layers of the blocks, and the classifier.
METHODS = ("essential_sparsity", "sparse_then_prune")


def prune_weights(model: nn.Module, share: float, *, method: str = "essential_sparsity", masks: bool = False) -> int:
    """Set the weights of the smallest magnitude to zero, of all layers that the method prunes together.

    Shapes and arithmetic stay: it is the weights that become sparse, not the computation.

    Args:
        model: a model of the zoo; changed in place.
        share: of the weights of these layers that become zero, in [0, 1).
        method: "essential_sparsity" for the linear layers and convolutions inside the blocks; "sparse_then_prune" for
            all layers with a weight, also norms, stem and classifier. Biases and tables are never pruned.
        masks: keep the masks of `torch.nn.utils.prune` in the model, so that zeros stay zeros in training;
            `remove_masks` ends it. Without, the weights are plain parameters again.

    Returns:
        How many weights are zero now by this.

    Raises:
        ValueError: if the share is out of range, the method is unknown, or the model has masks already.

    >>> model = nn.ModuleDict({"blocks": nn.Sequential(nn.Linear(2, 2, bias=False))})
    >>> prune_weights(model, 0.5)
    2
    """
    if not 0 <= share < 1:
        raise ValueError(
            f"prune_weights: share is that of the weights that become zero, from 0 to below 1, got {share=}"
        )
    if method not in METHODS:
        raise ValueError(f"prune_weights: unknown {method=}{did_you_mean(method, METHODS)}; expected one of {METHODS}")
    if prune.is_pruned(model):
        raise ValueError("prune_weights: the model has masks already; call remove_masks(model) first")
    layers: list[Any] = list(_layers(model, everywhere=method == "sparse_then_prune"))
    if not layers:
        raise ValueError(f"prune_weights: {type(model).__name__} has no layers that {method!r} prunes")
    prune.global_unstructured(
        [(layer, "weight") for layer in layers], pruning_method=prune.L1Unstructured, amount=float(share)
    )
    pruned = sum(int((layer.weight_mask == 0).sum()) for layer in layers)
    if not masks:
        remove_masks(model)
    return pruned


def remove_masks(model: nn.Module) -> None:
    """Make pruned weights plain parameters, with their zeros; without effect where there are no masks."""
    for module in model.modules():
        if isinstance(getattr(module, "weight_mask", None), torch.Tensor):
            prune.remove(module, "weight")


def _layers(model: nn.Module, *, everywhere: bool) -> Iterator[nn.Module]:
    kinds: tuple[type[nn.Module], ...] = (nn.Linear, nn.Conv2d)
    for name, module in model.named_modules():
        weight = getattr(module, "weight", None)
        if not isinstance(weight, nn.Parameter):
            continue
        inside = any(part in ("blocks", "stages") for part in name.split("."))
        if everywhere or (inside and isinstance(module, kinds)):
            yield module
