"""Attention by scores and normalizers is what its papers define, in any portions, at any length."""

import numpy as np
import pytest
import timm
import torch
from golden import Record, relative_error
from kernels.triton_checks import DEVICE

from visionzoo.kernels import explain, use_backend
from visionzoo.layers.mixers import ScoreMixer, score
from visionzoo.layers.normalizers import NORMALIZERS, entmax, softplus
from visionzoo.layers.scores import inverse_distances
from visionzoo.layers.tokens import Tokens, mix_tokens
from visionzoo.models._registry import TINY

FORMS = {
    **{name: {"normalizer": name} for name in NORMALIZERS},
    "sigmoid_qk_norm": {"normalizer": "sigmoid", "qk_norm": "layer_norm", "qkv_bias": False},
    "taylor_l2": {"normalizer": "taylor", "qk_norm": "l2"},
    "relu_bare": {"normalizer": "relu", "output_norm": "none"},
    "standardize_bare": {"normalizer": "standardize", "output_norm": "none", "output_gelu": False},
    "neural": {"score": "neural", "hidden_dim": 5},
    "collision": {"score": "collision"},
    "collision_4": {"score": "collision", "hash_length": 4, "normalizer": "sparsemax", "output_norm": "none"},
    "inverse_distance": {"score": "inverse_distance"},
    "inverse_distance_3": {"score": "inverse_distance", "power": 3.0, "eps": 0.5, "normalizer": "sparsemax"},
    "gaussian": {"score": "gaussian"},
    "gaussian_keys": {"score": "gaussian", "key_steps": 2},
    "gaussian_precisions": {"score": "gaussian", "key_precision": True, "value_precision": 0.5},
    "temperature_position": {"temperature": "position"},
    "temperature_query": {"temperature": "query", "normalizer": "entmax15"},
    "mta": {"query_kernel": 3, "key_kernel": 3, "weight_groups": 2},
    "mta_before": {
        **{"query_kernel": 2, "key_kernel": 3, "query_padding": "before", "key_padding": "before"},
        **{"weight_query_kernel": 2, "weight_key_kernel": 1, "score_groups": 4},
    },
    "mta_after": {"query_kernel": 1, "key_kernel": 2, "key_padding": "after", "output_norm": "gated_head_rms"},
    "talking_heads": {"score_groups": 4, "weight_groups": 4},
    "urpe": {"offset_factor": True, "position_bias": True, "map_size": (2, 3)},
    "urpe_factor": {"offset_factor": True, "map_size": (2, 3), "normalizer": "softplus"},
    "position_bias": {"position_bias": True, "map_size": (2, 3)},
    "mta_weights": {"weight_key_kernel": 3},
}
ON_A_MAP = ("mta", "mta_before", "mta_after", "mta_weights", "urpe", "urpe_factor", "position_bias")


def _mixer(form, dim=8, heads=4, size=(2, 3)):
    """Build a form whose parameters are all drawn, so that none is where it has no effect."""
    torch.manual_seed(0)
    options = FORMS[form] | ({"map_size": size} if "map_size" in FORMS[form] else {})
    mixer = ScoreMixer(dim, heads, **options).double()
    for parameter in mixer.parameters():
        torch.nn.init.normal_(parameter, std=1.0 if parameter.ndim < 2 else parameter[0].numel() ** -0.5)
    return mixer


# -- definitions, in loops --------------------------------------------------------------------------------------------


def _threshold(row, alpha):
    """Weights of α-entmax by bisection."""
    row = (alpha - 1) * row
    low, high = row.max() - 1, row.max()
    for _ in range(100):
        middle = (low + high) / 2
        low, high = (middle, high) if (np.maximum(row - middle, 0) ** (1 / (alpha - 1))).sum() > 1 else (low, middle)
    return np.maximum(row - low, 0) ** (1 / (alpha - 1))


def _shares(weights):
    return weights / weights.sum()


