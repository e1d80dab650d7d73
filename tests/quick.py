"""Models whose weights are drawn cheaply: proper initialization of the largest ones takes longer than testing them."""

from __future__ import annotations

from contextlib import contextmanager
from unittest import mock

import pytest
import timm
import torch
from torch import nn

import visionzoo  # noqa: F401  registers the families
from visionzoo.layers.conv_norm import ConvNorm, LinearNorm
from visionzoo.models._registry import CLASSES, TINY

MODELS = timm.list_models("zoo_*")
# Arguments of `quick_model` and `meta_model`: a small form for each way in which models are built, which stands for all
# sizes, and with --full every model as it is published.
FORMS = [
    *(
        pytest.param((name, kwargs), id=f"{name}-tiny", marks=pytest.mark.xdist_group(name))
        for name, kwargs in TINY.items()
    ),
    *(pytest.param((name, {}), id=name, marks=(pytest.mark.full, pytest.mark.xdist_group(name))) for name in MODELS),
]


def of_each_kind(names=TINY) -> list:
    """Give models' names as parameters of a test. Those of other families' networks with other parts are for --full.

    So are all small forms of a class but the first.
    """
    seen = set()
    parameters = []
    for name in names:
        new = CLASSES[name] not in seen and CLASSES[name].__mro__[1].__module__.startswith("visionzoo.models._")
        seen.add(CLASSES[name])
        parameters.append(pytest.param(name, marks=[] if new else pytest.mark.full))
    return parameters


@contextmanager
def no_initialisation():
    """Build modules with whatever memory holds."""
    names = ("uniform_", "normal_", "trunc_normal_", "kaiming_uniform_", "kaiming_normal_", "xavier_uniform_")
    with mock.patch.multiple(nn.init, **{name: lambda tensor, *args, **kwargs: tensor for name in names}), \
            mock.patch("visionzoo.models._contract.trunc_normal_", lambda tensor, **kwargs: tensor):  # fmt: skip
        yield


@torch.no_grad()
def draw_weights(model: nn.Module) -> nn.Module:
    """Give every parameter of a model non-trivial values: the same short random row over and over."""
    row = torch.randn(4093, generator=torch.Generator().manual_seed(0))
    # Chains of convolution, batch norm and SiLU forget the image unless the norms make up for the activations; other
    # chains grow until every softmax is hard unless the norms hold them back.
    silu = any(isinstance(module, nn.SiLU) for module in model.modules())
    batch_norms = [name for name, module in model.named_modules() if isinstance(module, nn.BatchNorm2d)]
    gains = {f"{name}.weight": 1.3 if silu else 0.8 for name in batch_norms}
    # Depthwise convolutions, kept small below, would make an image fade on paths that have no others around them.
    gains |= {
        f"{name}.norm.weight": 3.0
        for name, module in model.named_modules()
        if (isinstance(module, ConvNorm) and module.conv.weight.shape[1] == 1 < module.conv.groups)
        or name.endswith(".local_conv")
    }
    # Residual branches that nothing but their own norms holds back would grow until every softmax is hard.
    gains |= {f"{name}.norm.weight": 0.8 for name, module in model.named_modules() if isinstance(module, LinearNorm)}
    for name, parameter in model.named_parameters():
        flat = parameter.view(-1)
        values = row.repeat(flat.numel() // len(row) + 1)[: flat.numel()]
        if parameter.ndim == 4 and parameter.shape[1] == 1:  # depthwise: a chain of them must not outgrow the rest
            flat.copy_(values * 0.1)
        elif ".offset." in name:  # a deformable convolution that looks beyond the map would forget the image
            flat.copy_(values * 0.01)
        elif parameter.ndim > 1:
            flat.copy_(values * parameter[0].numel() ** -0.5)
        else:
            flat.copy_(values * 0.1 + (gains.get(name, 1.0) if name.endswith(("weight", "gamma")) else 0.0))
    return model


def quick_model(name: str, **kwargs) -> nn.Module:
    """`timm.create_model` with cheap weights, in eval mode."""
    with no_initialisation():
        model = timm.create_model(name, **kwargs)
    return draw_weights(model).eval()


def meta_model(name: str, **kwargs) -> nn.Module:
    """`timm.create_model` without memory: shapes only, in eval mode."""
    with no_initialisation():
        return timm.create_model(name, device="meta", **kwargs).eval()


def size_for(model: nn.Module, height: int, width: int) -> tuple[int, int]:
    """Give the size of images to test a model with: the one asked for, or the model's own where it takes no other."""
    return (height, width) if model.ANY_SIZE else model.img_size


def learned_from(model: nn.Module, image: torch.Tensor) -> torch.Tensor:
    """Return a scalar that depends on all that a model says, in whichever mode its parts are: logits and exits."""
    if not model.exit_places():
        return model(image).square().mean()
    training, model.training = model.training, True  # exits are given in training only
    model.set_auxiliary()
    out = model(image)
    model.set_auxiliary(False)
    model.training = training
    return torch.stack([out.logits, *(exit.logits for exit in out.exits)]).square().mean()
