"""What torch's compiler makes of the Triton kernels on a GPU: the same numbers, for any size, compiled once."""

import importlib

import pytest
import torch
from kernels.calls import KINDS, SIZES, Call, Graphs, draw, operators

pytestmark = pytest.mark.gpu


@pytest.fixture(autouse=True)
def _triton(monkeypatch):
    monkeypatch.setenv("VISIONZOO_BACKEND", "triton")
    # torch 2.11 finds what it compiled under bfloat16 autocast in its cache for float16, where no cast tells them apart
    monkeypatch.setattr(torch._functorch.config, "enable_autograd_cache", False)
    torch._dynamo.reset()


def _results(function, call, size, dtype):
    x = draw(size, "cuda")
    with torch.autocast("cuda", dtype, enabled=dtype != torch.float32):
        out = function(x)
    assert out.dtype == dtype
    direction = torch.randn(out.shape, generator=torch.Generator().manual_seed(2)).to(out)
    return out.detach().clone(), *torch.autograd.grad(out, [x, *call.parameters()], direction)


def _assert_close(results, expected, dtype):
    """Inductor rounds where eager mode does not, and the other way round: relative errors of whole tensors."""
    limit = 8 * torch.finfo(dtype).eps if dtype != torch.float32 else 1e-5
    for own, other in zip(results, expected, strict=True):
        assert own.isfinite().all() and other.norm() > 0
        assert (own.float() - other.float()).norm() <= limit * other.float().norm()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("name", KINDS)
def test_compiled_calls_and_their_gradients_are_the_eager_ones(name, dtype):
    call = Call(KINDS[name], "cuda")
    compiled = torch.compile(call, fullgraph=True)
    _assert_close(_results(compiled, call, SIZES[2], dtype), _results(call, call, SIZES[2], dtype), dtype)


@pytest.mark.parametrize("name", KINDS)
def test_ten_sizes_take_at_most_three_compilations(name):
    call, graphs = Call(KINDS[name], "cuda"), Graphs("inductor")
    compiled = torch.compile(call, backend=graphs, fullgraph=True, dynamic=True)
    for size in SIZES:
        _assert_close(
            _results(compiled, call, size, torch.bfloat16), _results(call, call, size, torch.bfloat16), torch.bfloat16
        )
    assert 1 <= len(graphs.operators) <= 3
    assert all(found == KINDS[name].operators for found in graphs.operators)


@pytest.mark.parametrize("name", KINDS)
def test_a_new_size_compiles_no_kernel(name):
    """Kernels are compiled for few classes of sizes: these twenty maps are of one, large ones."""
    call = Call(KINDS[name], "cuda")
    sizes = [(1 + i % 5, 34 + 2 * i, 72 - 2 * i) for i in range(20)]
    counts = []
    for size in sizes:
        _results(call, call, size, torch.bfloat16)
        counts.append(sum(_compiled(operation) for operation in KINDS[name].operations))
    assert counts[0] > 0 and set(counts) == {counts[0]}, counts


def _compiled(operation):
    """How many versions of an operation's kernels this process has compiled."""
    from triton.runtime.jit import JITFunction

    folder = "region_routing" if operation == "route_regions" else operation
    kernels = vars(importlib.import_module(f"visionzoo.kernels.{folder}.triton")).values()
    return sum(len(cache[0]) for f in kernels if isinstance(f, JITFunction) for cache in f.device_caches.values())


@pytest.mark.parametrize("name", KINDS)
def test_cuda_graphs_replay_calls(name):
    """With new numbers in the place of the old: what a kernel reads is on the device."""
    call = Call(KINDS[name], "cuda")
    compiled = torch.compile(call, fullgraph=True, mode="reduce-overhead")
    with torch.no_grad():
        for factor in (1.0, 1.0, 1.0, 2.0):  # two calls to warm up, one to record, one to replay
            x = draw(SIZES[2], "cuda") * factor
            torch.compiler.cudagraph_mark_step_begin()
            out = compiled(x).clone()
        _assert_close([out], [call(x)], torch.float32)


@pytest.mark.parametrize("name", KINDS)
def test_exported_calls_run_after_saving_and_loading(name, tmp_path):
    call, x = Call(KINDS[name], "cuda"), draw(SIZES[2], "cuda").detach()
    torch.export.save(torch.export.export(call, (x,)), tmp_path / "call.pt2")
    loaded = torch.export.load(tmp_path / "call.pt2").module()
    assert operators(loaded) == KINDS[name].operators
    with torch.no_grad():
        _assert_close([loaded(x)], [call(x)], torch.float32)
