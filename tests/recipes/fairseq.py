"""Lightweight and dynamic convolution of fairseq, along sequences of 9 tokens of 12 channels."""

import torch.nn.functional as F
from torch import nn

from . import Recipe, Source
from .gates import gradients

FAIRSEQ = Source("https://github.com/facebookresearch/fairseq", "3d262bb25690e4eb2e7d3c1309b1e9c406ca4b99", "MIT")


class Around(nn.Module):
    """What `LightConvEncoderLayer` has between its norm and its residual, dropout aside, on [B, T, C]."""

    def __init__(self, conv, glu):
        super().__init__()
        self.linear1, self.act = nn.Linear(12, 24 if glu else 12), nn.GLU() if glu else nn.Identity()
        self.conv, self.linear2 = conv, nn.Linear(12, 12)

    def forward(self, x):
        """Convolve along T."""
        return self.linear2(self.conv(self.act(self.linear1(x.transpose(0, 1))))).transpose(0, 1)


def layer(module, kind, glu, **kwargs):
    """Build the convolution of a file, as the encoder has it, with its layers around it."""
    conv = getattr(module, kind)(12, padding_l=kwargs["kernel_size"] // 2, num_heads=3, **kwargs)
    return Around(conv, glu)


def recipe(kind, file, glu=True, **kwargs):
    """Return the recipe of a layer."""
    return Recipe(
        FAIRSEQ,
        f"fairseq/modules/{file}.py",
        layer,
        {"kind": kind, "glu": glu, "weight_softmax": True, **kwargs},
        image=(2, 9, 12),
        run=gradients,
        gradients=True,
        stand_ins={"fairseq.utils": {"softmax": lambda x, dim, onnx_trace: F.softmax(x, dim)}},
        notes="the layers around the convolution are those of LightConvEncoderLayer; its softmax rounds to float32, "
        "which is left out",
    )


def light(**kwargs):
    """Return the recipe of a lightweight convolution."""
    return recipe("LightweightConv1dTBC", "lightweight_convolution", **kwargs)


def dynamic(**kwargs):
    """Return the recipe of a dynamic convolution."""
    return recipe("DynamicConv1dTBC", "dynamic_convolution", **kwargs)


RECIPES = {
    "light": light(kernel_size=5),
    "light_plain": light(kernel_size=15, glu=False, weight_softmax=False, bias=True),
    "dynamic": dynamic(kernel_size=5),
    "dynamic_plain": dynamic(kernel_size=15, glu=False, weight_softmax=False, conv_bias=True),
    "dynamic_renorm": dynamic(kernel_size=7, renorm_padding=True),
}
