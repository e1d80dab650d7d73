"""Where timm has the same network, its weights load into ours and give the same numbers."""

import pytest
import timm
import torch
from golden import relative_error
from quick import MODELS

import visionzoo

TWINS = {
    "zoo_convit_t": "convit_tiny",
    "zoo_convit_s": "convit_small",
    "zoo_crossvit_18_dagger_384": "crossvit_18_dagger_408",
    "zoo_crossvit_9_dagger": "crossvit_9_dagger_240",
    "zoo_crossvit_t": "crossvit_tiny_240",
    "zoo_davit_t": "davit_tiny",
    "zoo_davit_s": "davit_small",
    "zoo_deit_t": "deit_tiny_patch16_224",
    "zoo_deit_t_distilled": "deit_tiny_distilled_patch16_224",
    "zoo_ghostnetv2_100": "ghostnetv2_100",
    "zoo_ghostnetv2_130": "ghostnetv2_130",
    "zoo_ghostnetv2_160": "ghostnetv2_160",
    "zoo_pcpvt_b": "twins_pcpvt_base",
    "zoo_pcpvt_l": "twins_pcpvt_large",
    "zoo_pcpvt_s": "twins_pcpvt_small",
    "zoo_poolformer_s12": "poolformer_s12",
    "zoo_shvit_s2": "shvit_s2",
    "zoo_pvtv2_b0": "pvt_v2_b0",
    "zoo_pvtv2_b2_li": "pvt_v2_b2_li",
    "zoo_swin_t": "swin_tiny_patch4_window7_224",
    "zoo_tnt_b": "tnt_b_patch16_224",
    "zoo_tnt_s": "tnt_s_patch16_224",
}
OTHER_FEATURES = {name for name in TWINS if "ghostnet" in name}  # timm takes them elsewhere, and before the last conv
LEVITS = {"zoo_levit_128s": ["levit_128s", "levit_conv_128s"], "zoo_levit_192": ["levit_192"]}
# timm's Swin is built for one image size and pads after the shift, the authors and we before it: sizes without padding,
# one of them with maps of one window in width alone; its Twins takes whole patches only
SIZES = {
    "zoo_convit_t": [(224, 224), (160, 160)],
    "zoo_convit_s": [(224, 224), (160, 160)],
    "zoo_crossvit_18_dagger_384": [(204, 204), (204, 408)],
    "zoo_crossvit_9_dagger": [(240, 240), (240, 120)],
    "zoo_crossvit_t": [(240, 240), (120, 240)],
    "zoo_deit_t": [(224, 224)],
    "zoo_deit_t_distilled": [(224, 224)],
    "zoo_pcpvt_b": [(224, 224), (160, 96)],
    "zoo_pcpvt_l": [(224, 224), (160, 96)],
    "zoo_pcpvt_s": [(224, 224), (160, 96)],
    "zoo_pvtv2_b2_li": [(129, 230)],
    "zoo_swin_t": [(224, 224), (448, 224)],
    "zoo_tnt_b": [(224, 224), (160, 96)],
    "zoo_tnt_s": [(224, 224), (160, 96)],
}
LARGE = {  # of the same build as a smaller one
    *("zoo_crossvit_b", "zoo_crossvit_15", "zoo_crossvit_18", "zoo_crossvit_15_dagger", "zoo_crossvit_18_dagger"),
    *("zoo_crossvit_18_dagger_384", "zoo_davit_s", "zoo_ghostnetv2_130", "zoo_ghostnetv2_160", "zoo_pcpvt_b"),
    *("zoo_pcpvt_l", "zoo_tnt_b"),
}
RUNS = [
    pytest.param(name, size, marks=[pytest.mark.full] if name in LARGE else [])
    for name in TWINS
    for size in SIZES.get(name, [(224, 224), (129, 230)])
]
FIXED = {"convit", "crossvit", "swin", "tnt"}  # families that timm builds for one size
FORMS = {  # arguments of timm's and of ours: blocks left out where records have all, or what timm does otherwise
    "crossvit": ({"depth": ((1, 2, 0), (1, 1, 0))}, {"depths": ((1, 2), (1, 1))}),
    "tnt": ({"depth": 2}, {"depth": 2}),
    "swin": ({}, {"unshifted": "axis"}),  # the authors shift a map of 7x14 along neither axis
}
OTHER_HEAD = {"zoo_poolformer_s12"}  # timm pools before the last norm, the authors and we norm before pooling


