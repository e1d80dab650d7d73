"""Triton's choice of regions is the reference's, but where two scores differ by less than float32 rounds off."""

import pytest
import torch
from kernels.triton_checks import DEVICE, DTYPES

from visionzoo.kernels import route_regions
from visionzoo.kernels.dispatch import explain
from visionzoo.kernels.launch import run
from visionzoo.kernels.region_routing import triton as kernels
from visionzoo.kernels.regions import to_regions

CASES = {  # (height, width), regions, heads, head width, topk, further options
    "regions smaller than a block": ((6, 8), (3, 2), 2, 16, 4, {}),
    "all regions, best first": ((6, 8), (3, 2), 2, 8, 6, {"scale": 0.3}),
    "worst first": ((6, 8), (3, 2), 2, 8, 6, {"scale": -2.0}),
    "padding": ((6, 8), (3, 2), 2, 16, 3, {"valid_size": (5, 7)}),
    "regions of padding alone": ((6, 8), (3, 2), 2, 16, 6, {"valid_size": (2, 5)}),
    "regions summed in parts, in padding too": ((16, 66), (1, 2), 1, 24, 2, {"valid_size": (15, 60)}),
    "several tokens a region, more channels than are read at once": ((4, 6), (2, 2), 3, 32, 3, {"valid_size": (3, 6)}),
    "more regions than a block, more channels than a block": ((5, 4), (5, 4), 3, 48, 5, {}),
}


def _queries_and_keys(size, heads, dim, dtype, whole_numbers=False):
    generator = torch.Generator().manual_seed(0)
    q, k = torch.randn(2, 2, *size, heads, dim, generator=generator)
    if whole_numbers:
        q, k = q.round(), k.round()
    return q.to(DEVICE, dtype), k.to(DEVICE, dtype)


def _scores(q, k, regions, scale=1.0, valid_size=None):
    """Scores [B, R, R] in float64, and how far float32 may be off them."""
    height, width = valid_size or q.shape[1:3]
    count = q.new_zeros(1, *q.shape[1:3], 1, dtype=torch.float64)
    count[:, :height, :width] = 1
    tokens = to_regions(count, regions).sum(2)
    means = [
        to_regions(t.double().flatten(3) * count, regions).sum(2) / tokens.clamp(min=1) for t in (q, k)
    ]  # [B, R, C]
    scores = (means[0] * scale) @ means[1].mT
    scores = scores.masked_fill(tokens[..., 0] == 0, -torch.inf)
    rounding = torch.finfo(torch.float32).eps * abs(scale) * means[0].abs() @ means[1].abs().mT
    return scores, 4 * rounding.amax(-1, keepdim=True)


def _is_a_best_choice(index, q, k, regions, topk, scale=None, valid_size=None):
    scores, rounding = _scores(q, k, regions, 1.0 if scale is None else scale, valid_size)
    best = scores.sort(-1, descending=True).values[..., :topk]
    chosen = scores.gather(-1, index)
    each_once = all(len(set(row)) == topk for row in index.flatten(0, 1).tolist())
    near = ((chosen - best).abs() <= rounding) | (chosen == best)  # the latter for -inf
    return each_once and bool(near.all())


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", CASES)
def test_chosen_regions_have_the_best_scores_in_order(name, dtype):
    size, regions, heads, dim, topk, options = CASES[name]
    q, k = _queries_and_keys(size, heads, dim, dtype)
    index = route_regions(q, k, regions=regions, topk=topk, **options, backend="triton")
    assert index.dtype == torch.int64 and index.shape == (2, regions[0] * regions[1], topk)
    assert _is_a_best_choice(index, q, k, regions, topk, **options)
    assert not _is_a_best_choice(index.roll(1, 1), q, k, regions, topk, **options)
    assert not _is_a_best_choice(index.roll(1, 2), q, k, regions, topk, **options)


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("launches", [1, 2])
def test_where_sums_are_exact_every_choice_and_tie_is_the_references(name, launches, monkeypatch):
    ran = []
    monkeypatch.setattr(kernels, "run", lambda kernel, *args, **options: ran.append(run(kernel, *args, **options)))
    if launches == 2:
        monkeypatch.setattr(kernels, "_SMALL", 0)
    size, regions, heads, dim, topk, options = CASES[name]
    options = {**options, "scale": -1.0 if options.get("scale", 0) < 0 else 1.0}
    if "valid_size" in options:  # means of regions at the border would not be exact
        options["valid_size"] = (size[0], size[1] // 2)
    q, k = _queries_and_keys(size, heads, dim, torch.float16, whole_numbers=True)
    expected = route_regions(q, k, regions=regions, topk=topk, **options, backend="reference")
    assert torch.equal(route_regions(q, k, regions=regions, topk=topk, **options, backend="triton"), expected)
    assert len(ran) == (2 if name.startswith("regions summed in parts") else launches)


@pytest.mark.parametrize("scale", [1.0, 0.0, -1.0])
def test_ties_go_to_the_lower_region(scale):
    q = torch.randn(1, 6, 8, 2, 4, generator=torch.Generator().manual_seed(0)).to(DEVICE)
    k = torch.ones_like(q) * q.new_tensor([1.0, -1.0, 0.5, 3.0])  # scores of 0 come with either sign where scale is 0
    index = route_regions(q, k, regions=(3, 2), topk=6, scale=scale, backend="triton")
    assert index.tolist() == [[[0, 1, 2, 3, 4, 5]] * 6]


def test_takes_views_of_one_projection_and_other_strides():
    projection = torch.randn(2, 6, 8, 3, 2, 16, generator=torch.Generator().manual_seed(0)).to(DEVICE)
    q, k, _ = projection.unbind(3)
    expected = route_regions(q, k, regions=(3, 2), topk=3, backend="reference")
    other = [t.transpose(1, 3).contiguous().transpose(1, 3) for t in (q, k)]
    for views in ((q, k), other):
        assert torch.equal(route_regions(*views, regions=(3, 2), topk=3, backend="triton"), expected)


def test_no_gradient_flows_and_runs_repeat():
    q, k = (t.requires_grad_() for t in _queries_and_keys((6, 8), 2, 16, torch.float32))
    first, second = (route_regions(q, k, regions=(3, 2), topk=3, backend="triton") for _ in range(2))
    assert torch.equal(first, second) and not first.requires_grad


def test_too_many_regions_are_refused_by_name_and_fall_back_else():
    q = torch.randn(1, 33, 32, 1, 4, device=DEVICE)
    with pytest.raises(ValueError, match="cannot run: its kernels take up to 1024 regions, got 1056"):
        route_regions(q, q, regions=(33, 32), topk=1, backend="triton")
    with explain() as decisions:
        route_regions(q, q, regions=(33, 32), topk=1)
    assert decisions[0].backend == "reference"
