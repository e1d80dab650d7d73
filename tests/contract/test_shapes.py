"""Every model is what its cfg and its methods say: on the meta device, shapes only."""

import math
import sys

import pytest
import torch
from quick import FORMS, MODELS, meta_model
from timm.models import group_parameters
from torch.utils.flop_counter import FlopCounterMode

from visionzoo.models._registry import TINY, VARIANTS


@pytest.fixture(scope="module", params=[pytest.param(name, marks=pytest.mark.xdist_group(name)) for name in MODELS])
def model(request):
    return meta_model(request.param)


def _image(size, channels=3):
    return torch.empty(2, channels, *size, device="meta")


def _features(model, height=3, width=2):
    """Draw what the model's head takes."""
    if model.HEAD_INPUT.startswith("NCHW"):
        beside = [] if model.HEAD_INPUT == "NCHW" else model.head.latent_dims
        channels = model.num_features - sum(beside[-1:])
        features = torch.empty(2, channels, height, width, device="meta")
        if not beside:
            return features
        return features, *(torch.empty(2, 5 - i, dim, device="meta") for i, dim in enumerate(beside))
    if model.BRANCHES == 1:
        return torch.empty(2, 2 + height * width, model.num_features, device="meta")
    widths = [info["num_chs"] for info in model.feature_info[:: model.num_parts]]
    return tuple(torch.empty(2, 2 + (i + 1) * width, dim, device="meta") for i, dim in enumerate(widths))


def _shapes(x):
    return tuple(map(_shapes, x)) if isinstance(x, tuple) else tuple(x.shape)


def _names(name_or_names):
    return [name_or_names] if isinstance(name_or_names, str) else name_or_names


def test_default_cfg_names_the_right_layers(model):
    cfg = model.pretrained_cfg
    state = model.state_dict()
    for first_conv in _names(cfg["first_conv"]):
        assert state[f"{first_conv}.weight"].shape[1] == 3
    for classifier in _names(cfg["classifier"]):
        assert state[f"{classifier}.weight"].shape[0] == cfg["num_classes"] == 1000
    features = _features(model, *(cfg["pool_size"] or (3, 2)))
    assert model.forward_head(features, pre_logits=True).shape == (2, model.head_hidden_size)
    assert cfg["license"] and cfg["origin_url"] and cfg["paper_ids"]


def test_layer_groups_rise_from_input_to_output(model):
    groups = group_parameters(model, model.group_matcher(coarse=False), reverse=True)
    assert set(groups) == {parameter for parameter, _ in model.named_parameters()}
    first = {
        prefix: min(g for p, g in groups.items() if p.startswith(prefix)) for prefix in ("stem", f"{model.PARTS}.0.")
    }
    assert first["stem"] == 0 < first[f"{model.PARTS}.0."] < max(groups.values())
    for classifier in _names(model.pretrained_cfg["classifier"]):
        assert groups[f"{classifier}.weight"] == max(groups.values())
    coarse = group_parameters(model, model.group_matcher(coarse=True), reverse=True)
    assert len(set(coarse.values())) == 1 + len(model.parts) + 1


def test_no_weight_decay_names_parameters(model):
    assert model.no_weight_decay() <= {parameter for parameter, _ in model.named_parameters()}


def test_wrong_indices_and_formats_are_refused(model):
    count = len(model.feature_info)
    for indices in ([count], [-count - 1], count + 1):
        with pytest.raises(ValueError, match=rf"feature indices must be from -{count} to {count - 1} \({count} "):
            model.forward_intermediates(_image((64, 64)), indices=indices)
    for fmt in {"NCHW", "NHWC", "NLC", "NHC"} - {*model.FORMATS}:
        with pytest.raises(ValueError, match=f"output_fmt must be one of .* got '{fmt}'"):
            model.forward_intermediates(_image((64, 64)), output_fmt=fmt)


def test_classifier_can_be_replaced_and_removed(model):
    features = _features(model)
    try:
        model.reset_classifier(7)
        assert model.forward_head(features).shape == (2, 7) and model.num_classes == 7
        classifier = model.get_classifier()
        for linear in classifier if isinstance(classifier, tuple) else [classifier]:
            assert linear.weight.shape[0] == 7
        model.reset_classifier(0)
        assert model.forward_head(features).shape == (2, model.head_hidden_size)
        model.reset_classifier(0, "")
        assert _shapes(model.forward_head(features)) == _shapes(features)
    finally:
        model.reset_classifier(1000, model.default_pool)


