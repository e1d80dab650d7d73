"""A residual sum and its norm are what their definition says, as exact in Triton as in plain torch."""

import math

import pytest
import torch
from kernels.triton_checks import DEVICE, check_against_float64, check_repeats

from visionzoo.kernels import dispatch, explain, residual_norm


def _case(*shape, scale=True, factor=True):
    generator = torch.Generator().manual_seed(0)

    def draw(*size):
        return torch.randn(size, generator=generator, dtype=torch.float64).requires_grad_()

    tensors = {"x": draw(*shape), "branch": draw(*shape), "weight": draw(shape[-1]), "bias": draw(shape[-1])}
    if scale:
        tensors["scale"] = draw(shape[-1])
    if factor:
        tensors["factor"] = (torch.arange(shape[0], dtype=torch.float64) + 1) % 3 / 2  # 0.5, 1, 0, ...
    return tensors


def _both(**arguments):
    return torch.cat(residual_norm(**arguments), -1)


def _definition(x, branch, weight, bias, eps, scale=None, factor=None):
    y, out = torch.zeros_like(x), torch.zeros_like(x)
    for b in range(x.shape[0]):
        for i in range(x.shape[1]):
            row = []
            for c in range(x.shape[2]):
                by = (1 if scale is None else float(scale[c])) * (1 if factor is None else float(factor[b]))
                row.append(float(x[b, i, c]) + by * float(branch[b, i, c]))
            mean = sum(row) / len(row)
            deviation = math.sqrt(sum((value - mean) ** 2 for value in row) / len(row) + eps)
            for c, value in enumerate(row):
                y[b, i, c] = value
                out[b, i, c] = (value - mean) / deviation * float(weight[c]) + float(bias[c])
    return y, out


FORMS = [{}, {"scale": False}, {"factor": False}, {"scale": False, "factor": False}]


@pytest.mark.parametrize("form", FORMS)
def test_it_is_its_definition_with_its_derivatives(form):
    tensors = _case(3, 4, 5, **form)
    plain = {name: tensor.detach() for name, tensor in tensors.items()}
    for own, expected in zip(residual_norm(**plain, eps=0.1), _definition(**plain, eps=0.1), strict=True):
        torch.testing.assert_close(own, expected, rtol=1e-12, atol=1e-12)
    assert torch.autograd.gradcheck(
        lambda *values: residual_norm(**dict(zip(tensors, values, strict=True)), eps=0.1), list(tensors.values())
    )


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("shape", [(3, 5, 7, 24), (2, 70, 64)])
def test_kernels_are_as_exact_as_plain_torch(shape, form):
    check_against_float64(_both, _case(*shape, **form), eps=1e-6)


@pytest.mark.parametrize("shape", [(3, 1000), (1, 1, 17), (5, 2, 3, 1024)])
def test_wide_and_single_rows_are_as_exact(shape):
    check_against_float64(_both, _case(*shape), eps=1e-6)


def test_only_one_of_the_two_results_may_have_a_gradient():
    tensors = {name: t.detach().float().to(DEVICE) for name, t in _case(3, 5, 24).items()}
    tensors = {name: t.requires_grad_(name != "factor") for name, t in tensors.items()}
    learning = [t for t in tensors.values() if t.requires_grad]
    for which in (0, 1):
        grads = []
        for backend in ("reference", "triton"):
            out = residual_norm(**tensors, backend=backend)[which]
            grads.append(torch.autograd.grad(out, learning, torch.ones_like(out), materialize_grads=True))
        for own, expected in zip(*grads, strict=True):
            torch.testing.assert_close(own, expected, rtol=1e-4, atol=1e-4)


def test_more_rows_than_programs_are_all_summed(monkeypatch):
    from visionzoo.kernels.residual_norm import triton

    monkeypatch.setattr(triton, "_PARTS", 3)
    tensors = {name: t.detach().float().to(DEVICE) for name, t in _case(3, 20, 1024).items()}
    tensors = {name: t.requires_grad_(name != "factor") for name, t in tensors.items()}
    learning = [t for t in tensors.values() if t.requires_grad]
    grads = {}
    for backend in ("reference", "triton"):
        out = _both(**tensors, backend=backend)
        grads[backend] = torch.autograd.grad(out, learning, torch.ones_like(out))
    for grad, expected in zip(*grads.values(), strict=True):
        torch.testing.assert_close(grad, expected, rtol=1e-4, atol=2e-4)


