"""Quantizers put into any model: which layers get which, and where their scales begin."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import timm.layers
import torch
from torch import Tensor, nn

from visionzoo.layers.mixers.base import Mixer
from visionzoo.quantization.attention import QuantizedProducts, QueryKeyProjection
from visionzoo.quantization.layers import QUANTIZED, QUANTIZERS, is_quantizable, quantize_layer
from visionzoo.quantization.quantizers import LSQ, check_bits
from visionzoo.text import count_of, some

# Their outputs are 0 and up, but for a little; those of others (Tanh, Identity) are as often below.
ACTIVATIONS = (
    *(nn.ReLU, nn.ReLU6, nn.GELU, nn.SiLU, nn.Mish, nn.Hardswish, nn.Softplus, nn.Sigmoid, nn.Hardsigmoid),
    *(timm.layers.GELU, timm.layers.GELUTanh, timm.layers.QuickGELU, timm.layers.Swish, timm.layers.HardSwish),
)
ENDS = 8  # bits of the first layer and of the classifier


@dataclass(frozen=True)
class Quantized:
    """What of a model is quantized.

    Attributes:
        layers: number of layers with a quantized weight and input.
        ends: how many of them are first or last, with 8 bits.
        float_layers: names of other modules with a weight of two axes or more.
        share: of the parameters, those that are quantized weights.
        products: mixers whose attention is of quantized factors.
        reparameterized: of these, those with a quantized product of the weights of queries and keys.
        mixers: number of all mixers.
    """

    layers: int
    ends: int
    float_layers: list[str]
    share: float
    products: int
    reparameterized: int
    mixers: int

    def __str__(self) -> str:
        left = f"{count_of(len(self.float_layers), 'other module')} with weights in float"
        if self.float_layers:
            left += f" ({some(self.float_layers, 3)})"
        attention = f"attention in {self.products} of {count_of(self.mixers, 'mixer')}"
        if self.reparameterized:
            attention += f", {self.reparameterized} with reparameterized queries and keys"
        return (
            f"quantized are {count_of(self.layers, 'layer')}, {self.ends} of them first or last with {ENDS} bits, and "
            f"{attention}; {left}; {self.share:.1%} of the parameters are quantized weights"
        )


def quantize(
    model: nn.Module,
    weights: int,
    activations: int,
    *,
    weight_quantizer: str = "statsq",
    reparameterize: bool = False,
) -> Quantized:
    """Quantize a model's weights and activations for training, in place: tensors keep their names, others join them.

    Linear layers and convolutions of torch's own classes get quantizers of their weight (`StatsQ`, or `LSQ`) and of
    their input (`LSQ`, one scale each; inputs after an activation function are unsigned). The model's first layer and
    its classifier get LSQ of 8 bits, the first with a scale for each channel. Mixers that say so by `QUANTIZES` compute
    attention from quantized queries, keys, values and weights. All else stays in float.

    The authors have a scale for each token of a layer's input, or each column of a map; here images may be of any size.

    Scales begin with `calibrate`, or are loaded.

    Args:
        model: any model of timm's or the zoo.
        weights: bits of the weights, from 2 to 8; of 8 they are LSQ's.
        activations: bits of inputs and factors of attention, from 2 to 8.
        weight_quantizer: "statsq" or "lsq".
        reparameterize: quantize the product of the weights of queries and keys in place of each
            (`QueryKeyProjection`), in mixers `full` and `window`.

    Raises:
        ValueError: bits or quantizer are none of these, the model has no layers to quantize, or is quantized already,
            or none whose queries and keys can be reparameterized.
    """
    check_bits(weights, "weights")
    check_bits(activations, "activations")
    if weight_quantizer not in QUANTIZERS:
        raise ValueError(f"weight_quantizer: expected one of {', '.join(QUANTIZERS)}, got {weight_quantizer!r}")
    if not isinstance(reparameterize, bool):
        raise ValueError(f"reparameterize: expected True or False, got {reparameterize!r}")
    if any(isinstance(module, LSQ) for module in model.modules()):
        raise ValueError("the model is quantized already; build it anew")
    mixers = [module for module in model.modules() if isinstance(module, Mixer)]
    attending = [mixer for mixer in mixers if mixer.QUANTIZES]
    changed: list[Mixer] = []
    if reparameterize:
        changed = [m for m in attending if type(getattr(m, "qkv", None)) is nn.Linear and m.kv_heads == m.num_heads]
        if not changed:
            raise ValueError(
                f"reparameterize: the model has {count_of(len(mixers), 'mixer')}, and none whose queries and keys are "
                "projected from the same map by one layer, as those of `full` and `window` are; leave it out"
            )
    for mixer in changed:
        mixer.qkv = QueryKeyProjection(  # type: ignore[assignment]
            mixer.qkv,  # type: ignore[arg-type]
            mixer.num_heads,
            weights,
            activations,
            kind=weight_quantizer,
        )
    for mixer in attending:
        like = next(mixer.parameters())
        key_dim = mixer.dim if mixer in changed else None
        mixer.products = QuantizedProducts(
            mixer.num_heads, mixer.head_dim, activations, key_dim=key_dim, quantize_queries=mixer not in changed
        ).to(like.device, like.dtype)
    first, last = _names(model, "first_conv"), _names(model, "classifier")
    after = _after_activations(model)
    layers = {name: module for name, module in model.named_modules() if is_quantizable(module)}
    for name, layer in layers.items():
        ends = name in first or name in last
        quantize_layer(
            layer,
            ENDS if ends else weights,
            ENDS if ends else activations,
            kind=weight_quantizer,
            signed=id(layer) not in after and name not in first,
            each_channel=name in first and isinstance(layer, nn.Conv2d),
        )
    if not layers:
        raise ValueError(f"{type(model).__name__} has no linear layer and no convolution of torch's to quantize")
    return describe(model)


def describe(model: nn.Module) -> Quantized:
    """Return what of a model is quantized."""
    layers = dict(_quantized_layers(model))
    ends = [name for name in layers if name in _names(model, "first_conv") | _names(model, "classifier")]
    left = [
        name
        for name, module in model.named_modules()
        if name not in layers
        and isinstance(weight := getattr(module, "weight", None), nn.Parameter)
        and weight.ndim > 1
    ]
    weights = {id(module.weight): module.weight.numel() for module in layers.values()}  # type: ignore[operator]
    total = sum(parameter.numel() for parameter in model.parameters())
    mixers = [module for module in model.modules() if isinstance(module, Mixer)]
    return Quantized(
        layers=len(layers),
        ends=len(ends),
        float_layers=left,
        share=sum(weights.values()) / total,
        products=sum(mixer.products is not None for mixer in mixers),
        reparameterized=sum(isinstance(module, QueryKeyProjection) for module in layers.values()),
        mixers=len(mixers),
    )


def is_quantized(model: nn.Module) -> bool:
    """Whether there are quantizers in a model."""
    return any(isinstance(module, LSQ) for module in model.modules())


def holds_quantizers(checkpoint: Mapping[str, Any]) -> bool:
    """Whether a checkpoint, or a state_dict, is of a quantized model."""
    tensors = checkpoint.get("state_dict", checkpoint)
    return any(str(name).endswith("quantize_input.scale") for name in tensors)


@torch.no_grad()
def calibrate(model: nn.Module, images: Tensor) -> list[str]:
    """Let the scales that have not begun begin by what the model, in training mode, makes of some images.

    A scale is 2·mean|x| / √high, with 4 for one of several where x is unsigned. The model's own statistics stay as they
    are.

    Args:
        model: that `quantize` changed, on the device of the images.
        images: a batch of training images.

    Returns:
        names of the quantizers that saw nothing: their layers are never called, or others read their weights. They do
        not learn.
    """
    probe = copy.deepcopy(model).train()
    for module in probe.modules():
        if isinstance(module, LSQ):
            module.calibrating = True
    probe(images)
    unseen = []
    for (name, module), begun in zip(model.named_modules(), probe.modules(), strict=True):
        if not isinstance(module, LSQ):
            continue
        assert isinstance(begun, LSQ)
        module.scale.copy_(begun.scale)
        module.low.copy_(begun.low)
        if not module.begun:
            unseen.append(name)
            module.requires_grad_(False)
    return unseen


def _quantized_layers(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    kinds = (*QUANTIZED.values(), QueryKeyProjection)
    return ((name, module) for name, module in model.named_modules() if isinstance(module, kinds))


def _names(model: nn.Module, what: str) -> set[str]:
    """Return the layers that timm calls the first, or the classifier."""
    cfg: Any = getattr(model, "pretrained_cfg", None) or {}
    named = cfg.get(what) or ()
    return {named} if isinstance(named, str) else set(named)


def _after_activations(model: nn.Module) -> set[int]:
    """Return the layers that stand right behind an activation function, as far as their order in a module says."""
    found = set()
    for module in model.modules():
        before: nn.Module | None = None
        for child in module.children():
            if isinstance(child, nn.Dropout | nn.Identity):
                continue
            if is_quantizable(child) and isinstance(before, ACTIVATIONS):
                found.add(id(child))
            before = child
    return found
