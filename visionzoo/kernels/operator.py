"""Operators over Triton kernels: traced by torch.compile and torch.export, differentiated, cheap to call eagerly."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor


def operator(
    name: str,
    *,
    fake: Callable[..., Any],
    save: Callable[..., None] | None = None,
    differentiate: Callable[..., Any] | None = None,
) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Make an operator `visionzoo::name` of a function that launches kernels, for use as a decorator.

    The function takes tensors, None, numbers and lists of numbers, all positional, and is annotated as
    `torch.library.custom_op` wants it. Tracers and dispatch modes see a custom op. An eager call on plain tensors
    skips it: looking up the dispatcher's Python kernels takes several times as long as the launch of a small kernel.

    Args:
        name: of the operator.
        fake: returns outputs of the right shape and dtype without computing them.
        save: `setup_context` of the backward pass; None for an operator without gradient.
        differentiate: backward, called with the context and the gradients of the outputs.
    """

    def decorate(function: Callable[..., Any]) -> Callable[..., Any]:
        custom_op = torch.library.custom_op(f"visionzoo::{name}", function, mutates_args=())
        custom_op.register_fake(fake)
        if save is not None and differentiate is not None:
            custom_op.register_autograd(differentiate, setup_context=save)
        eager = _autograd_function(function, save, differentiate)

        def call(*inputs: Any) -> Any:
            if torch.compiler.is_compiling() or torch._C._len_torch_dispatch_stack():
                return custom_op(*inputs)
            tensors = [x for x in inputs if isinstance(x, Tensor)]
            if any(type(x) not in (Tensor, torch.nn.Parameter) for x in tensors):
                return custom_op(*inputs)
            if differentiate is not None and torch.is_grad_enabled() and any(x.requires_grad for x in tensors):
                return eager.apply(*inputs)
            return function(*inputs)

        call.custom_op = custom_op  # type: ignore[attr-defined]
        return call

    return decorate


def _autograd_function(function: Any, save: Any, differentiate: Any) -> Any:
    class Eager(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, *inputs: Any) -> Any:  # a setup_context of its own would cost 30 µs a call
            output = function(*inputs)
            save(ctx, inputs, output)
            return output

        backward = staticmethod(differentiate)

    return Eager