@pytest.mark.parametrize(("name", "size"), RUNS)
def test_timm_weights_give_timm_outputs(name, size):
    family = name.split("_")[1]
    built_for = {"img_size": size[0] if family == "convit" else size} if family in FIXED else {}
    their_form, our_form = FORMS.get(family, ({}, {}))
    theirs = timm.create_model(TWINS[name], **built_for, **their_form)
    ours = timm.create_model(name, **({} if family == "swin" else built_for), **our_form)
    _check_twin(theirs, ours, size, name not in OTHER_HEAD, name not in OTHER_FEATURES)


@pytest.mark.parametrize(("name", "twin"), [(name, twin) for name in LEVITS for twin in LEVITS[name]])
@pytest.mark.parametrize("size", [(224, 224), (160, 96)])
def test_timm_levit_gives_the_same_at_the_size_it_is_built_for(name, twin, size):
    """timm's LeViT takes one size only; its bias tables are then ours of that `img_size`."""
    theirs, ours = (timm.create_model(model, img_size=size) for model in (twin, name))
    for parameter, value in theirs.named_parameters():
        if "attention_biases" in parameter:
            torch.nn.init.normal_(value, std=2.0)
    _check_twin(theirs, ours, size, True)


def _ends_of_stages(theirs, image):
    """Return timm's maps before each block of stride 2, and the last one: those of GhostNet's stages."""
    maps = []
    hooks = [theirs.blocks[i].register_forward_hook(lambda m, args, out: maps.append(out)) for i in (0, 2, 4, 6, 8)]
    theirs(image)
    for hook in hooks:
        hook.remove()
    return maps


def _check_twin(theirs, ours, size, same_head, same_features=True):
    torch.manual_seed(0)
    theirs, ours = theirs.double().eval(), ours.double().eval()
    for name, value in theirs.state_dict().items():  # biases and scales start at 0 and 1e-5 and would hide mistakes
        if name.endswith("running_var"):
            value.uniform_(0.5, 2.0)
        elif value.ndim == 1:
            value.normal_(std=0.5)
    report = visionzoo.load_weights(ours, theirs.state_dict())
    assert report.names in ("timm", "authors") and not report.missing and not report.unexpected
    image = torch.randn(1, 3, *size, dtype=torch.float64)
    with torch.no_grad():
        if not hasattr(theirs, "forward_intermediates"):  # ConViT before timm 1.0.31
            expected, features, own_features, out = theirs.forward_features(image), [], [], ours.forward_features(image)
        else:
            expected, features = theirs.forward_intermediates(image)
            out, own_features = ours.forward_intermediates(image)
        if not same_features:
            features = _ends_of_stages(theirs, image)
        for feature, own in zip(features, own_features, strict=True):
            assert relative_error(own, feature) <= 1e-9
        if same_head:
            assert relative_error(ours.forward_head(out), theirs.forward_head(expected)) <= 1e-9
        else:
            assert relative_error(ours.forward_head(out), theirs.forward_head(expected)) > 1e-3


@pytest.mark.parametrize(
    "name", [n for n in MODELS if (timm.get_pretrained_cfg(n).hf_hub_id or "").startswith("timm/")]
)
def test_every_weight_on_timms_hub_is_a_timm_model_with_our_tensors(name):
    """The hub cannot be reached from a test; that its names and shapes fit can be seen on timm's own model."""
    twin = timm.get_pretrained_cfg(name).hf_hub_id.removeprefix("timm/")
    theirs = timm.create_model(twin, device="meta").state_dict()
    ours = timm.create_model(name, device="meta")
    renamed, names = visionzoo.models._checkpoint.rename(theirs, ours)
    assert not visionzoo.models._checkpoint.fit_tables(renamed, ours)  # tables are laid out anew, none is resized
    own = ours.state_dict()
    assert names in ("timm", "authors")  # timm may have kept the authors' names
    assert {key: value.shape for key, value in renamed.items()} == {key: value.shape for key, value in own.items()}
