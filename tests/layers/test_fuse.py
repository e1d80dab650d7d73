"""Fusing changes no output, leaves the given model alone, and what must not happen to a fused model raises."""

import copy
import io
import re
from functools import partial

import pytest
import timm
import torch
from quick import of_each_kind, quick_model, size_for
from timm.layers import BatchNormAct2d
from torch import nn
from torch.nn.utils import parametrizations, parametrize, prune, remove_weight_norm, weight_norm
from torchvision.ops import FrozenBatchNorm2d

import visionzoo
from visionzoo.layers.conv_norm import ConvNorm, DepthwiseConvNorm, LinearNorm
from visionzoo.layers.fuse import Folded
from visionzoo.models._registry import TINY


def _norms(model):
    kinds = nn.modules.batchnorm._BatchNorm | FrozenBatchNorm2d
    return [name for name, module in model.named_modules() if isinstance(module, kinds)]


def _shake(model):
    """Statistics and weights of batch norms as training leaves them."""
    generator = torch.Generator().manual_seed(0)
    for name in _norms(model):
        norm = model.get_submodule(name)
        norm.running_mean.normal_(std=0.3, generator=generator)
        norm.running_var.uniform_(0.3, 3.0, generator=generator)
        if norm.weight is not None:
            nn.init.normal_(norm.weight, 1.0, 0.3, generator=generator)
            nn.init.normal_(norm.bias, 0.0, 0.3, generator=generator)
    return model.eval()


def _model(name="zoo_levit_128s", **kwargs):
    return _shake(quick_model(name, **TINY.get(name, {}), num_classes=7, **kwargs))


def _error(out, expected):
    return ((out - expected).norm() / expected.norm()).item()


@pytest.mark.parametrize("name", of_each_kind())
@torch.no_grad()
def test_fused_model_computes_the_same(name):
    model = _model(name)
    image = torch.randn(2, 3, *size_for(model, 75, 96))
    fused = visionzoo.fuse(model)
    unfolded = model.UNFOLDED
    assert all(unfolded and re.search(unfolded, norm) for norm in _norms(fused)), _norms(fused)
    assert not unfolded or any(re.search(unfolded, norm) for norm in _norms(model))
    assert _error(fused(image), model(image)) <= 2e-6
    model, image = model.double(), image.double()
    fused = visionzoo.fuse(model)
    assert _error(fused(image), model(image)) <= 1e-12
    for own, other in zip(
        fused.forward_intermediates(image, intermediates_only=True),
        model.forward_intermediates(image, intermediates_only=True),
        strict=True,
    ):
        assert _error(own, other) <= 1e-12


@pytest.mark.parametrize(("name", "table"), [("zoo_swin_t", "table"), ("zoo_levit_128s", "bias_table")])
@torch.no_grad()
def test_position_biases_are_looked_up_once(name, table):
    sizes = {"img_size": 64} if name == "zoo_levit_128s" else {}
    model = quick_model(name, depths=(1,) * (3 if sizes else 4), num_classes=7, **sizes).eval()
    image = torch.randn(1, 3, 64, 64)
    fused = visionzoo.fuse(model)
    for parameter, value in fused.named_parameters():
        if parameter.endswith(table):
            value.fill_(torch.nan)
    assert _error(fused(image), model(image)) <= 2e-6


@torch.no_grad()
def test_fusing_again_changes_nothing():
    once = visionzoo.fuse(_model())
    twice = visionzoo.fuse(once)
    first, second = once.state_dict(), twice.state_dict()
    assert list(first) == list(second) and all(torch.equal(first[name], second[name]) for name in first)


@torch.no_grad()
def test_given_model_is_not_changed_and_trains_on():
    model = _model().train()
    before = copy.deepcopy(model.state_dict())
    fused = visionzoo.fuse(model)
    after = model.state_dict()
    assert list(before) == list(after) and all(torch.equal(before[name], after[name]) for name in before)
    assert model.training and not fused.training
    assert all(p.requires_grad for p in model.parameters())
    image = torch.randn(2, 3, 64, 64)
    expected = fused(image)
    with torch.enable_grad():
        model(image).sum().backward()
    for p in model.parameters():
        p.sub_(p.grad, alpha=0.1)
    assert torch.equal(fused(image), expected)  # no memory is shared


FOLDED = {
    "zoo_swin_t": {"depths": (1, 1, 1, 1)},
    "zoo_flatten_swin_t": {"depths": (1, 1, 1, 1)},
    "zoo_levit_128s": {"depths": (1, 1, 1)},
}


