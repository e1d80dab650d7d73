"""What other libraries do with a model's layers gives the right numbers."""

import copy

import pytest
import timm
import torch
from quick import meta_model, of_each_kind, quick_model, size_for
from timm.layers import SqueezeExcite, convert_sync_batchnorm, freeze_batch_norm_2d, unfreeze_batch_norm_2d
from timm.models._manipulate import reinit_non_persistent_buffers
from timm.utils import freeze, unfreeze
from torch import nn
from torch.utils.flop_counter import FlopCounterMode
from torchvision.models._utils import IntermediateLayerGetter
from torchvision.models.feature_extraction import create_feature_extractor
from torchvision.ops import FrozenBatchNorm2d

import visionzoo
from visionzoo.layers.mixers import InjectiveLinearMixer
from visionzoo.layers.nhwc import DepthwiseConvNHWC
from visionzoo.layers.norm import LayerNorm
from visionzoo.layers.tokens import TokenBlock
from visionzoo.models._pyramid import Pyramid
from visionzoo.models._registry import CLASSES, TINY

BATCH_NORM = [
    name for name in TINY if any(isinstance(m, nn.BatchNorm2d) for m in meta_model(name, **TINY[name]).modules())
]
PYRAMIDS = [name for name in TINY if issubclass(CLASSES[name], Pyramid)]


def _tiny(name, **kwargs):
    return quick_model(name, **TINY[name], num_classes=7, **kwargs)


