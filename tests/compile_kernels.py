"""Compile Triton kernels for GPUs that are not here: python tests/compile_kernels.py [operation ...].

Runs the operations on CPU tensors with a driver that compiles every launch and runs none, for each compute capability
of `CAPABILITIES`, and prints what the assembler says of each kernel: registers, spills, shared memory.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from itertools import product
from pathlib import Path

CAPABILITIES = (80, 90)


def routed_attention() -> Iterator[Callable[[], object]]:
    """Yield calls that launch every kernel of the operation."""
    import torch

    from visionzoo.kernels.routed_attention import triton as kernels

    for dtype, side, listed in product((torch.bfloat16, torch.float32), (14, 56), (0, 2)):
        q, k, v = torch.zeros(1, side, side, 3, 2, 32, dtype=dtype).unbind(3)
        n = (side // 7) ** 2
        index = torch.zeros(1, 49, listed, dtype=torch.int64) if listed else None
        extras = [(None, None, None, [])]
        if dtype == torch.bfloat16 and side == 56:
            bias = torch.zeros(2, n, n * (listed or 1))
            extras.append(
                (bias, torch.zeros(side, side, dtype=torch.int64), torch.zeros(1, 49, 2) if listed else None, [50, 50])
            )
        for bias, segments, weights, valid in extras:
            arguments = (q, k, v, index, bias, segments, weights, [7, 7], 0.1, valid)
            yield lambda a=arguments: kernels._attend(*a)
            grad, lse = torch.zeros(q.shape, dtype=dtype), torch.zeros(q.shape[:4])
            yield lambda a=arguments, g=grad, s=lse: kernels._attend_backward(
                g, g, s, *a, a[4] is not None, a[6] is not None
            )


def channel_attention() -> Iterator[Callable[[], object]]:
    """Yield calls that launch every kernel of the operation."""
    import torch

    from visionzoo.kernels.channel_attention import triton as kernels

    for dtype, head_dim in product((torch.bfloat16, torch.float32), (32, 64, 128)):
        q, k, v = torch.zeros(2, 28, 28, 3, 2, head_dim, dtype=dtype).unbind(3)
        yield lambda a=(q, k, v): kernels.forward(*a, scale=1.0)


def depthwise_conv() -> Iterator[Callable[[], object]]:
    """Yield calls that launch every kernel of the operation."""
    import torch

    from visionzoo.kernels.depthwise_conv import triton as kernels

    for dtype, kernel, regions in product((torch.bfloat16, torch.float32), (3, 5, 7), ([], [8, 8])):
        x = torch.zeros(1, 56, 56, 64, dtype=dtype)
        weight, bias = torch.zeros(64, 1, kernel, kernel, dtype=dtype), torch.zeros(64, dtype=dtype)
        yield lambda a=(x, weight, bias, x, False, regions, dtype): kernels._convolve(*a)
        yield lambda a=(x, x, weight, False, regions, True, True): kernels._convolve_backward(*a)


def halo_attention() -> Iterator[Callable[[], object]]:
    """Yield calls that launch every kernel of the operation."""
    import torch

    from visionzoo.kernels.halo_attention import triton as kernels

    cases = ((16, 16, 8, 3, 1, False), (64, 64, 8, 3, 2, True), (32, 80, 14, 2, 1, False))
    for dtype, (d, values, block, halo, stride, mask) in product((torch.bfloat16, torch.float32), cases):
        q = torch.zeros(1, 32 // stride, 32 // stride, 8, d, dtype=dtype)
        k, v = torch.zeros(1, 32, 32, 8, d + values, dtype=dtype).split((d, values), -1)
        tables = [torch.zeros(2 * (block + 2 * halo) - 1, d, dtype=dtype) for _ in range(2)]
        arguments = (q, k, v, *tables, block, halo, stride, 0.25, mask)
        yield lambda a=arguments: kernels._attend(*a)
        out, lse = v.new_empty(*q.shape[:4], values), torch.zeros(q.shape[:4])
        yield lambda a=arguments, o=out, s=lse: kernels._attend_backward(o, o, s, *a)


def linear_attention() -> Iterator[Callable[[], object]]:
    """Yield calls that launch every kernel of the operation."""
    import torch

    from visionzoo.kernels.linear_attention import triton as kernels

    float32, others = [torch.float32], [torch.bfloat16, torch.float16]
    for dtype, (heads, dim, values), feature_map in [
        *product(others[:1] + float32, [(2, 32, 32)], ["relu", "elu", "softmax", "focused"]),
        *product(others, [(4, 16, 16), (2, 32, 32), (1, 64, 64), (1, 128, 128)], ["focused"]),
        *product(others[:1] + float32, [(2, 32, 64), (1, 64, 128), (2, 128, 32)], ["softmax", "identity"]),
    ]:
        q, k, v = torch.zeros(8, 56, 56, heads, 2 * dim + values, dtype=dtype).split([dim, dim, values], -1)
        if feature_map == "identity":
            q, k = q.float(), k.float()
        sharpness = torch.ones(heads, dim) if feature_map == "focused" else None
        arguments = (q, k, v, sharpness, feature_map, 3.0, 1e-6)
        weights = feature_map in ("softmax", "identity")
        yield lambda a=arguments, w=weights: kernels._attend(*a, w)
        grad = torch.zeros(v.shape, dtype=dtype)
        grad_weights = torch.zeros(v.shape[:4]) if weights else None
        state = torch.zeros(8, heads, kernels._state_size(dim, values, feature_map))
        yield lambda a=arguments, g=(grad, grad_weights), s=state: kernels._attend_backward(*g, s, *a)


def route_regions() -> Iterator[Callable[[], object]]:
    """Yield calls that launch every kernel of the operation."""
    import torch

    from visionzoo.kernels.region_routing import triton as kernels

    for dtype, (side, regions, heads) in product(
        (torch.bfloat16, torch.float32), ((56, 7, 2), (14, 7, 8), (112, 14, 2), (64, 32, 4))
    ):
        q, k = torch.zeros(1, side, side, 2, heads, 32, dtype=dtype).unbind(3)
        for valid in ([], [side - 1, side]):
            yield lambda a=(q, k, [regions, regions], 4, 0.1, valid): kernels._route(*a)


def neighborhood_attention() -> Iterator[Callable[[], object]]:
    """Yield calls that launch every kernel of the operation."""
    import torch

    from visionzoo.kernels.neighborhood_attention import triton as kernels

    for dtype, head_dim, (kernel, stride) in product(
        (torch.bfloat16, torch.float32), (32, 64), ((7, 1), (13, 1), (7, 2), (7, 7), (13, 4))
    ):
        q, k, v = torch.zeros(2, 28, 28, 3, 2, head_dim, dtype=dtype).unbind(3)
        for bias in (None, torch.zeros(2, 2 * kernel - 1, 2 * kernel - 1)):
            arguments = (q, k, v, bias, [kernel, kernel], [1, 1], [stride, stride], 0.1)
            yield lambda a=arguments: kernels._attend(*a)
            grad, lse = torch.zeros(q.shape, dtype=dtype), torch.zeros(q.shape[:4])
            yield lambda a=arguments, g=grad, s=lse: kernels._attend_backward(g, g, s, *a, a[3] is not None)


def score_attention() -> Iterator[Callable[[], object]]:
    """Yield calls that launch every kernel of the operation."""
    import torch

    from visionzoo.kernels.score_attention import triton as kernels
    from visionzoo.kernels.score_attention.reference import NORMALIZERS

    kinds = [(torch.bfloat16, 64, NORMALIZERS), (torch.bfloat16, 128, ["sigmoid", "softplus"])]
    kinds += [(torch.float16, 64, ["relu"]), (torch.float32, 64, ["sigmoid", "signed_softmax"])]
    for dtype, head_dim, names in kinds:
        q, k, v = torch.zeros(2, 28, 28, 3, 2, head_dim, dtype=dtype).unbind(3)
        for name in names:
            yield lambda a=(q, k, v, name, 0.1, dtype): kernels._attend(*a)
            grad = torch.zeros(q.shape, dtype=dtype)
            sums = None if name in kernels._WITHOUT_SUM else torch.zeros(q.shape[:4])
            yield lambda a=(grad, None if sums is None else grad, sums, q, k, v, name, 0.1): kernels._attend_backward(
                *a
            )


def group_norm() -> Iterator[Callable[[], object]]:
    """Yield calls that launch every kernel of the operation."""
    import torch

    from visionzoo.kernels.group_norm import triton as kernels

    for dtype, channels in product((torch.bfloat16, torch.float32), (64, 320, 1024)):
        x, weight, sums = torch.zeros(2, 7, 8, channels, dtype=dtype), torch.zeros(channels), torch.zeros(2, 64, 2)
        yield lambda a=(x, weight, weight, 1e-5, dtype): kernels._normalize(*a)
        yield lambda a=(x, x, weight, sums, 1e-5): kernels._normalize_backward(*a)


def layer_norm() -> Iterator[Callable[[], object]]:
    """Yield calls that launch every kernel of the operation."""
    import torch

    from visionzoo.kernels.layer_norm import triton as kernels

    for dtype, width in product((torch.bfloat16, torch.float32), (64, 96, 512, 1024)):
        x, weight = torch.zeros(64, width, dtype=dtype), torch.zeros(width)
        yield lambda a=(x, weight, weight, 1e-5, dtype): kernels._normalize(*a)
        yield lambda a=(x, x, weight, 1e-5): kernels._normalize_backward(*a)


def residual_norm() -> Iterator[Callable[[], object]]:
    """Yield calls that launch every kernel of the operation."""
    import torch

    from visionzoo.kernels.residual_norm import triton as kernels

    for dtype, width in product((torch.bfloat16, torch.float32), (64, 96, 512, 1024)):
        x, weight, factor = torch.zeros(2, 32, width, dtype=dtype), torch.zeros(width), torch.zeros(2, dtype=dtype)
        for scale, kept in ((None, None), (None, factor), (weight, factor)):
            arguments = (weight, scale, kept, 1e-5, dtype, dtype)
            yield lambda a=arguments, x=x: kernels._add_and_normalize(x, x, a[0], *a)
            branch = None if scale is None else x
            yield lambda a=arguments, x=x, b=branch: kernels._add_and_normalize_backward(x, x, x, b, *a)


OPERATIONS = {
    f.__name__: f
    for f in (
        channel_attention,
        depthwise_conv,
        group_norm,
        halo_attention,
        layer_norm,
        linear_attention,
        neighborhood_attention,
        residual_norm,
        route_regions,
        routed_attention,
        score_attention,
    )
}


def main(names: list[str]) -> None:
    """Compile the operations `names`, or all."""
    os.environ.pop("TRITON_INTERPRET", None)  # before anything imports triton: interpreted kernels are not compiled
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.runtime.jit import JITFunction

    seen = set()
    for capability in CAPABILITIES:
        triton.runtime.driver.set_active(_Driver(GPUTarget("cuda", capability, 32)))

        def launch(kernel, grid, capability=capability):
            def run(*args, **kwargs):
                compiled = kernel.warmup(*args, grid=grid, **kwargs)
                key = (capability, compiled.hash)
                if key not in seen:
                    seen.add(key)
                    blocks = [f"{k}={v}" for k, v in kwargs.items() if isinstance(v, int) and not k.startswith("num")]
                    print(f"sm_{capability} {kernel.__name__} {_resources(compiled)} {' '.join(blocks)}", flush=True)

            return run

        JITFunction.__getitem__ = launch
        for name in names or OPERATIONS:
            for call in OPERATIONS[name]():
                call()


class _Driver:
    """What `JITFunction.warmup` asks of a driver."""

    def __init__(self, target):
        self.target = target

    def get_current_target(self):
        return self.target

    def get_current_device(self):
        return self.target.arch  # a device of its own: kernels are cached for each, not for each target

    def get_current_stream(self, device):
        return 0

    def get_active_torch_device(self):
        import torch

        return torch.device("cpu")


def _resources(compiled) -> str:
    """Read the assembler's resource report on a compiled kernel, with the program that comes with Triton."""
    import triton

    program = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
    shared = f"shared {compiled.metadata.shared // 1024:3} KiB warps {compiled.metadata.num_warps}"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.asm["cubin"])
        file.flush()
        report = subprocess.run(
            [program, "--dump-resource-usage", file.name], capture_output=True, text=True, check=True
        )
    words = report.stdout.replace(":", " ").split()
    return f"registers {words[words.index('REG') + 1]:>3} stack {words[words.index('STACK') + 1]:>3} {shared}"


if __name__ == "__main__":
    main(sys.argv[1:])
