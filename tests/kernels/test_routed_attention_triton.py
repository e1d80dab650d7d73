"""Triton's routed attention is the reference's, in every dtype, for every kind of call."""

import pytest
import torch
from kernels.triton_checks import DEVICE, check_against_float64, check_repeats

from visionzoo.kernels import routed_attention

SHAPES = {  # regions, (height, width), listed regions, heads, head width
    "regions smaller than a block": ((3, 2), (6, 8), 2, 2, 16),
    "several blocks of queries and keys": ((1, 2), (9, 10), 2, 1, 32),
    "odd tokens and widths": ((2, 2), (6, 10), 3, 3, 24),
    "one region of two tokens": ((1, 1), (1, 2), 1, 1, 16),
}


def _case(name, listed=True, extras=()):
    regions, (height, width), count, heads, dim = SHAPES[name]
    generator = torch.Generator().manual_seed(0)

    def draw(*shape):
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    q, k, v = (draw(2, height, width, heads, dim).requires_grad_() for _ in range(3))
    total, n = regions[0] * regions[1], height * width // (regions[0] * regions[1])
    index = torch.randint(0, total, (2, total, count), generator=generator) if listed else None
    tensors = {"q": q, "k": k, "v": v, "index": index}
    if "bias" in extras:
        tensors["bias"] = draw(heads, n, n * (count if listed else 1)).requires_grad_()
    if "bias of each region" in extras:
        tensors["bias"] = draw(total, heads, n, n * (count if listed else 1)).requires_grad_()
    if "segments" in extras:
        tensors["segments"] = torch.randint(0, 2, (height, width), generator=generator)
    if "weights" in extras:
        tensors["weights"] = draw(2, total, count).sigmoid().requires_grad_()
    options = {"regions": regions}
    if "valid" in extras:
        options["valid_size"] = (height - 1, width - 2)
    return tensors, options


@pytest.mark.parametrize("name", SHAPES)
@pytest.mark.parametrize("listed", [True, False], ids=["listed regions", "own region"])
def test_is_as_exact_as_plain_torch(name, listed):
    tensors, options = _case(name, listed)
    check_against_float64(routed_attention, tensors, **options)


EXTRAS = ["bias", "bias of each region", "segments", "weights", "valid", "all"]
SOME = ["all", "bias of each region"]  # the other bias, and what "all" has; each by itself with --full


@pytest.mark.parametrize(
    ("extra", "listed"),
    [
        pytest.param(extra, listed, id=f"{extra}-{regions}", marks=[] if extra in SOME else pytest.mark.full)
        for extra in EXTRAS
        for listed, regions in ((True, "listed regions"), (False, "own region"))
    ],
)
def test_every_kind_of_call_is_as_exact_as_plain_torch(extra, listed):
    extras = ("bias", "segments", "weights", "valid") if extra == "all" else (extra,)
    if not listed:
        extras = tuple(e for e in extras if e != "weights")  # there is no list to weigh
    tensors, options = _case("regions smaller than a block", listed, extras)
    check_against_float64(routed_attention, tensors, **options)


def test_runs_repeat_bit_for_bit():
    tensors, options = _case("several blocks of queries and keys", extras=("bias", "weights"))
    check_repeats(routed_attention, tensors, **options)


def test_takes_views_of_one_projection_and_other_strides():
    generator = torch.Generator().manual_seed(0)
    projection = torch.randn(2, 6, 8, 3, 2, 16, generator=generator).to(DEVICE)
    q, k, v = projection.unbind(3)
    expected = routed_attention(q, k, v, None, regions=(3, 2), backend="reference")
    views = [q, k.transpose(1, 2).contiguous().transpose(1, 2), v.transpose(3, 4).contiguous().transpose(3, 4)]
    out = routed_attention(*views, None, regions=(3, 2), backend="triton")
    torch.testing.assert_close(out, expected, rtol=1e-5, atol=1e-5)


def test_regions_that_do_not_exist_are_refused_or_never_read():
    tensors, options = _case("regions smaller than a block")
    tensors = {name: t.float().to(DEVICE) if t.is_floating_point() else t.to(DEVICE) for name, t in tensors.items()}
    wrong = tensors["index"].clone()
    wrong[0, 0] = torch.tensor([6, 1 << 40])
    with pytest.raises(ValueError, match=r"index must name regions 0 to 5, got 0 to 1099511627776"):
        routed_attention(**{**tensors, "index": wrong}, **options, backend="triton")
    out = routed_attention(**{**tensors, "index": wrong}, **options, backend="triton", check_index=False)
    assert out.isfinite().all() and not out[0, :2, :4].any()


def test_queries_without_any_key_give_zero_and_no_gradient():
    tensors, _ = _case("regions smaller than a block")
    leaves = [tensors[name].detach().float().to(DEVICE).requires_grad_() for name in "qkv"]
    index = torch.full((2, 6, 1), 4, device=DEVICE)  # all listed keys lie in padding
    out = routed_attention(*leaves, index, regions=(3, 2), valid_size=(4, 8), backend="triton")
    out.sum().backward()
    assert not out.any() and not any(t.grad.any() for t in leaves)


@pytest.mark.parametrize("width", [129, 256])
def test_too_wide_heads_are_refused_by_name_and_fall_back_else(width):
    q = torch.randn(1, 4, 4, 1, width, device=DEVICE)
    with pytest.raises(ValueError, match=f"cannot run: its kernels take head widths up to 128, got {width}"):
        routed_attention(q, q, q, None, regions=2, backend="triton")
    torch.testing.assert_close(
        routed_attention(q, q, q, None, regions=2), routed_attention(q, q, q, None, regions=2, backend="reference")
    )
