"""The ops of mmcv on torchvision and plain torch, for an mmcv without its compiled extension.

mmcv's Python code asks a compiled module `mmcv._ext` for its ops. Where that module is not installed, `_compat.install`
serves one in its place, with functions of the same names and arguments. Those that are not served raise when they are
called, never at import. A compiled `mmcv._ext` is found first and stays in charge.
"""

from __future__ import annotations

from collections.abc import Callable
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


def unserved(name: str) -> Callable[..., NoReturn]:
    """Return what stands for an op that is not served, and raises when it is called."""
    if name.startswith("__"):
        raise AttributeError(name)

    def raising(*args: Any, **kwargs: Any) -> NoReturn:
        raise NotImplementedError(
            f"the op {name!r} is in mmcv's compiled extension only, which is not installed, and "
            "visionzoo.openmmlab.ops does not serve it. Use a model without it, or build mmcv with its ops for your "
            "torch: https://mmcv.readthedocs.io/en/latest/get_started/build.html. "
            f"Served are {', '.join(sorted(SERVED))}."
        )

    raising.__name__ = name
    return raising
