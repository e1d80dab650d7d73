"""Subsampled attention is attention to a random subset of the keys, in training or in an ensemble."""

import pytest
import timm
import torch
from layers.test_mixers import _spec

from visionzoo.layers.mixers import MIXERS, base, build_mixer
from visionzoo.layers.subsampling import SelfEnsemble, Subsampling, subsample_attention

ABLE = [name for name, kind in MIXERS.items() if kind.SUBSAMPLES]
VIT = {"depth": 2, "embed_dim": 8, "num_heads": 2, "patch_size": 8, "img_size": 32, "num_classes": 3}


def hiding(share):
    """Attention that hides the keys that are not in the subset, from the definition."""

    def attend(q, k, v, *, bias=None, scale=None):
        numbers = torch.arange(k.shape[-2], dtype=k.dtype).view(1, 1, -1, 1)
        seen = Subsampling(share).draw(numbers, numbers, None)[0].flatten().long()
        hidden = torch.full((k.shape[-2],), float("-inf"), dtype=k.dtype).index_fill(0, seen, 0)
        scores = q @ k.mT * (q.shape[-1] ** -0.5 if scale is None else scale) + hidden
        return (scores if bias is None else scores + bias).softmax(-1) @ v

    return attend


@pytest.mark.parametrize("name", ABLE)
def test_it_is_attention_to_a_subset_of_the_keys(name, monkeypatch):
    torch.manual_seed(0)
    mixer = build_mixer(_spec(name), 16, 2).double()
    for parameter in mixer.parameters():  # biases of offsets begin at 0
        torch.nn.init.normal_(parameter, std=0.3)
    x = torch.randn(2, 4, 4, 16, dtype=torch.float64)
    evaluated = mixer.eval()(x)
    assert subsample_attention(mixer, 0.5) == (1, 1)
    assert torch.equal(mixer.eval()(x), evaluated)
    mixer.train()
    torch.manual_seed(1)
    out = mixer(x)
    subsample_attention(mixer, 1)
    monkeypatch.setattr(base, "attend", hiding(0.5))
    torch.manual_seed(1)
    torch.testing.assert_close(out, mixer(x), rtol=1e-11, atol=1e-11)
    assert (out - evaluated).abs().max() > 1e-4


@pytest.mark.parametrize("name", sorted(set(MIXERS) - set(ABLE)))
def test_other_mixers_are_left_as_they_are(name):
    mixer = build_mixer(_spec(name), 16, 2)
    subsample_attention(mixer, 0.5)
    assert mixer.subsampling is None


def test_each_key_is_drawn_as_often_as_the_others_and_one_at_least():
    torch.manual_seed(0)
    keys = torch.arange(8.0).view(1, 1, 8, 1)
    draws = [Subsampling(0.25).draw(keys, 2 * keys, None) for _ in range(800)]
    assert all(torch.equal(2 * k, v) and len(k.unique()) == 2 for k, v, _ in draws)
    counts = torch.cat([k.flatten() for k, _, _ in draws]).long().bincount()
    assert counts.min() > 150 and counts.max() < 250  # 200 on average
    assert Subsampling(0.01).draw(keys, keys, None)[0].shape[2] == 1


def test_an_ensemble_is_the_mean_of_its_sub_networks_probabilities():
    torch.manual_seed(0)
    model = timm.create_model("zoo_deit_t", **VIT).double().eval()
    image = torch.randn(2, 3, 32, 32, dtype=torch.float64)
    ensemble = SelfEnsemble(model, 0.3, 4)
    torch.manual_seed(1)
    logs = ensemble(image)
    torch.manual_seed(1)
    each = torch.stack([model(image).softmax(-1) for _ in range(4)])
    torch.testing.assert_close(logs.exp(), each.mean(0), rtol=1e-12, atol=1e-12)
    assert (each[0] - each[1]).abs().max() > 0


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda vit: subsample_attention(vit, 0), "above 0 and at most 1, got share=0"),
        (lambda vit: SelfEnsemble(vit, 0.5, 0), "one sample at least, got samples=0"),
        (lambda vit: SelfEnsemble(torch.nn.Identity(), 0.5, 1), "Identity has 0 mixers, and none"),
    ],
)
def test_what_cannot_be_is_named(make, message):
    with pytest.raises(ValueError, match=message):
        make(timm.create_model("zoo_deit_t", **VIT))
