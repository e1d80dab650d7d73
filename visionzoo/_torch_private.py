"""Every private name of torch that visionzoo uses, with what it is for; other files import it from here.

torch may rename or change these without notice. tests/test_torch_private.py checks that the installed torch has them,
that they do what is stated here (run with torch 2.7, 2.11 and 2.14), and that no other file uses a private name.
"""

from __future__ import annotations

from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import nn
from torch._inductor import aoti_compile_and_package, aoti_load_package, list_mode_options
from torch.autograd import forward_ad
from torch.nn.modules.batchnorm import _BatchNorm as BatchNorm
from torch.utils._python_dispatch import TorchDispatchMode, _get_current_dispatch_mode_stack
from torch.utils._pytree import tree_leaves

__all__ = [
    "BatchNorm",
    "TorchDispatchMode",
    "aoti_compile_and_package",
    "aoti_load_package",
    "count_dispatch_modes",
    "count_terms_once",
    "dispatch_modes",
    "find_cpp_compiler",
    "foreach_add_",
    "foreach_copy_",
    "foreach_mul_",
    "foreach_sub",
    "foreach_zero_",
    "forward_mode_level",
    "has_hooks",
    "is_exporting",
    "keep_memory_formats",
    "list_mode_options",
    "transforms_are_active",
    "tree_leaves",
    "without_special_ones",
]

# An eager call of a Triton kernel skips torch's dispatcher, whose Python part takes longer than a small launch, unless
# a transform (vmap, grad) or a dispatch mode (a FLOP counter, a fake tensor mode) must see the operator.
transforms_are_active = torch._C._are_functorch_transforms_active
count_dispatch_modes = torch._C._len_torch_dispatch_stack
dispatch_modes = _get_current_dispatch_mode_stack

# Arithmetic on lists of tensors in few kernels, which torch's own optimizers use: in place, but for `foreach_sub`.
foreach_zero_ = torch._foreach_zero_
foreach_add_ = torch._foreach_add_
foreach_mul_ = torch._foreach_mul_
foreach_copy_ = torch._foreach_copy_
foreach_sub = torch._foreach_sub


def forward_mode_level() -> int:
    """Return the level of forward-mode differentiation, -1 outside it; operators without it refuse tangents."""
    return forward_ad._current_level


def has_hooks(module: nn.Module) -> bool:
    """Whether someone looks at a module's calls, which computing its result elsewhere would skip."""
    everywhere = torch.nn.modules.module
    return bool(
        module._forward_hooks
        or module._forward_pre_hooks
        or module._backward_hooks
        or module._backward_pre_hooks
        or everywhere._global_forward_hooks
        or everywhere._global_forward_pre_hooks
        or everywhere._global_backward_hooks
        or everywhere._global_backward_pre_hooks
    )


def is_exporting() -> bool:
    """Whether torch.export (ONNX, AOTInductor) is tracing, but for `strict=True`, which torch 2.7 has by default.

    `torch.compiler.is_exporting()` would be the public name; the compiler of torch 2.11 takes it for true also where
    nothing is exported.
    """
    return torch.compiler._is_exporting_flag


def without_special_ones() -> AbstractContextManager[None]:
    """Let torch.export not ask whether a size is 1, which would bind a program to maps of more than one window."""
    from torch.fx.experimental import _config

    return _config.patch("backed_size_oblivious", True)  # type: ignore[attr-defined]


def find_cpp_compiler() -> str:
    """Return the C++ compiler that AOTInductor will call; the error where there is none differs between releases."""
    from torch._inductor.cpp_builder import get_cpp_compiler

    return get_cpp_compiler()


def keep_memory_formats() -> None:
    """Let Inductor leave memory formats as they are, for all that is compiled from now on.

    It would have others before convolutions, and is wrong about models whose maps are [B, H, W, C].
    """
    config: Any = torch._inductor.config
    config.layout_optimization = False


def count_terms_once() -> None:
    """Let compiled code count a term of the loss once where activations are computed again, from now on.

    Where a torch lacks the setting, there is nothing to set.
    """
    config: Any = torch._dynamo.config
    name = "skip_fwd_side_effects_in_bwd_under_checkpoint"
    if hasattr(config, name):
        setattr(config, name, True)
