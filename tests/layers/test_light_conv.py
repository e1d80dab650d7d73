"""Lightweight and dynamic convolution: the authors' along a row, and in two dimensions by the definition in loops."""

import numpy as np
import pytest
import torch
from golden import Record, relative_error

from visionzoo.layers.mixers import LightConvMixer

NAMES = {"linear1": "in_proj", "linear2": "proj", "conv.weight_linear": "to_weights", "conv.weight": "weight"}
NAMES |= {"conv.bias": "conv_bias", "conv.conv_bias": "conv_bias"}


def _our_name(name):
    return next(name.replace(theirs, ours) for theirs, ours in NAMES.items() if name.startswith(theirs))


def _taken(tensor, count):
    """Return the values of a tensor that a record of `count` holds."""
    flat = tensor.detach().reshape(-1).numpy()
    return flat if len(flat) == count else flat[np.random.RandomState(len(flat)).randint(0, len(flat), count)]


@pytest.mark.parametrize("name", ["light", "light_plain", "dynamic", "dynamic_plain", "dynamic_renorm"])
def test_on_one_row_outputs_and_gradients_are_the_authors(name):
    record = Record(f"fairseq/{name}")
    given = record.meta["factory_kwargs"]
    options = {key: given[key] for key in ("glu", "weight_softmax", "renorm_padding") if key in given}
    options |= {"conv_bias": "bias" in given or "conv_bias" in given, "dynamic": name.startswith("dynamic")}
    mixer = LightConvMixer(12, 3, kernel_size=(1, given["kernel_size"]), **options).double()
    state = mixer.state_dict()
    theirs = {_our_name(key): value for key, value in record.state_dict().items()}
    mixer.load_state_dict({key: value.reshape(state[key].shape) for key, value in theirs.items()})
    x = record.image().unsqueeze(1).requires_grad_()
    out = mixer(x)
    (out * torch.from_numpy(np.random.RandomState(4).standard_normal((2, 9, 12))).unsqueeze(1)).sum().backward()
    found = {"out": out, "grad_x": x.grad}
    for key, expected in record.arrays.items():
        own = found[key] if key in found else mixer.get_parameter(_our_name(key.removeprefix("grad/"))).grad
        assert relative_error(_taken(own, expected.size), expected) <= record.tolerance(), key
    assert len(record.arrays) == 2 + len(state)


@pytest.mark.parametrize(
    "options",
    [
        {"kernel_size": 3},  # the depthwise kernel's
        {"kernel_size": (5, 3), "glu": False, "conv_bias": True},
        {"kernel_size": (3, 5), "dynamic": True},
        {"kernel_size": (3, 5), "dynamic": True, "renorm_padding": True},
        {"kernel_size": (3, 5), "weight_softmax": False},
    ],
)
@torch.no_grad()
def test_each_place_sums_its_window_by_a_softmax_over_taps(options):
    torch.manual_seed(0)
    mixer = LightConvMixer(4, 2, **options).double()
    if mixer.conv_bias is not None:
        torch.nn.init.normal_(mixer.conv_bias)
    height, width = mixer.kernel_size
    x = torch.randn(1, 3, 4, 4, dtype=torch.float64)
    u = mixer.in_proj(x)[0]
    u = u[..., :4] * torch.sigmoid(u[..., 4:]) if options.get("glu", True) else u
    out = torch.zeros_like(u) if mixer.conv_bias is None else mixer.conv_bias.expand(3, 4, 4).clone()
    for row, column, channel in ((r, c, i) for r in range(3) for c in range(4) for i in range(4)):
        head = channel // 2
        taps = mixer.to_weights(u[row, column]) if options.get("dynamic") else mixer.weight.flatten()
        taps = taps[head * height * width :][: height * width]
        places = [(row + a - height // 2, column + b - width // 2) for a in range(height) for b in range(width)]
        inside = [n for n, (r, c) in enumerate(places) if 0 <= r < 3 and 0 <= c < 4]
        if options.get("weight_softmax", True):
            total = taps[inside if options.get("renorm_padding") else slice(None)].exp().sum()
            taps = taps.exp() / total
        out[row, column, channel] += sum(taps[n] * u[places[n]][channel] for n in inside)
    torch.testing.assert_close(mixer(x)[0], mixer.proj(out), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("dynamic", [False, True])
@torch.no_grad()
def test_training_drops_taps_and_enlarges_the_others(dynamic):
    torch.manual_seed(0)
    mixer = LightConvMixer(4, 2, kernel_size=1, glu=False, dynamic=dynamic, weight_dropout=0.75).double()
    x = torch.randn(2, 3, 5, 4, dtype=torch.float64)
    kept = mixer.eval()(x) - mixer.proj.bias  # one tap, whose softmax is 1
    inner = torch.linalg.solve(mixer.proj.weight, (mixer.train()(x) - mixer.proj.bias).flatten(0, -2).mT).mT
    ratio = (inner / torch.linalg.solve(mixer.proj.weight, kept.flatten(0, -2).mT).mT).unflatten(-1, (2, 2))
    torch.testing.assert_close(ratio, ratio[..., :1].expand_as(ratio))  # the channels of a head lose it together
    assert ((ratio - 4).abs() < 1e-9).logical_or(ratio.abs() < 1e-9).all()
    assert (ratio.std(0).sum() > 0) == dynamic  # places of their own, or one draw for all
