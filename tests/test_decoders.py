"""Segmentors: backbone and decoder in one, compared with their authors' records."""

import pytest
import timm
import torch
from golden import Record, relative_error, sample
from recipes import drawn, guided_attention
from tape import Capture
from torch.nn import functional as F

import visionzoo
from visionzoo.decoders import (
    DECODERS,
    SEGMENTORS,
    FussFreeDecoder,
    FussFreeEncoder,
    ParallelBackbones,
    Segmentor,
    list_segmentors,
)
from visionzoo.decoders.fuss_free import blur_and_halve
from visionzoo.layers.outputs import collect
from visionzoo.models._checkpoint import rename

REDUCED = {"isr": (2, 2, 1, 1), "decoder": {**SEGMENTORS["edaformer_t_ade"].decoder, "isr": (2, 2, 2)}}
RECORDS = {  # -> arguments of create_segmentor
    "edaformer/edaformer_t_ade": {"backbone": "edaformer_t_ade"},
    "edaformer/edaformer_t_ade_reduced": {"backbone": "edaformer_t_ade", **REDUCED},
    "fuss_free/ffnet40s_bcc_mobile_pre_down_small": {
        "backbone": "ffnet40s_bcc_mobile_pre_down",
        "depths": (1, 1, 1, 1),
        "widths": (64, 12, 16, 24),
    },
    "fuss_free/ffnet40s_dbbb_mobile_small": {
        "backbone": "ffnet40s_dbbb_mobile",
        "depths": (2, 1, 1, 1),
        "widths": (16, 12, 16, 24),
    },
    "fuss_free/ffnet46n_cbb_small": {
        "backbone": "ffnet46n_cbb",
        "depths": (1, 2, 1),
        "widths": (16, 16, 12, 24),
        "stem": (64, 64, 16),
    },
    "fuss_free/ffnet50_aaa_small": {"backbone": "ffnet50_aaa", "depths": (1, 2, 1, 1), "widths": (4, 6, 8, 10)},
}
_ONE = {"depths": (1, 1, 1, 1)}
BACKBONES = {  # maps: three from stride 16; four; five from stride 2; four of timm's list; [B, H, W, C]
    "zoo_levit_128s": {"depths": (1, 1, 1)},
    "zoo_pvtv2_b0": _ONE,
    "test_resnet": {},
    "test_convnext": {},
    "swin_tiny_patch4_window7_224": {**_ONE, "img_size": (45, 67), "embed_dim": 8, "num_heads": (1, 1, 2, 2)},
}

SMALL = {
    "guided_attention": {"embed_dim": 4},
    "paratranscnn": {"embed_dim": 4},
}  # options of decoders that are large by default


def small(decoder):
    """Return the decoder's specification, with the options that make it small."""
    return {"type": decoder, **SMALL.get(decoder, {})}


def guided_attention_learning(record):
    """Return the decoder with the authors' weights and, of evaluation and a training step, what is recorded by name."""
    decoder = DECODERS["guided_attention"](guided_attention.CHANNELS, num_classes=5).double()
    state, names = rename(record.state_dict(), decoder)
    assert names == "authors"
    decoder.load_state_dict(state)
    image = record.image()
    maps = [x.requires_grad_() for x in guided_attention.maps(image)]
    out = {"logits_full": F.interpolate(decoder.eval()(maps), image.shape[-2:], mode="bilinear")}
    with collect() as terms:
        logits, exits = decoder.train().decode(maps)
    torch.testing.assert_close(logits, torch.stack([x for name, x in exits.items() if "after" in name]).mean(0))
    full = [F.interpolate(x, image.shape[-2:], mode="bilinear") for x in exits.values()]
    losses = dict(terms)
    losses |= zip(exits, (F.cross_entropy(x, guided_attention.labels(image)) for x in full), strict=True)
    out |= {"exits": torch.stack([losses[name] for name in exits])}
    out |= {"terms": torch.stack([losses["guidance"], losses["reconstruction"]])}
    sum(weight * losses[name] for name, weight in decoder.AUXILIARY.items()).backward()
    return decoder, out | {f"grad_map{i}": x.grad.flatten()[:512] for i, x in enumerate(maps)}


