"""What holds of every part that is put into a network of one's own: precision, copies, sizes."""

import copy
import pickle

import pytest
import torch
from layers.parts import PARTS


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
