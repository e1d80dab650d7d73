"""Linear attention against its matrix of weights, entry by entry; random features; positions by transforms."""

import math

import pytest
import torch

from visionzoo.kernels import explain, use_backend
from visionzoo.layers.features import FEATURE_MAPS, Random, redraw_projections
from visionzoo.layers.mixers import LinearMixer

FORMS = [
    {"feature_map": "relu", "key_dim": 3},
    {"feature_map": "elu", "denominator": "count"},
    {"feature_map": "elu", "denominator": "rms_norm", "position_bias": True, "map_size": (3, 5)},
    {"feature_map": "softmax", "key_dim": 6, "denominator": "count", "qkv_bias": False},
    {"feature_map": "cosformer"},
    {"feature_map": "favor", "num_features": 6},
    {"feature_map": "favor", "key_dim": 5, "position_bias": True, "map_size": 2},
    {"feature_map": "favor_relu"},
    {"feature_map": "log_normal"},
]
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
CLOSE = {"rtol": 1e-11, "atol": 1e-11}


def _name(form):
    return "-".join(map(str, form.values()))


def _mixer(form, dim=8):
    torch.manual_seed(0)
    mixer = LinearMixer(dim, 2, **form).double()
    if mixer.position_bias is not None:
        torch.nn.init.normal_(mixer.position_bias.table)
    return mixer


def _weights(mixer, q, k, size):
    """Weights [N, N] of each head, and what is added to a query's sum of them, of queries and keys [N, G, D]."""
    name, dim = mixer.feature_map, mixer.key_dim
    weights, added = [], 0.0
    projection = getattr(mixer.features, "projection", None)
    for g in range(2):
        rows = []
        a, b = q[:, g], k[:, g]
        if name == "log_normal":
            s = ((q.var() * k.var() + 0.35487039130661086) / (2 * 0.14855178144710912)).sqrt().detach()
            a, b = a * s / q.std().detach(), b * s / k.std().detach()
            a, b = (a - a.amax(1, keepdim=True)).exp(), (b - b.max()).exp()
            added = 1e-8
        elif name == "favor":
            features = []
            for t in (a, b):
                t = t / dim**0.25
                dots = torch.stack([torch.stack([(w * x).sum() for w in projection]) for x in t])
                top = dots.detach().amax(1, keepdim=True) if not features else dots.detach().max()
                features.append((dots - (t * t).sum(1, keepdim=True) / 2 - top).exp() + 1e-4)
            a, b = (t / math.sqrt(len(projection)) for t in features)
        elif name == "favor_relu":
            a, b = (torch.einsum("nd,md->nm", t / dim**0.25, projection).clamp(min=0) + 1e-3 for t in (a, b))
        elif name == "softmax":
            a, b = a.exp() / a.exp().sum(1, keepdim=True), b.exp() / b.exp().sum(0) * len(b)
        elif name == "elu":
            a, b = (torch.where(t > 0, t + 1, t.exp()) for t in (a, b))
        else:
            a, b = a.clamp(min=0), b.clamp(min=0)
            added = 1e-6 * len(b) if name == "relu" else 0.0
        for i in range(len(a)):
            for j in range(len(b)):
                dy, dx = j // size[1] - i // size[1], j % size[1] - i % size[1]
                weight = (a[i] * b[j]).sum()
                if name == "cosformer":
                    weight = weight * math.cos(math.pi / 2 * dy / size[0]) * math.cos(math.pi / 2 * dx / size[1])
                if mixer.position_bias is not None:
                    table = mixer.position_bias.resized(size, weight.dtype)
                    weight = weight * table[dy + size[0] - 1, dx + size[1] - 1, g].exp()
                rows.append(weight)
        weights.append(torch.stack(rows).view(len(a), len(b)))
    return weights, added


