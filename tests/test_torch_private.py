"""torch's private names: the installed torch has them, they do what is relied on, and only one file uses them."""

import ast
import contextlib
import re
from pathlib import Path

import pytest
import torch
from torch.autograd import forward_ad
from torch.utils.flop_counter import FlopCounterMode

import visionzoo
from visionzoo import _torch_private as private

PACKAGE = Path(visionzoo.__file__).parent


def _is_private(name):
    return any(part.startswith("_") and not part.startswith("__") for part in name.split("."))


def _private_names(text):
    """Return the private names of torch in a Python text, as they are imported or reached by dots."""
    if not re.search(r"\b_[A-Za-z]", text) or "torch" not in text:
        return set()
    tree = ast.parse(text)
    modules = {"torch": "torch"}  # by the names that this text has for them
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and (node.module or "").partition(".")[0] == "torch":
            modules |= {alias.asname or alias.name: f"{node.module}.{alias.name}" for alias in node.names}
        elif isinstance(node, ast.Import):
            torches = [alias for alias in node.names if alias.name.partition(".")[0] == "torch" and alias.asname]
            modules |= {alias.asname: alias.name for alias in torches}
            modules |= {alias.name: alias.name for alias in node.names if alias.name.startswith("torch.")}
    reached = [
        f"{modules[root]}.{rest}"
        for node in ast.walk(tree)
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name | ast.Attribute)
        for root, _, rest in [ast.unparse(node).partition(".")]
        if root in modules
    ]
    return {name for name in [*modules.values(), *reached] if _is_private(name)}


@pytest.mark.parametrize(
    "text",
    [
        "import torch\ntorch._C.f()",
        "from torch._inductor import config",
        "from torch.autograd import forward_ad\nforward_ad._current_level",
        "import torch._dynamo as dynamo",
        "import torch.utils._pytree",
        "def f():\n    from torch.fx.experimental import _config",
    ],
)
def test_a_private_name_is_found(text):
    assert _private_names(text)


def test_one_file_uses_private_names_of_torch():
    assert not _private_names("import torch\ntorch.__version__, torch.nn.Linear, model._weights")
    found = {path: _private_names(path.read_text()) for path in PACKAGE.rglob("*.py")}
    users = {str(path.relative_to(PACKAGE)): sorted(names) for path, names in found.items() if names}
    assert list(users) == ["_torch_private.py"], users


def test_transforms_and_modes_are_seen():
    assert not private.transforms_are_active() and private.count_dispatch_modes() == 0
    seen = []
    torch.vmap(lambda x: seen.append(private.transforms_are_active()) or x)(torch.zeros(2, 1))
    counter = FlopCounterMode(display=False)
    with counter:
        assert private.count_dispatch_modes() == 1
        (mode,) = private.dispatch_modes()
    assert seen == [True] and isinstance(mode, private.TorchDispatchMode) and mode.counter is counter


def test_forward_mode_is_seen():
    assert private.forward_mode_level() == -1
    with forward_ad.dual_level():
        assert private.forward_mode_level() == 0


def test_exporting_is_seen_and_compiling_is_not_exporting():
    seen = []

    class Model(torch.nn.Module):
        def forward(self, x):
            seen.append(private.is_exporting())
            return x + 1

    torch.export.export(Model(), (torch.zeros(2),), strict=False)
    exported, seen[:] = list(seen), []
    compiled = torch.compile(lambda x: x + 1 if private.is_exporting() else x + 2, backend="eager", fullgraph=True)
    assert all(exported) and exported
    assert compiled(torch.zeros(1)) == 2 and not private.is_exporting()


def test_a_size_of_one_is_not_special_while_that_is_asked_for():
    from torch.fx.experimental import _config

    before = _config.backed_size_oblivious
    with private.without_special_ones():
        assert _config.backed_size_oblivious
    assert _config.backed_size_oblivious == before


def test_lists_of_tensors_are_computed():
    ones, twos = [torch.ones(2), torch.ones(1)], [torch.full((2,), 2.0), torch.full((1,), 2.0)]
    steps = private.foreach_sub(twos, ones)
    private.foreach_mul_(steps, 0.5)
    private.foreach_add_(ones, steps)
    assert [t.tolist() for t in ones] == [[1.5, 1.5], [1.5]]
    private.foreach_copy_(ones, twos)
    assert [t.tolist() for t in ones] == [[2, 2], [2]]
    private.foreach_zero_(ones)
    assert [t.tolist() for t in ones] == [[0, 0], [0]] and private.tree_leaves([1, {"a": (2, 3)}]) == [1, 2, 3]


def test_the_compiler_is_set():
    assert private.list_mode_options("reduce-overhead") == {"triton.cudagraphs": True}
    assert {"default", "reduce-overhead", "max-autotune"} <= set(private.list_mode_options())
    name = "skip_fwd_side_effects_in_bwd_under_checkpoint"
    with contextlib.ExitStack() as stack:
        stack.enter_context(torch._inductor.config.patch(layout_optimization=True))
        if hasattr(torch._dynamo.config, name):
            stack.enter_context(torch._dynamo.config.patch(**{name: False}))
        private.keep_memory_formats()
        private.count_terms_once()
        assert not torch._inductor.config.layout_optimization and getattr(torch._dynamo.config, name, True)


def test_norms_of_batches_have_one_class():
    norms = [torch.nn.BatchNorm1d(2), torch.nn.BatchNorm2d(2), torch.nn.SyncBatchNorm(2)]
    assert all(isinstance(norm, private.BatchNorm) for norm in norms)
    assert not isinstance(torch.nn.GroupNorm(1, 2), private.BatchNorm)
