"""SDANet's neck: the authors' feature pyramid with its attention, whose five levels of 256 channels are fixed there."""

import torch
from torch import nn

from . import Recipe, Source, drawn
from .gates import normal, some

try:
    from mmcv.cnn import ContextBlock, ConvModule
except ImportError:  # needed only where records are made
    ContextBlock = ConvModule = None

PIDRAY = Source("https://github.com/lutao2021/PIDray", "2acc52493804422b492c04159a7ac65c6a7ee4c2", "none given")
CHANNELS = (6, 8, 10, 12)
SIZES = ((5, 7), (5, 6), (4, 5), (4, 5))


def backbone_maps() -> list[torch.Tensor]:
    """Draw the maps of a backbone, of odd sizes."""
    return [drawn(i, (2, channels, *size)) for i, (channels, size) in enumerate(zip(CHANNELS, SIZES, strict=True))]


def refined(neck: nn.Module, _: torch.Tensor) -> dict[str, torch.Tensor]:
    """Return samples of the levels, and gradients of their sum with drawn factors for maps and parameters."""
    maps = [x.requires_grad_() for x in backbone_maps()]
    outs = neck(maps)
    total = sum((out * normal(4 + i, out.shape)).sum() for i, out in enumerate(outs))
    used = {f"grad_c{i}": x for i, x in enumerate(maps)} | {f"grad/{n}": p for n, p in neck.named_parameters()}
    grads = torch.autograd.grad(total, list(used.values()), allow_unused=True)
    found = {name: some(grad, 64) for name, grad in zip(used, grads, strict=True) if grad is not None}
    return {f"out{i}": some(out) for i, out in enumerate(outs)} | found


class _Registry:
    """A registry that registers nothing."""

    @staticmethod
    def register_module():
        return lambda kind: kind


def recipe(**options):
    """Return the recipe of a neck."""
    return Recipe(
        PIDRAY,
        "mmdet/models/necks/attfpn.py",
        "AttFPN",
        {"in_channels": list(CHANNELS), "out_channels": 256, "num_outs": 5, **options},
        image=(2, CHANNELS[0], *SIZES[0]),
        run=refined,
        gradients=True,
        stand_ins={
            "mmcv.cnn": {"ConvModule": ConvModule, "ContextBlock": ContextBlock},
            "mmcv.runner": {"BaseModule": nn.Module, "auto_fp16": lambda: lambda function: function},
            "mmdet.models.builder": {"NECKS": _Registry},
        },
        notes="the maps are drawn by recipes.sdanet.backbone_maps, in place of the image; gradients are of the sum of "
        "out<i> * RandomState(4 + i).standard_normal(its shape); ConvModule and ContextBlock are mmcv's at 2.3.6",
    )


RECIPES = {"cascade": recipe(), "ddod": recipe(start_level=1, add_extra_convs="on_output")}
