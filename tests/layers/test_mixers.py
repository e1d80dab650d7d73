"""Every mixer is a [B, H, W, C] map's map, in every family, and says what it cannot do."""

import copy
import inspect
import math
import re
import sys
from pathlib import Path

import pytest
import timm
import torch
import torch.nn.functional as F
import yaml
from golden import Record, relative_error, sample
from quick import learned_from, of_each_kind
from tape import assert_recorded_alike
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from visionzoo.benchmark.gallery import mathematics
from visionzoo.kernels import explain, route_regions, use_backend
from visionzoo.layers import mixers
from visionzoo.layers.mixers import (
    MIXERS,
    ChannelMixer,
    HaloMixer,
    LevitMixer,
    MixerNCHW,
    RoutedMixer,
    WindowMixer,
    build_mixer,
    combine_mixers,
    resolve_mixers,
)
from visionzoo.layers.symbols import SYMBOLS
from visionzoo.models._registry import TINY

SMALL = {  # options that suit tiny maps
    "aggregated": {"pool_size": 1},
    "forward_cross": {"map_size": 4},
    "halo": {"block_size": 4, "halo_size": 1},
    "cross_window": {"stripe_width": 2},
    "data_dependent_conv": {"map_size": 4, "residual": False},
    "dynamic_local": {"kernel_size": 3},
    "embedding_free": {"reduction": 2},
    "expert_choice": {"sparsity": 1},
    "factorized": {"reduction": 2, "window_size": 3},
    "focused_linear": {"position_size": 3},
    "injective_linear": {"lepe_kernel": 3},
    "kmeans": {"num_clusters": 2, "window_size": 200},
    "kolmogorov_arnold": {"map_size": 4, "rank": 3},
    "levit": {"map_size": 4},
    "light_conv": {"kernel_size": (3, 5), "dynamic": True, "renorm_padding": True},
    "mixture_of_heads": {"reduction": 1},
    "moving_average": {"qk_dim": 4, "num_averages": 2, "map_size": 4},
    "multi_pool": {"segments": 2},
    "neighborhood": {"kernel_size": 3, "dilation": 2},
    "nystrom": {"num_landmarks": 4},
    "pattern": {"parts": ("band", "disc", "cells", "left"), "radius": 2, "cell_size": 2},
    "sparsifiner": {"keep_rate": 1.0, "map_size": 4},
    "spatial_reduction": {"reduction": 2, "pool_size": None},
    "super_token": {"token_size": 2},
    "routed": {"regions": 2, "topk": 2},
    "sea": {"length": 4, "topk": 200},
    "score": {"normalizer": "sigmoid", "qk_norm": "l2", "temperature": "query"},
    "window": {"window_size": 3},
}


def _spec(name):
    return {"type": name, **SMALL.get(name, {})}


@pytest.mark.parametrize("name", MIXERS)
@pytest.mark.parametrize("size", [(1, 1), (5, 7), (8, 3), (2, 13)])
def test_any_height_and_width_keep_their_size_and_give_gradients(name, size):
    mixer = build_mixer(_spec(name), 16, 2)
    x = torch.randn(2, *size, 16, requires_grad=True)
    out = mixer(x)
    assert out.shape == x.shape and out.dtype == x.dtype
    out.square().sum().backward()
    assert x.grad.isfinite().all()
    assert all(p.grad is not None for p in mixer.parameters())


@pytest.mark.parametrize("spec", [*map(_spec, MIXERS), {"type": "kolmogorov_arnold", "base": "identity"}])
def test_whole_mixers_are_saved_and_loaded(spec, tmp_path):
    """Pickled: `torch.save(model)`, and processes that are started with one."""
    mixer = build_mixer(spec, 16, 2).eval()
    torch.save(mixer, tmp_path / "mixer.pt")
    x = torch.randn(1, 4, 5, 16)
    assert torch.equal(torch.load(tmp_path / "mixer.pt", weights_only=False)(x), mixer(x))


@pytest.mark.parametrize("assign", [False, True])
@pytest.mark.parametrize("name", MIXERS)
def test_a_mixer_from_the_meta_device_is_what_was_loaded(name, assign):
    """Also what no state dict holds: memory that was never written has any numbers in it."""
    mixer = build_mixer(_spec(name), 16, 2).eval()
    with torch.device("meta"):
        other = build_mixer(_spec(name), 16, 2).eval()
    if not assign:
        other.to_empty(device="cpu")
        for tensor in [*other.parameters(), *other.buffers()]:
            tensor.detach().fill_(77)
    other.load_state_dict(mixer.state_dict(), assign=assign)
    x = torch.randn(1, 4, 4, 16)
    assert torch.equal(other(x), mixer(x))


def _forms():
    """Give every mixer, and every form that is compared in configs/classification."""
    path = Path(__file__).parents[2] / "configs/classification/cifar10_mixers.yaml"
    compared = [spec for spec in yaml.safe_load(path.read_text())["mixers"] if isinstance(spec, dict)]
    forms = {name: _spec(name) for name in MIXERS}
    forms |= {f"dual_attention-{name}": {"type": "dual_attention", "symbols": name} for name in SYMBOLS}
    forms |= {f"{s['type']}-{s['label']}": {key: s[key] for key in s if key != "label"} for s in compared}
    return [pytest.param(spec, id=name) for name, spec in forms.items()]


class _Doubled(torch.nn.Module):
    """What adapters and quantizers put in the place of a linear layer: it has no weight that others could read."""

    def __init__(self, linear):
        super().__init__()
        self.inside = linear

    def forward(self, x):
        return 2 * self.inside(x)


READ = ("neural.fc1",)  # whose weight is taken apart


@pytest.mark.parametrize("spec", _forms())
def test_linear_layers_can_be_replaced(spec):
    """By adapters and quantized ones: mixers call all but those in `READ`, and look at nothing in them."""
    torch.manual_seed(0)
    mixer = build_mixer(spec, 16, 4).double().eval()
    other = copy.deepcopy(mixer)
    for name, layer in list(mixer.named_modules()):
        if type(layer) is torch.nn.Linear and name not in READ:
            other.set_submodule(name, _Doubled(other.get_submodule(name)))
            with torch.no_grad():
                for parameter in layer.parameters():
                    parameter.mul_(2)
    x = torch.randn(2, 4, 5, 16, dtype=torch.float64)
    torch.testing.assert_close(other(x), mixer(x), rtol=1e-12, atol=1e-12)


SHARING = [name for name, kind in MIXERS.items() if "kv_heads" in inspect.signature(kind).parameters]


