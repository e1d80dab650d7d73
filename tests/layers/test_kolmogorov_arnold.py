"""Learned activations against the paper's equations, for a class token too, of other sizes, and shared by blocks."""

import math

import pytest
import timm
import torch
from quick import draw_weights

import visionzoo
from visionzoo.layers.mixers import KolmogorovArnoldMixer
from visionzoo.layers.mixers.kolmogorov_arnold import project_to_simplex
from visionzoo.models._registry import TINY

BASES = {
    "zero": lambda x: 0.0,
    "identity": lambda x: x,
    "silu": lambda x: x / (1 + math.exp(-x)),
    "gelu": lambda x: x * (1 + math.erf(x / 2**0.5)) / 2,
}


def _by_definition(mixer, x, base, project):
    """One sequence [N, C], from the functions of all pairs of a score and an output."""
    count, heads = len(x), mixer.num_heads
    q, k, v = mixer.qkv(x).reshape(count, 3, heads, -1).unbind(1)
    series, weight = mixer.activation.series, mixer.activation.weight
    terms, rank = series.shape[1] // 2, weight.shape[2]
    out = torch.zeros_like(v)
    for head in range(heads):
        scores = (q[:, head] @ k[:, head].T / q.shape[-1] ** 0.5).tolist()
        for i in range(count):
            hidden = torch.zeros(rank, dtype=x.dtype)
            for p in range(rank):
                for j, score in enumerate(scores[i]):
                    hidden[p] += BASES[base](score)
                    for m in range(terms):
                        hidden[p] += series[head, m, j, p] * math.cos((m + 1) * score)
                        hidden[p] += series[head, terms + m, j, p] * math.sin((m + 1) * score)
            hidden = project_to_simplex(hidden) if project else hidden
            out[i, head] = (weight[head] @ hidden) @ v[:, head]
    return mixer.proj(out.reshape(count, -1))


@pytest.mark.parametrize(
    ("base", "prefix", "project"),
    [("zero", 0, False), ("identity", 2, False), ("silu", 1, True), ("gelu", 0, False)],
)
@torch.no_grad()
def test_scores_pass_through_fourier_series_of_low_rank(base, prefix, project):
    torch.manual_seed(0)
    options = {"map_size": (2, 3), "rank": 2, "grid_size": 2, "base": base, "prefix_tokens": prefix, "project": project}
    mixer = KolmogorovArnoldMixer(4, 2, **options).double()
    x = torch.randn(1, 1 if prefix else 2, prefix + 6 if prefix else 3, 4, dtype=torch.float64)
    out = mixer(x, map_size=(2, 3), prefix=prefix) if prefix else mixer(x)
    expected = _by_definition(mixer, x.reshape(-1, 4), base, project)
    torch.testing.assert_close(out.reshape(-1, 4), expected, rtol=1e-10, atol=1e-10)


def test_points_of_the_simplex_are_the_nearest():
    """What is kept is moved by one and the same distance, and what is cut off would have become negative."""
    x = torch.randn(20, 5, dtype=torch.float64)
    points = project_to_simplex(x)
    torch.testing.assert_close(points.sum(1), torch.ones(20, dtype=x.dtype))
    kept, distances = points > 0, x - points
    moved = distances.masked_fill(~kept, -math.inf).amax(1, keepdim=True)
    torch.testing.assert_close(distances[kept], moved.expand(-1, 5)[kept])
    assert (points >= 0).all() and (x <= moved + 1e-12)[~kept].all() and not kept.all()


@torch.no_grad()
def test_functions_fit_maps_and_checkpoints_of_other_sizes_and_sums_stay():
    mixer = KolmogorovArnoldMixer(4, 2, map_size=(4, 4), rank=2, prefix_tokens=1).double()
    other = KolmogorovArnoldMixer(4, 2, map_size=(6, 5), rank=2, prefix_tokens=1).double()
    other.load_state_dict(
        {
            name: other.activation.fit_weight(name, value) if "activation" in name else value
            for name, value in mixer.state_dict().items()
        }
    )
    x = torch.randn(2, 1, 31, 4, dtype=torch.float64)
    torch.testing.assert_close(other(x, map_size=(6, 5), prefix=1), mixer(x, map_size=(6, 5), prefix=1))
    mixer.activation.series.fill_(1.0)
    wide = other.activation.fit_weight("series", mixer.activation.series)
    torch.testing.assert_close(wide.sum(2), mixer.activation.series.sum(2))
    with pytest.raises(ValueError, match="series: expected the tokens of a square map behind 1 others, got"):
        mixer.activation.fit_weight("series", torch.zeros(2, 6, 16, 2))
    for given in ({"map_size": (6, 5), "prefix": 2}, {}):
        with pytest.raises(ValueError, match="expected 1 prefix tokens, as prefix_tokens says, got "):
            mixer(x, **given)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_what_is_not_finite_stays_in_its_row(value):
    """No index out of range: on a GPU that would end the process instead of one training step."""
    rows = torch.tensor([[0.3, 0.9, -0.2], [0.3, value, -0.2]])
    points = project_to_simplex(rows)
    assert torch.equal(points[:1], project_to_simplex(rows[:1])) and points[1].isnan().any()


@torch.no_grad()
def test_all_blocks_share_the_functions_of_universal_models_and_deits_weights_fit_the_rest():
    model = draw_weights(timm.create_model("zoo_karat_t_g3u", num_classes=5, **TINY["zoo_karat_t_g3u"])).eval()
    shared = [name for name, _ in model.named_parameters() if "activation" in name]
    assert shared == ["activation.series", "activation.weight"]
    apart = timm.create_model("zoo_karat_t_g3b", num_classes=5, **TINY["zoo_karat_t_g3b"]).eval()
    state = model.state_dict()
    for name in shared:
        value = state.pop(name)
        state |= {f"blocks.{i}.mixer.{name}": value for i in range(2)}
    apart.load_state_dict(state)
    image = torch.randn(1, 3, 64, 48)
    assert torch.equal(apart(image), model(image))
    apart.blocks[1].mixer.activation.series.add_(1)
    assert not torch.allclose(apart(image), model(image))
    deit = timm.create_model(
        "deit_tiny_patch16_224", num_classes=5, img_size=64, depth=2, embed_dim=16, num_heads=2
    ).state_dict()
    report = visionzoo.load_weights(model, deit, strict=False)
    assert report.names == "DeiT's" and report.missing == shared and not report.unexpected
    assert "activation.series" not in dict(timm.create_model("zoo_karat_t_g3u", mixers="full").named_parameters())
