"""What holds of every part that is put into your own network: precision, copies, sizes."""

import copy
import pickle

import pytest
import torch
from layers.parts import PARTS, Part, nchw, nhwc
from torch import fx, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from visionzoo.decoders import FussFreeEncoder
from visionzoo.kernels import use_backend
from visionzoo.layers.mimicking import spatial_loss


class Apart(nn.Module):
    """A linear layer whose weight no one else finds, as in quantized layers and adapters."""

    def __init__(self, layer):
        super().__init__()
        self.inner = layer

    def forward(self, x):
        return self.inner(x)


class Whole(nn.Module):
    """A part as a module whose inputs are only tensors."""

    def __init__(self, part, module):
        super().__init__()
        self.part, self.module = part, module

    def forward(self, *inputs):
        return self.part(self.module, *inputs)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("name", PARTS)
def test_a_part_is_as_precise_as_its_dtype(name, dtype):
    part = PARTS[name]
    module, inputs = part.build(dtype), part.inputs(dtype=dtype)
    exact = part(copy.deepcopy(module).double(), *(x.double() for x in inputs))
    for out, expected in zip(part(module, *inputs), exact, strict=True):
        assert out.dtype == dtype
        assert (out.double() - expected).norm() <= 20 * torch.finfo(dtype).eps * expected.norm()


@pytest.mark.parametrize("name", PARTS)
def test_a_part_that_was_pickled_is_the_same(name):
    part = PARTS[name]
    module, inputs = part.build(), part.inputs()
    again = pickle.loads(pickle.dumps(module))
    for out, expected in zip(part(again, *inputs), part(module, *inputs), strict=True):
        assert torch.equal(out, expected)


LINEAR = [name for name, part in PARTS.items() if any(type(m) is nn.Linear for m in part.make().modules())]


@pytest.mark.parametrize("name", LINEAR)
def test_linear_layers_can_be_replaced(name):
    part = PARTS[name]
    module, inputs = part.build(), part.inputs()
    replaced = copy.deepcopy(module)
    for path, layer in list(replaced.named_modules()):
        if type(layer) is nn.Linear:
            replaced.set_submodule(path, Apart(layer))
    for out, expected in zip(part(replaced, *inputs), part(module, *inputs), strict=True):
        torch.testing.assert_close(out, expected)


@pytest.mark.parametrize("name", PARTS)
@pytest.mark.parametrize(("batch", "height", "width"), [(0, 6, 7), (1, 1, 1), (2, 1, 9), (1, 9, 1)])
def test_maps_of_one_row_and_batches_of_none_are_taken(name, batch, height, width):
    part = PARTS[name]
    module = part.build()
    inputs = [x.requires_grad_() for x in part.inputs(batch, height, width)]
    outs = part(module, *inputs)
    assert all(len(out) == batch and out.isfinite().all() for out in outs)
    sum(out.square().sum() for out in outs).backward()
    assert all(x.grad.isfinite().all() for x in inputs if x.grad is not None)


@pytest.mark.parametrize("name", PARTS)
def test_a_part_is_mapped_over_images(name):
    part = PARTS[name]
    module, inputs = part.build(), part.inputs(3)

    def of_one(*image):
        return [out[0] for out in part(module, *(x[None] for x in image))]

    with use_backend("reference"), sdpa_kernel(SDPBackend.MATH):
        mapped, batch = torch.func.vmap(of_one)(*inputs), part(module, *inputs)
    for out, expected in zip(mapped, batch, strict=True):
        torch.testing.assert_close(out, expected, rtol=1e-9, atol=1e-9)


ENCODER = Part(lambda: FussFreeEncoder((1, 1, 1), (8, 8, 12, 16), stem=(8, 8, 8), pre_down=True), (nchw(3),))
LOSS = Part(nn.Identity, (nhwc(16), nhwc(16)), lambda module, x, y: spatial_loss(x, y))
BATCHED = {"spatial_loss": LOSS, **{name: PARTS[name] for name in ("level_attention", "bridging", "projector")}}


@pytest.mark.parametrize("name", BATCHED)
def test_a_part_is_exported_for_batches_of_any_size(name):
    part = BATCHED[name]
    module, inputs = part.build(), part.inputs()
    whole = Whole(part, module)
    batch = torch.export.Dim("batch", max=1024)
    program = torch.export.export(
        whole, tuple(inputs), dynamic_shapes=(tuple({0: batch} for _ in inputs),), strict=False
    )
    again = part.inputs(3)
    for out, expected in zip(program.module()(*again), whole(*again), strict=True):
        torch.testing.assert_close(out, expected)


class Held(nn.Module):
    """A part as a module whose inputs have names, up to four."""

    def __init__(self, part, module):
        super().__init__()
        self.part, self.module = part, module

    def forward(self, a, b=None, c=None, d=None):
        return self.part.call(self.module, *(x for x in (a, b, c, d) if x is not None))


@pytest.mark.parametrize("name", [*PARTS, "fuss_free_encoder"])
def test_torch_fx_traces_a_part(name):
    part = ENCODER if name == "fuss_free_encoder" else PARTS[name]
    held, inputs = Held(part, part.build()), part.inputs()
    graph = fx.symbolic_trace(held, concrete_args=dict.fromkeys("abcd"[len(inputs) :]))
    again = part.inputs(3, 9, 10)
    torch.testing.assert_close(graph(*again, *[None] * (4 - len(again))), held(*again))
