"""Every backbone of the zoo in OpenMMLab's configs: `backbone=dict(type='ZooBackbone', name='zoo_biformer_s')`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import lru_cache
from typing import Any

import timm
import torch
from huggingface_hub.errors import LocalEntryNotFoundError
from mmcv.cnn import build_norm_layer
from mmengine.logging import print_log
from mmengine.model import BaseModule
from mmengine.registry import MODELS
from timm.layers import LayerNorm2d
from torch import Tensor, nn

from visionzoo._torch_private import BatchNorm
from visionzoo.engine.errors import UserError, closest
from visionzoo.models._checkpoint import load_weights
from visionzoo.models._registry import VARIANTS
from visionzoo.openmmlab.checkpoints import download, read

if "LN2d" not in MODELS.module_dict:
    MODELS.register_module("LN2d", module=LayerNorm2d)  # layer normalization of the channels of [B, C, H, W]


@MODELS.register_module()
class ZooBackbone(BaseModule):
    """A backbone of the zoo that gives the maps of its stages.

    Args:
        name: of a model of the zoo, `zoo_*`.
        out_indices: stages whose maps are given, negative from the end; None for all. Later stages are not built.
        out_norm: norm of each map that is given: a config as mmcv takes it (`dict(type='LN2d')`,
            `dict(type='GN', num_groups=1)`, `dict(type='BN')`), None for none, or one of these for each map.
        frozen_stages: -1 freezes nothing, 0 the stem, k the stem and the first k stages: no gradients, no updates of
            batch norms, no stochastic depth.
        norm_eval: keep all batch norms of the backbone in eval mode.
        drop_path_rate: stochastic depth.
        with_cp: recompute blocks in the backward pass instead of keeping their activations.
        pretrained: start from the weights that timm's hub has for this model.
        init_cfg: `dict(type='Pretrained', checkpoint=FILE_OR_URL)` starts from a checkpoint, whoever's names it has:
            the authors', timm's, ours, also of a detector (`visionzoo.load_weights`).
        model: further arguments of the model, such as `in_chans`, `mixers` or BiFormer's `regions`.

    Raises:
        UserError: if there is no such model or stage, or `out_norm` or `init_cfg` are none of the above.
    """

    def __init__(
        self,
        name: str,
        *,
        out_indices: Sequence[int] | None = None,
        out_norm: Mapping[str, Any] | Sequence[Mapping[str, Any] | None] | None = None,
        frozen_stages: int = -1,
        norm_eval: bool = False,
        drop_path_rate: float = 0.0,
        with_cp: bool = False,
        pretrained: bool = False,
        init_cfg: Mapping[str, Any] | None = None,
        **model: Any,
    ):
        super().__init__(init_cfg=None)
        self._is_init = False
        self.name = name
        self.checkpoint = checkpoint_of(init_cfg, "ZooBackbone")
        self.pretrained = pretrained
        if pretrained and self.checkpoint:
            raise UserError(f"ZooBackbone: either pretrained=True or a checkpoint, got both ({self.checkpoint})")
        getter: Any = create_getter(name, out_indices, drop_path_rate=drop_path_rate, **model)
        self.model = getter.model
        self.out_indices = tuple(getter.out_indices)
        self.out_channels = getter.feature_info.channels()
        self.out_strides = getter.feature_info.reduction()
        self.out_norms = nn.ModuleList(
            _norm(norm, channels) if norm else nn.Identity()
            for norm, channels in zip(self._norms(out_norm), self.out_channels, strict=True)
        )
        if with_cp:
            self.model.set_grad_checkpointing(True)
        stages = len(self.model.parts)
        if not -1 <= frozen_stages <= stages:
            raise UserError(f"ZooBackbone: frozen_stages must be from -1 to {stages} for {name}, got {frozen_stages=}")
        self.norm_eval = norm_eval
        self._frozen = self.model.first_layers(frozen_stages) if frozen_stages >= 0 else []
        for part in self._frozen:
            part.requires_grad_(False)

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        """Image [B, in_chans, H, W] to a map [B, C, H', W'] for each of `out_indices`."""
        maps = self.model.forward_intermediates(x, indices=self.out_indices, stop_early=True, intermediates_only=True)
        return tuple(norm(feature) for norm, feature in zip(self.out_norms, maps, strict=True))

    def train(self, mode: bool = True) -> ZooBackbone:
        """Set the mode, but leave frozen stages and, with `norm_eval`, batch norms in eval mode."""
        super().train(mode)
        for module in self.model.modules():
            if mode and self.norm_eval and isinstance(module, BatchNorm):
                module.eval()
        for part in self._frozen:
            part.eval()
        return self

    def init_weights(self) -> None:
        """Load the pretrained weights or the checkpoint, once; the Runner calls it before training.

        Raises:
            UserError: if there are none, or they do not fit.
        """
        if self._is_init:
            return
        if self.pretrained or self.checkpoint:
            try:
                report = load_weights(self.model, self._weights(), strict=False)
            except ValueError as error:
                raise error if isinstance(error, UserError) else UserError(f"{self.name}: {error}") from error
            print_log(f"{self.name} from {self.checkpoint or 'the hub'}: {report}", logger="current")
        self._is_init = True

    def _weights(self) -> Any:
        if self.checkpoint is None:
            try:
                return timm.create_model(self.name, pretrained=True).state_dict()
            except (RuntimeError, LocalEntryNotFoundError) as error:  # no weights known, or no connection
                raise UserError(
                    f"{error}\nIn a config: init_cfg=dict(type='Pretrained', checkpoint=FILE) of the backbone and "
                    f"pretrained=False, or on the command line --cfg-options model.backbone.pretrained=False "
                    f"model.backbone.init_cfg.type=Pretrained model.backbone.init_cfg.checkpoint=FILE. To start from "
                    f"random weights, only pretrained=False."
                ) from error
        if self.checkpoint.startswith(("http://", "https://")):
            return download(self.checkpoint, map_location="cpu")
        return read(self.checkpoint)  # mmengine's own logs among the weights are no code

    def _norms(self, out_norm: Any) -> Sequence[Any]:
        if out_norm is None or isinstance(out_norm, Mapping | str):
            return [out_norm] * len(self.out_indices)
        if len(out_norm) != len(self.out_indices):
            raise UserError(
                f"ZooBackbone: out_norm must be one config or one for each of out_indices={self.out_indices}, got "
                f"{len(out_norm)}"
            )
        return out_norm


def feature_channels(name: str, out_indices: Sequence[int] | None = None, **model: Any) -> list[int]:
    """Channels of the maps that `ZooBackbone` gives: what a neck's or head's `in_channels` must be.

    >>> feature_channels("zoo_biformer_t")
    [64, 128, 256, 512]
    """
    return list(_features(name, out_indices, model)[0])


def feature_strides(name: str, out_indices: Sequence[int] | None = None, **model: Any) -> list[int]:
    """Strides of the maps that `ZooBackbone` gives, in pixels of the image.

    >>> feature_strides("zoo_levit_128s")
    [16, 32, 64]
    """
    return list(_features(name, out_indices, model)[1])


def _features(name: str, out_indices: Sequence[int] | None, model: Mapping[str, Any]) -> tuple[list[int], list[int]]:
    if not model:
        return _cached_features(name, None if out_indices is None else tuple(out_indices))
    with torch.device("meta"):  # only shapes
        info = create_getter(name, out_indices, **model).feature_info
    return info.channels(), info.reduction()


@lru_cache
def _cached_features(name: str, out_indices: tuple[int, ...] | None) -> tuple[list[int], list[int]]:
    with torch.device("meta"):
        info = create_getter(name, out_indices).feature_info
    return info.channels(), info.reduction()


def create_getter(name: str, out_indices: Sequence[int] | None = None, **model: Any) -> Any:
    """Build timm's feature getter of a model of the zoo.

    Raises:
        UserError: if there is no such model or stage, or it does not take the arguments.
    """
    if name not in VARIANTS:
        raise UserError(
            f"ZooBackbone: {name!r} is not a model of the zoo{closest(name, VARIANTS)}. All: timm.list_models('zoo_*')"
        )
    if out_indices is not None:
        if not isinstance(out_indices, Sequence) or not out_indices:
            raise UserError(
                f"ZooBackbone: out_indices must be numbers of stages or blocks, such as (1, 2, 3), got {out_indices=}"
            )
        model["out_indices"] = tuple(out_indices)
    try:
        getter: Any = timm.create_model(name, features_only=True, **model)
    except (TypeError, ValueError) as error:
        raise UserError(f"ZooBackbone: {name} cannot be built with {model}: {error}") from error
    found = list(getter.out_indices)
    if out_indices is not None and (len(found) != len(out_indices) or sorted(set(found)) != found):
        raise UserError(f"ZooBackbone: out_indices must be different stages, the first one first, got {out_indices=}")
    return getter


def _norm(config: Any, channels: int) -> nn.Module:
    try:
        norm: nn.Module = build_norm_layer(dict(config), channels)[1]
    except (KeyError, TypeError, ValueError) as error:
        raise UserError(
            f"ZooBackbone: out_norm must be a config of mmcv's norms, such as dict(type='LN2d') or dict(type='BN'), "
            f"got {config!r}"
        ) from error
    return norm


def checkpoint_of(init_cfg: Mapping[str, Any] | None, name: str) -> str | None:
    """Return the file or address that an `init_cfg` of the part `name` starts from.

    Raises:
        UserError: if it says anything else.
    """
    if not init_cfg:
        return None
    if init_cfg.get("type") != "Pretrained" or not init_cfg.get("checkpoint"):
        raise UserError(
            f"{name}: init_cfg must be dict(type='Pretrained', checkpoint=FILE_OR_URL) or None (the models "
            f"initialize themselves), got {dict(init_cfg)}"
        )
    return str(init_cfg["checkpoint"])