@pytest.mark.parametrize("name", FOLDED)
def test_training_a_fused_model_is_refused_and_leaves_it_as_it_was(name):
    fused = visionzoo.fuse(quick_model(name, **FOLDED[name]))
    for model in (fused, fused.stages, copy.deepcopy(fused), visionzoo.fuse(fused)):
        with pytest.raises(RuntimeError, match=r"fused for inference.*train the model that was given"):
            model.train()
        assert not any(module.training for module in model.modules())
        assert model.eval() is model and model.train(False) is model
        assert not any(p.requires_grad for p in model.parameters())


@pytest.mark.parametrize("strict", [True, False])
@pytest.mark.parametrize("name", FOLDED)
def test_unfused_weights_are_refused_by_a_fused_model_which_keeps_its_own(name, strict):
    weights = quick_model(name, **FOLDED[name]).state_dict()
    fused = visionzoo.fuse(quick_model(name, **FOLDED[name]))
    before = {name: value.clone() for name, value in fused.state_dict().items()}
    for load, refusal in ((fused.load_state_dict, RuntimeError), (partial(visionzoo.load_weights, fused), ValueError)):
        with pytest.raises(refusal, match=r"fused for inference.*an unfused model and fuse that"):
            load(weights, strict=strict)
    wrapped = nn.Sequential(fused)
    with pytest.raises(RuntimeError, match="into an unfused model"):
        wrapped.load_state_dict({f"0.{name}": value for name, value in weights.items()}, strict=strict)
    assert all(torch.equal(value, before[name]) for name, value in fused.state_dict().items())


@pytest.mark.parametrize("strict", [True, False])
@pytest.mark.parametrize("name", FOLDED)
def test_fused_weights_are_refused_by_an_unfused_model_and_taken_by_a_fused_one(name, strict):
    model = quick_model(name, **FOLDED[name])
    fused = visionzoo.fuse(model)
    with pytest.raises(ValueError, match=r"fused for inference .*give the weights of the model that was fused"):
        visionzoo.load_weights(model, fused.state_dict(), strict=strict)
    assert not visionzoo.load_weights(visionzoo.fuse(model), fused.state_dict(), strict=strict).unexpected


@torch.no_grad()
def test_fused_model_survives_saving_and_loading():
    model = _model()
    fused = visionzoo.fuse(model)
    other = visionzoo.fuse(_model())
    for p in other.parameters():
        p.zero_()
    other.load_state_dict(fused.state_dict())
    image = torch.randn(1, 3, 64, 64)
    assert torch.equal(other(image), fused(image))
    file = io.BytesIO()
    torch.save(fused, file)
    file.seek(0)
    again = torch.load(file, weights_only=False)
    assert torch.equal(again(image), fused(image))
    with pytest.raises(RuntimeError, match="fused for inference"):
        again.train()


@pytest.mark.parametrize("wrap", [nn.DataParallel, lambda m: torch.compile(m, backend="eager")])
@torch.no_grad()
def test_wrappers_are_taken_off(wrap):
    model = _model()
    image = torch.randn(1, 3, 64, 64)
    expected = model(image)
    fused = visionzoo.fuse(wrap(model)).cpu()  # DataParallel moves the model to a GPU, where there is one
    assert type(fused) is type(model) and _error(fused(image), expected) <= 2e-6


def _prune(conv):
    prune.l1_unstructured(conv, "weight", 0.3)
    return lambda: prune.remove(conv, "weight")


def _weight_norm(conv):
    weight_norm(conv)
    return lambda: remove_weight_norm(conv)


def _parametrize(conv):
    parametrizations.weight_norm(conv)
    return lambda: parametrize.remove_parametrizations(conv, "weight")


@pytest.mark.parametrize("change", [_prune, _weight_norm, _parametrize])
@pytest.mark.filterwarnings("ignore:.*weight_norm:FutureWarning")
@torch.no_grad()
def test_computed_weights_are_refused_until_they_are_permanent(change):
    model = _model()
    image = torch.randn(1, 3, 64, 64)
    make_permanent = change(model.stem[0].conv)
    with pytest.raises(ValueError, match=r"1 tensor is computed .*: stem\.0\.conv\.weight\. Make them permanent"):
        visionzoo.fuse(model)
    make_permanent()
    assert _error(visionzoo.fuse(model)(image), model(image)) <= 2e-6


@torch.no_grad()
def test_hooks_stay_but_for_those_of_folded_norms_which_are_named(caplog):
    model, seen = _model(), []
    for path in ("stem.0.conv", "stages.0", "stem.2.norm"):
        model.get_submodule(path).register_forward_hook(lambda *_, path=path: seen.append(path))
    fused = visionzoo.fuse(model)
    assert caplog.messages == ["fuse: hooks of 1 folded norms are left out: stem.2.norm"]
    fused(torch.randn(1, 3, 64, 64))
    assert seen == ["stem.0.conv", "stages.0"]


