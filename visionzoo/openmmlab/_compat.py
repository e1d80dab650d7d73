"""What visionzoo changes in OpenMMLab's libraries, and why: every change is a line of `PATCHES`.

`install()` makes them, once. Importing `visionzoo.openmmlab` calls it, because that is the name by which a config asks
for it (`custom_imports`), and `custom_imports` can only import; no other part of visionzoo imports that package.
Each patch first checks that what it replaces is still there, so that a new release of a library fails by name. Releases
other than those of `TESTED` are used all the same, with one warning that names them.

Objects that the commands build are changed in `checked_runner.CheckingRunner`, not here: no library is.
"""

from __future__ import annotations

import contextlib
import functools
import logging
import sys
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from importlib import import_module
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from importlib.metadata import PackageNotFoundError, version
from types import ModuleType
from typing import Any

import mmengine.logging as mmengine_logging
import mmengine.runner.checkpoint as mmengine_checkpoint
from mmengine.config import utils as config_utils

from visionzoo.openmmlab import checkpoints, ops

EXTENSION = "mmcv._ext"
TESTED = {  # distributions of each library, the maintained one first, and the releases that the patches were checked on
    "mmengine": (("onedl-mmengine", "mmengine"), "0.10"),
    "mmcv": (("onedl-mmcv", "mmcv", "mmcv-lite"), "2.3"),
    "mmdet": (("onedl-mmdetection", "mmdet"), "3.5"),
    "mmseg": (("onedl-mmsegmentation", "mmsegmentation"), "1.4"),
}


@dataclass(frozen=True)
class Patch:
    """A change of a library.

    Attributes:
        library: with the releases for which it was checked.
        what: it changes.
        reason: for it, and when it can go.
        apply: makes the change; a second call changes nothing.
    """

    library: str
    what: str
    reason: str
    apply: Callable[[], None]


def install() -> None:
    """Make every change of `PATCHES` that is not made yet.

    Raises:
        RuntimeError: a library no longer has what a patch replaces.
    """
    for patch in PATCHES:
        patch.apply()
    # mmdet's second evaluator of COCO: its import warns that it is not there, whichever a config names
    warnings.filterwarnings("ignore", "faster_coco_eval is not installed", UserWarning)
    _warn_of_untested()


@functools.cache  # once
def _warn_of_untested() -> None:
    found = {library: _installed(distributions) for library, (distributions, _) in TESTED.items()}
    other = [
        f"{library} {release} (checked: {TESTED[library][1]})"
        for library, release in found.items()
        if release and not f"{release}.".startswith(f"{TESTED[library][1]}.")
    ]
    if other:
        warnings.warn(
            f"visionzoo.openmmlab changes OpenMMLab's libraries, see visionzoo.openmmlab._compat.PATCHES, and was not "
            f'checked with {", ".join(other)}; the checked ones come with: pip install "visionzoo[openmmlab]"',
            stacklevel=2,
        )


def _installed(distributions: tuple[str, ...]) -> str | None:
    """Return the release of the first distribution that is installed."""
    for name in distributions:
        with contextlib.suppress(PackageNotFoundError):
            return version(name)
    return None


def _serve_ops() -> None:
    if not any(isinstance(finder, _Finder) for finder in sys.meta_path):
        sys.meta_path.append(_Finder())  # the last to be asked: a compiled extension comes first
        _replace_stand_ins()


def _replace_stand_ins() -> None:
    """Give mmcv's ops to modules that could not import them, such as those that `import mmseg.apis` brings in."""
    early = [module for name, module in sys.modules.items() if name.partition(".")[0] in ("mmdet", "mmseg")]
    if not early:
        return
    mmcv_ops = import_module("mmcv.ops")
    for module in early:
        for name, value in list(vars(module).items()):
            op = getattr(mmcv_ops, name.lstrip("_"), None)  # some import an op as _op
            if op is not None and _stands_in(value):
                setattr(module, name, op)


def _stands_in(value: Any) -> bool:
    function = vars(value).get("__init__") if isinstance(value, type) else value
    constants = getattr(getattr(function, "__code__", None), "co_consts", ())
    return value is None or any(isinstance(text, str) and "requires mmcv" in text for text in constants)


class _Finder(MetaPathFinder, Loader):
    def find_spec(self, fullname: str, path: Any = None, target: Any = None) -> ModuleSpec | None:
        return ModuleSpec(fullname, self, origin=ops.__file__) if fullname == EXTENSION else None

    def exec_module(self, module: ModuleType) -> None:
        vars(module).update(ops.SERVED, __getattr__=ops.unserved)


def _read_safely() -> None:
    _replace(mmengine_checkpoint, "_safe_torch_load", checkpoints.read)
    _replace(mmengine_checkpoint, "load_url", checkpoints.download)


def _replace(module: ModuleType, name: str, value: Any) -> None:
    if not hasattr(module, name):
        raise RuntimeError(
            f"visionzoo replaces {module.__name__}.{name}, which this release does not have; install the releases of "
            f'pip install "visionzoo[openmmlab]"'
        )
    setattr(module, name, value)


def _find_configs_of_mmseg() -> None:
    config_utils.MODULE2PACKAGE["mmseg"] = "mmseg"


def _print_no_debugging() -> None:
    original = mmengine_logging.print_log
    if hasattr(original, "__wrapped__"):
        return

    @functools.wraps(original)
    def print_log(msg: Any, logger: Any = None, level: int = logging.INFO) -> None:
        if logger is not None or level >= logging.INFO:
            original(msg, logger, level)

    mmengine_logging.print_log = print_log


PATCHES = (
    Patch(
        "mmcv 2.3 (onedl-mmcv 2.3.6), with mmdet 3.5 and mmseg 1.4",
        "`mmcv._ext` is `visionzoo.openmmlab.ops` where mmcv has no compiled extension; modules of mmdet and mmseg "
        "that were imported before get these ops instead of functions and classes that raise, or of None",
        "The maintained wheels have no compiled ops. A compiled mmcv._ext is found first and stays in charge",
        _serve_ops,
    ),
    Patch(
        "mmengine 0.10 (onedl-mmengine 0.10.12)",
        "`mmengine.runner.checkpoint._safe_torch_load` is `checkpoints.read`, `load_url` is `checkpoints.download`",
        "Where torch's safe reader refuses a file, mmengine reads it again by a reader that runs code from it. It can "
        "go when mmengine lists its own classes as safe",
        _read_safely,
    ),
    Patch(
        "mmengine 0.10 (onedl-mmengine 0.10.12)",
        "`mmengine.config.utils.MODULE2PACKAGE['mmseg']` is the module's name",
        "Bases such as mmseg::… are looked for under the name of the first maintainers' wheel, mmsegmentation. It can "
        "go when mmengine knows onedl-mmsegmentation",
        _find_configs_of_mmseg,
    ),
    Patch(
        "mmengine 0.10 (onedl-mmengine 0.10.12)",
        "`mmengine.logging.print_log` without a logger prints no message of the level DEBUG",
        "Without a logger it prints every level, such as mmdet's two lines on data sets of OneDL at each import. It "
        "can go when mmengine looks at the level there",
        _print_no_debugging,
    ),
)
