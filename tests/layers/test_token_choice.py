"""Heads that choose tokens, against their definition; centroids in training."""

import math

import pytest
import torch
import torch.nn.functional as F
from torch.autograd import gradcheck

from visionzoo.layers.mixers import ExpertChoiceMixer, KMeansMixer
from visionzoo.layers.mixers.token_choice import Centroids
from visionzoo.layers.outputs import collect

KMEANS = [
    {"num_clusters": 3},  # clusters of 5 of 15 tokens, rounded up
    {"num_clusters": 4, "window_size": 2},  # tokens that none takes
    {"num_clusters": 2, "window_size": 99, "shared_qk": True},
    {"num_clusters": 5, "window_size": 1, "shared_qk": True, "qkv_bias": False},
]


def _mixer(kind, **options):
    torch.manual_seed(0)
    mixer = kind(8, 2, **options).double().eval()
    for parameter in mixer.parameters():
        torch.nn.init.normal_(parameter, std=0.5)
    return mixer


def _seen(q, keys, values):
    weights = torch.stack([(q * key).sum() / math.sqrt(len(q)) for key in keys]).softmax(0)
    return sum(weight * value for weight, value in zip(weights, values, strict=True))


@pytest.mark.parametrize("options", KMEANS)
@torch.no_grad()
def test_clusters_attend_within_themselves(options):
    mixer = _mixer(KMeansMixer, **options)
    x = torch.randn(1, 3, 5, 8, dtype=torch.float64)
    shared, clusters = options.get("shared_qk"), options["num_clusters"]
    window = min(options.get("window_size", -(-15 // clusters)), 15)
    parts = mixer.qkv(x[0].flatten(0, 1)).chunk(2 if shared else 3, -1)
    out = torch.zeros(15, 8, dtype=torch.float64)
    for head in range(2):
        q, *k, v = (part[:, 4 * head : 4 * head + 4] for part in parts)
        keys = q / q.norm(dim=-1, keepdim=True) if shared else k[0]
        total, taken = torch.zeros_like(q), torch.zeros(15, 1, dtype=torch.float64)
        for mean in mixer.centroids.means[head]:

            def nearest(tokens, mean=mean):
                return sorted(range(15), key=lambda n: -float(tokens[n] @ mean / tokens[n].norm()))[:window]

            queries, seen = nearest(q), nearest(keys)
            for i in queries:
                others = [j for j in seen if not (shared and j == i)] or [i]
                total[i] += _seen(q[i], keys[others], v[others])
                taken[i] += 1
        out[:, 4 * head : 4 * head + 4] = total / (taken + 1e-5)
    torch.testing.assert_close(mixer(x)[0].flatten(0, 1), mixer.proj(out), rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize(("count", "options"), [(15, {}), (15, {"sparsity": 9, "head_dim": 5}), (1, {"sparsity": 1})])
@torch.no_grad()
def test_heads_attend_among_the_tokens_of_their_choice(count, options):
    mixer = _mixer(ExpertChoiceMixer, **options)
    x = torch.randn(count, 8, dtype=torch.float64)
    width, expected = mixer.head_dim, torch.zeros_like(x)
    chosen = min(count, max(2, count // options.get("sparsity", 4)))
    for head in range(2):
        gate = torch.sigmoid(x @ mixer.router.weight[head])
        best = sorted(range(count), key=lambda n: -float(gate[n]))[:chosen]
        q, k, v = (x @ mixer.qkv[head, :, part * width : (part + 1) * width] for part in range(3))
        for i in best:
            expected[i] += gate[i] * (_seen(q[i], k[best], v[best]) @ mixer.proj[head])
    out = mixer(x.view(1, -1, 1, 8)).view(count, 8)
    torch.testing.assert_close(out, expected, rtol=1e-12, atol=1e-12)
    assert (out == 0).all(-1).any() == (chosen * 2 < count)


@pytest.mark.parametrize(
    ("kind", "options"), [*((KMeansMixer, options) for options in KMEANS[:3]), (ExpertChoiceMixer, {"sparsity": 2})]
)
def test_gradients_are_those_of_differences(kind, options):
    mixer = _mixer(kind, **options)
    x = torch.randn(1, 2, 3, 8, dtype=torch.float64, requires_grad=True)
    names, values = zip(*mixer.named_parameters(), strict=True)

    def of(x, *values):
        return torch.func.functional_call(mixer, dict(zip(names, values, strict=True)), x)

    gradcheck(of, (x, *values), fast_mode=True)


def test_centroids_start_among_the_tokens_and_follow_them_in_training():
    torch.manual_seed(0)
    centroids = Centroids(1, 3, 2, decay=0.75).double()
    angles = torch.tensor([0.0, 0.1, 2.0, 2.1, 4.0, 4.1], dtype=torch.float64)
    tokens = 5 * torch.stack([angles.cos(), angles.sin()], 1)[None, None]
    untrained = centroids.means.clone()
    centroids.eval()(tokens)
    assert torch.equal(centroids.means, untrained)
    centroids.train()
    centroids.started = True
    centroids.means.copy_(torch.tensor([[[1.0, 0.0], [0.0, 1.0], [-1.0, 0.0]]]))
    tokens = tokens[:, :, :4].clone().requires_grad_()
    with collect() as terms:
        products = centroids(tokens)
    unit = F.normalize(tokens[0, 0].detach(), dim=-1)
    old = torch.tensor([[1.0, 0.0], [0.0, 1.0], [-1.0, 0.0]], dtype=torch.float64)
    torch.testing.assert_close(products[0, 0], unit @ old.T)
    nearest = [0, 0, 1, 1]  # 2 and 2.1 radians are nearer to π/2 than to π; none is nearest to the third
    moved = [F.normalize(unit[:2].sum(0), dim=0), F.normalize(unit[2:].sum(0), dim=0), old[2]]
    torch.testing.assert_close(centroids.means[0], 0.75 * old + 0.25 * torch.stack(moved))
    expected = sum((unit[i] - old[n]).square().sum() for i, n in enumerate(nearest)) / 8
    torch.testing.assert_close(terms["commitment"], expected)
    terms["commitment"].backward()
    assert tokens.grad.any()


def test_the_first_training_step_finds_the_clusters_and_loaded_ones_stay():
    torch.manual_seed(0)
    tokens = F.normalize(torch.randn(2, 2, 40, 3, dtype=torch.float64), dim=-1)
    centroids = Centroids(2, 4, 3, decay=1.0).double()
    before = centroids.means.clone()
    centroids(tokens)
    for head in range(2):
        every = tokens[:, head].flatten(0, 1)
        for mean in centroids.means[head]:  # ten steps are close to where k-means stays
            nearest = every[
                (every @ centroids.means[head].T).argmax(1) == (centroids.means[head] == mean).all(1).int().argmax()
            ]
            assert F.normalize(nearest.sum(0), dim=0) @ mean > 0.99
    assert not torch.equal(before, centroids.means)
    loaded = Centroids(2, 4, 3, decay=1.0).double()
    loaded.load_state_dict(centroids.state_dict())
    loaded(tokens.flip(-1))
    assert torch.equal(loaded.means, centroids.means)


@pytest.mark.parametrize(
    "mixer",
    [KMeansMixer(2, 1, num_clusters=16, window_size=64), ExpertChoiceMixer(2, 1, sparsity=512)],
    ids=["kmeans", "expert_choice"],
)
@torch.no_grad()
def test_65536_large_tokens_in_half_precision_stay_finite(mixer):
    out = mixer.half().eval()((torch.randn(1, 256, 256, 2) * 10).half())
    assert out.isfinite().all() and out.std() > 0


@torch.no_grad()
def test_tokens_of_zeros_have_no_direction_and_do_no_harm_in_half_precision():
    mixer = KMeansMixer(8, 2, num_clusters=3, shared_qk=True, qkv_bias=False).half()
    x = torch.randn(2, 3, 5, 8).half()
    x[:, 1:] = 0
    assert mixer(x).isfinite().all() and mixer.centroids.means.isfinite().all()