def _defined(mixer, x):
    size, count = x.shape[:2], x.shape[0] * x.shape[1]
    keys = 2 * mixer.key_dim
    q, k, v = (t.reshape(count, 2, -1) for t in mixer.qkv(x).split([keys, keys, mixer.dim], -1))
    weights, added = _weights(mixer, q, k, size)
    out = []
    for g, head in enumerate(weights):
        summed = head @ v[:, g]
        if mixer.denominator == "sum":
            total = head.sum(1, keepdim=True)
            out.append(summed / (total.clamp(min=1e-6) if mixer.feature_map == "cosformer" else total + added))
        else:
            mean = summed / count
            norm = (mean.square().mean(1, keepdim=True) + 1e-6).sqrt()
            out.append(mean / norm if mixer.denominator == "rms_norm" else mean)
    return mixer.proj(torch.cat(out, -1)).view(*size, -1)


@pytest.mark.parametrize("form", FORMS, ids=_name)
def test_each_form_is_its_matrix_of_weights_with_gradients(form):
    mixer = _mixer(form)
    x = 2 * torch.randn(3, 4, 8, dtype=torch.float64)
    direction = torch.randn_like(x)
    results = []
    for function in (lambda t: mixer(t[None])[0], lambda t: _defined(mixer, t)):
        mixer.zero_grad()
        given = x.clone().requires_grad_()
        out = function(given)
        (out * direction).sum().backward()
        results.append([out.detach(), given.grad, *(p.grad for p in mixer.parameters())])
    for ours, defined in zip(*results, strict=True):
        torch.testing.assert_close(ours, defined, **CLOSE)


@pytest.mark.parametrize("scale", [1, 3e-4])  # sums below 1e-6, too
@torch.no_grad()
def test_cosformer_on_one_row_weighs_by_the_distance_along_it(scale):
    mixer = _mixer({"feature_map": "cosformer", "qkv_bias": False})
    x = scale * torch.randn(1, 7, 8, dtype=torch.float64)
    mixer.qkv.weight[16:] /= scale
    torch.testing.assert_close(mixer(x[None])[0], _defined(mixer, x), **CLOSE)


@pytest.mark.parametrize("feature_map", [name for name, kind in FEATURE_MAPS.items() if not kind.knows_places])
@torch.no_grad()
def test_dropped_tokens_leave_no_trace(feature_map):
    mixer = _mixer({"feature_map": feature_map})
    x = torch.randn(2, 1, 6, 8, dtype=torch.float64)
    keep = torch.tensor([[True, False, True, True, False, True]] * 2)
    x[:, :, 1] = 1e3
    out = mixer(x, keep=keep)[:, :, keep[0]]
    torch.testing.assert_close(out, mixer(x[:, :, keep[0]]), rtol=1e-9, atol=1e-9)
    assert not torch.allclose(out, mixer(x)[:, :, keep[0]])


@pytest.mark.parametrize("form", FORMS, ids=_name)
def test_the_tokens_places_matter_where_they_are_known(form):
    mixer = _mixer(form)
    x = torch.randn(1, 2, 4, 8, dtype=torch.float64)
    moved = torch.allclose(mixer(x.flip(2)[:, [1, 0]].roll(1, 2)), mixer(x).flip(2)[:, [1, 0]].roll(1, 2))
    assert moved == mixer.takes_prefix_tokens == mixer.takes_dropped_tokens


@pytest.mark.parametrize("form", FORMS, ids=_name)
@torch.no_grad()
def test_low_precision_stays_near_float64(form):
    mixer = _mixer(form, 16)
    x = torch.randn(1, 6, 9, 16, dtype=torch.float64)
    exact = mixer(x)
    for dtype in (torch.float16, torch.bfloat16):
        low = mixer.to(dtype)(x.to(dtype))
        assert low.dtype == dtype
        assert (low.double() - exact).norm() < 40 * torch.finfo(dtype).eps * exact.norm()


