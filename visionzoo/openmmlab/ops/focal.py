"""Focal losses (arXiv:1708.02002) of logits [N, C] against class indices [N]."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor
from torchvision.ops import sigmoid_focal_loss

from visionzoo.openmmlab.ops.call import compute_dtype, gradients


def sigmoid_focal_loss_forward(
    input: Tensor, target: Tensor, weight: Tensor, output: Tensor, *, gamma: float, alpha: float
) -> None:
    """Fill `output` [N, C] with the losses of all classes.

    Args:
        input: logits [N, C].
        target: class indices [N]; C, one past the last, is background.
        weight: of the classes [C], by the target's; empty for none. Background counts with weight 1.
        output: [N, C].
        gamma: exponent of the modulating factor.
        alpha: weight of the target class; the others have 1 - alpha.
    """
    output.copy_(_sigmoid(input.to(compute_dtype(input)), target, weight, gamma, alpha))


def sigmoid_focal_loss_backward(
    input: Tensor, target: Tensor, weight: Tensor, grad_input: Tensor, *, gamma: float, alpha: float
) -> None:
    """Fill `grad_input` [N, C] with the derivative of each loss by its logit."""
    (grad,) = gradients(lambda x: _sigmoid(x, target, weight, gamma, alpha), [input], torch.ones_like(input))
    grad_input.copy_(grad)


def _sigmoid(logits: Tensor, target: Tensor, weight: Tensor, gamma: float, alpha: float) -> Tensor:
    one_hot = F.one_hot(target, logits.shape[1] + 1)[:, :-1].to(logits.dtype)
    losses = sigmoid_focal_loss(logits, one_hot, alpha, gamma)
    if weight.numel():
        losses = losses * F.pad(weight.to(logits.dtype), (0, 1), value=1.0)[target, None]
    return losses


def softmax_focal_loss_forward(
    softmax: Tensor, target: Tensor, weight: Tensor, output: Tensor, *, gamma: float, alpha: float
) -> None:
    """Fill `output` [N] with the losses from probabilities [N, C]; targets below 0 are ignored."""
    valid, label, probability = _of_target(softmax, target)
    loss = -alpha * (1 - probability) ** gamma * probability.log()
    output.copy_(torch.where(valid, loss * _class_weight(weight, label), 0.0))


def softmax_focal_loss_backward(
    softmax: Tensor, target: Tensor, weight: Tensor, buff: Tensor, grad_input: Tensor, *, gamma: float, alpha: float
) -> None:
    """Fill `grad_input` [N, C] with the derivatives by the logits; `buff` [N] with dloss/dlog(probability)."""
    valid, label, p = _of_target(softmax, target)
    slope = alpha * (gamma * (1 - p) ** (gamma - 1) * p * p.log() - (1 - p) ** gamma)
    buff.copy_(torch.where(valid, slope * _class_weight(weight, label), 0.0))
    one_hot = F.one_hot(label, softmax.shape[1])
    grad_input.copy_(buff[:, None] * (one_hot - softmax))


def _of_target(softmax: Tensor, target: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Which targets count, their indices, and their probabilities in float32 at least."""
    label = target.clamp(min=0)
    probability = softmax.to(compute_dtype(softmax)).gather(1, label[:, None])[:, 0]
    return target >= 0, label, probability.clamp(min=torch.finfo(torch.float32).tiny)


def _class_weight(weight: Tensor, label: Tensor) -> Tensor | float:
    return weight[label] if weight.numel() else 1.0
