"""EDAFormer: the encoder EFT, and the segmentor. There is no code of the authors for classification.

The records `eft_*` have a classifier added: mean over the last map, then `head`, as PVTv2 has it, which EFT is made of.
"""

from collections import OrderedDict

from torch import nn
from torch.nn import functional as F

from . import Recipe, Source, beside

EDAFORMER = Source("https://github.com/hyunwoo137/EDAFormer", "9f98d76866184544e1151ecaf6b312a4d47c31b5", "Apache-2.0")


class ConvModule(nn.Sequential):
    """mmcv's: convolution without bias, batch norm, ReLU."""

    def __init__(self, in_channels, out_channels, kernel_size, norm_cfg):
        conv = nn.Conv2d(in_channels, out_channels, kernel_size, bias=False)
        super().__init__(OrderedDict(conv=conv, bn=nn.BatchNorm2d(out_channels), activate=nn.ReLU()))


STAND_INS = {
    "mmcv.runner": {},
    "mmcv.cnn": {"ConvModule": ConvModule},
    "mmseg.core": {},
    "mmseg.models.builder": {},
    "mmseg.models.losses": {},
    "mmseg.models.utils": {},
    "mmseg.ops": {"resize": F.interpolate},
    "mmseg.utils": {},
}


def classifier(module, name, **kwargs):
    """Build the encoder, with a classifier beside its own layers."""
    model = getattr(module, name)(**kwargs)
    model.head = nn.Linear(model.norm4.normalized_shape[0], 1000)
    return model


def classify(model, image):
    """Return the encoder's maps, and the logits of the classifier that was added."""
    maps = model(image)
    return {"logits": model.head(maps[-1].mean((2, 3))), **{f"feat{i}": feature for i, feature in enumerate(maps)}}


class Segmentor(nn.Module):
    """Backbone and head by the names that mmseg's EncoderDecoder gives them."""

    def __init__(self, backbone, decode_head):
        super().__init__()
        self.backbone, self.decode_head = backbone, decode_head


def segmentor(module, name, backbone, decode_head):
    """Build backbone and head."""
    encoder = beside(module, "../backbones/eft.py")
    return Segmentor(getattr(encoder, name)(**backbone), module.EDAFormerHead(**decode_head))


def segment(model, image):
    """Return the encoder's maps, the head's output, and that of the image's size."""
    maps = model.backbone(image)
    logits = model.decode_head(maps)
    full = F.interpolate(logits, image.shape[-2:], mode="bilinear", align_corners=False)
    return {"logits": logits, "logits_full": full, **{f"feat{i}": feature for i, feature in enumerate(maps)}}


def encoder_recipe(name, reduction_ratios=(1, 1, 1, 1)):
    """Return the recipe of an encoder with a classifier."""
    return Recipe(
        EDAFORMER,
        "mmseg/models/backbones/eft.py",
        classifier,
        {"name": name, "reduction_ratios": reduction_ratios},
        run=classify,
        stand_ins=STAND_INS,
        notes="the classifier (mean of the last map, then `head`) is added: the authors' encoder has none",
    )


def segmentor_recipe(name, in_channels, embed_dim, mlp_ratio, reduced=False):
    """Return the recipe of a segmentor for ADE20K."""
    head = {
        "in_channels": in_channels,
        "in_index": [1, 2, 3],
        "channels": 128,
        "num_classes": 150,
        "mlp_ratio": mlp_ratio,
        "reduction_ratios": [2, 2, 2] if reduced else [1, 1, 1],
        "decoder_params": {"embed_dim": embed_dim},
        "align_corners": False,
        "loss_decode": {},
    }
    return Recipe(
        EDAFORMER,
        "mmseg/models/decode_heads/edaformer_head.py",
        segmentor,
        {
            "name": name,
            "backbone": {"reduction_ratios": [2, 2, 1, 1] if reduced else [1, 1, 1, 1]},
            "decode_head": head,
        },
        image=(1, 3, 72, 100),
        run=segment,
        stand_ins=STAND_INS,
    )


RECIPES = {
    "eft_t": encoder_recipe("EFT_T"),
    "eft_b": encoder_recipe("EFT_B"),
    "eft_t_reduced": encoder_recipe("EFT_T", (2, 2, 1, 1)),
    "edaformer_t_ade": segmentor_recipe("EFT_T", [64, 128, 256], 128, 2),
    "edaformer_b_ade": segmentor_recipe("EFT_B", [128, 256, 512], 768, 1),
    "edaformer_t_ade_reduced": segmentor_recipe("EFT_T", [64, 128, 256], 128, 2, reduced=True),
}