def paratranscnn_learning(record):
    """The same of a small ParaTransCNN, with its backbones."""
    decoder = {"type": "paratranscnn", "embed_dim": 16}
    options = {"resnet": "resnet18", "dim": 16, "num_heads": 4, "depths": (1, 2, 1)}
    model = visionzoo.create_segmentor("paratranscnn", decoder, 5, **options).double().eval()
    report = visionzoo.load_weights(model, record.state_dict())
    assert (report.names, report.missing, report.unexpected, report.beside) == ("authors", [], [], [])
    image = record.image().requires_grad_()
    logits = model(image)
    assert logits.shape == model.decoder(model.forward_maps(image)).shape  # nothing is interpolated
    (logits * drawn(1, logits.shape)).sum().backward()
    return model, {"logits": logits, "grad_image": image.grad.flatten()[:512]}


ROUNDING = 1e-14  # norm of a gradient that is 0
LEARNING = {  # records with gradients of all parameters
    "guided_attention/guided_attention": guided_attention_learning,
    "paratranscnn/paratranscnn_small": paratranscnn_learning,
}
MODELS = {record: arguments["backbone"] for record, arguments in RECORDS.items()}
MODELS |= {record: record.partition("/")[0] for record in LEARNING}


def compared(name):
    """Run a segmentor on its record's weights and image; yield each recorded array's key, our value and the array."""
    record = Record(name)
    yield from _compared_learning(record, LEARNING[name]) if name in LEARNING else _compared_maps(name, record)


def _compared_learning(record, learn):
    """Compare outputs and gradients by our names; of biases before norms the gradient is 0 but for rounding."""
    model, out = learn(record)
    ours = {name: p.grad.flatten()[:16] for name, p in model.named_parameters()}
    their = {k.removeprefix("grad/"): torch.from_numpy(v) for k, v in record.arrays.items() if k.startswith("grad/")}
    their = rename(their, model)[0]
    assert sorted(their) == sorted(ours)
    assert set(out) == {name for name in record.arrays if not name.startswith("grad/")}
    for name, value in out.items():
        yield name, value.detach(), record.arrays[name]
    for name, value in ours.items():
        if their[name].norm() > ROUNDING:
            yield f"grad/{name}", value, their[name].numpy()
        else:
            assert value.norm() <= (ROUNDING if their[name].any() else 0), name


def _compared_maps(name, record):
    model = visionzoo.create_segmentor(**RECORDS[name]).double().eval()
    report = visionzoo.load_weights(model, record.state_dict())
    assert not report.missing
    with torch.no_grad():
        maps = model.backbone(record.image())
        taken = [maps[i] for i in model.levels]
        logits = model.decoder(taken)
        full = model(record.image())
        if isinstance(model.decoder, FussFreeDecoder):
            maps += model.decoder.forward_levels(taken)
    out = {"logits": logits, "logits_full": full, **{f"feat{i}": x for i, x in enumerate(maps)}}
    for key, array in record.arrays.items():
        yield key, out[key] if array.shape == out[key].shape else sample(out[key], array.size), array


@pytest.mark.parametrize("name", RECORDS)
def test_logits_and_maps_are_the_authors(name):
    keys = []
    for key, value, array in compared(name):
        assert relative_error(value, array) <= Record(name).tolerance(), key
        keys.append(key)
    assert "logits" in keys


def test_spatial_reduction_shows_in_the_records():
    plain, reduced = (Record(f"edaformer/edaformer_t_ade{end}").arrays["logits"] for end in ("", "_reduced"))
    assert relative_error(reduced, plain) > 1e-3  # of the same weights and image


@pytest.mark.parametrize("name", LEARNING)
def test_outputs_losses_and_gradients_are_the_authors(name):
    keys = []
    for key, value, array in compared(name):
        assert relative_error(value, array) <= 1e-9, key
        keys.append(key)
    assert any(key.startswith("logits") for key in keys) and any(key.startswith("grad/") for key in keys)


def test_parallel_backbones_need_strides_in_common():
    fine, coarse = (timm.create_model("test_resnet", features_only=True, out_indices=i) for i in ((1, 2), (3, 4)))
    with pytest.raises(ValueError, match=r"two strides or more in common, got strides \[\[4, 8\], \[16, 32\]\]"):
        ParallelBackbones(fine, coarse)


