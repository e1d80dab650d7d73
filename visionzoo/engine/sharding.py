"""FSDP2: each process keeps a share of every tensor, and of what the optimizer holds for it.

Checkpoints hold whole tensors under the plain model's names and the optimizer's numbers, so that runs with and without
`--fsdp`, on any number of processes, take up each other's. The running averages of batch norm are each process's own
until the end of an epoch, and a checkpoint in mid-epoch holds the first one's.
"""

from collections.abc import Mapping
from typing import Any

from timm.task import FeatureDistillationTask, TrainingTask
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.optim import Optimizer

from visionzoo.engine.errors import UserError
from visionzoo.engine.flags import DeviceConfig, OptimizerConfig


def check(precision: DeviceConfig, optimizer: OptimizerConfig, distributed: bool, task: TrainingTask) -> None:
    """Refuse what cannot be sharded.

    Raises:
        UserError: there is one process only, or a flag that --fsdp does not go with.
    """
    if not distributed:
        raise UserError("--fsdp shares a model between processes: start several by torchrun --nproc-per-node N")
    if precision.amp and precision.amp_dtype == "float16":
        raise UserError("--fsdp: the loss scale of float16 is not kept between shards; pass --amp-dtype bfloat16")
    if optimizer.clip_grad is not None and optimizer.clip_mode == "agc":
        raise UserError("--fsdp: --clip-mode agc needs whole gradients; pass --clip-mode norm")
    if isinstance(task, FeatureDistillationTask):
        raise UserError(
            "--fsdp: --kd-distill-type feature and scalekd call parts of the model by themselves; use logit or token"
        )


def shard(task: TrainingTask) -> None:
    """Share out the trained model of a task, and its moving average, block by block."""
    averaged: Any = task.get_trainable_module(ema=True)
    for module in (task.get_trainable_module(), averaged and averaged.module):
        if module is not None:
            for blocks in [part for name, part in module.named_modules() if name.rpartition(".")[2] == "blocks"]:
                for block in blocks.children():
                    fully_shard(block)
            fully_shard(module)


def whole(state: Any, keep: bool = True) -> Any:
    """Return a state with whole tensors on the CPU for shared ones; all processes call this, `keep` says who needs it.

    Without `keep` the shared tensors are gathered for the others, and None is in their places.
    """
    if isinstance(state, DTensor):
        gathered = state.full_tensor()
        return gathered.cpu() if keep else None
    if isinstance(state, Mapping):
        return {key: whole(value, keep) for key, value in state.items()}
    if isinstance(state, (list, tuple)):
        return type(state)(whole(value, keep) for value in state)
    return state


def shares(state: Mapping[str, Any], module: nn.Module) -> dict[str, Any]:
    """Return a model's whole state with each tensor shared as the module's own is."""
    own = module.state_dict()
    return {name: _like(own.get(name), value) for name, value in state.items()}


def optimizer_shares(state: Mapping[str, Any], optimizer: Optimizer) -> dict[str, Any]:
    """Return an optimizer's whole state with the tensors of each parameter shared as that is."""
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    values = {
        number: {key: _like(parameters[number], value) for key, value in entries.items()}
        for number, entries in state["state"].items()
    }
    return {**state, "state": values}


def _like(own: Any, value: Any) -> Any:
    if isinstance(own, DTensor) and isinstance(value, Tensor) and value.shape == own.shape:
        return distribute_tensor(value.to(own.device), own.device_mesh, own.placements)
    return value
