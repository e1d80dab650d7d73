"""Quantizers, layers, attention and annealing are the authors': outputs and gradients of records of their code."""

import re

import numpy as np
import pytest
import torch
from golden import Record, relative_error
from torch import nn

from visionzoo.layers.mixers import FullMixer, WindowMixer
from visionzoo.quantization import LSQ, QuantizedProducts, QueryKeyProjection, StatsQ, far_from_rounding
from visionzoo.quantization.layers import quantize_layer

NAMES = [  # theirs to ours
    (r"^quant_x_4_qkv\.", "qkv."),
    (r"input_quant_fn\.s$", "quantize_input.scale"),
    (r"lsqw_fn\.s$", "quantize_weight.scale"),
    (r"^move_(v|qkx)_(b4|aft)\.bias$", r"products.quantize_\1.\2"),
    (r"^move_([qkv])_aft\.bias$", r"products.quantize_\1.aft"),
    (r"move_(b4|aft)\.bias$", r"quantize_input.\1"),
    (r"^quan_a_softmax_fn\.s$", "products.quantize_weights.scale"),
    (r"^quan_a_(q|k|v|qkx)_fn\.s$", r"products.quantize_\1.scale"),
    (r"quantize_qkx\.", "quantize_k."),
    (r"\.b4$", ".before"),
    (r"\.aft$", ".after"),
    (r"^relative_position_bias_table$", "relative_position_bias.table"),
]


def layer(dim=12, out=8, weights=2, activations=2, kind="statsq", signed=True, tokens=5):
    """A linear layer with a scale for each token of its input, as the authors have it."""
    built = nn.Linear(dim, out)
    quantize_layer(built, weights, activations, kind=kind, signed=signed)
    built.quantize_input = LSQ(activations, (tokens, 1) if tokens else (), signed=signed, shift=(dim,))
    return built


def patches():
    built = nn.Conv2d(3, 4, 16, 16)
    quantize_layer(built, 8, 8, kind="statsq", signed=False, each_channel=True)
    return built


class Mlp(nn.Module):
    def __init__(self):
        super().__init__()
        self.fc1, self.act, self.fc2 = layer(12, 20), nn.GELU(), layer(20, 12, signed=False)

    def forward(self, x):
        return self.fc2(self.act(self.fc1(x)))


def attention(mixer, bits=2, tokens=5, reparameterize=False):
    """A mixer whose attention is quantized, with scales as the authors have them."""
    if reparameterize:
        mixer.qkv = QueryKeyProjection(mixer.qkv, 3, bits, bits, tokens=tokens)
        options = {"key_dim": 12, "quantize_queries": False}
    else:
        mixer.qkv, options = layer(12, 36, bits, bits, tokens=tokens), {}
    mixer.proj = layer(12, 12, bits, bits, tokens=tokens)
    mixer.products = QuantizedProducts(3, 4, bits, tokens=tokens, **options)
    return mixer


def full(**options):
    return attention(FullMixer(12, 3, qkv_bias=True), **options)


def window(**options):
    options |= {"tokens": None}
    return attention(WindowMixer(12, 3, window_size=2, shift_size=1, relative_position_bias=True), **options)


PARTS = {
    "linear": lambda: layer(weights=3),
    "linear_unsigned": lambda: layer(signed=False),
    "linear_lsq": lambda: layer(weights=3, activations=3, kind="lsq"),
    "head": lambda: layer(weights=8, activations=8, tokens=None),
    "conv": patches,
    "mlp": Mlp,
    "attention": full,
    "attention_4": lambda: full(bits=4),
    "attention_qk": lambda: full(reparameterize=True),
    "attention_qk_annealed": lambda: full(reparameterize=True),  # which has no effect in their code
    "window": window,
    "window_qk": lambda: window(reparameterize=True),
}


def ours(tensors):
    """Named tensors of theirs, state or gradients, by our names and in our order."""
    tensors = {name: value for name, value in tensors.items() if name.split(".")[-1] not in ("clip_val", "signed")}
    found = {}
    if "move_qkv_b4.bias" in tensors:
        for name, part in zip("qkv", tensors.pop("move_qkv_b4.bias").chunk(3), strict=True):
            found[f"products.quantize_{name}.before"] = part
    if "q.weight" in tensors:
        found["qkv.weight"] = torch.cat([tensors.pop(f"{name}.weight") for name in "qkv"])
        bias = tensors.pop("v.bias")
        found["qkv.bias"] = torch.cat([bias.new_zeros(24), bias])
        scale = tensors["quan_a_qkx_fn.s"]  # of tokens x heads
        tensors["quan_a_qkx_fn.s"] = scale.reshape(-1, 3).T.flatten() if len(scale) > 1 else scale
    for name, value in tensors.items():
        for pattern, replacement in NAMES:
            name = re.sub(pattern, replacement, name)
        found[name] = value
    return found