def test_runs_repeat_bit_for_bit():
    check_repeats(_both, _case(5, 60, 24))


@pytest.mark.parametrize("backend", ["reference", "triton"])
def test_dtypes_are_those_of_an_addition_and_a_norm(backend):
    """The sum has the widest dtype of its terms, the norm has autocast's."""
    tensors = {name: t.detach().float().to(DEVICE) for name, t in _case(3, 6, 32).items()}
    exact = residual_norm(**tensors, backend="reference")
    low = torch.float16 if DEVICE == "cuda" else torch.bfloat16
    with torch.autocast(DEVICE, dtype=low):
        y, out = residual_norm(**tensors, backend=backend)
    assert (y.dtype, out.dtype) == (torch.float32, low)
    torch.testing.assert_close(y, exact[0])
    torch.testing.assert_close(out, exact[1].to(low), rtol=1e-2, atol=1e-2)
    tensors = {name: t.half() if name in ("x", "branch", "factor") else t for name, t in tensors.items()}
    tensors = {name: t.requires_grad_(name != "factor") for name, t in tensors.items()}
    scaled = residual_norm(**tensors, backend=backend)
    tensors.pop("scale")
    plain = residual_norm(**tensors, backend=backend)
    assert [t.dtype for t in (*scaled, *plain)] == [torch.float32] * 2 + [torch.float16] * 2
    torch.testing.assert_close(scaled[0], exact[0], rtol=5e-3, atol=5e-3)
    grads = torch.autograd.grad([t.sum() for t in (*scaled, *plain)], list(tensors.values())[:4])
    assert [grad.dtype for grad in grads] == [torch.float16] * 2 + [torch.float32] * 2


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"branch": torch.ones(2, 1, 8)}, r"x and branch must have one shape .*, got \(2, 3, 8\) and \(2, 1, 8\)"),
        ({"x": torch.ones(8), "branch": torch.ones(8)}, r"one shape \[B, ..., C\], got \(8,\)"),
        ({"bias": torch.ones(5)}, r"bias must be \[C\] for x \[B, ..., C\], got \(5,\) for x \(2, 3, 8\)"),
        ({"scale": torch.ones(1)}, r"scale must be \[C\]"),
        ({"factor": torch.ones(2, 1, 1)}, r"factor must be \[B\] for x \[B, ..., C\], got \(2, 1, 1\)"),
        ({"factor": torch.ones(2).requires_grad_()}, r"factor gets no gradient, and requires one; pass factor.detach"),
        ({"weight": torch.ones(8).long()}, r"must be floating point on one device, got .*weight torch.int64"),
        ({"weight": torch.ones(8, device="meta")}, r"must be floating point on one device, got .*weight .* on meta"),
        ({"backend": "cuda"}, r"unknown backend 'cuda'"),
        ({"branch": torch.ones(2, 3, 8).double(), "backend": "triton"}, r"got a branch or a sum of torch.float64"),
    ],
)
def test_wrong_arguments_are_named(change, message):
    given = {"x": torch.ones(2, 3, 8), "branch": torch.ones(2, 3, 8), "weight": torch.ones(8), "bias": torch.ones(8)}
    given = {
        name: value.to(DEVICE) if isinstance(value, torch.Tensor) and not value.is_meta else value
        for name, value in {**given, **change}.items()
    }
    with pytest.raises(ValueError, match=message):
        residual_norm(**given)


def test_too_wide_rows_are_refused_by_name():
    x = torch.ones(2, 1025, device=DEVICE)
    with pytest.raises(ValueError, match="its kernels take widths up to 1024, got 1025"):
        residual_norm(x, x, x[0], x[0], backend="triton")


def test_auto_leaves_kernels_out_that_do_not_pay(monkeypatch):
    monkeypatch.setattr(dispatch, "_why_not", lambda *_: None)
    monkeypatch.setattr(dispatch, "_verdicts", {})
    tensors = {name: t.detach().float().to(DEVICE) for name, t in _case(2, 3, 16).items()}
    with explain() as decisions:
        residual_norm(**tensors)
        for pays in (True, False):
            with dispatch.as_if_paying("residual_norm", pays):
                residual_norm(**tensors)
        residual_norm(**tensors)
    assert [decision.backend for decision in decisions] == ["reference", "triton", "reference", "reference"]
    assert decisions[0].reason == "measured on a GPU, its kernels do not pay"
