"""Who decides which backend runs: argument, scope, process, environment; in threads, workers and compiled code."""

import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from kernels.calls import KINDS, Call, draw, operators
from torch.utils.data import DataLoader

import visionzoo
from visionzoo.kernels import explain, layer_norm, scope
from visionzoo.models._pyramid import Stage


@pytest.fixture(autouse=True)
def _kernels_in_the_environment(monkeypatch):
    """Whatever nobody decides otherwise runs Triton kernels, interpreted where there is no GPU."""
    monkeypatch.setenv("VISIONZOO_BACKEND", "triton")
    yield
    visionzoo.set_backend(None)


DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def _norm(x=None, **options):
    x = torch.ones(2, 16, device=DEVICE) if x is None else x
    return layer_norm(x, torch.ones(16, device=DEVICE), torch.zeros(16, device=DEVICE), **options)


def _ran(**options):
    with explain() as decisions:
        _norm(**options)
    return decisions[0].backend


def test_the_nearest_decides():
    assert _ran() == "triton"
    visionzoo.set_backend("reference")
    assert _ran() == "reference"
    with visionzoo.use_backend("triton"):
        assert _ran() == "triton"
        with visionzoo.use_backend("reference"):
            assert _ran() == "reference"
            assert _ran(backend="triton") == "triton"
        assert _ran() == "triton" and _ran(backend="reference") == "reference"
    assert _ran() == "reference"
    visionzoo.set_backend(None)
    assert _ran() == "triton"


def test_auto_in_a_scope_is_the_best_that_can_run_whatever_stands_behind_it():
    visionzoo.set_backend("triton")
    with visionzoo.use_backend("auto"), explain() as decisions:
        _norm()  # so few rows that plain torch is as fast
    assert decisions[0].backend == "reference" and "asks for it" not in decisions[0].reason


def test_a_scope_ends_with_its_block_and_says_who_asked():
    with pytest.raises(RuntimeError), visionzoo.use_backend("reference"), explain() as decisions:
        _norm()
        raise RuntimeError
    assert decisions[0].reason == "use_backend(reference) asks for it"
    assert _ran() == "triton"


@pytest.mark.parametrize("function", [visionzoo.use_backend, visionzoo.set_backend])
@pytest.mark.parametrize("name", ["cuda", "Reference", "", 1])
def test_unknown_names_are_refused_at_once(function, name):
    with pytest.raises(ValueError, match=rf"unknown backend {name!r}, expected one of \('auto', 'reference', 'triton'"):
        function(name)
    assert _ran() == "triton"


def test_what_asks_for_kernels_that_cannot_run_is_named():
    x = torch.ones(2, 16, dtype=torch.float64, device=DEVICE)
    with visionzoo.use_backend("triton"), pytest.raises(ValueError, match=r"use_backend.triton.' cannot run"):
        _norm(x)
    visionzoo.set_backend("triton")
    with pytest.raises(ValueError, match=r"set_backend.triton.' cannot run"):
        _norm(x)


def test_scopes_of_threads_do_not_touch_each_other():
    inside, leave = threading.Event(), threading.Event()

    def hold():
        with visionzoo.use_backend("reference"):
            inside.set()
            leave.wait(20)
            return _ran()

    with ThreadPoolExecutor(1) as pool:
        held = pool.submit(hold)
        assert inside.wait(20) and _ran() == "triton"
        leave.set()
        assert held.result() == "reference"


def test_threads_see_the_choice_of_the_process_and_not_another_threads_scope():
    with ThreadPoolExecutor(1) as pool:
        with visionzoo.use_backend("reference"):
            assert pool.submit(_ran).result() == "triton"
        visionzoo.set_backend("reference")
        assert pool.submit(_ran).result() == "reference"


class _Backends:
    def __len__(self):
        return 1

    def __getitem__(self, index):
        return scope.backend


def test_workers_inherit_the_choice_of_the_process():
    visionzoo.set_backend("reference")
    batches = DataLoader(_Backends(), num_workers=1, multiprocessing_context="fork")
    assert list(batches) == [["reference"]]


@pytest.mark.parametrize("name", KINDS)
def test_compiled_code_follows_each_choice_and_is_compiled_once_for_each_backend(name):
    torch._dynamo.reset()
    call, x = Call(KINDS[name], DEVICE), draw((1, 4, 6), DEVICE).detach()
    compiled, ran = [], []

    def backend(graph, inputs):
        compiled.append(graph)

        def run(*args):
            ran.append(operators(graph))
            return graph(*args)

        return run

    function = torch.compile(call, backend=backend, fullgraph=True)
    kernels, plain = KINDS[name].operators, set()
    with torch.no_grad():
        function(x)
        with visionzoo.use_backend("reference"):
            function(x)
            with ThreadPoolExecutor(1) as pool:
                pool.submit(torch.no_grad()(function), x).result()
        visionzoo.set_backend("reference")
        function(x)
        with visionzoo.use_backend("triton"):
            function(x)
        function(x)
        visionzoo.set_backend(None)
        function(x)
    assert ran == [kernels, plain, kernels, plain, kernels, plain, kernels]
    assert len(compiled) == 2


def test_what_a_checkpointed_stage_runs_again_runs_as_before():
    class Norm(torch.nn.Module):
        def forward(self, x):
            return _norm(x)

    stage = Stage(torch.nn.Identity(), [Norm(), Norm()]).train()
    stage.grad_checkpointing = True
    x = torch.randn(1, 16, 2, 2, device=DEVICE, requires_grad=True)
    with explain() as decisions:
        with visionzoo.use_backend("reference"):
            out = stage(x)
        out.sum().backward()
    assert [d.backend for d in decisions] == ["reference"] * 4