def _row_weights(name, row, state, head):
    """Weights that one query gives the keys."""
    if name == "entmax":
        return _threshold(row, 1 + 1 / (1 + np.exp(-state["normalizer.sharpness"][head])))
    if name == "standardize":
        spread = np.sqrt(np.mean((row - row.mean()) ** 2)) + 0.001
        return state["normalizer.gain"][head] * (row - row.mean()) / spread + state["normalizer.bias"][head]
    if name == "topk_softmax":
        kept = [np.sort(row)[::-1][int(len(row) * share) - 1] for share in (1 / 2, 2 / 3, 3 / 4, 4 / 5)]
        parts = [_shares(np.where(row >= least, np.exp(row), 0)) for least in kept]
        return sum(factor * part for factor, part in zip(state["normalizer.factors"], parts, strict=True))
    return {
        "softmax": lambda: _shares(np.exp(row)),
        "sigmoid": lambda: 1 / (1 + len(row) * np.exp(-row)),
        "sparsemax": lambda: _threshold(row, 2.0),
        "entmax15": lambda: _threshold(row, 1.5),
        "relu": lambda: np.where(row > 0, row, 0),
        "signed_softmax": lambda: _shares(np.exp(np.abs(row))) * np.sign(row),
        "softplus": lambda: _shares(np.log(1 + np.exp(row))),
        "taylor": lambda: _shares(1 + row + row**2 / 2),
    }[name]()


