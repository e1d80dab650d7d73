"""Halo attention against loops over single queries, in float64."""

import itertools

import pytest
import torch

from visionzoo.kernels import halo_attention, routed_attention


def _inputs(size=(5, 7), block_size=4, halo_size=1, stride=1, heads=2, depth=3, values=5, dtype=torch.float64, batch=2):
    generator = torch.Generator().manual_seed(0)

    def draw(*shape):
        return torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype).requires_grad_()

    queries = [-(-side // stride) for side in size]
    offsets = 2 * (block_size + 2 * halo_size) - 1
    q, k, v = draw(batch, *queries, heads, depth), draw(batch, *size, heads, depth), draw(batch, *size, heads, values)
    return q, k, v, draw(offsets, depth), draw(offsets, depth)


def _loops(q, k, v, rel_height, rel_width, *, block_size, halo_size, stride=1, scale=None, mask_padding=False):
    """One query at a time, its keys looked up by their places on the map."""
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    height, width = k.shape[1:3]
    side, window = block_size // stride, block_size + 2 * halo_size
    y, x = (axis.flatten() for axis in torch.meshgrid(torch.arange(window), torch.arange(window), indexing="ij"))
    outputs = []
    for row, column in itertools.product(range(q.shape[1]), range(q.shape[2])):
        at_y, at_x = row // side * block_size - halo_size + y, column // side * block_size - halo_size + x
        inside = (at_y >= 0) & (at_y < height) & (at_x >= 0) & (at_x < width)
        position = rel_height[y - row % side + window - 1] + rel_width[x - column % side + window - 1]
        keys, values = (
            t[:, at_y.clamp(0, height - 1), at_x.clamp(0, width - 1)] * inside[:, None, None] for t in (k, v)
        )  # [B, window², G, D]
        query = q[:, row, column]
        scores = scale * torch.einsum("bgd,bngd->bgn", query, keys) + query @ position.T
        if mask_padding:
            scores, values = scores[..., inside], values[:, inside]
        outputs.append(torch.einsum("bgn,bngd->bgd", scores.softmax(-1), values))
    return torch.stack(outputs, 1).unflatten(1, q.shape[1:3])


CASES = {
    "blocks divide the map": {"size": (4, 8)},
    "any map": {"size": (5, 7)},
    "map inside one block": {"size": (2, 3), "halo_size": 2},
    "no rim": {"size": (5, 6), "block_size": 3, "halo_size": 0},
    "rim wider than a block": {"size": (5, 4), "block_size": 2, "halo_size": 3},
    "stride": {"size": (8, 4), "stride": 2},
    "stride on an odd map": {"size": (7, 5), "stride": 2},
    "stride of a whole block": {"size": (7, 4), "block_size": 3, "stride": 3},
}


@pytest.mark.parametrize("mask_padding", [False, True])
@pytest.mark.parametrize("case", CASES)
def test_output_and_every_gradient_are_those_of_loops(case, mask_padding):
    sizes = {"block_size": 4, "halo_size": 1, "stride": 1, **CASES[case]}
    inputs = _inputs(**sizes, batch=1)
    options = {**{k: v for k, v in sizes.items() if k != "size"}, "mask_padding": mask_padding}
    out, expected = halo_attention(*inputs, **options), _loops(*inputs, **options)
    torch.testing.assert_close(out, expected, rtol=1e-12, atol=1e-12)
    upstream = torch.randn(out.shape, dtype=out.dtype, generator=torch.Generator().manual_seed(1))
    own, theirs = torch.autograd.grad(out, inputs, upstream), torch.autograd.grad(expected, inputs, upstream)
    for gradient, wanted in zip(own, theirs, strict=True):
        assert wanted.norm() > 0
        torch.testing.assert_close(gradient, wanted, rtol=1e-10, atol=1e-12)


def test_scale_reaches_products_of_queries_and_keys_only():
    inputs = _inputs()
    options = {"block_size": 4, "halo_size": 1, "scale": 3.0}
    torch.testing.assert_close(halo_attention(*inputs, **options), _loops(*inputs, **options))


def test_without_rim_and_positions_it_is_window_attention():
    q, k, v, rel_height, rel_width = _inputs((6, 9), block_size=3, halo_size=0, values=3)
    out = halo_attention(q, k, v, rel_height * 0, rel_width * 0, block_size=3, halo_size=0)
    torch.testing.assert_close(out, routed_attention(q, k, v, None, regions=(2, 3)))


def test_a_token_reaches_the_blocks_whose_rim_it_is_in_and_no_other():
    q, k, v, *tables = _inputs((12, 12), block_size=4, halo_size=1, batch=1)
    moved = v.detach().clone()
    moved[0, 4, 5] += 1  # first row of the second block from the top
    options = {"block_size": 4, "halo_size": 1}
    change = (halo_attention(q, k, moved, *tables, **options) - halo_attention(q, k, v, *tables, **options)).abs()
    reached = change.amax((0, 3, 4)) > 1e-9
    expected = torch.zeros(12, 12, dtype=torch.bool)
    expected[0:8, 4:8] = True
    assert torch.equal(reached, expected)


def test_masked_padding_cannot_be_told_from_a_smaller_map():
    """What a block sees beyond the border changes its output unless padding is masked."""
    q, k, v, *tables = _inputs((4, 4), block_size=4, halo_size=1)
    constant = torch.ones_like(v)
    masked = halo_attention(q, k, constant, *tables, block_size=4, halo_size=1, mask_padding=True)
    torch.testing.assert_close(masked, torch.ones_like(masked))
    unmasked = halo_attention(q, k, constant, *tables, block_size=4, halo_size=1)
    assert unmasked.max() < 1


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_low_precision_is_as_good_as_its_inputs(dtype):
    inputs = [t.detach() for t in _inputs((9, 11), depth=16, values=16, dtype=dtype)]
    options = {"block_size": 4, "halo_size": 2}
    inputs[3:] = [torch.randn(15, 16).to(dtype) for _ in range(2)]
    out = halo_attention(*inputs, **options)
    exact = halo_attention(*(t.double() for t in inputs), **options)
    assert out.dtype == dtype
    assert (out.double() - exact).norm() <= 4 * torch.finfo(dtype).eps * exact.norm()


def test_strided_views_and_meta_tensors_are_taken():
    inputs = _inputs()
    q, k, v, *tables = (t.detach() for t in inputs)
    kv = torch.cat((k, v), -1)
    views = kv.split((k.shape[-1], v.shape[-1]), -1)
    expected = halo_attention(q, k, v, *tables, block_size=4, halo_size=1)
    assert torch.equal(halo_attention(q, *views, *tables, block_size=4, halo_size=1), expected)
    meta = halo_attention(*(t.to("meta") for t in inputs), block_size=4, halo_size=1)
    assert meta.shape == expected.shape


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"block_size": 0}, "block_size must be positive"),
        ({"halo_size": -1}, "halo_size not negative"),
        ({"stride": 3}, "stride must be positive and divide block_size"),
        ({"stride": 2}, r"q must be \(2, 3, 4, 2, 3\)"),
        ({"halo_size": 2}, r"rel_height must be \[2·window - 1, D\] = \[15, 3\]"),
        ({"backend": "cuda"}, "unknown backend"),
        ({"backend": "triton"}, "cannot run"),
    ],
)
def test_bad_arguments_are_refused_with_their_values(change, message):
    with pytest.raises(ValueError, match=message):
        halo_attention(*_inputs(), **{"block_size": 4, "halo_size": 1, **change})


@pytest.mark.parametrize(
    ("index", "broken", "message"),
    [
        (0, lambda t: t[0], r"must be \[B, H, W, G, D\]"),
        (0, lambda t: t[:, :-1], "q must be"),
        (0, lambda t: t.float(), "share a floating dtype"),
        (2, lambda t: t[:, :, :-1], "v must be like k"),
        (2, lambda t: t.half(), "share a floating dtype"),
        (4, lambda t: t[:, :-1], "rel_width must be"),
        (4, lambda t: t.float(), "in torch.float64"),
    ],
)
def test_tensors_that_do_not_fit_are_refused(index, broken, message):
    inputs = list(_inputs())
    inputs[index] = broken(inputs[index])
    with pytest.raises(ValueError, match=message):
        halo_attention(*inputs, block_size=4, halo_size=1)
