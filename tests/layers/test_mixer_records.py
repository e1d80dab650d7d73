"""Mixers that several papers share are the authors' layers: outputs and gradients of records of their code."""

import numpy as np
import pytest
import torch
from golden import Record, relative_error

from visionzoo.layers.mixers import (
    MIXERS,
    ChannelMixer,
    DynamicLocalMixer,
    ExpertChoiceMixer,
    FourierMixer,
    KMeansMixer,
    LinearMixer,
    MixerNCHW,
    MultiPoolMixer,
    PatternMixer,
    ScoreMixer,
)


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


def _of_pairs(kernel, keys):
    """Put a kernel for rows of queries and keys [G, 1, a, b] into one for squares, whose queries end in its own."""
    heads, _, queries, width = kernel.shape
    whole = kernel.new_zeros(heads, queries, queries, width, width)
    whole[:, -1, :, {"both": width // 2, "before": -1, "after": 0}[keys]] = kernel[:, 0]
    return whole


def _multi_token(state):
    ours = {
        "qkv.weight": torch.cat([state[f"layer.w{n}.weight"] for n in "qkv"]),
        "proj.weight": state["layer.wo.weight"],
        "proj.bias": torch.zeros(12),
    }
    normed = "layer.subln.weight" in state
    keys = "after" if normed else "both" if "layer.head_kernel" in state else "before"
    ours["score_conv.weight"] = _of_pairs(state["layer.mta_kernel"], keys)
    if normed:
        ours["output_norm.weight"] = state["layer.subln.weight"]
        ours |= {f"output_norm.gate.{kind}": state[f"layer.gate.{kind}"] for kind in ("weight", "bias")}
    if "layer.head_kernel" in state:
        return ours | {"weight_mix.weight": state["layer.head_kernel"]}
    return ours | {
        "score_mix.weight": state["layer.wpsm.weight"].T[None],
        "weight_conv.weight": _of_pairs(state["layer.mta_kernel_after_sm"], "before"),
    }


def _selective(state):
    names = {"c_attn": "qkv", "c_proj": "proj"}
    return {"beta": state["beta"]} | {
        f"{names[part]}.{kind}": state[f"{part}.{kind}"] for part in names for kind in ("weight", "bias")
    }


def _universal(state):
    tables = {"ur_rp_bias": "offset_factor", "rp_bias": "position_bias"}
    found = {f"{tables[part]}.table": state[f"{part}.weight"] for part in tables if f"{part}.weight" in state}
    return _separate(state) | found


def _latte(state):
    return {
        "qkv.weight": torch.cat([state[f"W{n}"].T for n in "qkv"]),
        "proj.weight": state["o_proj"].T,
        "proj.bias": torch.zeros(12),
    }


def _normalized(state):
    parts = {"w": ("weight", lambda value: value.T), "b": ("bias", lambda value: value)}
    ours = {}
    for kind, (name, turn) in parts.items():
        ours[f"qkv.{name}"] = torch.cat([turn(state[f"{part}_{kind}"]) for part in ("query", "key", "value")])
        ours[f"proj.{name}"] = turn(state[f"mix_{kind}"])
    return ours | {
        "normalizer.gain": state["gain"].flatten(),
        "normalizer.bias": state["bias"].flatten(),
        "output_norm.weight": state["norm_weight"],
        "output_norm.bias": state["norm_bias"],
    }


def _rectified(state):
    names = {"qkv_map_W_0_0": "qkv.weight", "qkv_map_b_0": "qkv.bias", "o_map_W_0_0": "proj.weight"}
    names |= {"o_map_b_0": "proj.bias", "post_scale": "output_norm.weight", "post_gate": "output_norm.gate"}
    found = {ours: state[f"dot_attention_{name}"] for name, ours in names.items()}
    return {name: value.T if value.ndim == 2 else value for name, value in found.items()}


def _experts(state):
    return {"router.weight": state["r.0.weight"], "qkv": state["QKV.W"], "proj": state["O.W"]}


def _discs(state):
    ours = {f"qkv.{kind}": torch.cat([state[f"to_{n}.{kind}"] for n in "qkv"]) for kind in ("weight", "bias")}
    ours |= {name: value for name, value in state.items() if name.startswith("proj.")}
    cells = state.get("processor.spatial_weight")
    return ours if cells is None else ours | {"cell_weight": cells[0, 0, 0, :, 0, :, 0]}


def _dynamic_local(state):
    names = {"conv0": "in_proj", "conv1": "proj", "conv.conv1.0": "reduce", "conv.conv1.1": "conv"}
    names["conv.conv2.0"] = "to_weights"
    ours = {f"{ours}.{kind}": state.get(f"{n}.{kind}") for n, ours in names.items() for kind in ("weight", "bias")}
    return {
        name: value if name == "conv.weight" or value.ndim == 1 else value[:, :, 0, 0]
        for name, value in ours.items()
        if value is not None
    }


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


def _multi_token_mixer(**options):
    return ScoreMixer(12, 4, query_padding="before", qkv_bias=False, **options)


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
    "scores/mta": (_multi_token_mixer(query_kernel=3, key_kernel=5, weight_groups=2), _multi_token),
    "scores/mta_weights": (
        _multi_token_mixer(
            query_kernel=3,
            key_kernel=3,
            key_padding="before",
            weight_query_kernel=2,
            weight_key_kernel=3,
            score_groups=4,
        ),
        _multi_token,
    ),
    "scores/mta_norm": (
        _multi_token_mixer(
            query_kernel=2, key_kernel=4, key_padding="after", weight_groups=4, output_norm="gated_head_rms"
        ),
        _multi_token,
    ),
    "scores/selective": (_score(temperature="position"), _selective),
    "scores/urpe": (_score(offset_factor=True, map_size=(1, 9)), _universal),
    "scores/urpe_bias": (_score(offset_factor=True, position_bias=True, map_size=(1, 9)), _universal),
    "scores/normalized": (_score(normalizer="standardize"), _normalized),
    "scores/rela": (_score(normalizer="relu"), _rectified),
    "linear/latte": (_linear("softmax", denominator="count", key_dim=2, qkv_bias=False), _latte),
    "linear/log_normal": (_linear("log_normal"), _same),
    "linear/cosformer": (_linear("cosformer"), _separate),
    "linear/favor": (_linear("favor", num_features=6), _same),
    "linear/favor_relu": (_linear("favor_relu", num_features=6), _same),
    "linear/efficient": (_linear("softmax", denominator="count"), _without_features),
    "sparse/kmeans": (KMeansMixer(12, 3, num_clusters=2, window_size=4), _same),
    "sparse/kmeans_shared": (KMeansMixer(12, 3, num_clusters=2, window_size=4, shared_qk=True), _keys_are_queries),
    "sparse/topk_channels": (_of_channels(2, "topk_softmax"), _channels),
    "sparse/relu_channels": (_of_channels(3, "relu"), _channels),
    "sparse/clear": (PatternMixer(12, 3, parts=("disc",), radius=3), _discs),
    "sparse/clear_cells": (PatternMixer(12, 3, parts=("disc", "cells"), radius=3, cell_size=2), _discs),
    "sparse/dynamic_local": (DynamicLocalMixer(12, 3, kernel_size=3), _dynamic_local),
    "sparse/dynamic_local_plain": (DynamicLocalMixer(12, 3, kernel_size=3, bias=False), _dynamic_local),
    "sparse/expert_choice": (ExpertChoiceMixer(12, 3, sparsity=2), _experts),
    "sparse/expert_choice_first": (ExpertChoiceMixer(12, 3, sparsity=2, include_first=True), _experts),
    "sparse/fnet": (FourierMixer(12, sequence=True, orthonormal=False), _same),
    "sparse/strided": (PatternMixer(12, 3, parts=("column",)), _same),
    "sparse/ponet": (MultiPoolMixer(12, 3, segments=2), _same),
}


def compared(name):
    """Yield what a record holds of a mixer, as (array's name, value, array)."""
    record, (mixer, ours) = Record(name), RECORDS[name]
    mixer = mixer.double().eval()
    mixer.load_state_dict(ours(record.state_dict()))
    x = record.image().requires_grad_()
    out = MixerNCHW(mixer)(x) if x.ndim == 4 else mixer(x.unsqueeze(1)).squeeze(1)
    (out * torch.from_numpy(np.random.RandomState(4).standard_normal(out.shape))).sum().backward()
    for key, value in (("out", out.detach()), ("grad_x", x.grad)):
        assert record.arrays[key].size == value.numel()
        yield key, value.flatten(), record.arrays[key]


MODELS = {name: next(key for key in MIXERS if MIXERS[key] is type(mixer)) for name, (mixer, _) in RECORDS.items()}


@pytest.mark.parametrize("name", RECORDS)
def test_outputs_and_gradients_are_the_authors(name):
    for key, value, expected in compared(name):
        assert relative_error(value, expected) <= Record(name).tolerance(), key
