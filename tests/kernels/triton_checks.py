"""What every operation's Triton kernels must do; the tests of an operation call these with their own cases.

On a GPU the kernels run compiled, elsewhere in Triton's interpreter, which has no bfloat16 matrix product.
"""

from __future__ import annotations

from contextlib import nullcontext

import torch

from visionzoo.testing import compare_with_float64, controls, matrix_units, poisoned_memory, run

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
DTYPES = [torch.float32, torch.float16] + ([torch.bfloat16] if DEVICE == "cuda" else [])


def check_against_float64(operation, tensors, *, alike=(), units=True, **options):
    """Outputs and gradients are as near to float64 as plain torch's, and the comparison refuses wrong ones.

    `tensors` hold float64 numbers that the dtype can represent; each result names what it belongs to. `alike` are the
    wrong results that differ from right ones by less than they are rounded to, by the nature of the data. Without
    `units` plain torch's products take their factors unrounded, which is the harder comparison.
    """
    for dtype in DTYPES:
        low = {name: _cast(t, dtype) for name, t in tensors.items()}
        same = {name: _cast(t, torch.float64) for name, t in low.items()}  # the numbers that the kernel sees
        exact = run(operation, same, backend="reference", **options)
        with matrix_units(dtype) if units else nullcontext():
            plain = run(operation, low, backend="reference", **options)
        with poisoned_memory():
            fused = run(operation, low, backend="triton", **options)
        failed = [c for c in compare_with_float64(fused, plain, exact) if not c.passed]
        assert not failed, (dtype, failed)
        for name, wrong in controls(fused).items():
            assert name in alike or not all(c.passed for c in compare_with_float64(wrong, plain, exact)), (
                f"{name} was not refused"
            )


def check_repeats(operation, tensors, dtype=torch.float16, **options):
    """Two runs give the same bits."""
    low = {name: _cast(t, dtype) for name, t in tensors.items()}
    first, second = (run(operation, low, backend="triton", **options) for _ in range(2))
    assert all(torch.equal(first[name], second[name]) for name in first)


def _cast(t, dtype):
    if t is None or not t.is_floating_point():
        return t if t is None else t.to(DEVICE)
    return t.detach().to(DEVICE, dtype).requires_grad_(t.requires_grad)