def test_only_training_returns_auxiliary_outputs_and_backbones_add_their_terms():
    mixers = {"type": "full", "sparse_term": True}
    model = visionzoo.create_segmentor("zoo_pvtv2_b0", small("guided_attention"), 3, mixers=mixers, **_ONE)
    model.set_auxiliary()
    weights = model.auxiliary_weights()
    assert {"sparsity", "guidance", "reconstruction", "before_attention_3"} < set(weights)
    image = torch.randn(1, 3, 32, 40)
    assert "sparsity" in model(image).terms
    assert model.eval()(image).shape == (1, 3, 32, 40)
    plain = visionzoo.create_segmentor("test_convnext", "edaformer", 3)
    with pytest.raises(ValueError, match="Segmentor as built has no exits and no terms"):
        plain.set_auxiliary()


@pytest.mark.parametrize("decoder", DECODERS)
@pytest.mark.parametrize(("backbone", "options"), BACKBONES.items())
def test_any_pyramid_and_size_is_taken_and_learns(backbone, options, decoder):
    model = visionzoo.create_segmentor(backbone, small(decoder), num_classes=3, **options)
    image, labels = torch.randn(2, 3, 45, 67), torch.randint(3, (2, 45, 67))
    weights = model.auxiliary_weights()
    model.set_auxiliary(bool(weights))
    with Capture():  # a CUDA graph can hold it
        out = model(image)
    logits, exits, terms = out if weights else (out, (), {})
    assert sorted([*terms, *(e.name for e in exits)]) == sorted(weights)
    assert {x.shape for x in (logits, *(e.logits for e in exits))} == {(2, 3, 45, 67)}
    losses = {e.name: F.cross_entropy(e.logits, labels) for e in exits} | dict(terms)
    (F.cross_entropy(logits, labels) + sum(weights[name] * value for name, value in losses.items())).backward()
    assert [name for name, p in model.named_parameters() if p.grad is None] == []


@pytest.mark.parametrize("decoder", DECODERS)
def test_without_upsampling_logits_are_those_that_are_upsampled(decoder):
    model = visionzoo.create_segmentor("test_convnext", small(decoder), num_classes=3, in_chans=1).eval()
    image = torch.randn(1, 1, 40, 56)
    full = model(image)
    model.upsample = False
    logits = model(image)
    scale = DECODERS[decoder].SCALE
    assert logits.shape[-2:] == tuple(scale * side for side in model.forward_maps(image)[0].shape[-2:])
    torch.testing.assert_close(full, F.interpolate(logits, (40, 56), mode="bilinear"))
    with torch.no_grad():  # its own names, through the wrappers of trainers
        state = {f"module.{name}": value for name, value in model.state_dict().items()}
        options = {"num_classes": 3, "in_chans": 1, "upsample": False}
        other = visionzoo.create_segmentor("test_convnext", small(decoder), **options).eval()
        assert not visionzoo.load_weights(other, {"model": state}).missing
        torch.testing.assert_close(other(image), logits)


