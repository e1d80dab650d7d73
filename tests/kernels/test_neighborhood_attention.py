"""Neighborhood attention against loops over single queries, in float64, and against NATTEN's outputs."""

import itertools

import numpy as np
import pytest
import torch
from golden import Record, relative_error, sample
from torch._dynamo.testing import CompileCounterWithBackend

from visionzoo.kernels import neighborhood_attention, routed_attention


def _inputs(size=(7, 9), kernel_size=(3, 3), heads=2, dim=4, batch=2, dtype=torch.float64):
    generator = torch.Generator().manual_seed(0)

    def draw(*shape):
        return torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype).requires_grad_()

    q, k, v = (draw(batch, *size, heads, dim) for _ in range(3))
    return q, k, v, draw(heads, 2 * kernel_size[0] - 1, 2 * kernel_size[1] - 1)


def _nearest(place, length, kernel_size, dilation, stride):
    """Of the places in the same group the kernel_size whose window is centered best: by trying them all.

    Best on the middle one of the `stride` places that share it, or the last if that is not there.
    """
    group = range(place % dilation, length, dilation)
    windows = [group[start : start + kernel_size] for start in range(len(group) - kernel_size + 1)]
    (together,) = [t for t in (group[i : i + stride] for i in range(0, len(group), stride)) if place in t]
    leader = together[min(stride // 2, len(together) - 1)]
    return min(windows, key=lambda window: abs(window[kernel_size // 2] - leader))


def _loops(q, k, v, bias=None, *, kernel_size, dilation=(1, 1), stride=(1, 1), scale=None):
    """One query at a time, its keys one by one."""
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    height, width = q.shape[1:3]
    outputs = []
    for i, j in itertools.product(range(height), range(width)):
        rows = _nearest(i, height, kernel_size[0], dilation[0], stride[0])
        columns = _nearest(j, width, kernel_size[1], dilation[1], stride[1])
        seen = list(itertools.product(rows, columns))
        scores = [scale * (q[:, i, j] * k[:, y, x]).sum(-1) for y, x in seen]  # [B, G] each
        if bias is not None:
            places = [
                ((y - i) // dilation[0] + kernel_size[0] - 1, (x - j) // dilation[1] + kernel_size[1] - 1)
                for y, x in seen
            ]
            scores = [score + bias[:, y, x] for score, (y, x) in zip(scores, places, strict=True)]
        weights = torch.stack(scores).softmax(0)
        outputs.append(sum(w[..., None] * v[:, y, x] for w, (y, x) in zip(weights, seen, strict=True)))
    return torch.stack(outputs, 1).unflatten(1, (height, width))


CASES = {
    "inside and borders": ((7, 9), (3, 3), (1, 1)),
    "map of one neighborhood": ((3, 5), (3, 5), (1, 1)),
    "a kernel for each axis": ((6, 11), (5, 3), (1, 1)),
    "dilation": ((8, 10), (3, 3), (2, 2)),
    "groups of unequal size": ((11, 13), (3, 3), (2, 3)),
    "groups of one neighborhood": ((6, 15), (3, 5), (2, 3)),
    "even kernels": ((7, 9), (4, 2), (1, 2)),
    "one neighbor": ((3, 4), (1, 1), (1, 3)),
    "stride": ((7, 9), (3, 3), (1, 1), (2, 3)),
    "stride and dilation in groups of unequal size": ((6, 11), (4, 5), (1, 2), (3, 2)),
    "stride of one axis": ((5, 9), (2, 5), (1, 1), (1, 4)),
}


@pytest.mark.parametrize("with_bias", [False, True])
@pytest.mark.parametrize("case", CASES)
def test_output_and_every_gradient_are_those_of_loops(case, with_bias):
    size, kernel_size, *options = CASES[case]
    *qkv, bias = _inputs(size, kernel_size, batch=1)
    inputs = [*qkv, bias] if with_bias else qkv
    options = {"kernel_size": kernel_size, **dict(zip(("dilation", "stride"), options, strict=False))}
    out = neighborhood_attention(*qkv, bias=bias if with_bias else None, **options)
    expected = _loops(*inputs, **options)
    torch.testing.assert_close(out, expected, rtol=1e-12, atol=1e-12)
    upstream = torch.randn(out.shape, dtype=out.dtype, generator=torch.Generator().manual_seed(1))
    own, theirs = (torch.autograd.grad(o, inputs, upstream, allow_unused=True) for o in (out, expected))
    for gradient, wanted in zip(own, theirs, strict=True):
        torch.testing.assert_close(gradient, wanted, rtol=1e-10, atol=1e-12)
    assert own[2].norm() > 0 and (kernel_size == (1, 1) or min(g.norm() for g in own) > 0)


def test_gradients_are_those_of_finite_differences():
    q, k, v, bias = _inputs((5, 7), (3, 3), heads=1, dim=2, batch=1)

    def attend(q, k, v, bias):
        return neighborhood_attention(q, k, v, kernel_size=3, dilation=(1, 2), bias=bias)

    assert torch.autograd.gradcheck(attend, (q, k, v, bias))


@pytest.mark.parametrize("name", ["na2d_k7", "na2d_k7_d2"])
def test_outputs_are_nattens(name):
    record = Record(f"nat/{name}")
    options = {key: record.meta["kwargs"][key] for key in ("kernel_size", "dilation", "scale")}

    def draw(seed, shape):
        return torch.from_numpy(np.random.RandomState(seed).standard_normal(shape).astype(np.float32)).double()

    q, k, v = (draw(seed, record.meta["input_shape"]) for seed in (1, 2, 3))
    rpb = draw(4, record.meta["rpb_shape"])
    for key, bias in (("out", None), ("out_rpb", rpb)):
        out = neighborhood_attention(q, k, v, bias=bias, **options)
        assert relative_error(sample(out), record.arrays[key]) <= record.tolerance()
        moved = neighborhood_attention(q, k.roll(1, 2), v.roll(1, 2), bias=bias, **options)
        assert relative_error(sample(moved), record.arrays[key]) > 0.1


def test_windows_with_the_stride_of_their_kernel_are_those_that_cut_a_map():
    q, k, v, _ = _inputs((6, 8))
    out = neighborhood_attention(q, k, v, kernel_size=(3, 4), stride=(3, 4))
    torch.testing.assert_close(out, routed_attention(q, k, v, None, regions=2))


def test_scale_reaches_products_and_not_the_bias():
    q, k, v, bias = _inputs()
    options = {"kernel_size": (3, 3), "scale": 3.0}
    torch.testing.assert_close(neighborhood_attention(q, k, v, bias=bias, **options), _loops(q, k, v, bias, **options))


def test_a_neighborhood_that_is_the_map_is_attention_over_all_of_it():
    q, k, v, _ = _inputs((3, 5))
    out = neighborhood_attention(q, k, v, kernel_size=(3, 5))
    torch.testing.assert_close(out, routed_attention(q, k, v, None, regions=1))


def test_a_token_reaches_its_neighbors_and_those_whose_window_the_border_shifts():
    q, k, v, _ = _inputs((9, 12), batch=1)
    moved = v.detach().clone()
    moved[0, 1, 6] += 1
    change = neighborhood_attention(q, k, moved, kernel_size=3) - neighborhood_attention(q, k, v, kernel_size=3)
    expected = torch.zeros(9, 12, dtype=torch.bool)
    expected[0:3, 5:8] = True
    assert torch.equal(change.abs().amax((0, 3, 4)) > 1e-9, expected)
    moved = v.detach().clone()
    moved[0, 2, 11] += 1  # windows of 5 start no higher than row 0 and end no later than column 11
    change = neighborhood_attention(q, k, moved, kernel_size=5) - neighborhood_attention(q, k, v, kernel_size=5)
    expected = torch.zeros(9, 12, dtype=torch.bool)
    expected[0:5, 9:12] = True
    assert torch.equal(change.abs().amax((0, 3, 4)) > 1e-9, expected)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_low_precision_is_as_good_as_its_inputs(dtype):
    q, k, v, bias = (t.detach() for t in _inputs((9, 11), (5, 5), dim=16, dtype=dtype))
    out = neighborhood_attention(q, k, v, kernel_size=5, bias=bias)
    exact = neighborhood_attention(q.double(), k.double(), v.double(), kernel_size=5, bias=bias.double())
    assert out.dtype == dtype
    assert (out.double() - exact).norm() <= 4 * torch.finfo(dtype).eps * exact.norm()


def test_a_float32_bias_goes_with_low_precision():
    q, k, v, bias = (t.detach() for t in _inputs(dtype=torch.float16))
    out = neighborhood_attention(q, k, v, kernel_size=3, bias=bias.float())
    assert out.dtype == torch.float16 and torch.equal(out, neighborhood_attention(q, k, v, kernel_size=3, bias=bias))


def test_strided_views_and_meta_tensors_are_taken():
    inputs = [t.detach() for t in _inputs()]
    q, k, v, bias = inputs
    views = torch.cat((q, k, v), -1).split(q.shape[-1], -1)
    expected = neighborhood_attention(q, k, v, kernel_size=3, bias=bias)
    assert torch.equal(neighborhood_attention(*views, kernel_size=3, bias=bias), expected)
    turned = [t.transpose(1, 2).contiguous().transpose(1, 2) for t in (q, k, v)]
    torch.testing.assert_close(neighborhood_attention(*turned, kernel_size=3, bias=bias), expected)
    *meta, table = (t.to("meta") for t in inputs)
    assert neighborhood_attention(*meta, kernel_size=3, bias=table).shape == expected.shape


def test_it_compiles_once_for_sizes_that_change():
    torch._dynamo.reset()
    counter = CompileCounterWithBackend("aot_eager")

    def attend(q, k, v, bias):
        return neighborhood_attention(q, k, v, kernel_size=3, dilation=2, stride=(1, 2), bias=bias)

    compiled = torch.compile(attend, fullgraph=True, dynamic=True, backend=counter)
    for size in [(9, 7), (6, 8), (7, 20)]:
        inputs = _inputs(size, dim=3)
        results = [run(*inputs) for run in (compiled, attend)]
        torch.testing.assert_close(*results)
        gradients = [torch.autograd.grad(out.square().sum(), inputs) for out in results]
        for gradient, expected in zip(*gradients, strict=True):
            torch.testing.assert_close(gradient, expected)
    assert counter.frame_count == 1


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"kernel_size": 8}, r"kernel_size · dilation = 8 · 1 = 8 exceeds the height 7 of the map"),
        ({"kernel_size": (3, 5), "dilation": (1, 2)}, r"5 · 2 = 10 exceeds the width 9 of the map"),
        ({"kernel_size": 0}, "kernel_size must be a positive integer"),
        ({"kernel_size": (3, 3, 3)}, r"kernel_size must be .* got \(3, 3, 3\)"),
        ({"dilation": 0}, "dilation must be a positive integer"),
        ({"dilation": 1.5}, "dilation must be a positive integer"),
        ({"stride": 0}, "stride must be a positive integer"),
        ({"stride": (2, 4)}, r"stride may be at most kernel_size.* got stride=\(2, 4\) and kernel_size=3"),
        ({"kernel_size": 5}, r"bias must be .* = \[2, 9, 9\] for kernel_size=\(5, 5\), got \(2, 5, 5\)"),
        ({"backend": "cuda"}, "unknown backend"),
        ({"backend": "triton"}, "cannot run"),
    ],
)
def test_bad_arguments_are_refused_with_their_values(change, message):
    q, k, v, bias = _inputs()
    with pytest.raises(ValueError, match=message):
        neighborhood_attention(q, k, v, **{"kernel_size": 3, "bias": bias, **change})


@pytest.mark.parametrize(
    ("index", "broken", "message"),
    [
        (0, lambda t: t[0], r"must be \[B, H, W, G, D\]"),
        (1, lambda t: t[:, :-1], r"must be \[B, H, W, G, D\] of one shape"),
        (2, lambda t: t[..., :-1], "of one shape"),
        (1, lambda t: t.float(), "share a floating dtype"),
        (2, lambda t: t.to("meta"), "share a floating dtype and a device"),
        (3, lambda t: t.long(), "bias must be floating point"),
        (3, lambda t: t.to("meta"), "bias must be floating point on cpu"),
        (3, lambda t: t[:1], "bias must be"),
    ],
)
def test_tensors_that_do_not_fit_are_refused(index, broken, message):
    inputs = list(_inputs())
    inputs[index] = broken(inputs[index])
    with pytest.raises(ValueError, match=message):
        neighborhood_attention(*inputs[:3], kernel_size=3, bias=inputs[3])
