"""Learning rates by layer, and weight decay as the backbones want it."""

from __future__ import annotations

import logging
from typing import Any

from mmengine.logging import print_log
from mmengine.optim import DefaultOptimWrapperConstructor
from mmengine.registry import OPTIM_WRAPPER_CONSTRUCTORS
from timm.models import group_parameters
from torch import nn

from visionzoo.openmmlab.backbone import ZooBackbone
from visionzoo.text import count_of


@OPTIM_WRAPPER_CONSTRUCTORS.register_module()
class ZooOptimWrapperConstructor(DefaultOptimWrapperConstructor):
    """mmengine's default constructor with three more keys in `paramwise_cfg`, for any `ZooBackbone`.

    `layer_decay=0.9` gives earlier layers lower learning rates. Layers are the blocks in their order, as timm counts
    them (`group_matcher` of the model): the last has 0.9 times the learning rate, every earlier one 0.9 times that of
    the next; norms of the outputs, neck and heads have the whole.

    `position_decay_mult=0.0` multiplies the weight decay of what the backbone itself would spare (`no_weight_decay` of
    the model): tables and other parameters of positions, whatever their names.

    `vector_decay_mult=0.0` multiplies the weight decay of the backbone's vectors, as of norms and biases.

    All other keys are mmengine's, and multiply.

    Raises:
        ValueError: if the decay is not in (0, 1], or the model has no `ZooBackbone`.
    """

    def __init__(self, optim_wrapper_cfg: dict[str, Any], paramwise_cfg: dict[str, Any] | None = None):
        super().__init__(optim_wrapper_cfg, paramwise_cfg)
        self.layer_decay = float(self.paramwise_cfg.get("layer_decay", 1.0))
        self.position_decay_mult = self.paramwise_cfg.get("position_decay_mult", 1.0)
        self.vector_decay_mult = self.paramwise_cfg.get("vector_decay_mult", 1.0)
        if not 0 < self.layer_decay <= 1:
            raise ValueError(
                f"ZooOptimWrapperConstructor: layer_decay must be above 0 and up to 1, got {self.layer_decay}"
            )

    def add_params(
        self, params: list[dict[str, Any]], module: nn.Module, prefix: str = "", is_dcn_module: Any = None
    ) -> None:
        """Add the parameters of `module` as mmengine does, then scale those of backbones."""
        if prefix:  # a part of the model, from mmengine's recursion
            super().add_params(params, module, prefix, is_dcn_module)
            return
        before = logging.root.manager.disable
        logging.disable(logging.INFO)  # mmengine prints three lines a parameter, a thousand for a backbone
        try:
            super().add_params(params, module, prefix, is_dcn_module)
        finally:
            logging.disable(before)
        backbones = [part for part in module.modules() if isinstance(part, ZooBackbone)]
        if not backbones:
            raise ValueError("ZooOptimWrapperConstructor: the model has no ZooBackbone")
        groups = {id(group["params"][0]): group for group in params}  # mmengine makes one for each parameter
        for backbone in backbones:
            layers = group_parameters(backbone.model, backbone.model.group_matcher(coarse=False), reverse=True)
            count = max(layers.values()) + 1
            spared = backbone.model.no_weight_decay()
            for name, parameter in backbone.model.named_parameters():
                group = groups.get(id(parameter))
                if group is None:  # shared, and added under its first name
                    continue
                group["lr"] = group.get("lr", self.base_lr) * self.layer_decay ** (count - layers[name])
                if name in spared:
                    self._multiply_decay(group, self.position_decay_mult)
            for parameter in backbone.parameters():
                if parameter.ndim <= 1 and id(parameter) in groups:
                    self._multiply_decay(groups[id(parameter)], self.vector_decay_mult)
        print_log(_summary(params, self.base_lr, self.base_wd), logger="current")
        params[:] = _merged(params, {"lr": self.base_lr, "weight_decay": self.base_wd})

    def _multiply_decay(self, group: dict[str, Any], factor: float) -> None:
        decay = group.get("weight_decay", self.base_wd)
        if decay is not None:
            group["weight_decay"] = decay * factor


def _summary(params: list[dict[str, Any]], base_lr: float, base_wd: float | None) -> str:
    rates = [group.get("lr", base_lr) for group in params]
    without_decay = sum(group.get("weight_decay", base_wd) == 0 for group in params)
    return (
        f"{count_of(len(params), 'parameter')}: learning rates from {min(rates):.3g} to {max(rates):.3g}, "
        f"{without_decay} without weight decay"
    )


def _merged(groups: list[dict[str, Any]], defaults: dict[str, Any]) -> list[dict[str, Any]]:
    """Put parameters of equal settings into one group: an optimizer takes groups one after the other."""
    merged: dict[tuple[Any, ...], dict[str, Any]] = {}
    for group in groups:
        settings = {name: value for name, value in {**defaults, **group}.items() if value is not None}
        parameters = settings.pop("params")
        merged.setdefault(tuple(sorted(settings.items())), {**settings, "params": []})["params"] += parameters
    return list(merged.values())