def state_of(record):
    """The authors' tensors by our names; the scales in their record began by the same image."""
    theirs = {name: value.double() for name, value in record.state_dict().items()}
    return ours({name: value for name, value in theirs.items() if name != "relative_position_index"})


@pytest.mark.parametrize("name", PARTS)
def test_outputs_and_gradients_are_the_authors(name):
    record, part = Record(f"ofq/{name}"), PARTS[name]().double()
    part.load_state_dict(state_of(record), strict=False)
    for quantizer in (m for m in part.modules() if isinstance(m, LSQ)):
        assert quantizer.begun
    x = record.image().requires_grad_()
    as_map = x.unsqueeze(1) if isinstance(part, FullMixer) else x
    if name == "conv":
        part.quantize_input.low.fill_(-128)
    out = part(as_map).reshape(-1)
    factors = torch.from_numpy(np.random.RandomState(4).standard_normal(tuple(record_shape(name, out))))
    (out * factors.reshape(-1)).sum().backward()
    if name == "conv":  # theirs has a shift for each pixel, here zeros
        places = np.random.RandomState(x.numel()).randint(0, x.numel(), 512)
        pairs = {"grad_x": (x.grad.flatten()[places], record.arrays["grad_x"])}
        places = np.random.RandomState(part.weight.numel()).randint(0, part.weight.numel(), 512)
        pairs["weight"] = part.weight.grad.flatten()[places], record.arrays["grad/weight"]
        for of, scale in (("input_quant_fn", part.quantize_input.scale), ("lsqw_fn", part.quantize_weight.scale)):
            pairs[of] = scale.grad, record.arrays[f"grad/{of}.s"]
        out = out[np.random.RandomState(out.numel()).randint(0, out.numel(), 512)] if out.numel() > 512 else out
    else:
        shapes = {name: shape for name, shape, _ in record.meta["state"]}
        grads = {key[5:]: value for key, value in record.arrays.items() if key.startswith("grad/")}
        theirs = ours({key: torch.from_numpy(g).reshape(shapes.get(key, g.shape)) for key, g in grads.items()})
        pairs = {key: (part.get_parameter(key).grad, value) for key, value in theirs.items()}
        pairs["grad_x"] = x.grad.flatten(), record.arrays["grad_x"]
        assert {key for key, value in part.named_parameters() if value.grad is not None} <= set(pairs)
    pairs["out"] = out.detach(), record.arrays["out"]
    for key, (value, expected) in pairs.items():
        expected = np.asarray(expected).reshape(-1)
        if np.abs(expected).max() < 1e-13:  # softmax does not see a shift of all keys
            assert value.abs().max() < 1e-13 and key.startswith("products.quantize_k.")
        else:
            assert relative_error(value.flatten(), expected) <= 1e-9, key


def record_shape(name, out):
    """Shape that the authors' output has, which the drawn factors follow."""
    return {"conv": (1, 4, 14, 14)}.get(name, (out.numel(),))


# the unsigned layer's input goes below what activations do, and becomes signed here
@pytest.mark.parametrize("name", sorted(PARTS.keys() - {"linear_unsigned"}))
def test_scales_begin_as_the_authors(name):
    record, part = Record(f"ofq/{name}"), PARTS[name]().double()
    state = state_of(record)
    part.load_state_dict({key: value for key, value in state.items() if not key.endswith(".scale")}, strict=False)
    for quantizer in (m for m in part.modules() if isinstance(m, LSQ)):
        quantizer.calibrating = True
    part(record.image().unsqueeze(1) if isinstance(part, FullMixer) else record.image())
    scales = {key: value for key, value in part.state_dict().items() if key.endswith(".scale")}
    assert scales.keys() == {key for key in state if key.endswith(".scale")}
    for key, value in scales.items():
        assert relative_error(value, state[key]) <= 1e-12, key


def test_weights_have_the_levels_and_the_gradients_of_the_authors():
    record = Record("ofq/statsq")
    weight = record.state_dict()["weight"].double().requires_grad_()
    x = record.image().requires_grad_()
    out = torch.stack([StatsQ(bits)(weight) for bits in (2, 3, 4)]) * x
    (out * torch.from_numpy(np.random.RandomState(4).standard_normal(out.shape))).sum().backward()
    places = np.random.RandomState(x.numel()).randint(0, x.numel(), 512)
    for value, key in ((out.detach(), "out"), (x.grad, "grad_x")):
        assert relative_error(value.flatten()[places], record.arrays[key]) <= 1e-9
    assert relative_error(weight.grad.flatten(), record.arrays["grad/weight"]) <= 1e-9


@pytest.mark.parametrize("bits", [2, 3, 4])
@pytest.mark.parametrize("margin", [0.005, 0.05])
def test_the_same_weights_are_frozen(bits, margin):
    record = Record("ofq/frozen")
    frozen = far_from_rounding(record.state_dict()["weight"].double(), StatsQ(bits), margin)
    expected = record.arrays[f"frozen_{bits}_{margin}"]
    assert np.array_equal(frozen.double().numpy(), expected) and 0 < expected.sum() < expected.size
