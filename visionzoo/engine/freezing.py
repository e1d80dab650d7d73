"""Layer-wise freezing: the first layers of a model stop learning, by a schedule over the epochs.

Layers near the input settle first, so their backward pass can be left out from some epoch on (FreezeOut,
arXiv:1706.04983, whose learning rates fall to zero layer by layer; here a layer learns at the full rate until it is
frozen). What a layer is, timm's `group_matcher` says, as for the decay of learning rates over layers.
"""

from __future__ import annotations

from collections.abc import Mapping
from itertools import pairwise
from typing import Any

from timm.models import group_parameters
from torch import nn

from visionzoo._torch_private import BatchNorm
from visionzoo.engine.errors import UserError
from visionzoo.engine.flags import TrainConfig
from visionzoo.engine.parallel import Process
from visionzoo.text import count_of

FLAG = "--freeze-layers"


class LayerFreezing:
    """Which of a model's layers are frozen in which epoch.

    Args:
        given: number of layers, from the input on, that are frozen from an epoch on: {epoch: count}, as
            --freeze-layers has it.
        model: whose layers they are.
        name: of the model, for messages.

    Raises:
        UserError: an epoch or a count is not a whole number from 0, all layers would be frozen, or the model does not
            say what its layers are.
    """

    def __init__(self, given: Mapping[Any, Any], model: nn.Module, name: str) -> None:
        if not hasattr(model, "group_matcher"):
            raise UserError(f"{FLAG}: {name} does not say what its layers are (timm's group_matcher); leave it out")
        self.learning: set[str] = set()
        self.num_layers = 1 + max(_layers(model).values())
        self.counts = {0: 0} | {_whole(epoch, "epoch"): _whole(count, "count") for epoch, count in given.items()}
        for epoch, count in self.counts.items():
            if count >= self.num_layers:
                raise UserError(
                    f"{FLAG} {epoch}={count}: {name} has {count_of(self.num_layers, 'layer')}; freeze "
                    f"{self.num_layers - 1} at most, or train only the classifier by --freeze"
                )

    @property
    def always(self) -> int:
        """The number of layers that never learn."""
        return min(self.counts.values())

    @property
    def changes(self) -> list[int]:
        """The epochs in which other layers are frozen than before."""
        ordered = sorted(self.counts)
        return [epoch for before, epoch in pairwise(ordered) if self.counts[before] != self.counts[epoch]]

    def count(self, epoch: int) -> int:
        """Return the number of layers that are frozen in an epoch."""
        return self.counts[max(start for start in self.counts if start <= epoch)]

    def begin(self, model: nn.Module) -> None:
        """Freeze the layers that never learn, so that no optimizer has them; what has no gradients now never has any.

        It comes when what learns is known: quantizers without a use are known after their calibration.
        """
        self.learning = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
        self.apply(model, self.always)

    def apply(self, model: nn.Module, count: int) -> str:
        """Let the first `count` layers have no gradients and keep the statistics of their batch norms.

        Without a gradient an optimizer neither updates nor decays a parameter. It is for a model in training mode,
        which has to be set anew where fewer layers are frozen than before.

        Returns:
            what is frozen, in words.
        """
        layers = _layers(model)
        frozen = 0
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(name in self.learning and layers[name] >= count)
            if layers[name] < count:
                parameter.grad = None
                frozen += parameter.numel()
        for name, module in model.named_modules():
            if isinstance(module, BatchNorm) and not _learns(model, name):
                module.eval()
        total = sum(parameter.numel() for parameter in model.parameters())
        return f"{count} of {count_of(self.num_layers, 'layer')} frozen: {frozen:,} of {total:,} parameters"


def make_freezing(config: TrainConfig, model: nn.Module, process: Process) -> LayerFreezing | None:
    """Return the schedule of --freeze-layers, None without it; it is to `begin`.

    Raises:
        UserError: another flag has no place beside it, or as `LayerFreezing`.
    """
    given = config.fit.freeze_layers
    if not given:
        return None
    if config.fit.freeze:
        raise UserError("--freeze-layers: --freeze leaves only the classifier to learn; give one of them")
    freezing = LayerFreezing(given, model, config.model.name)
    if freezing.count(0) and not has_weights(config):
        raise UserError(
            f"--freeze-layers freezes {count_of(freezing.count(0), 'layer')} of random weights at epoch 0; give "
            "--pretrained, --pretrained-path or --initial-checkpoint, or freeze them later"
        )
    if freezing.changes and (process.distributed or config.fit.cuda_graphs):
        flag = "--cuda-graphs" if config.fit.cuda_graphs else "a run of several processes"
        raise UserError(
            f"--freeze-layers changes what learns at epoch {freezing.changes[0]}, and {flag} fixes it at the start; "
            "freeze from epoch 0 only, or leave one of them out"
        )
    return freezing


def has_weights(config: TrainConfig) -> bool:
    """Whether something gives the model's features weights."""
    fit = config.fit
    return bool(config.model.pretrained or fit.pretrained_path or fit.initial_checkpoint or config.run.resume)


def _layers(model: Any) -> dict[str, int]:
    """Return the number of the layer of each parameter, by name; 0 is next to the input."""
    return group_parameters(model, model.group_matcher(coarse=False), reverse=True)


def _learns(model: nn.Module, path: str) -> bool:
    """Whether a module has parameters that learn; one without any is as the nearest module around it that has some."""
    while True:
        learning = [parameter.requires_grad for parameter in model.get_submodule(path).parameters()]
        if learning or not path:
            return any(learning)
        path = path.rpartition(".")[0]


def _whole(value: Any, what: str) -> int:
    text = str(value)
    if isinstance(value, bool) or not text.isdecimal():
        raise UserError(f"{FLAG}: expected EPOCH=COUNT, whole numbers from 0, got {what} {value!r}")
    return int(text)