def _convolved(scores, kernel, size, query_padding, key_padding):
    """Scores [N, N] of one head, convolved with [a, a, c, c], pair by pair."""
    before = [
        {"before": k - 1, "both": k // 2, "after": 0}[p]
        for k, p in ((len(kernel), query_padding), (kernel.shape[2], key_padding))
    ]
    maps, out = scores.reshape(*size, *size), np.zeros((*size, *size))
    for place in np.ndindex(*out.shape):
        for at in np.ndindex(*kernel.shape):
            there = [p + a - before[axis // 2] for axis, (p, a) in enumerate(zip(place, at, strict=True))]
            if all(0 <= t < side for t, side in zip(there, (*size, *size), strict=True)):
                out[place] += kernel[at] * maps[tuple(there)]
    return out.reshape(scores.shape)


def _mixed(scores, weight):
    """Scores [G, N, N], heads mixed within groups by [groups, from, to]."""
    groups = scores.reshape(len(weight), -1, *scores.shape[1:])
    return np.stack(
        [sum(w[f, t] * g[f] for f in range(len(g))) for w, g in zip(weight, groups, strict=True) for t in range(len(g))]
    )


def _norm(x, weight, bias, eps):
    centred = x - x.mean(-1, keepdims=True)
    return centred / np.sqrt((centred**2).mean(-1, keepdims=True) + eps) * weight + bias


def _defined(mixer, form, state, x):
    """What a form makes of one map [H, W, C], by its definition."""
    options = FORMS[form]
    size, heads = x.shape[:2], mixer.num_heads
    tokens = x.reshape(-1, x.shape[-1])
    count, width = len(tokens), x.shape[-1] // heads

    def linear(name, values):
        return values @ state[f"{name}.weight"].T + state.get(f"{name}.bias", 0)

    q, k, v = linear("qkv", tokens).reshape(count, 3, heads, width).transpose(1, 2, 0, 3)  # [G, N, D]
    if options.get("qk_norm") == "layer_norm":
        q, k = (_norm(t, state[f"{n}_norm.weight"], state[f"{n}_norm.bias"], 1e-5) for n, t in (("q", q), ("k", k)))
    scale = np.full(heads, 1.0 if options.get("normalizer") == "standardize" else width**-0.5)
    if options.get("qk_norm") == "l2":
        q, k = (t / np.sqrt((t**2).sum(-1, keepdims=True)) for t in (q, k))
        scale = state["qk_scale"]
    precision = np.full((heads, count), width**-0.5)
    if options.get("key_precision"):
        precision = 2 * precision / (1 + np.exp(-linear("precision", tokens).T))
    factor = np.ones((heads, count))
    if "temperature" in options:
        factor = factor + np.exp(-np.exp(state["beta"])) * np.log(count)
    if options.get("temperature") == "query":
        factor = factor + np.tanh(linear("temperature", tokens)).T

    def pair(head, i, j, keys):
        a, b = q[head, i], keys[head, j]
        distance = ((a - b) ** 2).sum()
        if mixer.score == "neural":
            both = np.concatenate([linear("neural.q_proj", a), linear("neural.k_proj", b)])
            hidden = np.maximum(linear("neural.fc2", np.maximum(linear("neural.fc1", both), 0)), 0)
            return linear("neural.fc3", hidden)[0]
        if mixer.score == "collision":
            cosine = (a * b).sum() / np.sqrt((a**2).sum() * (b**2).sum())
            return options.get("hash_length", 9) * np.log(1 - np.arccos(0.98 * cosine) / np.pi)
        if mixer.score == "inverse_distance":
            return np.log(1 / (options.get("eps", 1e-3) + np.sqrt(distance) ** options.get("power", 2.0)))
        if mixer.score == "gaussian":
            guess = ((v[head, i] - v[head, j]) ** 2).sum()
            return -precision[head, j] / 2 * (distance + options.get("value_precision", 0) * guess)
        return scale[head] * (a * b).sum()

    def table(name):
        height, width = size
        table = state[f"{name}.table"].reshape(2 * height - 1, 2 * width - 1, heads)
        places = list(np.ndindex(*size))
        return np.array(
            [[table[t[0] - s[0] + height - 1, t[1] - s[1] + width - 1] for t in places] for s in places]
        ).transpose(2, 0, 1)

    padding = (options.get("query_padding", "both"), options.get("key_padding", "both"))

    def weights(keys):
        scores = np.array([[[pair(g, i, j, keys) for j in range(count)] for i in range(count)] for g in range(heads)])
        scores = scores * factor[..., None]
        if "query_kernel" in options:
            kernels = state["score_conv.weight"]
            scores = np.stack([_convolved(s, w, size, *padding) for s, w in zip(scores, kernels, strict=True)])
        if "score_groups" in options:
            scores = _mixed(scores, state["score_mix.weight"])
        if options.get("position_bias"):
            scores = scores + table("position_bias")
        name = options.get("normalizer", "softmax")
        out = np.stack([[_row_weights(name, row, state, g) for row in scores[g]] for g in range(heads)])
        if "weight_key_kernel" in options:
            kernels = state["weight_conv.weight"]
            out = np.stack([_convolved(s, w, size, *padding) for s, w in zip(out, kernels, strict=True)])
        if "weight_groups" in options:
            out = _mixed(out, state["weight_mix.weight"])
        return out * table("offset_factor") if options.get("offset_factor") else out

    for _ in range(options.get("key_steps", 0)):
        given = weights(k)
        k = np.einsum("gij,gid->gjd", given, q) / given.sum(1)[..., None]
    out = np.einsum("gij,gjd->igd", weights(k), v).reshape(count, -1)
    if form == "collision":
        parts = out.reshape(count, heads, width)
        out = (parts / np.sqrt((parts**2).sum(-1, keepdims=True))).reshape(count, -1)
    if form == "relu":
        gate = 1 / (1 + np.exp(-state["output_norm.gate"] * out))
        out = gate * state["output_norm.weight"] * out / np.sqrt((out**2).mean(-1, keepdims=True) + 1e-8)
    if form == "mta_after":
        parts = out.reshape(count, heads, width)
        parts = state["output_norm.weight"] * parts / np.sqrt((parts**2).mean(-1, keepdims=True) + 1e-5)
        gate = parts @ state["output_norm.gate.weight"][0] + state["output_norm.gate.bias"]
        out = (parts / (1 + np.exp(-gate[..., None]))).reshape(count, -1)
    if form == "standardize":
        out = _norm(out, state["output_norm.weight"], state["output_norm.bias"], 1e-3)
        out = out / 2 * (1 + np.tanh(np.sqrt(2 / np.pi) * (out + 0.044715 * out**3)))
    return linear("proj", out).reshape(x.shape)


@pytest.mark.parametrize("form", FORMS)
def test_each_form_and_its_gradients_are_by_definition(form):
    mixer = _mixer(form)
    x = torch.randn(1, 2, 3, 8, dtype=torch.float64, requires_grad=True)
    out = mixer(x)
    state = {name: value.numpy() for name, value in mixer.state_dict().items()}
    assert relative_error(out[0].detach(), _defined(mixer, form, state, x[0].detach().numpy())) < 1e-12

    draw = np.random.RandomState(1).standard_normal
    upstream = draw(out[0].shape)
    (out[0] * torch.from_numpy(upstream)).sum().backward()
    leaves = {"x": x} | dict(mixer.named_parameters())
    directions = {name: draw(tuple(leaf.shape)) for name, leaf in leaves.items()}
    slope = sum((leaf.grad.numpy() * directions[name]).sum() for name, leaf in leaves.items())

    def moved(step):
        there = {name: value + step * directions[name] for name, value in state.items()}
        return (_defined(mixer, form, there, x[0].detach().numpy() + step * directions["x"][0]) * upstream).sum()

    assert abs(slope - (moved(1e-6) - moved(-1e-6)) / 2e-6) < 1e-6 * max(1, abs(slope))


def test_expected_collisions_are_yosos():
    record = Record("yoso/yoso_e")
    mixer = ScoreMixer(12, 3, score="collision").double()
    state = record.state_dict()
    joined = {f"qkv.{kind}": torch.cat([state.pop(f"W_{n}.{kind}") for n in "qkv"]) for kind in ("weight", "bias")}
    mixer.load_state_dict(joined | {name.replace("ff.", "proj."): value for name, value in state.items()})
    x = record.image().view(2, 3, 3, 12).requires_grad_()
    out = mixer(x)
    assert relative_error(out.detach().flatten(), record.arrays["out"]) <= record.tolerance()
    (out * torch.from_numpy(np.random.RandomState(4).standard_normal((2, 9, 12))).view(out.shape)).sum().backward()
    assert relative_error(x.grad.flatten(), record.arrays["grad_x"]) <= record.tolerance()


# -- lengths, portions, dtypes ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("form", FORMS)
def test_portions_of_queries_change_nothing(form, monkeypatch):
    mixer = _mixer(form, size=(5, 4))
    x = torch.randn(2, 5, 4, 8, dtype=torch.float64, requires_grad=True)
    leaves = [x, *mixer.parameters()]
    whole = mixer(x)
    expected = torch.autograd.grad(whole.square().sum(), leaves)
    called = []
    monkeypatch.setattr(score, "MAX_SCORES", 2 * 4 * 20 * 3 * mixer._held)
    monkeypatch.setattr(score, "recomputed", lambda f, *a, own=score.recomputed: called.append(a) or own(f, *a))
    out = mixer(x)
    assert mixer.is_plain or len(called) > 1
    torch.testing.assert_close(out, whole, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(torch.autograd.grad(out.square().sum(), leaves), expected, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, pytest.param(torch.float16, marks=pytest.mark.full)])
def test_low_precision_stays_near_float64(form, dtype):
    mixer = _mixer(form, size=(3, 4))
    x = torch.randn(1, 3, 4, 8, dtype=torch.float64)
    exact = mixer(x)
    low = mixer.to(dtype)(x.to(dtype))
    assert low.dtype == dtype
    assert (low.double() - exact).norm() < 40 * torch.finfo(dtype).eps * exact.norm()


def _some(forms, chosen):
    """Return forms, those that are not chosen marked `full`."""
    return [form if form in chosen else pytest.param(form, marks=pytest.mark.full) for form in forms]


# Plain softmax is torch's own function; without their norms the sums over so many keys are too large for float16.
LARGE = [form for form in FORMS if form not in ("softmax", "temperature_position") and not form.endswith("_bare")]


@pytest.mark.parametrize("form", _some(LARGE, [*NORMALIZERS, "neural", "inverse_distance", "gaussian_keys"]))
def test_65536_large_tokens_in_half_precision_stay_finite(form):
    """Of two queries; those of the whole map come in portions like them."""
    torch.manual_seed(0)
    mixer = ScoreMixer(2, 1, **FORMS[form]).half()
    tokens = (torch.randn(1, 256 * 256, 2) * 10).half().requires_grad_()
    q, k, v = (t.transpose(1, 2).float() for t in mixer.split_heads(mixer.qkv(tokens)))
    mixer._in_portions = lambda function, *args, add=False: function(40000, 40002)
    out = mixer._attend(q, k, v, tokens.float(), (256, 256))
    out = mixer.output_norm(out.transpose(1, 2).flatten(2))
    assert out.half().isfinite().all() and out.abs().max() > 1e-6
    (out / out.detach().norm()).sum().backward()
    assert tokens.grad.isfinite().all() and all(p.grad is None or p.grad.isfinite().all() for p in mixer.parameters())


@pytest.mark.parametrize("form", _some(FORMS, []))
def test_each_form_compiles_into_one_graph_for_sizes_that_change(form):
    torch._dynamo.reset()
    mixer = _mixer(form).float()
    compiled = torch.compile(mixer, fullgraph=True, dynamic=True, backend="eager")
    for size in [(3, 4), (5, 2)]:
        x = torch.randn(2, *size, 8)
        torch.testing.assert_close(compiled(x), mixer(x))


@pytest.mark.parametrize("form", FORMS)
def test_prefix_tokens_take_part_where_places_do_not_matter(form):
    mixer = _mixer(form)
    assert mixer.takes_prefix_tokens == (form not in ON_A_MAP)
    tokens = Tokens(torch.randn(1, 8, 8, dtype=torch.float64), (2, 3), prefix=2)
    out = mix_tokens(mixer, tokens)
    if form in ON_A_MAP:
        assert not out[:, :2].any()
        return
    order = torch.tensor([1, 0, 7, 6, 5, 4, 3, 2])
    torch.testing.assert_close(mix_tokens(mixer, tokens._replace(x=tokens.x[:, order])), out[:, order])


@pytest.mark.parametrize("form", _some(FORMS, ["mta_before", "urpe"]))
@pytest.mark.parametrize("family", ["zoo_biformer_t", "zoo_convit_t"])
def test_each_form_stands_in_a_pyramid_and_among_tokens(family, form):
    model = timm.create_model(family, mixers={"type": "score", **FORMS[form]}, num_classes=3, **TINY[family])
    model(torch.randn(2, 3, 40, 56)).sum().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())


def test_numbers_for_offsets_are_resized_about_offset_0():
    mixer = ScoreMixer(8, 1, offset_factor=True, map_size=(3, 5))
    with torch.no_grad():
        mixer.offset_factor.table.zero_()
        mixer.offset_factor.table[2 * 9 + 4] = 1
    for size in [(3, 5), (7, 9), (1, 1), (2, 6)]:
        numbers = mixer.offset_factor(size, 0, size[0] * size[1], torch.float32)[0]
        assert torch.equal(numbers.diagonal(), torch.ones(size[0] * size[1]))
    assert mixer.offset_factor((3, 5), 0, 15, torch.float32)[0].sum() == 15


def test_plain_softmax_is_left_to_torch():
    assert ScoreMixer(8, 2).is_plain and ScoreMixer(8, 2, temperature="query").is_plain
    assert not any(_mixer(form).is_plain for form in FORMS if form not in ("softmax", "temperature_position"))


@pytest.mark.parametrize(
    "options",
    [
        {"normalizer": "sigmoid", "temperature": "query"},
        {"normalizer": "taylor", "qk_norm": "l2"},
        {"normalizer": "relu", "temperature": "position", "qk_norm": "layer_norm"},
    ],
)
def test_kernels_give_what_scores_that_are_held_give(options):
    generator = torch.Generator().manual_seed(0)
    mixer = ScoreMixer(8, 2, **options).to(DEVICE)
    for parameter in mixer.parameters():
        torch.nn.init.normal_(parameter, generator=generator) if DEVICE == "cpu" else torch.nn.init.normal_(parameter)
    x = torch.randn(2, 3, 4, 8, generator=generator).to(DEVICE)
    results = []
    for backend in ("triton", "reference"):
        with use_backend(backend), explain() as ran:
            out = mixer(x)
        fused = [d.backend for d in ran if d.operation == "score_attention"]
        assert fused == ["triton"] * (backend == "triton")
        results.append([out, *torch.autograd.grad(out.square().sum(), mixer.parameters())])
    for own, expected in zip(*results, strict=True):
        torch.testing.assert_close(own, expected, rtol=1e-4, atol=1e-4)


def test_scores_that_are_changed_are_not_left_to_kernels():
    forms = [{"qk_norm": "l2"}, {"position_bias": True}, {"weight_groups": 2}, {"score": "neural"}, {"key_kernel": 3}]
    found = [ScoreMixer(8, 2, normalizer="sigmoid", **form).has_kernels for form in forms]
    assert found == [True, False, False, False, False]
    assert not ScoreMixer(8, 2, normalizer="sparsemax").has_kernels and not ScoreMixer(8, 2).has_kernels


def test_softplus_of_scores_too_low_for_its_sum_is_softmax():
    low = torch.tensor([-300.0, -301.0, -320.0])
    torch.testing.assert_close(softplus(low), low.softmax(-1))
    around = torch.linspace(-20.5, -19.5, 5, dtype=torch.float64)
    expected = torch.from_numpy(_shares(np.log1p(np.exp(around.numpy()))))
    torch.testing.assert_close(softplus(around), expected, rtol=1e-13, atol=0)


def test_powers_of_distances_that_overflow_do_no_harm():
    q, k = torch.zeros(1, 1, 1, 2, requires_grad=True), torch.tensor([[[[3e4, 0.0], [3e4, 1.0], [0.0, 0.0]]]])
    scores = inverse_distances(q, k, 10.0, 1e-3)
    torch.testing.assert_close(scores[0, 0, 0, 0].item(), -10 * float(np.log(3e4)))
    torch.testing.assert_close(scores[0, 0, 0, 2].item(), -float(np.log(1e-3)))
    assert torch.autograd.grad(scores.sum(), q)[0].isfinite().all()


# -- entmax -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("alpha", [1.3, 2.0])
def test_entmax_has_its_first_and_second_derivatives(alpha):
    torch.manual_seed(0)
    scores = (2 * torch.randn(2, 5, dtype=torch.float64)).requires_grad_()
    assert torch.autograd.gradcheck(entmax, (scores, alpha), check_forward_ad=True, check_batched_grad=True)
    assert torch.autograd.gradgradcheck(entmax, (scores, alpha), fast_mode=True)
    if alpha < 2:  # at 2 the derivative for α is of one side
        learned = torch.full((2, 1), alpha, dtype=torch.float64, requires_grad=True)
        assert torch.autograd.gradcheck(entmax, (scores, learned), check_forward_ad=True, check_batched_grad=True)
        assert torch.autograd.gradgradcheck(entmax, (scores, learned), fast_mode=True)


@pytest.mark.parametrize("alpha", [2.0, torch.linspace(1.2, 1.8, 3, dtype=torch.float64)[:, None]])
def test_entmax_is_mapped_over_rows(alpha):
    scores = torch.randn(4, 3, 7, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    mapped = torch.func.vmap(entmax, (1, 0 if isinstance(alpha, torch.Tensor) else None), 1)(scores, alpha)
    torch.testing.assert_close(mapped, entmax(scores, alpha))
    of_rows = torch.func.vmap(torch.func.grad(lambda row: entmax(row, 1.5).square().sum()))(scores[:, 0])
    of_all = torch.func.grad(lambda rows: entmax(rows, 1.5).square().sum())(scores[:, 0])
    torch.testing.assert_close(of_rows, of_all)


@pytest.mark.parametrize("alpha", _some([1.01, 1.2, 1.5, 2.0], [1.5, 2.0]))
@pytest.mark.parametrize("spread", [1e-2, 1.0, 1e3])
def test_entmax_of_many_keys_is_that_of_bisection(alpha, spread):
    row = np.random.RandomState(0).standard_normal(65536) * spread
    out = entmax(torch.from_numpy(row), alpha).numpy()
    assert relative_error(out, _shares(_threshold(row, alpha))) < 1e-9
    assert abs(entmax(torch.from_numpy(row).float(), alpha).sum().item() - 1) < 1e-5
