"""What torch's transforms get from operators over Triton kernels: the right numbers or an error, never wrong ones."""

import pytest
import torch
from kernels.triton_checks import DEVICE
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.autograd import forward_ad

from visionzoo.kernels import routed_attention
from visionzoo.kernels.operator import operator


def _attention(q):
    return routed_attention(q, q, q, None, regions=2, backend="triton")


@pytest.fixture
def q():
    return torch.randn(1, 4, 4, 1, 16, generator=torch.Generator().manual_seed(0)).to(DEVICE)


def test_a_second_derivative_is_refused(q):
    q.requires_grad_()
    (grad,) = torch.autograd.grad(_attention(q).square().sum(), q, create_graph=True)
    with pytest.raises(RuntimeError, match="differentiate twice"):
        (grad.square().sum() + q.sum()).backward()


def test_forward_mode_is_refused(q):
    with forward_ad.dual_level(), pytest.raises(NotImplementedError, match="Triton kernels have no forward-mode"):
        _attention(forward_ad.make_dual(q, torch.ones_like(q)))


def test_vmap_maps(q):
    batch = torch.stack([q, 2 * q])
    torch.testing.assert_close(torch.vmap(_attention)(batch), torch.stack([_attention(x) for x in batch]))


@pytest.mark.skipif(torch.cuda.device_count() == 1, reason="torch names no second GPU where there is one")
@pytest.mark.parametrize(("current", "entered"), [(0, ["cuda:1"]), (1, [])])
def test_kernels_are_launched_on_the_device_of_their_tensors(current, entered, monkeypatch):
    seen, ran = [], []

    class Device:
        def __init__(self, device):
            self.device = device

        def __enter__(self):
            seen.append(str(self.device))

        def __exit__(self, *_):
            ran.append("left")

    def launch(x: torch.Tensor) -> torch.Tensor:
        ran.append(x.device)
        return x.new_empty(x.shape)

    name = f"launched_on_{current}"
    call = operator(name, fake=lambda x: x.new_empty(x.shape))(launch)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: current)
    monkeypatch.setattr(torch.cuda, "device", Device)
    with FakeTensorMode():
        x = torch.empty(3, device="cuda:1")
    call.launch(x)
    assert seen == entered and ran == [torch.device("cuda:1"), *["left"] * len(entered)]