def test_other_classes_and_what_is_beside_the_segmentor():
    model = visionzoo.create_segmentor("test_convnext", "edaformer", num_classes=3)
    state = dict(model.state_dict())
    state["auxiliary_head.conv.weight"] = torch.zeros(1)
    assert visionzoo.load_weights(model, state).beside == ["auxiliary_head.conv.weight"]
    other = visionzoo.create_segmentor("test_convnext", "edaformer", num_classes=4)
    before = other.backbone.state_dict()["stem_0.weight"].clone()
    with pytest.raises(ValueError, match=r"has 3 classes, the model 4\. Build the model with num_classes=3"):
        visionzoo.load_weights(other, state)
    assert torch.equal(other.backbone.state_dict()["stem_0.weight"], before)
    assert len(visionzoo.load_weights(other, state, strict=False).adapted) == 2
    assert torch.equal(other.decoder.fuse.conv.weight, model.decoder.fuse.conv.weight)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda s: {k: v for k, v in s.items() if k.startswith("decoder.")}, "no tensors of a backbone"),
        (lambda s: {k: v for k, v in s.items() if "classifier" not in k}, "2 missing: classifier"),
        (lambda s: s | {"decoder.extra": torch.zeros(1)}, "1 unexpected: extra"),
        (lambda s: s | {"decoder.fuse.conv.weight": torch.zeros(1, 2)}, r"fuse\.conv\.weight \(1, 2\) instead of"),
        (lambda s: {k: v for k, v in s.items() if "decoder" not in k or "fuse" in k}, "less than 90 %"),
    ],
)
def test_checkpoints_that_do_not_fit_are_named(change, message):
    model = visionzoo.create_segmentor("test_convnext", "edaformer", num_classes=3)
    with pytest.raises(ValueError, match=message):
        visionzoo.load_weights(model, change(dict(model.state_dict())))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("zoo_convit_t", "edaformer", 3), "zoo_convit_t has 3 of stride 16: it is isotropic. Take a hierarchical"),
        (("zoo_pvtv2_b0", "edaforme", 3), "unknown decoder 'edaforme' .did you mean"),
        (("zoo_pvtv2_b0", "edaformer"), "zoo_pvtv2_b0 needs num_classes=; only"),
        (("edaformer_t_ad",), "needs decoder=, one of .* and num_classes=; .*did you mean"),
        (
            ("zoo_pvtv2_b0", {"type": "edaformer", "isr": (2, 2)}, 3),
            r"isr must be three positive integers, got isr=\(2,",
        ),
        (("zoo_pvtv2_b0", {"type": "edaformer", "mlp_ratio": 0.0}, 3), "mlp_ratio positive, got"),
        (("zoo_pvtv2_b0", {"type": "guided_attention", "embed_dim": 0}, 3), "embed_dim must be 1 or more, got"),
        (("zoo_pvtv2_b0", {"type": "paratranscnn", "embed_dim": 0}, 3), "embed_dim must be 1 or more, got"),
        (("zoo_pvtv2_b0", {"type": "paratranscnn", "gate": "ecca"}, 3), "unknown gate 'ecca'"),
        (("zoo_pvtv2_b0", {"type": "fuss_free", "up": "d"}, 3), r"up must be one of \['a', 'b', 'c'\], got up='d'"),
        (("zoo_pvtv2_b0", {"type": "fuss_free", "head": "A"}, 3), "head must be one of .* got head='A'"),
        (("zoo_pvtv2_b0", {"type": "fuss_free", "mode": "area"}, 3), "mode must be one of .*'nearest'"),
        (("zoo_pvtv2_b0", "edaformer", 0), "num_classes must be int, 1 or more, got num_classes=0"),
        (("test_convnext", "edaformer", "3"), "num_classes must be int, 1 or more, got num_classes='3'"),
        (("test_convnext", "edaformer", 2.0), "num_classes must be int, 1 or more, got num_classes=2.0"),
        (("zoo_pvtv2_bo", "edaformer", 3), "unknown backbone 'zoo_pvtv2_bo' .did you mean 'zoo_pvtv2_b"),
        ((None, "edaformer", 3), "expected the name of a backbone, or a module with maps, got NoneType"),
        (("test_convnext", {"type": "edaformer", "drop_path": 1.0}, 3), "drop_path must be from 0 to 1, without 1"),
        ((torch.nn.Conv2d(3, 4, 1), "edaformer", 3), "Conv2d gives no maps of its stages"),
    ],
)
def test_wrong_arguments_are_named(arguments, message):
    with pytest.raises(ValueError, match=message):
        visionzoo.create_segmentor(*arguments)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"out_indices": (3, 1)}, r"out_indices must name the first stage first, got \(3, 1\), of strides \[32, 8\]"),
        ({"out_indices": (2,)}, "zoo_pvtv2_b0 has 1 of stride 16: name more of them in out_indices"),
        ({"depth": 2}, "zoo_pvtv2_b0 cannot be built so: .* has no argument 'depth' .did you mean 'depths'"),
    ],
)
def test_wrong_options_of_the_backbone_are_named(options, message):
    with pytest.raises(ValueError, match=message):
        visionzoo.create_segmentor("zoo_pvtv2_b0", "edaformer", num_classes=3, **options)


