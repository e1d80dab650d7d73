"""A recorder like that of CUDA graphs for the CPU: operators on fixed tensors, and nothing of what Python does."""

import contextlib
import copy

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


def tensors(tree):
    return [leaf for leaf in tree_leaves(tree) if isinstance(leaf, Tensor)]


class Capture(TorchDispatchMode):
    """Refuses on the CPU what no CUDA graph can hold: the device would wait for the host, or the host for it.

    Args:
        scalars: let tensors of one number be made: torch's optimizers do, and leave them on the host on a GPU, too.
    """

    def __init__(self, scalars=False):
        super().__init__()
        self.scalars = scalars

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        # what torch.tensor made, or a list that is an index, or an array of numpy's
        if func is torch.ops.aten.lift_fresh.default and not (self.scalars and args[0].dim() == 0):
            raise RuntimeError("Cannot copy between CPU and CUDA tensors during CUDA graph capture")
        if func in (torch.ops.aten.index.Tensor, torch.ops.aten.index_put.default, torch.ops.aten.index_put_.default):
            reads = any(index is not None and index.dtype in (torch.bool, torch.uint8) for index in args[1])
        else:
            reads = {torch.Tag.data_dependent_output, torch.Tag.dynamic_output_shape} & set(func.tags)
        if reads:
            raise RuntimeError("operation not permitted when stream is capturing")
        return func(*args, **kwargs or {})


class Tape(Capture):
    """Keeps each operator with its arguments and results, which must not depend on the values of tensors."""

    def __init__(self):
        super().__init__(scalars=True)
        self.calls = []
        self.before = {}  # storage -> what was in it, of all that is older than the recording
        self.made = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        inputs = tensors((args, kwargs))
        for tensor in inputs:
            storage = tensor.untyped_storage()
            if storage.data_ptr() not in self.made | self.before.keys():
                self.before[storage.data_ptr()] = storage, storage.clone()
        result = super().__torch_dispatch__(func, types, args, kwargs)
        own = {tensor.untyped_storage().data_ptr() for tensor in inputs}
        outputs = [tensor for tensor in tensors(result) if tensor.untyped_storage().data_ptr() not in own]
        self.made |= {tensor.untyped_storage().data_ptr() for tensor in outputs}
        self.calls.append((func, args, kwargs, own, outputs))
        return result

    def spoil(self):
        """Overwrite all that the recording has made."""
        for _, _, _, _, outputs in self.calls:
            for tensor in outputs:
                tensor.untyped_storage().fill_(255)  # not a number where it is one

    def rewind(self):
        for storage, content in self.before.values():
            storage.copy_(content)

    def replay(self):
        with torch.no_grad():
            for func, args, kwargs, own, outputs in self.calls:
                result = [t for t in tensors(func(*args, **kwargs)) if t.untyped_storage().data_ptr() not in own]
                for output, tensor in zip(outputs, result, strict=True):
                    output.copy_(tensor)


class TapeRecorder:
    """Records tapes; `runs` counts their replays.

    As with CUDA's, what one has made is gone once another runs.
    """

    def __init__(self):
        self.runs = []
        self.tapes = []

    @property
    def recordings(self):
        return len(self.tapes)

    def aside(self, tensors=()):
        return contextlib.nullcontext()

    def record(self, function):
        state = torch.get_rng_state()
        number, tape = self.recordings, Tape()
        self.tapes.append(tape)
        with tape:
            result = function()
        tape.rewind()
        torch.set_rng_state(state)

        def replay():
            self.runs.append(number)
            for other in self.tapes:
                if other is not tape:
                    other.spoil()
            tape.replay()

        return replay, result


def assert_recorded_alike(module, x):
    """Check that a recording of a module's outputs and gradients gives, for another input, what the module gives.

    Args:
        module: in the mode in which it is to be recorded.
        x: floating-point input, not changed.
    """
    plain, own = copy.deepcopy(module), torch.zeros_like(x).requires_grad_()

    def learned(module, x):
        with Capture():
            out = module(x)
            wanted = [x, *(p for p in module.parameters() if p.requires_grad)]
            return [out, *torch.autograd.grad(out.square().sum(), wanted, allow_unused=True)]

    torch.manual_seed(0)
    replay, result = TapeRecorder().record(lambda: learned(module, own))
    with torch.no_grad():
        own.copy_(x)
    replay()
    torch.manual_seed(0)
    for recorded, expected in zip(result, learned(plain, x.detach().requires_grad_()), strict=True):
        assert (recorded is None) == (expected is None)
        assert expected is None or torch.equal(recorded, expected)
