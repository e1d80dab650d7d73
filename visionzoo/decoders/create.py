"""Segmentors by name: a backbone of timm or the zoo and a decoder, or a network as its authors published it."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import timm
from torch import nn

from visionzoo.decoders.base import Decoder
from visionzoo.decoders.edaformer import EDAFormerDecoder
from visionzoo.decoders.fuss_free import FussFreeDecoder, FussFreeEncoder, published
from visionzoo.decoders.guided_attention import GuidedAttentionDecoder
from visionzoo.decoders.paratranscnn import CHECKPOINT_KEYS, ParaTransCNNDecoder, paratranscnn_encoder
from visionzoo.decoders.segmentor import Segmentor, pyramid_levels
from visionzoo.layers.specs import Spec, build_spec, read_spec
from visionzoo.text import did_you_mean, some

DECODERS: Mapping[str, type[Decoder]] = {
    "edaformer": EDAFormerDecoder,
    "guided_attention": GuidedAttentionDecoder,
    "paratranscnn": ParaTransCNNDecoder,
    "fuss_free": FussFreeDecoder,
}


@dataclass(frozen=True)
class Network:
    """A published segmentor.

    Attributes:
        backbone: name of a model of timm or the zoo, or what builds another encoder.
        decoder: as `create_segmentor` takes it.
        num_classes: classes that it was trained for.
        options: of the backbone.
        miou: published mean IoU in percent, single scale; None where the authors' repository states none.
        keys: the authors' names, see `Segmentor`.
    """

    backbone: str | Callable[..., nn.Module]
    decoder: Mapping[str, Any]
    num_classes: int
    options: Mapping[str, Any] = field(default_factory=dict)
    miou: float | None = None
    keys: Sequence[tuple[str, Any]] = ()


def _edaformers() -> dict[str, Network]:
    sizes = {
        "t": ("zoo_eft_t", {"type": "edaformer", "embed_dim": 128, "mlp_ratio": 2.0}),
        "b": ("zoo_eft_b", {"type": "edaformer", "embed_dim": 768, "mlp_ratio": 1.0}),
    }
    classes = {"ade": 150, "city": 19, "coco_stuff": 171}
    return {
        f"edaformer_{size}_{data}": Network(backbone, decoder, count, {"drop_path_rate": 0.2})
        for size, (backbone, decoder) in sizes.items()
        for data, count in classes.items()
    }


def _fuss_free() -> dict[str, Network]:
    return {name: Network(FussFreeEncoder, decoder, 19, options, miou) for name, options, decoder, miou in published()}


SEGMENTORS: Mapping[str, Network] = {
    **_edaformers(),
    **_fuss_free(),
    "paratranscnn": Network(paratranscnn_encoder, {"type": "paratranscnn"}, 9, keys=CHECKPOINT_KEYS),  # of Synapse
}


def list_segmentors() -> list[str]:
    """Return the names of the published segmentors that `create_segmentor` builds."""
    return sorted(SEGMENTORS)


def create_segmentor(
    backbone: str | nn.Module,
    decoder: Spec | None = None,
    num_classes: int | None = None,
    *,
    upsample: bool = True,
    pretrained: bool = False,
    **options: Any,
) -> Segmentor:
    """Build a segmentor: any hierarchical backbone with a decoder, or a published network.

    Images may have any size that the backbone takes; where a decoder has batch norms, training on one image at a time
    takes a coarsest map of more than one pixel. Of the backbone's maps the decoder gets the last of each stride, and of
    these the coarsest that it has places for.

    Args:
        backbone: name of a model of timm or the zoo, a module with maps as timm's `features_only=True` gives them, or
            the name of a published segmentor (`visionzoo.decoders.list_segmentors`).
        decoder: a name of `visionzoo.decoders.DECODERS` or `dict(type=name, **options)`; None for the published one's.
        num_classes: classes; None for the published network's.
        upsample: interpolate the logits to the image's size, bilinearly; else they stay at the decoder's stride.
        pretrained: start the backbone from the weights that timm's hub has for it.
        options: of the backbone, such as `in_chans`, `drop_path_rate`, `mixers` or `isr`.

    Returns:
        a module that takes images [B, in_chans, H, W] and gives logits [B, num_classes, H, W].

    Raises:
        ValueError: if a name or option of the decoder is unknown, decoder or classes are missing, the backbone's maps
            make no pyramid, or it cannot be built so.

    >>> import torch, visionzoo
    >>> model = visionzoo.create_segmentor("zoo_pvtv2_b0", "edaformer", num_classes=5).eval()
    >>> model(torch.zeros(1, 3, 50, 70)).shape
    torch.Size([1, 5, 50, 70])
    """
    name = backbone if isinstance(backbone, str) else type(backbone).__name__
    network = SEGMENTORS.get(backbone) if isinstance(backbone, str) else None
    build: Any = backbone
    if network is not None:
        build, options = network.backbone, {**network.options, **options}
        decoder = network.decoder if decoder is None else decoder
        num_classes = network.num_classes if num_classes is None else num_classes
    if not isinstance(backbone, str | nn.Module):
        raise ValueError(f"create_segmentor: expected the name of a backbone, or a module with maps, got {name}")
    if decoder is None or num_classes is None:
        lacking = [f"decoder=, one of {some(sorted(DECODERS))}"] if decoder is None else []
        lacking += ["num_classes="] if num_classes is None else []
        raise ValueError(
            f"create_segmentor: {name} needs {' and '.join(lacking)}; only published segmentors have them"
            f"{did_you_mean(name, SEGMENTORS)} (visionzoo.decoders.list_segmentors())"
        )
    kind = DECODERS[read_spec("decoder", decoder, DECODERS)["type"]]
    if isinstance(build, str):
        features = _features(build, pretrained, options)
    elif pretrained:
        raise ValueError(f"create_segmentor: timm's hub has no weights for {name}; pass pretrained=False")
    elif isinstance(build, nn.Module):
        if options:
            raise ValueError(f"create_segmentor: {name} is built already and takes no options, got {sorted(options)}")
        features = build
    else:
        try:
            features = build(**options)
        except TypeError as error:
            raise ValueError(f"create_segmentor: {name} cannot be built so: {error}") from error
    channels: list[int] = [
        features.feature_info.channels()[i]  # type: ignore[union-attr, operator]
        for i in pyramid_levels(features, name)[-kind.LEVELS :]
    ]
    built = build_spec("decoder", decoder, DECODERS, channels, num_classes)
    return Segmentor(features, built, upsample=upsample, keys=network.keys if network else ())


def _features(name: str, pretrained: bool, options: Mapping[str, Any]) -> nn.Module:
    """Build a model of timm for its maps."""
    try:
        model: nn.Module = timm.create_model(name, pretrained=pretrained, features_only=True, **options)
    except TypeError as error:
        raise ValueError(f"create_segmentor: {name} cannot be built so: {error}") from error
    except (AssertionError, AttributeError, RuntimeError) as error:
        if timm.is_model(name.split(".")[0]) and "features_only" in f"{error} {error.__cause__}":
            raise ValueError(f"timm cannot give the maps of {name}: {error}. Take another backbone") from error
        if ":" not in name and not timm.is_model(name.split(".")[0]):
            near = did_you_mean(name, [*timm.list_models(), *SEGMENTORS])
            raise ValueError(
                f"create_segmentor: unknown backbone {name!r}{near}; timm.list_models() has all"
            ) from error
        raise
    strides: list[int] = model.feature_info.reduction()  # type: ignore[union-attr, operator]
    if strides != sorted(strides):  # timm gives maps as the network makes them, and describes them as they are named
        raise ValueError(
            f"create_segmentor: out_indices must name the first stage first, got {options.get('out_indices')}, of "
            f"strides {strides}"
        )
    return model