@torch.no_grad()
def test_feature_extractors_fuse():
    model = _shake(timm.create_model("zoo_levit_128s", features_only=True, depths=(1, 1, 1)))
    image = torch.randn(1, 3, 64, 64)
    fused = visionzoo.fuse(model)
    assert not _norms(fused)
    for own, other in zip(fused(image), model(image), strict=True):
        assert _error(own, other) <= 2e-6


def _pair(**options):
    return ConvNorm(8, 12, 3, norm_layer=nn.BatchNorm2d, **options)


@pytest.mark.parametrize(
    ("layer", "folded"),
    [
        (_pair(), True),
        (_pair(bias=False, padding=1, stride=2, groups=4), True),
        (_pair(norm_first=True), True),
        (_pair(norm_first=True, bias=False, groups=2, stride=2), True),
        (_pair(norm_first=True, padding=1), False),  # zero padding comes between the two
        (_pair(norm_first=True, pad_to_stride=True, stride=2), False),
        (ConvNorm(8, 12, 3, norm_layer=lambda dim: nn.BatchNorm2d(dim, affine=False)), True),
        (ConvNorm(8, 12, 3, norm_layer=lambda dim: nn.BatchNorm2d(dim, track_running_stats=False)), False),
        (ConvNorm(8, 12, 3, norm_layer=nn.LayerNorm), False),
        (LinearNorm(8, 12), True),
        (nn.Sequential(nn.Conv2d(5, 6, 3, padding=1), nn.BatchNorm2d(6), nn.ReLU(), nn.Conv2d(6, 4, 1)), True),
        (nn.Sequential(nn.Conv2d(5, 6, 3), nn.SyncBatchNorm(6)), True),
        (nn.Sequential(nn.Conv2d(5, 6, 3), FrozenBatchNorm2d(6)), True),
        (nn.Sequential(nn.Conv2d(5, 6, 3), BatchNormAct2d(6)), False),  # an activation comes with it
        (nn.Sequential(nn.BatchNorm2d(5), nn.Conv2d(5, 4, 1)), True),
        (nn.Sequential(nn.BatchNorm2d(5), nn.Conv2d(5, 4, 3, padding=1)), False),
        (nn.Sequential(nn.Conv2d(5, 6, 1), nn.Identity(), nn.BatchNorm2d(6)), False),  # not neighbors
        (nn.Sequential(nn.BatchNorm2d(5), nn.Linear(8, 4)), False),  # normalizes rows, not channels
        (nn.Sequential(nn.Linear(8, 4), nn.BatchNorm2d(5)), False),
        (DepthwiseConvNorm(8, 5), True),
    ],
)
@torch.no_grad()
def test_every_kind_of_pair(layer, folded):
    torch.manual_seed(0)
    if not (isinstance(layer, ConvNorm) and getattr(layer.norm, "running_mean", 0) is None):
        _shake(layer)
    layer = layer.double().eval()
    x = torch.randn(2, 5, 7, 8, dtype=torch.float64)
    fused = visionzoo.fuse(layer)
    assert _error(fused(x), layer(x)) <= 1e-12
    assert any(isinstance(module, Folded) for module in fused.modules()) == folded
    assert not (folded and _norms(fused))


@torch.no_grad()
def test_folding_costs_one_rounding_in_low_precision():
    layer = _shake(_pair()).to(torch.bfloat16)
    exact = visionzoo.fuse(copy.deepcopy(layer).double())
    fused = visionzoo.fuse(layer)
    assert fused.conv.weight.dtype == torch.bfloat16
    assert torch.equal(fused.conv.weight, exact.conv.weight.to(torch.bfloat16))


@torch.no_grad()
def test_fused_model_traces():
    fused = visionzoo.fuse(_model())
    image = torch.randn(1, 3, 64, 64)
    assert torch.equal(torch.fx.symbolic_trace(fused)(image), fused(image))


@pytest.mark.slow
@torch.no_grad()
def test_fused_model_compiles():
    model = _model()
    image = torch.randn(1, 3, 64, 64)
    torch.compiler.reset()
    compiled = torch.compile(visionzoo.fuse(model), fullgraph=True, backend="aot_eager")
    assert _error(compiled(image), model(image)) <= 2e-6


def test_fusing_works_on_the_meta_device():
    with torch.device("meta"):
        model = timm.create_model("zoo_shvit_s1")
    fused = visionzoo.fuse(model)
    assert not _norms(fused) and fused(torch.empty(1, 3, 64, 64, device="meta")).shape == (1, 1000)