@pytest.mark.parametrize("form", [form for form in FORMS if "position_bias" not in form], ids=_name)
def test_the_kernels_take_every_form(form):
    mixer = _mixer(form, 8).float().to(DEVICE)
    x = torch.randn(1, 3, 5, 8).to(DEVICE)
    keep = torch.arange(15, device=DEVICE)[None] % 4 > 0 if mixer.takes_dropped_tokens else None
    for options in ({}, {"keep": keep}):
        results = []
        for backend in ("triton", "reference"):
            mixer.zero_grad()
            with use_backend(backend), explain() as ran:
                out = mixer(x, **options)
                out.square().sum().backward()
            results.append([out, *(p.grad for p in mixer.parameters())])
            assert [(d.operation, d.backend) for d in ran] == [("linear_attention", backend)]
        torch.testing.assert_close(*results, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("form", FORMS, ids=_name)
def test_large_maps_of_large_numbers_stay_finite(form):
    mixer = _mixer(form, 4).half()
    side = 64 if form.get("position_bias") else 256
    x = (10 * torch.randn(1, side, side, 4)).half().requires_grad_()
    out = mixer(x)
    out.float().mean().backward()
    assert out.isfinite().all() and x.grad.isfinite().all()
    assert all(p.grad.isfinite().all() for p in mixer.parameters())


@torch.no_grad()
def test_weights_of_favor_near_those_of_softmax_with_more_features():
    errors = []
    for count in (2**6, 2**16):
        features = _mixer({"feature_map": "favor", "num_features": count}).features
        features.EPS = 0.0  # what it adds does not fade
        q, k = torch.randn(2, 12, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(1)) / 2
        of_q, of_k = (t[0, :, 0] for t in features(q[None, :, None], k[None, :, None], (3, 4), None))
        weights = of_q @ of_k.mT
        errors.append(float((weights / weights.sum(-1, keepdim=True) - (q @ k.mT / 2).softmax(-1)).abs().max()))
    assert errors[1] < 0.02 < errors[0]  # 0.04 with signs of the decomposition alone


def test_projections_are_orthogonal_saved_and_drawn_anew_by_the_seed():
    model = torch.nn.Sequential(*(LinearMixer(8, 2, feature_map=name) for name in ("favor", "elu", "favor_relu")))
    first, _, last = (mixer.features for mixer in model)
    assert isinstance(first, Random) and first.projection.shape == (5, 4)
    assert "0.features.projection" in model.state_dict()
    products = first.projection[:4] @ first.projection[:4].mT
    torch.testing.assert_close(products, products.diag().diag(), rtol=0, atol=1e-5)
    before = first.projection.clone()
    assert redraw_projections(model, seed=3) == 2
    drawn = [first.projection.clone(), last.projection.clone()]
    assert not torch.equal(drawn[0], before) and not torch.equal(*drawn)
    redraw_projections(model, seed=4)
    torch.rand(3)
    assert not torch.equal(first.projection, drawn[0])
    redraw_projections(model, seed=3)
    assert torch.equal(first.projection, drawn[0]) and torch.equal(last.projection, drawn[1])


@pytest.mark.parametrize("form", FORMS, ids=_name)
@pytest.mark.full  # the shared test compiles one form
def test_each_form_compiles_into_one_graph_for_sizes_that_change(form):
    torch._dynamo.reset()
    mixer = LinearMixer(8, 2, **form)
    compiled = torch.compile(mixer, fullgraph=True, dynamic=True, backend="eager")
    for size in [(6, 9), (11, 7)]:
        x = torch.randn(2, *size, 8)
        torch.testing.assert_close(compiled(x), mixer(x))


@pytest.mark.parametrize("feature_map", ["cosformer", "log_normal"])  # which count tokens
def test_exports_for_maps_of_any_size(feature_map):
    mixer = LinearMixer(8, 2, feature_map=feature_map).eval()
    any_size = {axis: torch.export.Dim.DYNAMIC for axis in (1, 2)}
    program = torch.export.export(mixer, (torch.randn(2, 4, 5, 8),), dynamic_shapes=(any_size,), strict=False).module()
    x = torch.randn(2, 6, 3, 8)
    torch.testing.assert_close(program(x), mixer(x))
