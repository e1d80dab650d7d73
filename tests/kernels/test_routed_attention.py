"""Routing and routed attention do what their docstrings say, by an oracle that loops over queries."""

import pytest
import torch

from visionzoo.kernels import route_regions, routed_attention
from visionzoo.kernels.regions import from_regions, to_regions


def _qkv(batch=2, height=6, width=8, heads=2, dim=4, dtype=torch.float64, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(batch, height, width, heads, dim, generator=generator, dtype=dtype) for _ in range(3)]


def _region_of(y, x, size, regions):
    return (y // (size[0] // regions[0])) * regions[1] + x // (size[1] // regions[1])


def _loops(q, k, v, index, regions, scale, valid_size=None, bias=None, segments=None):
    """One query after the other, from the definition."""
    batch, height, width, heads, _ = q.shape
    tall, wide = height // regions[0], width // regions[1]
    out = torch.zeros_like(q)
    for b in range(batch):
        for y in range(height):
            for x in range(width):
                own = _region_of(y, x, (height, width), regions)
                listed = [own] if index is None else index[b, own].tolist()
                keys = [
                    (ky, kx)
                    for region in listed
                    for ky in range(height)
                    for kx in range(width)
                    if _region_of(ky, kx, (height, width), regions) == region
                    and (valid_size is None or (ky < valid_size[0] and kx < valid_size[1]))
                    and (segments is None or segments[ky, kx] == segments[y, x])
                ]
                if not keys:
                    continue
                row = (y % tall) * wide + x % wide
                for g in range(heads):
                    scores = torch.stack([q[b, y, x, g] @ k[b, ky, kx, g] * scale for ky, kx in keys])
                    if bias is not None:  # with one listed region, or all keys of all of them
                        own_bias = bias[own if len(bias) > 1 else 0, g, row]
                        places = [(ky % tall) * wide + kx % wide for ky, kx in keys]
                        offset = [tall * wide * i for i in range(len(listed)) for _ in range(tall * wide)]
                        offset = offset if len(offset) == len(keys) else [0] * len(keys)
                        scores = scores + own_bias[[p + o for p, o in zip(places, offset, strict=True)]]
                    values = torch.stack([v[b, ky, kx, g] for ky, kx in keys])
                    out[b, y, x, g] = scores.softmax(0) @ values
    return out


REGIONS = (3, 2)
INDEX = torch.tensor(
    [[[0, 3], [1, 1], [5, 2], [4, 0], [2, 3], [5, 4]], [[5, 5], [0, 2], [1, 3], [3, 4], [4, 5], [0, 1]]]
)


@pytest.mark.parametrize("index", [None, INDEX], ids=["own region", "listed regions"])
@pytest.mark.parametrize("scale", [None, 0.3])
def test_attention_is_softmax_over_the_listed_regions(index, scale):
    q, k, v = _qkv()
    out = routed_attention(q, k, v, index, regions=REGIONS, scale=scale)
    torch.testing.assert_close(out, _loops(q, k, v, index, REGIONS, scale or 0.5), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("count", [1, 6])
@pytest.mark.parametrize("index", [None, INDEX], ids=["own region", "listed regions"])
def test_biases_are_added_to_the_scores_of_each_region_and_head(index, count):
    q, k, v = _qkv()
    listed = 1 if index is None else 2
    bias = torch.randn(count, 2, 8, 8 * listed, dtype=torch.float64)
    out = routed_attention(q, k, v, index, regions=REGIONS, bias=bias)
    torch.testing.assert_close(out, _loops(q, k, v, index, REGIONS, 0.5, bias=bias), rtol=1e-12, atol=1e-12)
    if count == 1:
        assert torch.equal(routed_attention(q, k, v, index, regions=REGIONS, bias=bias[0]), out)


@pytest.mark.parametrize("index", [None, INDEX], ids=["own region", "listed regions"])
@pytest.mark.parametrize("valid_size", [None, (5, 7)])
def test_tokens_attend_only_within_their_segment(index, valid_size):
    q, k, v = _qkv()
    segments = torch.randint(0, 3, (6, 8), generator=torch.Generator().manual_seed(0))
    segments[5, 7] = 9  # alone: no key but itself, and none where it is padding
    out = routed_attention(q, k, v, index, regions=REGIONS, segments=segments, valid_size=valid_size)
    expected = _loops(q, k, v, index, REGIONS, 0.5, valid_size=valid_size, segments=segments)
    torch.testing.assert_close(out, expected, rtol=1e-12, atol=1e-12)
    assert out[1, 5, 7].any() == (index is None and valid_size is None)


def test_padded_keys_are_left_out_when_the_valid_size_is_given():
    q, k, v = _qkv()
    index = torch.tensor([[[0, 3], [1, 1], [0, 2], [1, 0], [2, 3], [3, 0]]] * 2)
    out = routed_attention(q, k, v, index, regions=REGIONS, valid_size=(5, 7))
    expected = _loops(q, k, v, index, REGIONS, 0.5, valid_size=(5, 7))
    torch.testing.assert_close(out, expected, rtol=1e-12, atol=1e-12)
    k[:, 5:], v[:, 5:], k[:, :, 7:], v[:, :, 7:] = 1e3, 1e3, -1e3, -1e3
    torch.testing.assert_close(routed_attention(q, k, v, index, regions=REGIONS, valid_size=(5, 7)), out)


def test_queries_without_any_key_give_zero_and_finite_gradients():
    q, k, v = (t.requires_grad_() for t in _qkv())
    index = torch.full((2, 6, 1), 4)  # all listed keys lie in padding
    out = routed_attention(q, k, v, index, regions=REGIONS, valid_size=(4, 8))
    out.sum().backward()
    assert not out.any()
    assert all(t.grad.isfinite().all() for t in (q, k, v))


@pytest.mark.parametrize("index", [None, INDEX], ids=["own region", "listed regions"])
def test_gradients_are_those_of_finite_differences(index):
    q, k, v = (t.requires_grad_() for t in _qkv(dim=3))

    def attention(q, k, v):
        return routed_attention(q, k, v, index, regions=REGIONS, valid_size=(5, 8))

    assert torch.autograd.gradcheck(attention, (q, k, v), fast_mode=True)


def test_biases_learn():
    q, k, v = (t.requires_grad_() for t in _qkv(dim=3))
    bias = torch.randn(2, 8, 8, dtype=torch.float64, requires_grad=True)
    segments = torch.arange(6 * 8).view(6, 8) % 2

    def attention(q, k, v, bias):
        return routed_attention(q, k, v, None, regions=REGIONS, bias=bias, segments=segments)

    assert torch.autograd.gradcheck(attention, (q, k, v, bias), fast_mode=True)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_low_precision_is_as_close_as_its_inputs_allow(dtype):
    q, k, v = _qkv(height=12, width=12, dim=16, dtype=torch.float32)
    q = q * 5  # sharp softmax
    low = [t.to(dtype) for t in (q, k, v)]
    out = routed_attention(*low, None, regions=2)
    exact = routed_attention(*(t.double() for t in low), None, regions=2)
    assert out.dtype == dtype
    assert (out.double() - exact).norm() / exact.norm() < 2 * torch.finfo(dtype).eps


def test_strided_inputs_and_views_of_one_projection_are_taken():
    projection = torch.randn(2, 6, 8, 3, 2, 4, dtype=torch.float64)
    q, k, v = projection.unbind(3)
    out = routed_attention(q, k, v, INDEX, regions=REGIONS)
    copies = (q.contiguous(), k.contiguous(), v.contiguous())
    torch.testing.assert_close(out, routed_attention(*copies, INDEX, regions=REGIONS), rtol=0, atol=0)


def test_regions_and_back_is_the_identity_and_numbers_go_row_by_row():
    x = torch.arange(6 * 8).view(1, 6, 8, 1)
    tokens = to_regions(x, REGIONS)
    assert tokens.shape == (1, 6, 8, 1)
    assert tokens[0, 1, :, 0].tolist() == [4, 5, 6, 7, 12, 13, 14, 15]
    assert torch.equal(from_regions(tokens, REGIONS, (6, 8)), x)


def _loop_routes(q, k, regions, topk, valid_size=None):
    batch, height, width, heads, dim = q.shape
    count = regions[0] * regions[1]
    out = torch.zeros(batch, count, topk, dtype=torch.long)
    for b in range(batch):
        tokens = [[] for _ in range(count)]
        for y in range(height if valid_size is None else valid_size[0]):
            for x in range(width if valid_size is None else valid_size[1]):
                tokens[_region_of(y, x, (height, width), regions)].append((y, x))
        for own in range(count):
            scores = []
            for other in range(count):
                if not tokens[other]:
                    scores.append((float("inf"), other))
                    continue
                q_mean = sum((q[b, y, x] for y, x in tokens[own]), torch.zeros(heads, dim)) / max(1, len(tokens[own]))
                k_mean = sum(k[b, y, x] for y, x in tokens[other]) / len(tokens[other])
                scores.append((-float((q_mean * k_mean).sum()), other))
            out[b, own] = torch.tensor([other for _, other in sorted(scores)[:topk]])
    return out


@pytest.mark.parametrize("valid_size", [None, (5, 7), (4, 8)])
def test_routes_are_the_best_mean_scores(valid_size):
    q, k, _ = _qkv(seed=3)
    routes = route_regions(q, k, regions=REGIONS, topk=4, valid_size=valid_size)
    assert torch.equal(routes, _loop_routes(q, k, REGIONS, 4, valid_size))


def test_ties_go_to_the_lower_region():
    same = torch.ones(1, 6, 8, 2, 4)
    assert torch.equal(route_regions(same, same, regions=REGIONS, topk=3), torch.tensor([0, 1, 2]).expand(1, 6, 3))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"q": torch.zeros(2, 6, 8, 4)}, r"must be \[B, H, W, G, D\] of one shape, got \(2, 6, 8, 4\)"),
        ({"k": torch.zeros(2, 6, 8, 2, 5)}, r"of one shape, got .*\(2, 6, 8, 2, 5\)"),
        (
            {"k": torch.zeros(2, 6, 8, 2, 4)},
            r"share a floating dtype and a device, got torch\.float64 .* and torch\.float32",
        ),
        ({"v": torch.zeros(2, 6, 8, 2, 3)}, r"q, k and v must be .*and \(2, 6, 8, 2, 3\)"),
        ({"regions": (4, 2)}, r"regions must be positive and divide the map, got regions=\(4, 2\) for height 6"),
        ({"regions": 0}, r"regions must be positive"),
        ({"index": INDEX[:, :5]}, r"index must be \[B, R, K\] = \[2, 6, K ≥ 1\], got \(2, 5, 2\)"),
        ({"index": INDEX.double()}, r"index must hold integers"),
        ({"index": INDEX + 1}, r"index must name regions 0 to 5, got 1 to 6"),
        ({"index": INDEX - 1}, r"index must name regions 0 to 5, got -1 to 4"),
        ({"valid_size": (7, 8)}, r"valid_size must lie within the map \(6, 8\)"),
        ({"bias": torch.zeros(2, 8, 8)}, r"bias must be \[G, n, K·n\] = \[2, 8, 16\].*got \(2, 8, 8\)"),
        ({"bias": torch.zeros(3, 2, 8, 16)}, r"with 1 or R = 6 in front, got \(3, 2, 8, 16\)"),
        ({"bias": torch.zeros(2, 8, 16).long()}, r"bias must be floating point on cpu, got torch\.int64"),
        ({"segments": torch.zeros(8, 6).long()}, r"segments must be \[H, W\] = \[6, 8\], got \(8, 6\)"),
        ({"segments": torch.zeros(6, 8)}, r"segments must hold integers on cpu, got torch\.float32"),
        ({"backend": "cuda"}, r"unknown backend 'cuda', expected one of \('auto', 'reference', 'triton'\)"),
        ({"backend": "triton"}, r"backend 'triton' cannot run: "),
    ],
)
def test_wrong_arguments_are_named(change, message):
    q, k, v = _qkv()
    arguments = {"q": q, "k": k, "v": v, "index": INDEX, "regions": REGIONS, **change}
    with pytest.raises(ValueError, match=message):
        routed_attention(**arguments)


def test_wrong_topk_is_named():
    q, k, _ = _qkv()
    with pytest.raises(ValueError, match="topk must be from 1 to 6 regions, got topk=7"):
        route_regions(q, k, regions=REGIONS, topk=7)


def test_the_environment_names_the_backend_of_auto(monkeypatch):
    q, k, v = _qkv()
    monkeypatch.setenv("VISIONZOO_BACKEND", "reference")
    routed_attention(q, k, v, None, regions=REGIONS)
    monkeypatch.setenv("VISIONZOO_BACKEND", "cuda")
    with pytest.raises(ValueError, match="unknown backend 'VISIONZOO_BACKEND=cuda'"):
        routed_attention(q, k, v, None, regions=REGIONS)
    routed_attention(q, k, v, None, regions=REGIONS, backend="reference")
