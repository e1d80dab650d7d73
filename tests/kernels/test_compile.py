"""Calls of the Triton kernels trace, compile, export and run under autocast, on any machine.

Here kernels run interpreted where there is no GPU, or not at all, where tensors are fake. What torch's own compiler
makes of them is tested on a GPU: test_compile_gpu.py.
"""

import pytest
import torch
from kernels.calls import KINDS, SIZES, Call, Graphs, draw, operators
from kernels.triton_checks import DEVICE
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from visionzoo.kernels import dispatch


def _unless_full(*left_out):
    """Kinds of calls, of which some run with --full only: others reach the same operators."""
    marks = {name: [pytest.mark.full] if name in left_out else [] for name in KINDS}
    return pytest.mark.parametrize("name", [pytest.param(name, marks=marks[name]) for name in KINDS])


SAME_OPERATORS = ("windows with bias and segments", "halo with stride, masked")
FEW = _unless_full(
    *SAME_OPERATORS, "linear, with weights", "neighborhood with bias", "channels", "layer norm", "group norm"
)


@pytest.fixture(autouse=True)
def _triton(monkeypatch):
    monkeypatch.setenv("VISIONZOO_BACKEND", "triton")
    torch._dynamo.reset()


def test_every_operation_is_called():
    assert {operation for kind in KINDS.values() for operation in kind.operations} == set(dispatch.OPERATIONS)


class _Recorder(TorchDispatchMode):
    """Keeps the calls of the zoo's operators."""

    def __init__(self):
        super().__init__()
        self.calls = {}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.namespace == "visionzoo":
            self.calls[func] = args
        return func(*args, **(kwargs or {}))


@_unless_full(*SAME_OPERATORS)
def test_operators_and_their_backward_are_what_torch_expects_of_operators(name):
    call, x = Call(KINDS[name], DEVICE), draw(SIZES[0], DEVICE)
    with _Recorder() as recorder:
        call(x).sum().backward()
    reached = {func._opname for func in recorder.calls}
    assert reached >= KINDS[name].operators
    for func, args in recorder.calls.items():
        learns = f"{func._opname}_backward" in reached
        args = [
            a.detach().requires_grad_(learns and a.is_floating_point()) if isinstance(a, torch.Tensor) else a
            for a in args
        ]
        torch.library.opcheck(func, args)


@FEW
def test_under_autocast_compiled_calls_and_their_gradients_are_the_eager_ones(name):
    call, x = Call(KINDS[name], DEVICE), draw(SIZES[0], DEVICE)
    results = []
    for function in (call, torch.compile(call, backend="aot_eager", fullgraph=True)):
        with torch.autocast(DEVICE, torch.float16):
            out = function(x)
        assert out.dtype == torch.float16
        results.append((out, *torch.autograd.grad(out, [x, *call.parameters()], torch.ones_like(out))))
    for own, expected in zip(*results, strict=True):
        assert expected.abs().sum() > 0
        torch.testing.assert_close(own, expected, rtol=1e-5, atol=1e-5)


@FEW
def test_ten_sizes_take_at_most_three_compilations(name):
    graphs = Graphs("aot_eager")
    with FakeTensorMode():
        call = Call(KINDS[name], DEVICE)
        compiled = torch.compile(call, backend=graphs, fullgraph=True, dynamic=True)
        for size in SIZES:
            x = draw(size, DEVICE)
            compiled(x).sum().backward()
            assert x.grad.shape == x.shape
    assert len(SIZES) == 10 and 1 <= len(graphs.operators) <= 3
    assert all(found == KINDS[name].operators for found in graphs.operators)


@FEW
def test_exported_calls_take_other_sizes(name):
    call = Call(KINDS[name], DEVICE)
    auto = torch.export.Dim.AUTO
    with torch.no_grad():
        exported = torch.export.export(
            call, (draw(SIZES[1], DEVICE),), dynamic_shapes=({0: auto, 1: auto, 2: auto},)
        ).module()
        assert operators(exported) == KINDS[name].operators
        x = draw(SIZES[3], DEVICE)
        torch.testing.assert_close(exported(x), call(x), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("strict", [False, True])
@pytest.mark.parametrize("name", KINDS)
def test_auto_compiles_to_kernels_for_a_gpu_that_is_not_here_and_exports_to_plain_torch(name, strict, monkeypatch):
    monkeypatch.delenv("VISIONZOO_BACKEND")
    monkeypatch.setattr(dispatch, "_capabilities", {})
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: (9, 0))
    avoided = {"group_norm", "layer_norm", "residual_norm"}  # plain norms are fused
    expected = KINDS[name].operators - avoided
    with FakeTensorMode(), torch.no_grad():
        call, x = Call(KINDS[name], "cuda"), torch.empty(2, 6, 8, 32, device="cuda")
        exported = torch.export.export(call, (x,), strict=strict).module()
        graphs = Graphs("eager")
        torch.compile(call, backend=graphs, fullgraph=True)(x)
    assert operators(exported) == set()
    assert graphs.operators == [expected]
