"""A recorder like that of CUDA graphs for the CPU: operators on fixed tensors, and nothing of what Python does."""

import contextlib

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


def tensors(tree):
    return [leaf for leaf in tree_leaves(tree) if isinstance(leaf, Tensor)]


class Tape(TorchDispatchMode):
    """Keeps each operator with its arguments and results, which must not depend on the values of tensors."""

    def __init__(self):
        super().__init__()
        self.calls = []
        self.before = {}  # storage -> what was in it, of all that is older than the recording
        self.made = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func in (torch.ops.aten._local_scalar_dense.default, torch.ops.aten.nonzero.default):
            raise RuntimeError("operation not permitted when stream is capturing")
        kwargs = kwargs or {}
        inputs = tensors((args, kwargs))
        for tensor in inputs:
            storage = tensor.untyped_storage()
            if storage.data_ptr() not in self.made | self.before.keys():
                self.before[storage.data_ptr()] = storage, storage.clone()
        result = func(*args, **kwargs)
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
