"""The ops of mmcv on torchvision and plain torch, for an mmcv without its compiled extension.

mmcv's Python code asks a compiled module `mmcv._ext` for its ops. Where that module is not installed, `install` serves
one in its place, with functions of the same names and arguments. Those that are not served raise when they are called,
never at import. A compiled `mmcv._ext` is found first and stays in charge.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from importlib import import_module
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any, NoReturn

from visionzoo.openmmlab.ops import boxes, deformable, focal, masked, nms, roi

SERVED: dict[str, Callable[..., Any]] = {
    function.__name__: function
    for function in (
        boxes.bbox_overlaps,
        boxes.box_iou_rotated,
        deformable.deform_conv_backward_input,
        deformable.deform_conv_backward_parameters,
        deformable.deform_conv_forward,
        deformable.modulated_deform_conv_backward,
        deformable.modulated_deform_conv_forward,
        deformable.ms_deform_attn_backward,
        deformable.ms_deform_attn_forward,
        focal.sigmoid_focal_loss_backward,
        focal.sigmoid_focal_loss_forward,
        focal.softmax_focal_loss_backward,
        focal.softmax_focal_loss_forward,
        masked.masked_col2im_forward,
        masked.masked_im2col_forward,
        nms.nms,
        nms.nms_match,
        nms.nms_rotated,
        nms.softnms,
        roi.roi_align_backward,
        roi.roi_align_forward,
        roi.roi_pool_backward,
        roi.roi_pool_forward,
    )
}

EXTENSION = "mmcv._ext"


def install() -> None:
    """Serve `mmcv._ext` from here if nothing else does, also to what was imported without it."""
    if not any(isinstance(finder, _Finder) for finder in sys.meta_path):
        sys.meta_path.append(_Finder())  # the last to be asked: a compiled extension comes first
        _replace_stand_ins()


def _replace_stand_ins() -> None:
    """Give mmcv's ops to modules that could not import them, such as those that `import mmseg.apis` brings in.

    mmdet and mmseg go on with functions and classes of the same names that raise, or with None.
    """
    early = [module for name, module in sys.modules.items() if name.partition(".")[0] in ("mmdet", "mmseg")]
    if not early:
        return
    ops = import_module("mmcv.ops")
    for module in early:
        for name, value in list(vars(module).items()):
            op = getattr(ops, name.lstrip("_"), None)  # some import an op as _op
            if op is not None and _stands_in(value):
                setattr(module, name, op)


def _stands_in(value: Any) -> bool:
    function = vars(value).get("__init__") if isinstance(value, type) else value
    constants = getattr(getattr(function, "__code__", None), "co_consts", ())
    return value is None or any(isinstance(text, str) and "requires mmcv" in text for text in constants)


class _Finder(MetaPathFinder, Loader):
    def find_spec(self, fullname: str, path: Any = None, target: Any = None) -> ModuleSpec | None:
        return ModuleSpec(fullname, self, origin=__file__) if fullname == EXTENSION else None

    def exec_module(self, module: ModuleType) -> None:
        vars(module).update(SERVED, __getattr__=_unserved)


def _unserved(name: str) -> Callable[..., NoReturn]:
    """Stand in for an op that is not served."""
    if name.startswith("__"):
        raise AttributeError(name)

    def unserved(*args: Any, **kwargs: Any) -> NoReturn:
        raise NotImplementedError(
            f"the op {name!r} is in mmcv's compiled extension only, which is not installed, and "
            "visionzoo.openmmlab.ops does not serve it. Use a model without it, or build mmcv with its ops for your "
            "torch: https://mmcv.readthedocs.io/en/latest/get_started/build.html. "
            f"Served are {', '.join(sorted(SERVED))}."
        )

    unserved.__name__ = name
    return unserved