def _image(size=64, batch=2, model=None):
    sides = (size, size) if model is None else size_for(model, size, size)
    return torch.randn(batch, 3, *sides, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("name", of_each_kind())
def test_layers_are_torchs_own_or_none_of_torchs(name):
    """What asks `isinstance` is right then. Containers, and the norm of any last axis, behave as torch's do."""
    exempt = (nn.Module, nn.ModuleList, nn.LayerNorm)
    kinds = [kind for kind in vars(nn).values() if isinstance(kind, type) and issubclass(kind, nn.Module)]
    torchs = tuple(kind for kind in kinds if kind not in exempt)
    ours = {
        type(module).__name__
        for module in meta_model(name, **TINY[name]).modules()
        if type(module).__module__.startswith("visionzoo") and isinstance(module, (*torchs, SqueezeExcite))
    }
    assert ours <= {"Folded", "_NoHead"}


# -- norms ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("convert", [convert_sync_batchnorm, nn.SyncBatchNorm.convert_sync_batchnorm])
@pytest.mark.parametrize("name", of_each_kind(BATCH_NORM))
def test_synchronised_norms_compute_the_same(name, convert):
    model = _tiny(name)
    changed = convert(copy.deepcopy(model))
    kinds = [type(module) for module in changed.modules()]
    assert nn.SyncBatchNorm in kinds and nn.BatchNorm2d not in kinds
    assert list(changed.state_dict()) == list(model.state_dict())
    image = _image(96)  # one process: the statistics of its own maps
    torch.testing.assert_close(changed.train()(image), model.train()(image))
    torch.testing.assert_close(dict(changed.state_dict()), dict(model.state_dict()))


@torch.no_grad()
@pytest.mark.parametrize("name", of_each_kind(BATCH_NORM))
def test_frozen_norms_compute_the_same_and_thaw(name):
    model = _tiny(name)
    image = _image()
    expected = model(image)
    frozen = freeze_batch_norm_2d(copy.deepcopy(model))
    kinds = [type(module) for module in frozen.modules()]
    assert FrozenBatchNorm2d in kinds and nn.BatchNorm2d not in kinds
    torch.testing.assert_close(frozen(image), expected, rtol=1e-4, atol=1e-4)
    thawed = unfreeze_batch_norm_2d(frozen).eval()
    torch.testing.assert_close(thawed(image), expected, rtol=1e-4, atol=1e-4)


@torch.no_grad()
def test_a_part_is_frozen_where_height_and_channels_agree():
    model = quick_model("zoo_biformer_t", depths=(1,) * 4)
    image = _image(256, 1)  # the first stage's maps are 64 x 64, of 64 channels
    expected = model(image)
    freeze(model, ["stem.2", "norm"])
    assert isinstance(model.stem[2].norm, FrozenBatchNorm2d) and isinstance(model.norm, FrozenBatchNorm2d)
    torch.testing.assert_close(model(image), expected, rtol=1e-4, atol=1e-4)
    unfreeze(model, ["stem.2", "norm"])
    model.eval()
    torch.testing.assert_close(model(image), expected, rtol=1e-4, atol=1e-4)


# -- convolutions -----------------------------------------------------------------------------------------------------

# The patches of the others go through a linear layer.
CONVOLVED = sorted({*TINY} - {"zoo_crate_t", "zoo_dat_s", "zoo_memory_vit_s", "zoo_t2t_nystrom_7"})


@torch.no_grad()
@pytest.mark.parametrize("name", of_each_kind(CONVOLVED))
def test_hooks_on_convolutions_count_as_the_operations_do(name):
    """ptflops, thop and torchinfo multiply a layer's weights by the height and width of its output."""
    model = _tiny(name)
    counted = []

    def count(conv, inputs, output):
        assert inputs[0].shape[1] == conv.in_channels and output.shape[1] == conv.out_channels
        counted.append(conv.weight.numel() * len(output) * output.shape[2] * output.shape[3])

    hooks = [m.register_forward_hook(count) for m in model.modules() if isinstance(m, nn.Conv2d)]
    model(_image(96, model=model))
    for hook in hooks:
        hook.remove()
    depthwise = []
    for module in model.modules():
        if isinstance(module, DepthwiseConvNHWC):
            module.register_forward_hook(lambda m, _, output: depthwise.append(m.weight[0].numel() * output.numel()))
    with FlopCounterMode(display=False) as counter:
        model(_image(96, model=model))
    of_operations = sum(
        flops for operation, flops in counter.get_flop_counts()["Global"].items() if "convolution" in str(operation)
    )
    # kernels that are made from the tokens, and convolutions along a sequence
    others = any(isinstance(module, InjectiveLinearMixer | nn.Conv1d) for module in model.modules())
    rest = of_operations - 2 * sum(depthwise) - 2 * sum(counted)
    assert counted and (rest > 0 if others else rest == 0)


class _Adapter(nn.Module):
    """A convolution with one of low rank beside it, built from the layer's own class, as peft does."""

    def __init__(self, conv, rank=2):
        super().__init__()
        self.conv = conv
        args = (conv.kernel_size, conv.stride, conv.padding, conv.dilation)
        self.down = type(conv)(conv.in_channels, rank * conv.groups, *args, groups=conv.groups, bias=False)
        self.up = type(conv)(rank * conv.groups, conv.out_channels, 1, groups=conv.groups, bias=False)
        nn.init.zeros_(self.up.weight)

    def forward(self, x):
        return self.conv(x) + self.up(self.down(x))


@torch.no_grad()
@pytest.mark.parametrize("name", of_each_kind(CONVOLVED))
def test_convolutions_take_adapters(name):
    model = _tiny(name)
    image = _image(96, model=model)
    expected = model(image)
    convs = [name for name, module in model.named_modules() if isinstance(module, nn.Conv2d)]
    for path in convs:
        parent, _, child = path.rpartition(".")
        setattr(model.get_submodule(parent), child, _Adapter(model.get_submodule(path)))
    torch.testing.assert_close(model(image), expected)
    for module in model.modules():
        if isinstance(module, _Adapter):
            nn.init.normal_(module.up.weight)
    assert convs and (model(image) - expected).norm() > 1e-3 * expected.norm()


# -- features ---------------------------------------------------------------------------------------------------------


@torch.no_grad()
@pytest.mark.parametrize("name", of_each_kind(PYRAMIDS))
def test_features_are_nchw_whoever_takes_them(name):
    model = _tiny(name)
    image = _image(96)
    expected = model.forward_intermediates(image, intermediates_only=True)
    stages = [stage for stage in model.stages if not any(isinstance(m, TokenBlock) for m in stage.modules())]
    hooked = []
    hooks = [stage.register_forward_hook(lambda *args: hooked.append(args[2])) for stage in stages]
    model(image)
    for hook in hooks:
        hook.remove()
    cut = nn.Sequential(*list(model.children())[:2])
    getter = IntermediateLayerGetter(model, {"stem": "first", "stages": "last"})
    assert hooked and all(torch.equal(a, b) for a, b in zip(hooked, expected, strict=False))
    if len(stages) == len(expected):  # else the last has tokens
        assert torch.equal(cut(image), expected[-1])
        assert torch.equal(getter(image)["last"], expected[-1])
    assert torch.equal(getter(image)["first"], model.stem(image))


@pytest.mark.parametrize("kind", ["hook", "list", "dict", "fx"])
@pytest.mark.parametrize("name", of_each_kind())
@torch.no_grad()
def test_every_feature_extractor_of_timm_gives_the_same_or_says_why_not(name, kind):
    whole = quick_model(name, **TINY[name])
    if any(isinstance(module, TokenBlock) for module in whole.modules()):
        with pytest.raises(ValueError, match=f"feature_cls='{kind}'.*tokens.*feature_cls='getter'"):
            quick_model(name, **TINY[name], features_only=True, feature_cls=kind)
        return
    model = quick_model(name, **TINY[name], features_only=True, feature_cls=kind)
    weights = whole.state_dict()
    names = {own: own.removeprefix("graph_module.").replace("stages_", "stages.") for own in model.state_dict()}
    model.load_state_dict({own: weights[name] for own, name in names.items()})
    expected = whole.forward_intermediates(_image(96), intermediates_only=True)
    out = model(_image(96))
    out = list(out.values()) if isinstance(out, dict) else out
    assert all(torch.equal(a, b) for a, b in zip(out, expected, strict=True))


@pytest.mark.parametrize("name", of_each_kind())
@torch.no_grad()
def test_graphs_of_any_tracer_compute_the_same(name):
    model = _tiny(name, drop_path_rate=0.5)
    image = _image(96, model=model)
    dim = model.feature_info[-1]["num_chs"]
    last = model.feature_info[-1]["module"]
    extractor = create_feature_extractor(model, {last: "last", "head": "logits"}, suppress_diff_warning=True)
    out = extractor.eval()(image)
    assert torch.equal(out["logits"], model(image))
    if not any(isinstance(module, TokenBlock) for module in model.modules()):
        assert torch.equal(out["last"], model.forward_intermediates(image, intermediates_only=True)[-1])
    assert dim in (out["last"].shape[1], out["last"].shape[-1])
    graph = torch.fx.symbolic_trace(model.train())
    torch.manual_seed(0)
    expected = model(image)
    torch.manual_seed(0)
    assert torch.equal(graph(image), expected)


@pytest.mark.parametrize("name", of_each_kind())
@torch.no_grad()
def test_images_of_a_few_pixels_give_numbers_or_a_message(name):
    model = _tiny(name)
    for size in (1, 2, 5, 16, 31):
        try:
            assert torch.isfinite(model(_image(size))).all()
        except ValueError as error:
            assert ("the image is too small for this model" if model.ANY_SIZE else "made for maps of") in str(error)


@pytest.mark.parametrize("kwargs", [{}, {"elementwise_affine": False}, {"bias": False}])
def test_layer_norms_are_built_as_torchs(kwargs):
    own, theirs = LayerNorm((5, 8), 1e-3, **kwargs), nn.LayerNorm((5, 8), 1e-3, **kwargs)
    x = torch.randn(2, 5, 8)
    torch.testing.assert_close(own(x), theirs(x))
    torch.testing.assert_close(LayerNorm(8, **kwargs)(x), nn.LayerNorm(8, **kwargs)(x))


# -- what users of timm reported ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", of_each_kind())
@torch.no_grad()
def test_a_head_that_is_reset_keeps_device_and_dtype(name):
    """Directly, too, as trainers do (timm, pull request 2743)."""
    model, image = _tiny(name).double().eval(), _image().double()
    model.head.reset(3)
    assert model(image).dtype == torch.float64 and model(image).shape == (2, 3)
    assert not model.head.training


@pytest.mark.parametrize("name", of_each_kind())
@torch.no_grad()
def test_models_without_classifier_are_their_weights(name):
    """Nothing random is left where there is neither classifier nor pooling (timm, issue 2682)."""
    model, other = (timm.create_model(name, **TINY[name], num_classes=0, global_pool="").eval() for _ in range(2))
    visionzoo.load_weights(other, timm.create_model(name, **TINY[name]).state_dict())
    visionzoo.load_weights(model, other.state_dict())
    torch.testing.assert_close(model(_image()), other(_image()), rtol=0, atol=0)  # or those of all branches


@torch.no_grad()
def test_exporting_leaves_the_model_as_it_was():
    """No fake tensor stays in it, as in LeViT's cache elsewhere (pytorch, issue 155114)."""
    model, image = _tiny("zoo_levit_128s"), _image()
    before = model(image)
    torch.export.export(model, (image,))
    assert type(model(image)) is torch.Tensor and torch.equal(model(image), before)


def test_intermediate_features_recompute_blocks_too():
    """timm, issue 2435: gradient checkpointing in `forward_intermediates`."""
    model = _tiny("zoo_swin_t").train()
    model.set_grad_checkpointing(True)
    calls = []
    for block in model.blocks_in_order():
        block.register_forward_pre_hook(lambda *_: calls.append(1))
    features = model.forward_intermediates(_image(), intermediates_only=True)
    blocks = len(calls)
    sum(feature.mean() for feature in features).backward()
    assert len(calls) == 2 * blocks > 0


# -- parameters that are elsewhere until their module runs ------------------------------------------------------------


def _offload(model):
    """Keep a module's own tensors away outside its forward, as accelerate does, and spoil them after, as ZeRO does."""
    for module in model.modules():
        kinds = (module._parameters, module._buffers)
        own = [
            (kind, name, tensor.detach().clone())
            for kind in kinds
            for name, tensor in kind.items()
            if tensor is not None
        ]
        if not own:
            continue
        away = [(kind, name, torch.empty_like(tensor, device="meta")) for kind, name, tensor in own]
        away = [(kind, name, nn.Parameter(t, False) if kind is module._parameters else t) for kind, name, t in away]

        def bring(module, inputs, own=own):
            for kind, name, tensor in own:
                here = tensor.clone()
                kind[name] = nn.Parameter(here, requires_grad=False) if kind is module._parameters else here

        def take(module, inputs, output, away=away):
            for kind, name, tensor in away:
                if kind[name].is_floating_point():
                    kind[name].data.fill_(torch.nan)
                kind[name] = tensor

        take(module, None, None)
        module.register_forward_pre_hook(bring)
        module.register_forward_hook(take)
    return model


@pytest.mark.parametrize("name", of_each_kind())
@torch.no_grad()
def test_parameters_are_used_inside_their_own_modules_forward(name):
    model = _tiny(name)
    image = _image(96, model=model)
    expected = model(image)
    torch.testing.assert_close(_offload(model)(image), expected)  # copies lie elsewhere: other sums, NaN where misused


# -- the meta device --------------------------------------------------------------------------------------------------


def _fill_with_garbage(model):
    for tensor in (*model.parameters(), *model.buffers()):
        tensor.data.fill_(torch.nan if tensor.is_floating_point() else 1 << 40 if tensor.dtype == torch.int64 else 1)


def _outside(module):
    """Tensors of a module that neither `to_empty` nor a checkpoint reaches."""
    values = vars(module).values()
    flat = (v for value in values for v in (value if isinstance(value, list | tuple) else [value]))
    return [value for value in flat if isinstance(value, torch.Tensor)]


@pytest.mark.parametrize("kwargs", [{}, {"mixers": "levit"}], ids=["own", "levit"])
@pytest.mark.parametrize("name", of_each_kind())
@torch.no_grad()
def test_what_no_checkpoint_holds_is_computed_anew_after_the_meta_device(name, kwargs):
    try:
        model = _tiny(name, **kwargs)
    except ValueError as error:  # a family that has no place for the mixer
        assert "mixer" in str(error)
        return
    other = meta_model(name, **TINY[name], num_classes=7, **kwargs).to_empty(device="cpu")
    _fill_with_garbage(other)
    other.load_state_dict(model.state_dict())
    reinit_non_persistent_buffers(other)
    for path, buffer in model.named_buffers():
        assert torch.equal(other.get_buffer(path), buffer), path
    for path, module in model.named_modules():
        assert not _outside(module), path


@torch.no_grad()
def test_a_model_from_the_meta_device_computes_the_same():
    model = _tiny("zoo_levit_128s")
    with torch.device("meta"):
        other = timm.create_model("zoo_levit_128s", **TINY["zoo_levit_128s"], num_classes=7)
    other = other.to_empty(device="cpu").eval()
    _fill_with_garbage(other)
    visionzoo.load_weights(other, model.state_dict())
    for size in (224, 64):
        assert torch.equal(other(_image(size)), model(_image(size)))