@pytest.mark.parametrize("kv_heads", [1, 2])
@pytest.mark.parametrize("name", SHARING)
def test_shared_keys_and_values_are_those_of_all_heads_that_share_them(name, kv_heads):
    torch.manual_seed(0)
    shared = build_mixer({**_spec(name), "kv_heads": kv_heads}, 16, 4).double()
    whole = build_mixer(_spec(name), 16, 4).double()
    parts = (kv_heads, 8) if name == "halo" else (2, kv_heads, 4)
    state = shared.state_dict()
    for key, value in state.items():
        if key.startswith(("qkv.", "kv.")):
            q, kv = value.split([value.shape[0] - math.prod(parts), math.prod(parts)])
            kv = kv.unflatten(0, parts).repeat_interleave(4 // kv_heads, len(parts) - 2)
            state[key] = torch.cat([q, kv.flatten(0, len(parts) - 1)])
    whole.load_state_dict(state)
    x = torch.randn(1, 5, 7, 16, dtype=torch.float64, requires_grad=True)
    outs = shared(x), whole(x)
    torch.testing.assert_close(*outs, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(*(torch.autograd.grad(out.square().sum(), x) for out in outs), rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("name", MIXERS)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_low_precision_stays_near_float64(name, dtype):
    torch.manual_seed(0)
    mixer = build_mixer(_spec(name), 16, 2).double()
    x = torch.randn(1, 6, 9, 16, dtype=torch.float64)
    exact = mixer(x)
    low = mixer.to(dtype)(x.to(dtype))
    assert low.dtype == dtype
    assert (low.double() - exact).norm() < 40 * torch.finfo(dtype).eps * exact.norm()


@pytest.mark.parametrize("name", MIXERS)
def test_autocast_runs_and_stays_near_float32(name):
    torch.manual_seed(0)
    mixer = build_mixer(_spec(name), 16, 2)
    x = torch.randn(1, 6, 9, 16)
    exact = mixer(x)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = mixer(x)
    assert (out.float() - exact).norm() < 0.1 * exact.norm()


# One of each kind of operation: SDPA, each kernel, transforms, sums in portions. Compiling takes seconds a mixer.
COMPILED = {"channel", "full", "halo", "linear", "neighborhood", "routed", "score", "spectral_gate"}


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=[] if name in COMPILED else [pytest.mark.full]) for name in MIXERS]
)
def test_compiles_into_one_graph_for_sizes_that_change(name):
    torch._dynamo.reset()
    mixer = build_mixer(_spec(name), 16, 2)
    compiled = torch.compile(mixer, fullgraph=True, dynamic=True, backend="eager")
    for size in [(6, 9), (11, 7)]:
        x = torch.randn(2, *size, 16)
        torch.testing.assert_close(compiled(x), mixer(x))


@pytest.mark.parametrize("spec", _forms())
def test_each_form_can_be_recorded_as_a_cuda_graph(spec):
    assert_recorded_alike(build_mixer(spec, 16, 4), torch.randn(2, 4, 6, 16))


# -- torch.func -------------------------------------------------------------------------------------------------------


def _drawn(spec, seed=0):
    """Build a mixer in float64 whose parameters all count, as one of zeros or ones might not."""
    torch.manual_seed(seed)
    mixer = build_mixer(spec, 16, 4).double().eval()
    with torch.no_grad():
        for parameter in mixer.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return mixer, torch.randn(3, 4, 5, 16, dtype=torch.float64)


