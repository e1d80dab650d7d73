"""A model in several processes that learns as one: what DistributedDataParallel does, outside of the backward pass."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.distributed
from torch import Tensor, nn


class Replicas:
    """A model that is in all processes of a group, one replica in each.

    DistributedDataParallel averages gradients while the backward pass runs, which a CUDA graph cannot hold. Here they
    are averaged at once, between the backward pass and the update, with the same results. All replicas begin as that
    of the first process.

    Args:
        model: on one device, the same network in all processes.
        broadcast_buffers: give all replicas the buffers of the first, such as the statistics of batch norm, before the
            first batch of every update.
        group: of processes, as torch.distributed makes them; None for all.
    """

    def __init__(self, model: nn.Module, *, broadcast_buffers: bool = True, group: Any = None) -> None:
        self.group = group
        self._first = 0 if group is None else torch.distributed.get_global_rank(group, 0)
        self._share = 1 / torch.distributed.get_world_size(group)
        self._buffers = list(model.buffers()) if broadcast_buffers else []
        self._packed_buffers = _Packed(self._buffers)
        self._learning: list[Tensor] | None = None
        self._packed_gradients = _Packed([])
        begin = [tensor.detach() for tensor in (*model.parameters(), *model.buffers())]
        _Packed(begin).change(begin, self._broadcast)

    def share_buffers(self) -> None:
        """Give all replicas the buffers of the first; nothing without `broadcast_buffers`."""
        self._packed_buffers.change(self._buffers, self._broadcast)

    def average_gradients(self, parameters: Sequence[Tensor]) -> None:
        """Give all replicas the average of their gradients; all processes call this with the same parameters.

        Parameters learn that have a gradient in any process at the first call. Where another has none, it counts as 0.

        Raises:
            RuntimeError: another parameter has a gradient at a later call.
        """
        if self._learning is None:
            learns = torch.tensor([p.grad is not None for p in parameters], device=parameters[0].device).int()
            torch.distributed.all_reduce(learns, torch.distributed.ReduceOp.MAX, group=self.group)
            self._learning = [p for p, yes in zip(parameters, learns.tolist(), strict=True) if yes]
            self._packed_gradients = _Packed(self._learning)
        for parameter in self._learning:
            if parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)
        count = sum(p.grad is not None for p in parameters)
        if count > len(self._learning):
            raise RuntimeError(
                f"expected gradients of the {len(self._learning)} parameters that had one at the first update, got "
                f"{count}: which parts of a model learn must not change"
            )
        self._packed_gradients.change([p.grad for p in self._learning if p.grad is not None], self._average)

    def _broadcast(self, numbers: Tensor) -> None:
        torch.distributed.broadcast(numbers, self._first, group=self.group)

    def _average(self, numbers: Tensor) -> None:
        numbers.mul_(self._share)  # before the sum, as DistributedDataParallel does, so that it rounds alike
        torch.distributed.all_reduce(numbers, group=self.group)


class _Packed:
    """Tensors one behind the other in one for each dtype, which are sent as one."""

    def __init__(self, like: Sequence[Tensor]) -> None:
        numbers: dict[torch.dtype, list[int]] = defaultdict(list)
        for number, tensor in enumerate(like):
            numbers[tensor.dtype].append(number)
        self._parts = []
        for dtype, chosen in numbers.items():
            tensors = [like[number] for number in chosen]
            whole = torch.empty(sum(t.numel() for t in tensors), dtype=dtype, device=tensors[0].device)
            places = whole.split([t.numel() for t in tensors])
            laid = [
                torch.empty_like(t, device="meta").stride() for t in tensors
            ]  # as in memory, so that copies are fast
            views = [p.as_strided(t.shape, s) for p, t, s in zip(places, tensors, laid, strict=True)]
            self._parts.append((chosen, whole, views))

    @torch.no_grad()
    def change(self, tensors: Sequence[Tensor], function: Callable[[Tensor], None]) -> None:
        """Let a function change tensors like those that this was made for."""
        for chosen, whole, views in self._parts:
            own = [tensors[number] for number in chosen]
            torch._foreach_copy_(views, own)
            function(whole)
            torch._foreach_copy_(own, views)
