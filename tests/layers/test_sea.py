"""SEA: the authors' on maps as sequences, at what the records do not reach its definition."""

import math

import numpy as np
import pytest
import torch
from golden import Record, relative_error

from visionzoo.layers.mixers import SeaMixer, score
from visionzoo.layers.mixers.sea import _rounded
from visionzoo.layers.outputs import collect

NAMES = {
    "qkv": "qkv",
    "proj": "proj",
    "attention.performer.projection_matrix": "features.projection",
    "attention.attention_predictor_enc": "encode",
    "attention.attention_predictor_enc_per_layer": "encode",
    "attention.attention_predictor_dec_row.0": "to_planes",
    "attention.attention_predictor_cnn.0.net.0": "reduce",
    "attention.attention_predictor_cnn.0.net.2": "mix",
    "attention.attention_predictor_cnn.0.net.5": "estimate",
    "attention.attention_predictor_dec_scaler.0": "scales",
}
FORMS = {"sea_heads": "heads", "sea_query": "query", "sea_queries": "queries", "sea_sample": "sample"}


def _our_name(name):
    theirs = max((key for key in NAMES if name == key or name.startswith(f"{key}.")), key=len)
    return NAMES[theirs] + name.removeprefix(theirs)


def _taken(tensor, count):
    """Return the values of a tensor that a record of `count` holds."""
    flat = tensor.detach().reshape(-1).numpy()
    return flat if len(flat) == count else flat[np.random.RandomState(len(flat)).randint(0, len(flat), count)]


def _mixer(record, among):
    given = record.meta["factory_kwargs"]
    mixer = SeaMixer(
        12,
        2,
        length=4,
        topk=given["k"],
        among=among,
        shared_encoder=not given.get("attention_predictor_enc_per_layer", False),
        scale_weights=given.get("partial_attention_scaler", True),
    ).double()
    mixer.load_state_dict({_our_name(key): value for key, value in record.state_dict().items()})
    return mixer


@pytest.mark.parametrize("form", FORMS)
def test_outputs_gradients_and_the_term_are_the_authors(form):
    record = Record(f"sea/{form}")
    mixer = _mixer(record, FORMS[form])
    x = record.image().view(2, 3, 3, 12).requires_grad_()
    with collect() as terms:
        out = mixer(x)
    factors = torch.from_numpy(np.random.RandomState(4).standard_normal((2, 9, 12)))
    (out * factors.view(2, 3, 3, 12)).sum().backward()
    found = {"out": out, "grad_x": x.grad, "loss": terms["estimation"]}
    for key, expected in record.arrays.items():
        own = found[key] if key in found else mixer.get_parameter(_our_name(key.removeprefix("grad/"))).grad
        if key.endswith("net.5.bias"):  # which the softmax over cells does not feel
            assert np.abs([own.numpy(), expected]).max() < 1e-14
        else:
            assert relative_error(_taken(own, expected.size), expected) <= record.tolerance(), key
    assert len(record.arrays) == 3 + len(list(mixer.parameters()))


def test_large_maps_come_in_portions_with_the_same_numbers(monkeypatch):
    torch.manual_seed(0)
    mixer = SeaMixer(4, 2, length=6, topk=5).double()
    whole, apart = (
        torch.randn(2, 5, 7, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(1)) for _ in "ab"
    )
    expected = mixer(whole.requires_grad_())
    monkeypatch.setattr(score, "MAX_SCORES", 2 * 2 * 35 * 2 * 4)  # portions of four of the 35 queries
    out = mixer(apart.requires_grad_())
    torch.testing.assert_close(out, expected, rtol=1e-12, atol=1e-12)
    for result in (out, expected):
        result.square().sum().backward()
    torch.testing.assert_close(apart.grad, whole.grad, rtol=1e-11, atol=1e-12)


@pytest.mark.parametrize("among", SeaMixer.AMONG)
@torch.no_grad()
def test_queries_see_the_tokens_of_the_largest_cells(among):
    torch.manual_seed(0)
    mixer = SeaMixer(4, 2, length=6, topk=3, among=among)
    shares = torch.rand(2, 2, 10, 6)
    seen = mixer._largest(shares)
    axes = {"query": (3,), "heads": (1, 3), "queries": (2, 3), "sample": (1, 2, 3)}[among]
    number = {"query": 2, "heads": 4, "queries": 18, "sample": 36}[among]  # of 3 * 6 / 10 for each query and head
    assert (seen.sum(axes) == number).all()
    least = torch.where(seen, shares, 2).amin(axes)
    assert (torch.where(seen, -1, shares).amax(axes) < least).all()
    q, k, v = torch.randn(3, 2, 2, 10, 2, dtype=torch.float64).unbind()
    cells = [math.floor((n + 0.5) / 10 * 6 - 1e-4) for n in range(10)]
    out = mixer._attend(q, k, v, seen, torch.tensor(cells))
    for b, g, i in np.ndindex(2, 2, 10):
        keys = [j for j in range(10) if seen[b, g, i, cells[j]]]
        weights = (k[b, g, keys] @ q[b, g, i]).softmax(0)
        torch.testing.assert_close(out[b, g, i], weights @ v[b, g, keys] if keys else torch.zeros(2).double())


def test_the_number_of_cells_is_rounded_as_torch_does():
    for number, by in np.ndindex(40, 8):
        assert _rounded(number, by + 1) == round(number / (by + 1))
