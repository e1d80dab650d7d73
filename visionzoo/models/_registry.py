"""From a family's table of variants to timm's registry."""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from inspect import signature
from typing import Any

import torch
from timm.models import PretrainedCfg, build_model_with_cfg, generate_default_cfgs, register_model
from timm.models._builder import _resolve_pretrained_source, resolve_pretrained_cfg
from timm.models._features import FeatureGetterNet
from torch import nn

from visionzoo.layers.arguments import check_arguments
from visionzoo.layers.mixers import combine_mixers
from visionzoo.layers.tokens import TokenBlock
from visionzoo.models._checkpoint import filter_for_timm
from visionzoo.models._contract import Contract
from visionzoo.models._gating import with_gates
from visionzoo.models._heads import with_head
from visionzoo.models._licenses import check
from visionzoo.models._memory import with_memory
from visionzoo.models._network import WEIGHTS, check_reachable
from visionzoo.models._reducing import with_reducers


@dataclass(frozen=True)
class Published:
    """What a paper or repository says of a variant; None where it says nothing."""

    params_m: float | None = None  # parameters in millions
    gmacs: float | None = None  # multiply-adds of one image at `size`, in billions
    top1: float | None = None  # ImageNet-1k, per cent
    size: int = 224  # pixels
    source: str = ""
    explained: tuple[str, ...] = ()  # which of the first two are not what the model has, as the docstring explains


@dataclass(frozen=True)
class Variant:
    """One published size of a family: its arguments, its published numbers, where its weights are."""

    kwargs: Mapping[str, Any]
    published: Published = Published()
    weights: Mapping[str, Any] = field(default_factory=dict)  # entries of timm's PretrainedCfg; `tag` names them
    no_weights: str = ""  # why there are none, for those who ask for them


FAMILIES: dict[str, list[str]] = {}  # family -> its model names
TINY: dict[str, Mapping[str, Any]] = {}  # model name -> arguments that make it small, for tests
VARIANTS: dict[str, Variant] = {}  # model name -> variant, over all families
CLASSES: dict[str, type[Contract]] = {}  # model name -> its class


def register_family(
    module_name: str,
    model_cls: type[Contract],
    variants: Mapping[str, Variant],
    *,
    tiny: Mapping[str, Mapping[str, Any]],
    **cfg: Any,
) -> None:
    """Register every variant of a family into timm, with its pretrained cfg.

    Args:
        module_name: `__name__` of the family's file; its last part is the family's name.
        model_cls: built as `model_cls(**variant.kwargs, **caller's arguments)`.
        variants: model name -> variant.
        tiny: model names -> arguments that make them small, for the tests: one for each way that the family is built.
        cfg: entries of timm's PretrainedCfg that all variants share; a variant's `weights` win.
    """
    module: Any = sys.modules[module_name]
    cfgs: dict[str, Any] = {}
    for name, variant in variants.items():
        entries = {**_IMAGENET, **cfg, **variant.weights}
        tag = entries.pop("tag", "")
        cfgs[f"{name}.{tag}" if tag else name] = entries
    module.default_cfgs = {**getattr(module, "default_cfgs", {}), **generate_default_cfgs(cfgs)}  # where timm looks
    for name, variant in variants.items():
        create = _entry_point(name, model_cls, variant)
        create.__module__ = module_name
        register_model(create)
    FAMILIES.setdefault(module_name.rpartition(".")[2], []).extend(variants)
    TINY.update({name: kwargs for name, kwargs in tiny.items() if name in variants})
    VARIANTS.update(variants)
    CLASSES.update(dict.fromkeys(variants, model_cls))


_IMAGENET = {
    "input_size": (3, 224, 224),
    "pool_size": (7, 7),
    "crop_pct": 0.875,
    "interpolation": "bicubic",
    "mean": (0.485, 0.456, 0.406),
    "std": (0.229, 0.224, 0.225),
    "num_classes": 1000,
    "classifier": "head.fc",
}


# Options that any model takes beside its family's own, and what puts their value into it.
PLUG_INS: dict[str, Callable[[Any, Any], Any]] = {
    "gates": with_gates,
    "memory": with_memory,
    "reduce": with_reducers,
    "head": with_head,
}


