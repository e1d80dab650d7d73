"""Fusing changes no output, leaves the given model alone, and what must not happen to a fused model raises."""

import copy
import io
from functools import partial

import pytest
import timm
import torch
from quick import quick_model
from timm.models import get_notrace_functions, get_notrace_modules
from torch import nn
from torchvision.models.feature_extraction import NodePathTracer

import visionzoo
from visionzoo.layers.conv_norm import ConvNorm, LinearNorm
from visionzoo.layers.fuse import Folded
from visionzoo.layers.nhwc import BatchNormNHWC, ConvNHWC
from visionzoo.models import registry

TINY = {
    "zoo_levit_128s": {"depths": (1, 1, 1)},
    "zoo_shvit_s1": {"depths": (1, 1, 1)},
    "zoo_biformer_t": {"depths": (1, 1, 1, 1)},
    "zoo_biformer_stl": {"depths": (1, 1, 1, 1)},
    "zoo_davit_t": {"depths": (1, 1, 1, 1)},
    "zoo_halonet_h0": {"layout": ("a",) * 4},
    "zoo_sehalonet_33ts": {"layout": ("c", "c", "c", "ca")},
    "zoo_stvit_s": {"depths": (1, 1, 1, 1)},
    "zoo_litv2_s": {"depths": (1, 1, 1, 1)},
    "zoo_ffnet_1": {"depths": (1, 1, 1, 1)},
    "zoo_l2vit_t": {"depths": (2, 1, 1, 1)},
}
WITHOUT_PAIRS = [
    "zoo_cswin_t",
    "zoo_dinat_mini",
    "zoo_flatten_swin_t",
    "zoo_nat_mini",
    "zoo_poolformer_s12",
    "zoo_pvt_t",
    "zoo_pvtv2_b0",
    "zoo_swin_t",
    "zoo_favit_b0",
    "zoo_eft_t",
    "zoo_inline_swin_t",
]
LEFT = {
    "zoo_ffnet_1": ["norm"],
    "zoo_l2vit_t": ["stages.0.blocks.1.cpe2.bn"],  # between an activation and a convolution that pads
    "zoo_biformer_t": ["norm"],  # before pooling: part of the features
    "zoo_biformer_stl": ["norm"],
    "zoo_halonet_h0": [f"stages.{i}.blocks.0.norm2" for i in range(4)],  # behind attention, not behind its projection
    "zoo_sehalonet_33ts": ["stages.3.blocks.1.norm2"],  # between attention and an activation
    "zoo_stvit_s": [f"stem.{i}" for i in (2, 5, 8, 11)],  # before convolutions that pad
}


def _norms(model):
    return [name for name, module in model.named_modules() if isinstance(module, nn.modules.batchnorm._BatchNorm)]


def _shake(model):
    """Statistics and weights of batch norms as training leaves them."""
    generator = torch.Generator().manual_seed(0)
    for name in _norms(model):
        norm = model.get_submodule(name)
        norm.running_mean.normal_(std=0.3, generator=generator)
        norm.running_var.uniform_(0.3, 3.0, generator=generator)
        if norm.affine:
            nn.init.normal_(norm.weight, 1.0, 0.3, generator=generator)
            nn.init.normal_(norm.bias, 0.0, 0.3, generator=generator)
    return model.eval()


def _model(name="zoo_levit_128s", **kwargs):
    return _shake(quick_model(name, **TINY[name], num_classes=7, **kwargs))


def _error(out, expected):
    return ((out - expected).norm() / expected.norm()).item()


@pytest.mark.parametrize("name", TINY)
@torch.no_grad()
def test_fused_model_computes_the_same(name):
    model = _model(name)
    assert bool(_norms(model)) == (name != "zoo_davit_t")
    image = torch.randn(2, 3, 75, 96)
    fused = visionzoo.fuse(model)
    assert _norms(fused) == LEFT.get(name, [])
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


@pytest.mark.parametrize("name", WITHOUT_PAIRS)
@torch.no_grad()
def test_other_families_have_nothing_to_fold_and_stay_what_they_are(name):
    model = quick_model(name, depths=(1, 1, 1, 1), num_classes=7)
    assert not _norms(model)
    image = torch.randn(1, 3, 64, 64)
    assert _error(visionzoo.fuse(model)(image), model(image)) <= 2e-6


def test_no_family_is_left_out():
    families = {f for f, names in registry.FAMILIES.items() if set(names) & ({*TINY, *WITHOUT_PAIRS})}
    assert families == set(registry.FAMILIES)


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
    fused = visionzoo.fuse(wrap(model))
    assert type(fused) is type(model) and _error(fused(image), model(image)) <= 2e-6


@torch.no_grad()
def test_feature_extractors_fuse():
    model = _shake(timm.create_model("zoo_levit_128s", features_only=True, depths=(1, 1, 1)))
    image = torch.randn(1, 3, 64, 64)
    fused = visionzoo.fuse(model)
    assert not _norms(fused)
    for own, other in zip(fused(image), model(image), strict=True):
        assert _error(own, other) <= 2e-6


def _pair(**options):
    return ConvNorm(8, 12, 3, norm_layer=BatchNormNHWC, **options)


@pytest.mark.parametrize(
    ("layer", "folded"),
    [
        (_pair(), True),
        (_pair(bias=False, padding=1, stride=2, groups=4), True),
        (_pair(norm_first=True), True),
        (_pair(norm_first=True, bias=False, groups=2, stride=2), True),
        (_pair(norm_first=True, padding=1), False),  # zero padding comes between the two
        (_pair(norm_first=True, pad_to_stride=True, stride=2), False),
        (ConvNorm(8, 12, 3, norm_layer=lambda dim: BatchNormNHWC(dim, affine=False)), True),
        (ConvNorm(8, 12, 3, norm_layer=lambda dim: BatchNormNHWC(dim, track_running_stats=False)), False),
        (ConvNorm(8, 12, 3, norm_layer=nn.LayerNorm), False),
        (LinearNorm(8, 12), True),
        (nn.Sequential(ConvNHWC(8, 8, 3, padding=1), BatchNormNHWC(8), nn.ReLU(), ConvNHWC(8, 4, 1)), True),
        (nn.Sequential(BatchNormNHWC(8), nn.Linear(8, 4)), True),
        (nn.Sequential(BatchNormNHWC(8), ConvNHWC(8, 4, 3, padding=1)), False),
        (nn.Sequential(ConvNHWC(8, 8, 1), nn.Identity(), BatchNormNHWC(8)), False),  # not neighbours
        (nn.Sequential(nn.Conv2d(5, 6, 3), nn.BatchNorm2d(6)), True),
        (nn.Sequential(ConvNHWC(8, 8, 1), nn.BatchNorm2d(5)), False),  # normalises rows, not channels
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
    tracer = NodePathTracer(leaf_modules=get_notrace_modules(), autowrap_functions=get_notrace_functions())
    graph = tracer.trace(fused)
    assert torch.equal(torch.fx.GraphModule(tracer.root, graph)(image), fused(image))


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
