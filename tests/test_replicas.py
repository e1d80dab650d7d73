"""Replicas of a model, beside the comparison with DistributedDataParallel in tests/engine/test_graphs.py."""

import pytest
import torch
from torch import nn

from visionzoo import Replicas


@pytest.fixture
def other(monkeypatch):
    """Two processes, of which the other one's numbers are all 4 where sums are asked for, and all 3 where it sends."""
    monkeypatch.setattr("torch.distributed.get_world_size", lambda group: 2)
    monkeypatch.setattr("torch.distributed.broadcast", lambda numbers, source, group: numbers.fill_(3))

    def all_reduce(numbers, operation=torch.distributed.ReduceOp.SUM, group=None):
        if operation == torch.distributed.ReduceOp.SUM:
            numbers.add_(4 / 2)

    monkeypatch.setattr("torch.distributed.all_reduce", all_reduce)


def test_replicas_begin_alike_and_share_gradients_and_buffers(other):
    model = nn.Sequential(nn.Conv2d(1, 2, 3), nn.BatchNorm2d(2)).to(memory_format=torch.channels_last)
    replicas = Replicas(model)
    assert all(bool((value == 3).all()) for value in model.state_dict().values())
    parameters = list(model.parameters())
    for parameter in parameters[:3]:
        parameter.grad = torch.arange(parameter.numel()).view_as(parameter).float()
    expected = [(parameter.grad + 4) / 2 for parameter in parameters[:3]]
    before = [parameter.grad for parameter in parameters[:3]]
    replicas.average_gradients(parameters)
    for parameter, gradient, mean in zip(parameters, before, expected, strict=False):
        assert parameter.grad is gradient and torch.equal(gradient, mean)
    parameters[0].grad = None  # here, not in the other
    replicas.average_gradients(parameters)
    assert bool((parameters[0].grad == 2).all()) and parameters[3].grad is None
    parameters[3].grad = torch.ones(2)
    with pytest.raises(RuntimeError, match="of the 3 parameters that had one at the first update, got 4"):
        replicas.average_gradients(parameters)
    model[1].running_mean.zero_()
    replicas.share_buffers()
    assert model[1].running_mean.tolist() == [3, 3] and int(model[1].num_batches_tracked) == 3


def test_buffers_are_left_alone_where_asked(other):
    model = nn.BatchNorm2d(2)
    replicas = Replicas(model, broadcast_buffers=False)
    model.running_mean.zero_()
    replicas.share_buffers()
    assert model.running_mean.tolist() == [0, 0]
