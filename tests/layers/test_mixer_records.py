"""Mixers that several papers share are the authors' layers: outputs and gradients of records of their code."""

import numpy as np
import pytest
import torch
from golden import Record, relative_error

from visionzoo.layers.mixers import ChannelMixer, KMeansMixer, LinearMixer, MixerNCHW, MultiPoolMixer, ScoreMixer


def _same(state):
    """Names of ours, behind those of what holds a layer; parts without weights are empty."""
    moved = {"attention.projection_matrix": "features.projection", "attention.sharpness": "normalizer.sharpness"}
    moved["attention.attention.kmeans.means"] = "centroids.means"
    named = {moved.get(name, name.removeprefix("layer.")): value for name, value in state.items()}
    return {name: value for name, value in named.items() if not name.startswith("attention.")}


def _without_features(state):
    return {name: value for name, value in _same(state).items() if not name.startswith("features.")}


def _separate(state):
    joined = {kind: torch.cat([state[f"layer.{n}_proj.{kind}"] for n in "qkv"]) for kind in ("weight", "bias")}
    return {f"qkv.{kind}": value for kind, value in joined.items()} | {
        f"proj.{kind}": state[f"layer.out_proj.{kind}"] for kind in joined
    }


def _neural(state):
    names = {"q_proj": "q_proj", "k_proj": "k_proj", "linear1": "fc1", "linear2": "fc2", "linear3": "fc3"}
    ours = {f"neural.{names[part]}.{kind}": state[f"{part}.{kind}"] for part in names for kind in ("weight", "bias")}
    qkv = (
        state["to_qkv.weight"].view(4, 3, 3, 12).permute(1, 2, 0, 3).reshape(36, 12)
    )  # theirs is D x (q, k, v) x heads
    return ours | {"qkv.weight": qkv, "proj.weight": state["W_out.weight"], "proj.bias": torch.zeros(12)}


def _keys_are_queries(state):
    ours = _same(state)
    q, _, v = ours["qkv.weight"].chunk(3)
    q_bias, _, v_bias = ours["qkv.bias"].chunk(3)
    return ours | {"qkv.weight": torch.cat([q, v]), "qkv.bias": torch.cat([q_bias, v_bias])}


def _channels(state):
    def values_first(weight):
        q, k, v = weight.chunk(3)
        return torch.cat([v, q, k])

    ours = {
        "qkv.weight": values_first(state["qkv.weight"][:, :, 0, 0]),
        "qkv_conv.weight": values_first(state["qkv_dwconv.weight"]),
        "proj.weight": state["project_out.weight"][:, :, 0, 0],
        "temperature": state["temperature"].flatten(),
    }
    if "attn1" in state:
        ours["normalizer.factors"] = torch.cat([state[f"attn{i}"] for i in range(1, 5)])
    return ours


def _score(**options):
    return ScoreMixer(12, 3, **options)


def _linear(feature_map, **options):
    return LinearMixer(12, 3, feature_map=feature_map, **options)


def _of_channels(num_heads, normalizer):
    options = {"qkv_kernel": 3, "qk_norm": "l2", "qkv_bias": False, "proj_bias": False}
    return ChannelMixer(12, num_heads, normalizer=normalizer, **options)


RECORDS = {
    "scores/sigmoid": (_score(normalizer="sigmoid"), _same),
    "scores/sigmoid_qk_norm": (_score(normalizer="sigmoid", qk_norm="layer_norm"), _same),
    "scores/cog": (_score(normalizer="signed_softmax", qkv_bias=False), _same),
    "scores/sparsemax": (_score(normalizer="sparsemax"), _same),
    "scores/entmax15": (_score(normalizer="entmax15"), _same),
    "scores/entmax": (_score(normalizer="entmax"), _same),
    "scores/gaussian": (_score(score="gaussian"), _same),
    "scores/gaussian_keys": (_score(score="gaussian", key_steps=2), _same),
    "scores/neural": (_score(score="neural", hidden_dim=4, qkv_bias=False), _neural),
    "linear/cosformer": (_linear("cosformer"), _separate),
    "linear/favor": (_linear("favor", num_features=6), _same),
    "linear/favor_relu": (_linear("favor_relu", num_features=6), _same),
    "linear/efficient": (_linear("softmax", denominator="count"), _without_features),
    "sparse/kmeans": (KMeansMixer(12, 3, num_clusters=2, window_size=4), _same),
    "sparse/kmeans_shared": (KMeansMixer(12, 3, num_clusters=2, window_size=4, shared_qk=True), _keys_are_queries),
    "sparse/topk_channels": (_of_channels(2, "topk_softmax"), _channels),
    "sparse/relu_channels": (_of_channels(3, "relu"), _channels),
    "sparse/ponet": (MultiPoolMixer(12, 3, segments=2), _same),
}


@pytest.mark.parametrize("name", RECORDS)
def test_outputs_and_gradients_are_the_authors(name):
    record, (mixer, ours) = Record(name), RECORDS[name]
    mixer = mixer.double().eval()
    mixer.load_state_dict(ours(record.state_dict()))
    x = record.image().requires_grad_()
    out = MixerNCHW(mixer)(x) if x.ndim == 4 else mixer(x.unsqueeze(1)).squeeze(1)
    (out * torch.from_numpy(np.random.RandomState(4).standard_normal(out.shape))).sum().backward()
    for value, expected in ((out.detach(), record.arrays["out"]), (x.grad, record.arrays["grad_x"])):
        assert expected.size == value.numel()
        assert relative_error(value.flatten(), expected) <= record.tolerance()