def test_wrong_input_is_named():
    model = visionzoo.create_segmentor("test_convnext", "edaformer", num_classes=3)
    with pytest.raises(ValueError, match=r"expected images \[B, C, H, W\], got \(3, 32, 32\)"):
        model(torch.zeros(3, 32, 32))


def test_a_module_with_maps_is_a_backbone():
    features = timm.create_model("test_convnext", features_only=True)
    model = visionzoo.create_segmentor(features, "edaformer", num_classes=2)
    assert isinstance(model, Segmentor)
    assert model.backbone is features
    with pytest.raises(ValueError, match=r"is built already and takes no options, got \['in_chans'\]"):
        visionzoo.create_segmentor(features, "edaformer", num_classes=2, in_chans=1)


PARAMETERS = {  # as their authors' code has them
    "ffnet50_aaa": 28_553_043,
    "ffnet46n_cbb": 20_214_035,
    "ffnet18_daac": 13_403_347,
    "ffnet40s_dbbb_mobile": 13_911_283,
    "ffnet46ns_ccc_mobile_pre_down": 12_530_995,
}


def test_published_parameters():
    for name, count in PARAMETERS.items():
        with torch.device("meta"):
            model = visionzoo.create_segmentor(name)
        assert sum(p.numel() for p in model.parameters()) == count, name
        assert model.num_classes == SEGMENTORS[name].num_classes


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=pytest.mark.full) for name in list_segmentors() if name not in PARAMETERS]
)
def test_published_segmentors_have_their_classes(name):
    with torch.device("meta"):
        model = visionzoo.create_segmentor(name)
    assert model.num_classes == SEGMENTORS[name].num_classes


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (((1, 1), (8, 8, 8, 8)), r"expected 3 or 4 positive depths, .* got depths=\(1, 1\)"),
        (((1, 0, 1, 1), (8, 8, 8, 8)), r"positive depths"),
        (((1, 1, 1, 1), (8, 8, 8)), r"4 widths .*widths=\(8, 8, 8\)"),
        (((1, 1, 1), (8, 8, 8, 8)), r"the stem has none or at least two .*got stem=\(\)"),
        (((1, 1, 1), (8, 8, 8, 8), {"stem": (8, 4)}), "ends with the first of the widths"),
        (((1, 1, 1, 1), (8, 8, 8, 8), {"stem": (8,)}), "at least two convolutions"),
        (((1, 1, 1, 1), (8, 8, 8, 8), {"first_stride": 4}), "first_stride must be 1, or 2 with 4 depths, got first_"),
        (((1, 1, 1), (8, 8, 8, 8), {"stem": (8, 8), "first_stride": 2}), "or 2 with 4 depths, got first_stride=2"),
    ],
)
def test_wrong_options_of_the_fuss_free_encoder_are_named(arguments, message):
    depths, widths, *options = arguments
    with pytest.raises(ValueError, match=message):
        FussFreeEncoder(depths, widths, **dict(*options))


def test_options_that_an_encoder_does_not_take_are_named():
    with pytest.raises(ValueError, match=r"ffnet18_daac cannot be built so: .* has no argument 'isr'"):
        visionzoo.create_segmentor("ffnet18_daac", isr=(2, 2, 1, 1))


def test_images_that_are_halved_first():
    model = visionzoo.create_segmentor("ffnet40s_bcc_mobile_pre_down", depths=(1, 1, 1, 1), in_chans=1).eval()
    assert model.backbone.feature_info.reduction() == [8, 16, 32, 64]
    assert model(torch.zeros(1, 1, 3, 5)).shape == (1, 19, 3, 5)
    with pytest.raises(ValueError, match=r"takes images of 3 rows and 5 columns or more, got \(2, 64\)"):
        model(torch.zeros(1, 1, 2, 64))
    flat = blur_and_halve(torch.ones(1, 2, 9, 11, dtype=torch.float64))
    assert flat.shape == (1, 2, 4, 4)
    torch.testing.assert_close(flat, torch.ones_like(flat), rtol=0, atol=1e-15)
