"""Operators over Triton kernels: traced by torch.compile and torch.export, differentiated, cheap to call eagerly."""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.autograd.function import once_differentiable
from torch.nn import Parameter
from torch.utils.flop_counter import FlopCounterMode, flop_registry, register_flop_formula

from visionzoo._torch_private import (
    count_dispatch_modes,
    dispatch_modes,
    forward_mode_level,
    transforms_are_active,
)


def operator(
    name: str,
    *,
    fake: Callable[..., Any],
    save: Callable[..., None] | None = None,
    differentiate: Callable[..., Any] | None = None,
    flops: Callable[..., int] | None = None,
) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Make an operator `visionzoo::name` of a function that launches kernels, for use as a decorator.

    The function takes a tensor, then tensors, None, numbers and lists of numbers, all positional, and is annotated as
    `torch.library.custom_op` wants it. Tracers, dispatch modes and transforms see a custom op. An eager call on plain
    tensors skips it: looking up the dispatcher's Python kernels takes several times as long as a small launch.

    Args:
        name: of the operator.
        fake: returns outputs of the right shape and dtype without computing them.
        save: `setup_context` of the backward pass; None for an operator without gradient.
        differentiate: backward, called with the context and the gradients of the outputs.
        flops: formula of `visionzoo.kernels.flops`; None for none that count.
    """

    def decorate(launch: Callable[..., Any]) -> Callable[..., Any]:
        @wraps(launch)  # custom_op reads the annotations
        def function(*inputs: Any) -> Any:
            device = inputs[0].device
            if device.type != "cuda" or device.index == torch.cuda.current_device():
                return launch(*inputs)
            with torch.cuda.device(device):  # Triton launches on the current device, wherever the tensors are
                return launch(*inputs)

        custom_op = torch.library.custom_op(f"visionzoo::{name}", function, mutates_args=())
        custom_op.register_fake(fake)
        if save is not None and differentiate is not None:
            custom_op.register_autograd(differentiate, setup_context=save)
        packet = getattr(torch.ops.visionzoo, name)
        if flops is not None:
            register_flop_formula(packet)(flops)
        eager = None if save is None or differentiate is None else _autograd_function(function, save, differentiate)

        def call(*inputs: Any) -> Any:
            if eager is not None and forward_mode_level() >= 0:
                _refuse_tangents(name, inputs)
            if torch.compiler.is_compiling() or transforms_are_active():
                return custom_op(*inputs)
            if count_dispatch_modes():
                _tell_counters(packet)
                return custom_op(*inputs)
            differentiated = False
            for x in inputs:
                kind = type(x)
                if kind is Tensor or kind is Parameter:
                    differentiated = differentiated or x.requires_grad
                elif isinstance(x, Tensor):
                    return custom_op(*inputs)
            if differentiated and eager is not None and torch.is_grad_enabled():
                return eager.apply(*inputs)
            return function(*inputs)

        call.custom_op, call.launch = custom_op, function  # type: ignore[attr-defined]
        return call

    return decorate


def _tell_counters(packet: Any) -> None:
    """Give an operator's formula to counters made before its file was imported: they copy what there is then."""
    if (formula := flop_registry.get(packet)) is not None:
        for mode in dispatch_modes():
            if isinstance(counter := getattr(mode, "counter", None), FlopCounterMode):
                counter.flop_registry.setdefault(packet, formula)


def _autograd_function(function: Any, save: Any, differentiate: Any) -> Any:
    class Eager(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, *inputs: Any) -> Any:  # a setup_context of its own would cost 30 µs a call
            output = function(*inputs)
            save(ctx, inputs, output)
            return output

        # once, for kernels leave no graph: a second derivative would be wrong silently
        backward = staticmethod(once_differentiable(differentiate))  # type: ignore[assignment]

    return Eager


def _refuse_tangents(name: str, inputs: tuple[Any, ...]) -> None:
    """Refuse forward-mode differentiation, through which custom ops would drop the derivative silently."""
    if any(isinstance(x, Tensor) and forward_ad.unpack_dual(x).tangent is not None for x in inputs):
        raise NotImplementedError(f"{name}: Triton kernels have no forward-mode derivative; use backend='reference'")