def test_poolings_work_where_the_family_has_them_and_are_refused_elsewhere(model):
    features, width = _features(model), model.head_hidden_size
    try:
        for pool in ("", "avg", "max", "avgmax", "catavgmax", "token", "map", "avgg"):
            if pool in model.POOLS:
                model.reset_classifier(0 if pool == "" else 7, pool)
                pooled = _shapes(model.forward_head(features, pre_logits=True))
                assert pooled == (_shapes(features) if pool == "" else (2, model.head_hidden_size))
                assert model.head_hidden_size == width * (2 if pool == "catavgmax" else 1)
                if pool:
                    assert model.forward_head(features).shape == (2, 7)
                continue
            model.reset_classifier(1000, model.default_pool)
            with pytest.raises(ValueError, match=f"{pool}"):
                model.reset_classifier(7, pool)
            assert model.num_classes == 1000
    finally:
        model.reset_classifier(1000, model.default_pool)


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=[] if name in TINY else [pytest.mark.full]) for name in MODELS]
)
def test_multiply_adds_are_the_published_and_maps_those_of_feature_info(name, monkeypatch):
    model, published = meta_model(name), VARIANTS[name].published
    multiply_adds = []

    def neighborhood_attention(q, k, v, *, kernel_size, **_):
        """Cost what the definition does; the reference works in tiles, which is more."""
        multiply_adds.append(2 * q.numel() * math.prod(kernel_size))
        return torch.empty_like(q)

    monkeypatch.setattr("visionzoo.layers.mixers.neighborhood.neighborhood_attention", neighborhood_attention)
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        last, maps = model.forward_intermediates(torch.empty(1, 3, published.size, published.size, device="meta"))
        model.forward_head(last)
    for m, info in zip(maps, model.feature_info, strict=True):
        assert m.shape[1] == info["num_chs"] and abs(published.size / info["reduction"] - m.shape[2]) <= 0.5
    _check_published(model, "gmacs", (counter.get_total_flops() / 2 + sum(multiply_adds)) / 1e9)


def test_parameters_are_the_published(model):
    _check_published(model, "params_m", sum(p.numel() for p in model.parameters()) / 1e6)


def _check_published(model, what, counted):
    """Within 2 % or the rounding of the publication; what is not, the family's docstring explains."""
    published = VARIANTS[model.pretrained_cfg["architecture"]].published
    if (expected := getattr(published, what)) is None:
        return
    rounding = 0.5 * 10 ** -len(f"{expected:g}".partition(".")[2])
    agrees = abs(counted - expected) <= max(0.02 * expected, rounding)
    assert agrees != (what in published.explained), f"{what}: counted {counted:.3f}, published {expected}"
    assert agrees or f"{counted:.1f}" in str(sys.modules[type(model).__module__].__doc__)


@pytest.mark.parametrize("form", FORMS)
def test_features_only_has_no_dead_parameters(form):
    name, kwargs = form
    channels = [info["num_chs"] for info in meta_model(name, **kwargs).feature_info]
    for index, channel in enumerate(channels):
        getter = meta_model(name, **kwargs, features_only=True, out_indices=(index,))
        assert getter.feature_info.channels() == [channel]
        parts = range(index % getter.model.num_parts + 1)
        needed = {*getter.model.stem_names} | {f"{getter.model.PARTS}.{i}" for i in parts}
        for parameter, _ in getter.model.named_parameters():
            assert parameter.split(".")[0] in needed or ".".join(parameter.split(".")[:2]) in needed, parameter


@pytest.mark.parametrize("form", FORMS)
def test_any_image_channels_and_classes(form):
    name, kwargs = form
    first = None
    for channels, classes in [(3, 1000), (1, 1000), (4, 0), (10, 2)]:
        model = meta_model(name, **kwargs, in_chans=channels, num_classes=classes)
        first = first or _shapes(model.stem(_image((64, 64), channels)))
        assert _shapes(model.stem(_image((64, 64), channels))) == first
        features = _features(model)
        assert model.forward_head(features).shape == (2, classes or model.head_hidden_size)
        assert model.in_chans == channels and model.num_classes == classes


@pytest.mark.parametrize("name", MODELS)
def test_unknown_arguments_are_refused(name):
    with pytest.raises(TypeError, match=rf"{name}: .* has no argument 'num_clases' \(did you mean 'num_classes'"):
        meta_model(name, num_clases=1)
