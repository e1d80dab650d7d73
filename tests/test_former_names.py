"""What arguments, values and tensors were called before is still taken."""

import pytest
import timm
import torch

import visionzoo
from visionzoo.former_names import former_names
from visionzoo.kernels import score_attention
from visionzoo.layers.mixers import build_mixer
from visionzoo.layers.mixers.channel import ChannelMixer
from visionzoo.layers.mixers.score import ScoreMixer


@pytest.mark.parametrize("kind", ["score", "channel"])
def test_options_in_specs_and_in_calls(kind):
    spec = build_mixer({"type": kind, "normaliser": "standardise"}, 8)
    called = {"score": ScoreMixer, "channel": ChannelMixer}[kind](8, normaliser="standardise")
    now = build_mixer({"type": kind, "normalizer": "standardize"}, 8)
    assert str(spec) == str(called) == str(now)
    assert former_names(type(now)) == {"normaliser": "normalizer"}


def test_of_two_names_one_is_left_out():
    with pytest.raises(TypeError, match="got normalizer and its former name normaliser; leave one out"):
        ScoreMixer(8, 2, normaliser="relu", normalizer="relu")
    with pytest.raises(ValueError, match="unknown normalizer='max', expected one of"):
        build_mixer({"type": "score", "normaliser": "max"}, 8)


def test_arguments_of_operations():
    q, k, v = torch.randn(3, 1, 2, 2, 1, 4).unbind()
    torch.testing.assert_close(score_attention(q, k, v, normaliser="relu"), score_attention(q, k, v, normalizer="relu"))


@pytest.mark.parametrize("load", [lambda model, state: model.load_state_dict(state), visionzoo.load_weights])
def test_tensors_in_checkpoints(load):
    options = {"mixers": {"type": "score", "normaliser": "entmax"}, "depth": 1, "embed_dim": 8, "num_heads": 2}
    models = [timm.create_model("zoo_deit_t", img_size=32, num_classes=2, **options) for _ in range(2)]
    with torch.no_grad():
        models[0].blocks[0].mixer.normalizer.sharpness.fill_(0.3)
    state = {key.replace("normalizer", "normaliser"): value for key, value in models[0].state_dict().items()}
    assert any("normaliser" in key for key in state)
    load(models[1], state)
    for (name, was), now in zip(models[0].state_dict().items(), models[1].state_dict().values(), strict=True):
        assert torch.equal(was, now), name