@pytest.mark.parametrize("spec", _forms())
def test_forward_mode_has_the_derivative_of_reverse_mode(spec):
    mixer, x = _drawn(spec)
    at = (x, {name: p.detach() for name, p in mixer.named_parameters()})
    along = (torch.randn_like(x), {name: torch.randn_like(p) for name, p in at[1].items()})
    with use_backend("reference"):  # plain products, which have forward-mode derivatives everywhere
        out, tangent = torch.func.jvp(lambda x, p: torch.func.functional_call(mixer, p, (x,)), at, along)
        _, pull_back = torch.func.vjp(lambda x, p: torch.func.functional_call(mixer, p, (x,)), *at)
    weights = torch.randn_like(out)
    pairs = zip(tree_leaves(pull_back(weights)), tree_leaves(along), strict=True)
    expected = sum((gradient * direction).sum() for gradient, direction in pairs)
    torch.testing.assert_close((weights * tangent).sum(), expected, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("spec", _forms())
def test_mixers_are_mapped_over_images_and_over_weights(spec):
    mixer, x = _drawn(spec)
    torch.testing.assert_close(torch.func.vmap(lambda image: mixer(image[None])[0])(x), mixer(x))
    several = [mixer, _drawn(spec, 1)[0]]
    with use_backend("reference"):  # torch's own attention refuses biases that take gradients, where it is mapped
        stacked = torch.func.stack_module_state(several)
        if stacked[0]:
            mapped = torch.func.vmap(lambda *p: torch.func.functional_call(mixer, p, (x,)))(*stacked)
            torch.testing.assert_close(mapped, torch.stack([each(x) for each in several]))


# -- large numbers, large maps ----------------------------------------------------------------------------------------


def _learn_from_large_numbers(mixer, size):
    """Check that of a map of numbers around 10 output and gradients are finite."""
    weight = next(mixer.parameters(), torch.zeros((), dtype=torch.float16))
    x = (torch.randn(1, *size, mixer.dim) * 10).to(weight).requires_grad_()
    out = mixer(x)
    out.float().square().mean().sqrt().backward()  # gradients as large as the activations, whatever their number
    assert out.isfinite().all() and x.grad.isfinite().all() and x.grad.any()
    assert all(p.grad is None or p.grad.isfinite().all() for p in mixer.parameters())


@pytest.mark.parametrize("name", MIXERS)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_large_activations_stay_finite_in_half_precision(name, dtype):
    torch.manual_seed(0)
    _learn_from_large_numbers(build_mixer(_spec(name), 16, 2).to(dtype), (14, 15))


@pytest.mark.full
@pytest.mark.gpu
@pytest.mark.parametrize("name", MIXERS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_65536_large_tokens_stay_finite_or_are_refused(name, dtype):
    torch.manual_seed(0)
    mixer = build_mixer(name, 32, 1).to("cuda", dtype)
    try:
        _learn_from_large_numbers(mixer, (256, 256))
    except ValueError as error:
        assert mixer.pair_bytes and "got 256 x 256 = 65,536" in str(error)


class _Largest(TorchDispatchMode):
    """Counts the numbers of the largest tensor that operators make."""

    numbers = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        made = function(*args, **(kwargs or {}))
        for tensor in tree_leaves(made):
            if isinstance(tensor, torch.Tensor):
                self.numbers = max(self.numbers, tensor.untyped_storage().nbytes() // tensor.element_size())
        return made


def _takes_memory_for_pairs(spec):
    with torch.device("meta"):
        return build_mixer(spec, 4, 1).pair_bytes > 0


FORMS = [*MIXERS, {"type": "gmm", "window_size": 4}, {"type": "aggregated", "reduction": 1}]
FORMS += [{"type": "data_dependent_conv", "transform": "dct"}, {"type": "levit", "stride": 2}]
MEASURED = [*FORMS[-4:], "full", "gmm", "linear", "sparsifiner", "window"]  # others take long on the meta device


@pytest.mark.parametrize(
    "spec", [pytest.param(spec, marks=[] if spec in MEASURED else [pytest.mark.full]) for spec in FORMS], ids=str
)
def test_mixers_that_hold_numbers_for_all_pairs_say_so(spec, monkeypatch):
    def attend(q, k, v, **kwargs):  # which holds no scores on devices that have memory
        return q.new_empty(*q.shape[:-1], v.shape[-1])

    monkeypatch.setattr(F, "scaled_dot_product_attention", attend)
    with torch.device("meta"), torch.no_grad(), _Largest() as largest:
        mixer = build_mixer(spec, 4, 1)
        mixer(torch.empty(1, 64, 64, 4))
    held = largest.numbers >= (64 * 64) ** 2 // mixer.stride**2
    assert (mixer.pair_bytes > 0) == held or spec == "sea"  # which comes in portions of more than these


@pytest.mark.parametrize("spec", [form for form in FORMS if _takes_memory_for_pairs(form)], ids=str)
def test_more_pairs_than_memory_holds_are_refused_before_anything_is_computed(spec, monkeypatch):
    monkeypatch.setattr("visionzoo.layers.mixers.base.memory_of", lambda device: 2**30)
    mixer = build_mixer(spec, 4, 1)
    most = math.isqrt(2**30 // mixer.pair_bytes)
    needed = f"{4 * mixer.pair_bytes}.0 GiB for an image; take a mixer that holds none"
    with pytest.raises(ValueError, match=rf"expected at most {most:,} tokens on cpu, which has 1.0 GiB.*{needed}"):
        mixer(torch.zeros(1, 256, 256, 4))
    mixer.check_input(torch.zeros(1, 1, most, 4))
    with pytest.raises(ValueError, match=f"got 1 x {most + 1} = "):
        mixer.check_input(torch.zeros(1, 1, most + 1, 4))


@torch.no_grad()
def test_channel_attention_stays_finite_in_half_precision_on_large_maps():
    mixer = ChannelMixer(16, 2)
    x = torch.randn(1, 256, 256, 16) * 10 + 5  # a shared offset, so that the sums grow with the map
    exact = mixer(x)
    low = mixer.half()(x.half())
    assert (low.float() - exact).norm() < 0.01 * exact.norm()


LICENCES = "MIT|Apache-2.0|BSD-|AGPL-3.0|Apple's sample code license|no license|none given"
SOURCE = re.compile(rf"https://github\.com/\S+ at (?:[0-9a-f]{{7}}|\d+\.\d+\.\d+)(?:, | \()(?:{LICENCES})")


@pytest.mark.parametrize("name", MIXERS)
def test_the_docstring_gives_mathematics_costs_source_dtypes_shapes_and_an_example(name):
    mixer = MIXERS[name]
    formula, time, memory = mathematics(mixer)
    assert " = " in formula and time.startswith("O(N") and memory.startswith("O(")
    doc = " ".join(f"{inspect.getdoc(sys.modules[mixer.__module__])} {inspect.getdoc(mixer)}".split())
    assert re.search(r"arXiv:\d{4}\.\d{5}", doc) and SOURCE.search(doc), doc
    assert ("float32" in doc or "dtype of the input" in doc) and ">>>" in doc and "Raises:" in doc
    assert re.search(r"\[B, H, W, C\].* to .*\[B, ", inspect.getdoc(mixer.forward))
    assert mixer.__name__ in mixers.__all__


# -- [B, C, H, W] -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", MIXERS)
def test_the_nchw_adapter_computes_what_the_mixer_does(name):
    torch.manual_seed(0)
    mixer = build_mixer(_spec(name), 16, 2)
    layer = MixerNCHW(mixer)
    x = torch.randn(2, 16, 6, 9)
    expected = mixer(x.permute(0, 2, 3, 1).contiguous()).permute(0, 3, 1, 2)
    gradients = []
    for given in (x, x.contiguous(memory_format=torch.channels_last)):
        given = given.clone().requires_grad_()
        out = layer(given)
        assert torch.equal(out, expected)
        assert out.is_contiguous(memory_format=torch.channels_last)
        out.square().sum().backward()
        gradients.append(given.grad)
    torch.testing.assert_close(*gradients)
    assert gradients[0].any() and all(p.grad is not None for p in layer.parameters())
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert (layer(x).float() - expected).norm() < 0.1 * expected.norm()
    assert set(layer.state_dict()) == {f"mixer.{key}" for key in mixer.state_dict()}


def test_the_nchw_adapter_copies_nothing_in_channels_last():
    mixer = build_mixer("pool", 16)
    mixer.forward = lambda x: x
    x = torch.randn(2, 16, 6, 9).contiguous(memory_format=torch.channels_last)
    out = MixerNCHW(mixer)(x)
    assert out.data_ptr() == x.data_ptr() and out.stride() == x.stride()


@pytest.mark.parametrize(
    ("mixer", "shape"),
    [
        (HaloMixer(16, 2, block_size=4, halo_size=1, stride=2), (2, 16, 3, 5)),
        (LevitMixer(16, 2, map_size=4, stride=2, out_dim=24), (2, 24, 3, 5)),
    ],
)
def test_the_nchw_adapter_shrinks_as_the_mixer_does(mixer, shape):
    assert MixerNCHW(mixer)(torch.randn(2, 16, 6, 9)).shape == shape


def test_the_nchw_adapter_compiles_into_one_graph_for_sizes_that_change():
    torch._dynamo.reset()
    layer = MixerNCHW(build_mixer(_spec("window"), 16, 2))
    compiled = torch.compile(layer, fullgraph=True, dynamic=True, backend="eager")
    for size in [(6, 9), (11, 7)]:
        x = torch.randn(2, 16, *size)
        torch.testing.assert_close(compiled(x), layer(x))


@pytest.mark.parametrize("shape", [(2, 6, 9, 16), (16, 6, 9), (2, 8, 6, 9)])
def test_the_nchw_adapter_names_the_layout_it_expects(shape):
    with pytest.raises(ValueError, match=r"expected a map \[B, C, H, W\] with C = 16, got \(.*use the WindowMixer"):
        MixerNCHW(build_mixer(_spec("window"), 16, 2))(torch.randn(shape))


# -- other mixers in a family -----------------------------------------------------------------------------------------


HOSTS = ("zoo_biformer_t", "zoo_convit_t")  # a pyramid and an isotropic model that take each mixer
REDUCED = ("zoo_iared2_deit_s", "zoo_sparsifiner_s")  # whose reducers ask for mixers that take dropped tokens
GUESTS = ("halo", "linear", "pool", "window")  # that each model takes
PAIRS = [
    pytest.param(*family.values, name, marks=family.marks if name in GUESTS else [pytest.mark.full])
    for family in of_each_kind()
    for name in MIXERS
    if family.values[0] not in HOSTS
]
PAIRS += [pytest.param(family, name) for family in HOSTS for name in MIXERS]


@pytest.mark.parametrize(("family", "name"), PAIRS)
def test_every_family_takes_every_mixer_forward_and_backward(family, name):
    if family in REDUCED and not build_mixer(_spec(name), 16, 2).takes_dropped_tokens:
        with pytest.raises(ValueError, match=rf"^reduce: .* mixes by {MIXERS[name].__name__}, which (needs|has no)"):
            timm.create_model(family, mixers=_spec(name), **TINY[family])
        return
    model = timm.create_model(family, mixers=_spec(name), num_classes=3, **TINY[family])
    kinds = {type(block.mixer) for block in model.blocks_in_order() if getattr(block, "mixer", None) is not None}
    assert kinds == {MIXERS[name]}
    learned_from(model, torch.randn(2, 3, 40, 56)).backward()
    assert all(p.grad is not None for p in model.parameters())


def test_routed_mixer_is_the_authors_layer():
    record = Record("biformer/bra_layer")
    names = {"qkv.qkv.": "qkv.", "wo.": "proj."}
    state = record.state_dict()
    for theirs, ours in names.items():
        state = {(ours + n.removeprefix(theirs) if n.startswith(theirs) else n): t for n, t in state.items()}
    mixer = RoutedMixer(64, 2, topk=4).double()
    mixer.load_state_dict(state)
    with torch.no_grad():
        out = mixer(record.image())
        q, k, _ = mixer.split_heads(mixer.qkv(record.image()))
    assert relative_error(sample(out), record.arrays["output"]) <= record.tolerance()
    index = route_regions(q, k, regions=7, topk=4)
    assert torch.equal(index, torch.from_numpy(record.arrays["routing_index"]))


@pytest.mark.parametrize("mixer", [RoutedMixer(8, 2, regions=3, topk=2), WindowMixer(8, 2, window_size=4)])
def test_padding_takes_part_by_default_and_not_when_masked(mixer):
    """With masked padding nothing beyond the map is seen; without, the padded tokens' biases are."""
    torch.manual_seed(0)
    torch.nn.init.normal_(mixer.qkv.bias, std=2.0)
    x = torch.randn(1, 7, 10, 8)  # neither 3 regions nor windows of 4 divide it
    released = mixer(x)
    mixer.mask_padding = True
    assert (mixer(x) - released).norm() > 1e-2 * released.norm()
    whole = torch.randn(1, 12, 12, 8)
    masked = mixer(whole)
    mixer.mask_padding = False
    torch.testing.assert_close(mixer(whole), masked)


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        (
            "poool",
            r"unknown mixer 'poool' \(did you mean 'pool'\?\); expected one of adaptive_fourier, aggregated, channel, "
            r"clamped_linear, cross_window, data_dependent_conv and \d+ more \(`visionzoo parts mixers` lists them\)",
        ),
        ({"window_size": 7}, r"unknown mixer None; expected one of"),
        ({"type": "pool", "pool_size": 3.0}, r"mixer 'pool': pool_size must be int, got pool_size=3.0"),
        ({"type": "window", "num_heads": 2.0}, r"mixer 'window': num_heads must be int \| None, got num_heads=2.0"),
        ({"type": "window", "window_size": (3, 5)}, r"'window': window_size must be int, got window_size=\(3, 5\)"),
        (
            {"type": "pool", "window_size": 7},
            r"'pool' does not take these options: window_size=7.*it takes num_heads, pool_size",
        ),
        (["pool"], r"mixer: expected a name or dict\(type=name, \*\*options\), got \['pool'\]"),
        ({"type": ["pool"]}, r"unknown mixer \['pool'\]; expected one of"),
        ({"type": "pool", "pool_sise": 3}, r"pool_sise=3 \(did you mean 'pool_size'\?\)"),
        ({"type": "pool", "dim": 3}, r"'pool' does not take these options: dim=3"),
        ({"type": "pool", "pool_size": True}, r"pool_size must be int, got pool_size=True"),
        ({"type": "linear", "qkv_bias": 1}, r"qkv_bias must be bool, got qkv_bias=1"),
        ({"type": "linear", "feature_map": 1}, r"feature_map must be str, got feature_map=1"),
        (
            {"type": "levit", "map_size": (4, 4, 4)},
            r"map_size must be int \| tuple\[int, int\], got map_size=\(4, 4, 4\)",
        ),
        ({"type": "routed", "regions": 2, "topk": 5}, r"topk must be from 1 to the number of regions \(2·2 = 4\)"),
        ({"type": "routed", "regions": 0}, r"regions must be positive"),
        ({"type": "window", "window_size": 0}, r"window_size must be positive"),
        ({"type": "pool", "pool_size": 4}, r"pool_size must be odd and positive, got pool_size=4"),
        ({"type": "routed", "regions": 2, "topk": 0}, r"topk must be from 1 to .* got topk=0"),
        ({"type": "routed", "lepe_kernel": 4}, r"lepe_kernel must be odd and positive, got lepe_kernel=4"),
        ({"type": "full", "lepe_kernel": 0}, r"lepe_kernel must be odd and positive, got lepe_kernel=0"),
        ({"type": "window", "window_size": 4, "shift_size": 4}, r"shift_size must be from 0 to 3, got shift_size=4"),
        ({"type": "window", "unshifted": "both"}, r"unshifted must be 'axis', 'map' or 'none', got unshifted='both'"),
        ({"type": "cross_window", "stripe_width": 0}, r"stripe_width must be positive or None, got stripe_width=0"),
        ({"type": "focused_linear", "kernel_size": 2}, r"kernel_size must be odd and positive, got kernel_size=2"),
        ({"type": "focused_linear", "position_size": 0}, r"size must be positive, got size=0"),
        ({"type": "focused_linear", "focusing_factor": 0}, r"focusing_factor must be positive, got focusing_factor=0"),
        ({"type": "focused_linear", "reduction": 0}, r"reduction must be 1 or more, got reduction=0"),
        ({"type": "linear", "feature_map": "exp"}, r"unknown feature_map='exp', expected one of \('relu', "),
        ({"type": "linear", "denominator": "max"}, r"unknown denominator='max', expected one of \('sum', 'count', "),
        ({"type": "linear", "key_dim": 0}, r"key_dim must be positive, got key_dim=0"),
        ({"type": "linear", "feature_map": "favor", "num_features": 0}, r"num_features must be positive, got num_f"),
        ({"type": "linear", "num_features": 8}, r"num_features is for feature_map of \('favor', 'favor_relu'\), got "),
        ({"type": "linear", "map_size": 8}, r"map_size is for position_bias=True, got map_size=8 without"),
        ({"type": "linear", "position_bias": True, "map_size": (8, 0)}, r"map_size must be positive, got map_size=\(8"),
        ({"type": "flow", "eps_of_flows": 0.0}, r"eps_of_flows must be bool, got eps_of_flows=0.0"),
        (
            {"type": "glu", "hidden_ratio": 0.01},
            r"hidden_ratio must give one channel at least, got dim=16 and hidden_r",
        ),
        ({"type": "glu", "activation": "elu"}, r"unknown activation='elu', expected one of \('gelu', 'silu', 'relu'\)"),
        ({"type": "gmm", "num_kernels": 0}, r"GmmMixer: num_kernels must be positive, got num_kernels=0"),
        ({"type": "gmm", "shift_size": None, "window_size": 0}, r"GmmMixer: window_size must be positive"),
        (
            {"type": "gmm", "window_size": 4, "shift_size": 4},
            r"GmmMixer: shift_size must be from 0 to 3, got shift_siz",
        ),
        (
            {"type": "gmm", "relative_position_bias": True},
            r"only windows have .*window_size=None, shift_size=0 and rel",
        ),
        ({"type": "halo", "block_size": 0}, r"block_size must be positive .*got block_size=0, halo_size=3"),
        ({"type": "halo", "halo_size": -1}, r"halo_size not negative, got block_size=8, halo_size=-1"),
        ({"type": "halo", "stride": 3}, r"stride must be positive and divide block_size, got stride=3, block_size=8"),
        ({"type": "halo", "value_dim": 15}, r"num_heads must divide value_dim, got value_dim=15 and num_heads=2"),
        ({"type": "adaptive_fourier", "num_blocks": 3}, r"num_blocks must divide dim, got dim=16 and num_blocks=3"),
        ({"type": "adaptive_fourier", "threshold": -0.1}, r"threshold must not be negative, got threshold=-0.1"),
        ({"type": "spectral_gate", "map_size": (0, 4)}, r"map_size must be positive, got map_size=\(0, 4\)"),
        ({"type": "clamped_linear", "min_denominator": 0}, r"min_denominator must be positive, got min_denominator=0"),
        ({"type": "data_dependent_conv", "transform": "dst"}, r"transform of \('fft', .*got .* transform='dst'"),
        ({"type": "data_dependent_conv", "conditioning": "phase"}, r"conditioning must be one of .*='phase'"),
        ({"type": "data_dependent_conv", "position_dim": 4}, r"position_dim odd and at least 3, .*position_dim=4"),
        ({"type": "data_dependent_conv", "conditioning_kernel": 2}, r"conditioning_kernel must be odd and positive"),
        ({"type": "channel", "qkv_kernel": 2}, r"ChannelMixer: qkv_kernel must be odd and positive, got qkv_kernel=2"),
        ({"type": "channel", "qk_norm": "l1"}, r"ChannelMixer: unknown qk_norm='l1', expected one of \('none', 'l2'\)"),
        (
            {"type": "channel", "normalizer": "topk"},
            r"ChannelMixer: unknown normalizer='topk', expected one of .*softm",
        ),
        ({"type": "dynamic_local", "kernel_size": 4}, r"kernel_size must be odd and positive, got kernel_size=4"),
        ({"type": "dynamic_local", "reduction": 0}, r"DynamicLocalMixer: reduction must be positive, got reduction=0"),
        ({"type": "expert_choice", "sparsity": 0}, r"sparsity and head_dim must be positive, got sparsity=0 and head_"),
        ({"type": "expert_choice", "head_dim": 0}, r"must be positive, got sparsity=4 and head_dim=0"),
        ({"type": "kmeans", "num_clusters": 0}, r"must be positive, got num_clusters=0 and window_size=None"),
        ({"type": "kmeans", "window_size": 0}, r"must be positive, got num_clusters=8 and window_size=0"),
        ({"type": "kmeans", "decay": 1.5}, r"KMeansMixer: decay must be from 0 to 1, got decay=1.5"),
        ({"type": "pattern", "parts": ()}, r"parts must be different names of \('row', .*got parts=\(\)"),
        ({"type": "pattern", "parts": ("row", "row")}, r"parts must be different names of .*parts=\('row', 'row'\)"),
        ({"type": "pattern", "parts": ("rows",)}, r"parts must be different names of .*parts=\('rows',\)"),
        ({"type": "pattern", "radius": 0}, r"PatternMixer: .* must be positive, got radius=0, cell_size=4 and summ"),
        ({"type": "pattern", "cell_size": 0}, r"must be positive, got radius=8, cell_size=0 and summary_columns=1"),
        ({"type": "pattern", "summary_columns": 0}, r"must be positive, .*cell_size=4 and summary_columns=0"),
        ({"type": "embedding_free", "isr": 0}, r"must be positive, got reduction=1 and isr=0"),
        ({"type": "factorized", "window_size": 0}, r"must be positive, got reduction=1 and window_size=0"),
        ({"type": "factorized", "reduction": 2, "num_heads": 8}, r"more channels, got dim=16 and num_heads=8"),
        ({"type": "forward_cross", "map_size": 0}, r"ForwardCrossMixer: map_size must be positive, got map_size=0"),
        ({"type": "forward_cross", "cross_tokens": -1}, r"must not be negative, got cross_tokens=-1"),
        ({"type": "hashed_linear", "num_bits": 0}, r"must be positive, got num_bits=0 and num_anchors=25"),
        ({"type": "hashed_linear", "num_anchors": 0}, r"must be positive, got num_bits=16 and num_anchors=0"),
        ({"type": "hilo", "window_size": 0}, r"window_size must be positive .*got window_size=0 and alpha=0.5"),
        ({"type": "hilo", "alpha": 1.5}, r"alpha from 0 to 1, got window_size=2 and alpha=1.5"),
        (
            {"type": "injective_linear", "feature_map": "elu"},
            r"unknown feature_map='elu', expected one of \('identity', ",
        ),
        ({"type": "injective_linear", "window_size": 4, "shift_size": 4}, r"got window_size=4 and shift_size=4"),
        ({"type": "kolmogorov_arnold", "base": "relu"}, r"unknown base='relu', expected one of \('zero', 'identity', "),
        (
            {"type": "kolmogorov_arnold", "rank": 0},
            r"must be positive .*got map_size=14, rank=0, grid_size=3",
        ),
        ({"type": "kolmogorov_arnold", "prefix_tokens": -1}, r"prefix_tokens not negative, got .*prefix_tokens=-1"),
        (
            {"type": "large_kernel_ffn", "kernel_sizes": (7, 4)},
            r"kernel_sizes\[1\] must be odd .*got kernel_sizes\[1\]=4",
        ),
        ({"type": "aggregated", "window_size": 4}, r"window_size must be odd and positive, got window_size=4"),
        (
            {"type": "aggregated", "reduction": 0},
            r"must be positive where they are given, got reduction=0, pool_size=N",
        ),
        ({"type": "aggregated", "pool_size": 0}, r"got reduction=4, pool_size=0, map_size=None and"),
        ({"type": "aggregated", "map_size": (7, 0)}, r"pool_size=None, map_size=\(7, 0\) and bias_size=None"),
        ({"type": "aggregated", "bias_size": 0}, r"map_size=None and bias_size=0"),
        ({"type": "mixture_of_heads", "shared_heads": 3}, r"got num_heads=2, shared_heads=3 and routed_heads="),
        ({"type": "mixture_of_heads", "shared_heads": -1}, r"expected shared_heads from 0 .*shared_heads=-1"),
        ({"type": "mixture_of_heads", "routed_heads": 0}, r"got num_heads=2, shared_heads=1 and routed_heads=0"),
        ({"type": "mixture_of_heads", "routed_heads": 2}, r"got num_heads=2, shared_heads=1 and routed_heads=2"),
        (
            {"type": "moving_average", "qk_dim": 0},
            r"got value_ratio=2.0 of dim=16, qk_dim=0, num_averages=16 and map_s",
        ),
        ({"type": "moving_average", "attention": "relu"}, r"unknown attention='relu', expected one of \('laplace', "),
        ({"type": "levit", "map_size": 0}, r"must be positive, got key_dim=16, attn_ratio=2.0, map_size=0"),
        ({"type": "levit", "out_dim": 0}, r"must be positive, .*out_dim=0"),
        ({"type": "levit", "num_heads": 0}, r"num_heads must divide dim, got dim=16 and num_heads=0"),
        ({"type": "score", "normalizer": "max"}, r"unknown normalizer='max', expected one of \('softmax', 'sigmoid', "),
        ({"type": "score", "score": "cosine"}, r"unknown score='cosine', expected one of \('dot', 'gaussian', "),
        ({"type": "score", "qk_norm": "rms"}, r"unknown qk_norm='rms', expected one of \('none', 'l2', "),
        ({"type": "score", "temperature": "key"}, r"unknown temperature='key', expected one of \('none', 'position', "),
        ({"type": "score", "query_padding": "after"}, r"unknown query_padding='after', expected one of \('both', "),
        ({"type": "score", "key_padding": "left"}, r"unknown key_padding='left', expected one of \('both', 'before', "),
        ({"type": "score", "output_norm": "rms"}, r"unknown output_norm='rms', expected one of \('none', 'gated_rms"),
        ({"type": "score", "score": "gaussian", "normalizer": "relu"}, r"take a normalizer of \('softmax', .*='relu'"),
        ({"type": "score", "score": "neural", "qk_norm": "l2"}, r"qk_norm='l2' is for scores of 'dot', got .*'neural'"),
        ({"type": "score", "hidden_dim": 4}, r"hidden_dim is for score='neural', which is not given, got hidden_dim=4"),
        (
            {"type": "score", "score": "neural", "power": 3.0},
            r"power is for score='inverse_distance', .*power=3.0; leave",
        ),
        ({"type": "score", "key_steps": 1}, r"key_steps is for score='gaussian', which is not given, got key_steps=1"),
        (
            {"type": "score", "map_size": 7},
            r"map_size is for position_bias or offset_factor, which is not .*map_size=7",
        ),
        ({"type": "score", "key_padding": "before"}, r"key_padding is for key_kernel or weight_key_kernel, .*'before'"),
        (
            {"type": "score", "position_bias": True, "map_size": (0, 4)},
            r"map_size must be positive, got map_size=\(0, 4",
        ),
        ({"type": "score", "score": "neural", "hidden_dim": 1}, r"hidden_dim must be at least 2, got hidden_dim=1"),
        (
            {"type": "score", "score": "inverse_distance", "power": 0.0},
            r"must be positive, got power=0.0 and eps=0.001",
        ),
        ({"type": "score", "score": "inverse_distance", "eps": float("nan")}, r"eps must be a number, got eps=nan"),
        (
            {"type": "score", "score": "gaussian", "key_steps": -1},
            r"must not be negative, got key_steps=-1 and value_p",
        ),
        ({"type": "score", "query_kernel": 2}, r"query_kernel must be positive, and odd where .*query_kernel=2"),
        ({"type": "score", "weight_key_kernel": 0}, r"weight_key_kernel must be positive, .* got weight_key_kernel=0"),
        (
            {"type": "score", "score_groups": 0},
            r"score_groups must divide num_heads, got score_groups=0 and num_heads=2",
        ),
        ({"type": "single_head", "partial_dim": 17}, r"partial_dim must be from 1 to dim=16, got partial_dim=17"),
        ({"type": "single_head", "qk_dim": 0}, r"qk_dim must be positive, got qk_dim=0"),
        ({"type": "subspace", "head_dim": 0}, r"SubspaceMixer: head_dim must be positive, got head_dim=0"),
        ({"type": "super_token", "token_size": 0}, r"must be positive, got token_size=0 and num_iterations=1"),
        ({"type": "super_token", "num_iterations": 0}, r"must be positive, got token_size=8 and num_iterations=0"),
        ({"type": "super_token", "refinement": "conv"}, r"unknown refinement='conv', expected one of \('attention', "),
        ({"type": "dual_attention", "relational_heads": 3}, r"from 1 to num_heads=2, got relational_heads=3"),
        ({"type": "dual_attention", "num_relations": 3}, r"relational heads' width 8, got num_relations=3"),
        (
            {"type": "dual_attention", "relation_activation": "exp"},
            r"unknown relation_activation='exp', expected one of",
        ),
        ({"type": "dual_attention", "symbols": "symbolic"}, r"unknown symbols 'symbolic' .*expected one of"),
        (
            {"type": "dual_attention", "symbols": {"type": "symbolic_attention", "num_heads": 3}},
            r"num_heads must divide dim=16, .*got num_heads=3 and num_symbols=16",
        ),
        (
            {"type": "dual_attention", "symbols": {"type": "relational", "neighbours": 0}},
            r"there must be neighbors, got relation_heads=1 and neighbors=0",
        ),
        ({"type": "dual_attention", "symbols": {"type": "positional", "max_length": 0}}, r"positive, got max_length=0"),
        (
            {"type": "dual_attention", "symbols": {"type": "position_relative", "max_distance": -1}},
            r"must not be negative, got max_distance=-1",
        ),
        ({"type": "light_conv", "kernel_size": (3, 4)}, r"kernel_size\[1\] must be odd and positive, got .*=4"),
        ({"type": "light_conv", "weight_dropout": 1.0}, r"must be from 0 to below 1, got weight_dropout=1.0"),
        ({"type": "light_conv", "renorm_padding": True}, r"renorm_padding is for dynamic=True with .*dynamic=False"),
        ({"type": "score", "score": "collision", "hash_length": 0}, r"hash_length must be positive, got hash_length=0"),
        ({"type": "score", "hash_length": 8}, r"hash_length is for score='collision', which is not given, got hash_l"),
        ({"type": "sea", "length": 5}, r"SeaMixer: length must be even and positive, .*got length=5, topk=7"),
        ({"type": "sea", "topk": 0}, r"topk and num_features positive, got length=128, topk=0 and num_features=None"),
        ({"type": "sea", "among": "batch"}, r"unknown among='batch', expected one of \('query', 'heads', 'queries', "),
        ({"type": "multi_pool", "segments": 0}, r"MultiPoolMixer: segments must be positive, got segments=0"),
        ({"type": "multi_pool", "pool_size": 2}, r"pool_size must be odd and positive, got pool_size=2"),
        ({"type": "nystrom", "num_landmarks": -1}, r"not be negative, .*got num_landmarks=-1 and num_iterations=6"),
        ({"type": "nystrom", "num_iterations": 0}, r"got num_landmarks=64 and num_iterations=0"),
        ({"type": "nystrom", "out_dim": 9}, r"num_heads=2 must divide out_dim, got out_dim=9"),
        ({"type": "nystrom", "value_kernel": 2}, r"value_kernel must be odd and positive, got value_kernel=2"),
        ({"type": "taylor_shift", "coefficients": (0, 1.0, 1.0)}, r"a > 0 and c >= b.*coefficients=\(0, 1.0, 1.0\)"),
        ({"type": "taylor_shift", "coefficients": (0.5, 1.5, 1.0)}, r"never negative, got coefficients=\(0.5, 1.5, "),
        ({"type": "spatial_reduction", "reduction": 0}, r"expected a positive reduction.*reduction=0"),
        ({"type": "spatial_reduction", "reduction": 2, "pool_size": 7}, r"with reduction 1, got reduction=2"),
        ({"type": "full", "head_dim": 0}, r"FullMixer: head_dim must be positive, got head_dim=0"),
        (
            {"type": "full", "head_dim": 4, "lepe_kernel": 3},
            r"lepe_kernel needs heads that are together as wide as the map, got dim=16, num_heads=2 and head_dim=4",
        ),
        ({"type": "full", "kv_heads": 3}, r"kv_heads must divide num_heads=2, got kv_heads=3"),
        ({"type": "window", "kv_heads": 0}, r"WindowMixer: kv_heads must divide num_heads=2, got kv_heads=0"),
        ({"type": "channel", "kv_heads": 1}, r"kv_heads"),
        ({"type": "full", "num_heads": 3}, r"num_heads must divide dim, got dim=16 and num_heads=3"),
    ],
)
def test_wrong_specs_are_named(spec, message):
    with pytest.raises(ValueError, match=message):
        build_mixer(spec, 16, 2)


@pytest.mark.parametrize(
    "name", sorted(set(MIXERS) - {"pool", "single_head", "levit", "large_kernel_ffn", "decoupled_fc"})
)  # their heads are free
@pytest.mark.parametrize("num_heads", [3, 0, -2, 32])
def test_heads_that_do_not_divide_the_channels_are_refused(name, num_heads):
    with pytest.raises(ValueError, match=f"num_heads must divide dim, got dim=16 and num_heads={num_heads}"):
        build_mixer(_spec(name), 16, num_heads)


@pytest.mark.parametrize("name", MIXERS)
def test_no_channels_are_refused(name):
    with pytest.raises(ValueError, match="dim must be positive, got dim=0"):
        build_mixer(_spec(name), 0)


@pytest.mark.parametrize("name", MIXERS)
@pytest.mark.parametrize("shape", [(6, 9, 16), (1, 2, 6, 9, 16), (2, 16, 6, 9), (2, 6, 9, 8), (2, 0, 9, 16), (16,)])
def test_what_is_no_map_of_the_mixer_is_refused_with_its_shape(name, shape):
    mixer = build_mixer(_spec(name), 16, 2)
    with pytest.raises(ValueError) as error:
        mixer(torch.randn(shape))
    assert f"{type(mixer).__name__}: expected a map [B, H, W, C] with C = 16, got {shape}" in str(error.value)
    assert "MixerNCHW" in str(error.value)


@pytest.mark.parametrize("name", MIXERS)
@pytest.mark.parametrize("dtype", [torch.float16, torch.float64, torch.int64])
def test_a_map_of_another_dtype_than_the_weights_is_refused(name, dtype):
    mixer = build_mixer(_spec(name), 16, 2)
    x = torch.ones(1, 6, 9, 16, dtype=dtype)
    if name in ("fourier", "pool") and dtype.is_floating_point:  # have no weights
        assert mixer(x).dtype == dtype
        return
    with pytest.raises(ValueError, match=f"{type(mixer).__name__}: expected a floating point map .*got {dtype}"):
        mixer(x)
    with torch.device("meta"):
        meta = build_mixer(_spec(name), 16, 2)
    with pytest.raises(ValueError, match=f"got {dtype}"):
        meta(x.to("meta"))


@pytest.mark.parametrize("name", MIXERS)
def test_no_samples_are_no_error(name):
    """A detector's second stage may have nothing to look at."""
    mixer = build_mixer(_spec(name), 16, 2).eval()
    assert mixer(torch.randn(0, 6, 9, 16)).shape == (0, 6, 9, 16)


def test_overrides_go_stage_by_stage_and_keep_the_familys_options():
    own = [[{"type": "window", "window_size": 5}, {"type": "channel"}], [{"type": "full"}], [{"type": "full"}]]
    assert resolve_mixers(own, None) == own
    assert resolve_mixers(own, "pool") == [[{"type": "pool"}]] * 3
    mixed = resolve_mixers(own, ("window", ["pool", {"type": "full", "lepe_kernel": 3}], None))
    assert mixed == [
        [{"type": "window", "window_size": 5}],
        [{"type": "pool"}, {"type": "full", "lepe_kernel": 3}],
        [{"type": "full"}],
    ]
    turns = [[{"type": "window", "shift_size": 0}, {"type": "window", "shift_size": None}]]
    assert resolve_mixers(turns, "window") == resolve_mixers(turns, [["window", "window"]]) == turns
    assert [spec["shift_size"] for spec in resolve_mixers(turns, {"type": "window", "window_size": 5})[0]] == [0, None]
    with pytest.raises(ValueError, match="one entry for each of the 3 stages, got 2"):
        resolve_mixers(own, ("pool", "pool"))
    with pytest.raises(ValueError, match="one entry for each of the 3 stages, got int: 5"):
        resolve_mixers(own, 5)
    with pytest.raises(ValueError, match="at least one mixer"):
        resolve_mixers(own, ("pool", [], "pool"))


def test_overrides_lie_over_those_of_a_variant():
    own = [[{"type": "focused_linear", "position_size": 56}], None]
    assert combine_mixers(own, None) == [own[0], None]
    assert combine_mixers(own, {"type": "focused_linear", "focusing_factor": 4}) == [
        [{"type": "focused_linear", "position_size": 56, "focusing_factor": 4}],
        {"type": "focused_linear", "focusing_factor": 4},
    ]
    assert combine_mixers(own, (None, "pool")) == [own[0], "pool"]
    assert combine_mixers(own, ("pool", None)) == [[{"type": "pool"}], None]
    with pytest.raises(ValueError, match="one entry for each of the 2 stages, got 1"):
        combine_mixers(own, ("pool",))


def test_blocks_of_a_stage_take_its_mixers_in_turn():
    model = timm.create_model("zoo_davit_t", device="meta", mixers=(None, "pool", ["pool", "routed"], "full"))
    names = [[type(block.mixer).__name__ for block in stage.blocks] for stage in model.stages]
    assert names == [
        ["WindowMixer", "ChannelMixer"],
        ["PoolMixer"] * 2,
        ["PoolMixer", "RoutedMixer"] * 3,
        ["FullMixer"] * 2,
    ]


@pytest.mark.parametrize("name", TINY)
def test_under_a_scope_nothing_but_the_reference_runs(name, monkeypatch):
    monkeypatch.setenv("VISIONZOO_BACKEND", "triton")  # what the scope does not reach runs in the interpreter
    model = timm.create_model(name, num_classes=3, **TINY[name]).train()
    with use_backend("reference"), explain() as decisions:
        model(torch.randn(2, 3, 64, 64)).sum().backward()
    assert {decision.backend for decision in decisions} <= {"reference"}
    assert decisions or name == "zoo_levit_128s"  # which is made of torch's layers alone


@pytest.mark.parametrize("name", MIXERS)
def test_under_a_scope_mixers_run_the_reference_alone(name, monkeypatch):
    monkeypatch.setenv("VISIONZOO_BACKEND", "triton")
    mixer = build_mixer(_spec(name), 16, 2)
    with use_backend("reference"), explain() as decisions:
        mixer(torch.randn(1, 6, 8, 16, requires_grad=True)).sum().backward()
    assert {decision.backend for decision in decisions} <= {"reference"}


# No gradient passes through super tokens' memberships and the largest exponents of random features, and that of the
# signs is made up: not those of one function.
STOPPED = {"super_token", "hashed_linear", "sea"}


@pytest.mark.parametrize("name", sorted(set(MIXERS) - STOPPED))
def test_second_derivatives_of_the_reference_are_those_of_differences(name):
    torch.manual_seed(0)
    mixer = build_mixer(_spec(name), 16, 2).double().eval()
    x, direction = (torch.randn(1, 6, 8, 16, dtype=torch.float64) for _ in range(2))

    def gradient(at, create_graph=False):
        return torch.autograd.grad(mixer(at).pow(3).sum(), at, create_graph=create_graph)[0]

    with use_backend("reference"):
        leaf = x.clone().requires_grad_()
        product = torch.autograd.grad(gradient(leaf, create_graph=True), leaf, direction)[0]
        step = 1e-6 * direction
        after, before = (gradient((x + sign * step).requires_grad_()) for sign in (1, -1))
    assert relative_error(product, (after - before) / 2e-6) < 1e-6


@pytest.mark.parametrize("name", of_each_kind())
def test_families_have_second_derivatives_under_the_reference(name):
    model = timm.create_model(name, num_classes=3, **TINY[name]).double().eval()  # float32 would lose what fades
    x = torch.randn(1, 3, 64, 64, dtype=torch.float64, requires_grad=True)
    with use_backend("reference"):
        grad = torch.autograd.grad(model(x).square().sum(), x, create_graph=True)[0]
        if not model.TWICE:
            with pytest.raises(RuntimeError, match=r"derivative for .* is not implemented"):
                grad.square().sum().backward()
            return
        grad.square().sum().backward()
    assert x.grad.isfinite().all() and x.grad.abs().sum() > 0


@pytest.mark.parametrize("name", ["full", "levit", "single_head", "spatial_reduction"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@torch.no_grad()
def test_plain_attention_of_all_tokens_is_torchs_own(name, dtype):
    torch.manual_seed(0)
    mixer = build_mixer(_spec(name), 16, 2).to(dtype).eval()
    x = torch.randn(2, 6, 8, 16, dtype=dtype)
    with use_backend("reference"):
        plain = mixer(x)
    assert plain.dtype == dtype and not torch.equal(plain, torch.zeros_like(plain))
    assert relative_error(plain.double(), mixer(x).double()) < 4 * torch.finfo(dtype).eps