def _entry_point(name: str, model_cls: type[Contract], variant: Variant) -> Callable[..., nn.Module]:
    def create(pretrained: bool = False, device: Any = None, dtype: Any = None, **kwargs: Any) -> nn.Module:
        accepted = kwargs.pop("non_commercial", False)
        plugged = {option: kwargs.pop(option, None) for option in PLUG_INS}
        _check_arguments(name, model_cls, kwargs)
        if pretrained:
            _require_weights(name, variant, kwargs, accepted)
        if "mixers" in variant.kwargs:
            kwargs["mixers"] = combine_mixers(variant.kwargs["mixers"], kwargs.get("mixers"))
        if kwargs.get("feature_cls") == "getter":  # timm's name of what ours is a kind of
            del kwargs["feature_cls"]
        apart = {"flatten_sequential": True} if kwargs.get("feature_cls") in ("dict", "hook", "list") else {}

        def build(**arguments: Any) -> nn.Module:
            make: Any = model_cls
            for option, plug_in in PLUG_INS.items():
                make = plug_in(make, plugged[option])
            model = make(**arguments)
            _check_features(name, model, kwargs)
            return model

        with torch.device(device) if device is not None else nullcontext():
            model = build_model_with_cfg(
                build,
                name,
                pretrained,
                pretrained_filter_fn=filter_for_timm,
                feature_cfg={"out_indices": model_cls.FEATURES, "feature_cls": FeatureGetter, **apart},
                **{**variant.kwargs, **kwargs},
            )
        return model.to(dtype=dtype)

    create.__name__ = create.__qualname__ = name
    create.__doc__ = f"{model_cls.__name__} with {', '.join(f'{k}={v}' for k, v in variant.kwargs.items())}."
    return create


class FeatureGetter(FeatureGetterNet):
    """timm's feature extractor, `create_model(..., features_only=True)`, with what trainers ask of a model."""

    def __init__(self, model: Any, out_indices: Any = None, **options: Any):
        if out_indices == model.FEATURES and isinstance(out_indices, int):  # the caller has not named them
            out_indices = min(out_indices, model.num_parts)
        super().__init__(model, out_indices, **options)

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Recompute blocks in the backward pass instead of keeping their activations."""
        model: Any = self.model
        model.set_grad_checkpointing(enable)


def _check_features(name: str, model: nn.Module, kwargs: Mapping[str, Any]) -> None:
    """Refuse extractors that take what a module returns where that is no map.

    Raises:
        ValueError: if tokens pass between the model's parts, and the extractor is not timm's getter.
    """
    kind = kwargs.get("feature_cls") or "getter"
    getter = kind.lower() == "getter" if isinstance(kind, str) else issubclass(kind, FeatureGetterNet)
    if kwargs.get("features_only") and not getter and any(isinstance(m, TokenBlock) for m in model.modules()):
        raise ValueError(
            f"{name}: feature_cls={kind!r} takes what the modules return, which are tokens here, not maps "
            f"[B, C, H, W]; leave it out, or pass feature_cls='getter'"
        )


_BUILDER = {*signature(build_model_with_cfg).parameters, "features_only", "out_indices", "feature_cls", "pruned"}


def _check_arguments(name: str, model_cls: type[Contract], kwargs: dict[str, Any]) -> None:
    """Refuse arguments that neither the family nor timm's builder has; drop an image size that nothing depends on.

    Raises:
        TypeError: if there is one.
        ValueError: if a value is of another type than the family states, or `img_size` is not a size.
    """
    own = signature(model_cls).parameters
    if "img_size" not in own and (size := kwargs.pop("img_size", None)) is not None:
        sides = size if isinstance(size, Sequence) else (size,)
        if len(sides) not in (1, 2) or not all(isinstance(side, int) and side > 0 for side in sides):
            raise ValueError(f"{name}: img_size must be pixels or (height, width), got {size!r}")
    given = {key: value for key, value in kwargs.items() if key in own or key not in _BUILDER}
    check_arguments(model_cls, given, where=f"{name}: ", also=PLUG_INS)


def _require_weights(name: str, variant: Variant, kwargs: Mapping[str, Any], accepted: bool) -> None:
    cfg = resolve_pretrained_cfg(
        name, pretrained_cfg=kwargs.get("pretrained_cfg"), pretrained_cfg_overlay=kwargs.get("pretrained_cfg_overlay")
    )
    if not _resolve_pretrained_source(cfg.to_dict())[0]:
        raise RuntimeError(
            f"No public weights are known for {name}: {variant.no_weights or 'none were published'}. If you have the "
            f"authors' checkpoint, load it with visionzoo.load_weights(model, path), or turn it into a folder with "
            f"`visionzoo convert` and use timm.create_model('local-dir:FOLDER', pretrained=True)."
        )
    if not cfg.file:  # else they are the caller's own
        check(name, cfg.license, accepted=accepted)
    check_download(name, cfg, cache=kwargs.get("cache_dir"))


def check_download(name: str, cfg: PretrainedCfg, *, cache: Any = None) -> None:
    """Stop where a model's weights are to come from the hub and can be had neither from there nor from the cache.

    Raises:
        huggingface_hub.errors.LocalEntryNotFoundError: they cannot.
    """
    source, place = _resolve_pretrained_source(cfg.to_dict())
    if source == "hf-hub":
        repository, files = (place, WEIGHTS) if isinstance(place, str) else (place[0], place[1:])
        check_reachable(name, repository, files, cache=cache)
