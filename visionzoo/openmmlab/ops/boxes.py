"""Overlaps of boxes, upright and rotated."""

from __future__ import annotations

import torch
from torch import Tensor

from visionzoo.openmmlab.ops.call import compute_dtype


def pairwise_overlaps(boxes1: Tensor, boxes2: Tensor, *, offset: int = 0) -> Tensor:
    """Intersection over union of all pairs: [N, 4] and [M, 4] to [N, M]."""
    from mmcv.ops.bbox import _bbox_overlaps_cpu  # on any device; mmcv's own function for where it has no extension

    return _bbox_overlaps_cpu(boxes1, boxes2, offset=offset)


def bbox_overlaps(boxes1: Tensor, boxes2: Tensor, ious: Tensor, *, mode: int, aligned: bool, offset: int) -> None:
    """Fill `ious` [N, M], or [N] if `aligned`, with intersections over unions (mode 0) or over the first box (1)."""
    from mmcv.ops.bbox import _bbox_overlaps_cpu

    ious.copy_(_bbox_overlaps_cpu(boxes1, boxes2, mode="iof" if mode else "iou", aligned=aligned, offset=offset))


def box_iou_rotated(boxes1: Tensor, boxes2: Tensor, ious: Tensor, *, mode_flag: int, aligned: bool) -> None:
    """Fill `ious` [N·M], or [N] if `aligned`, with those of boxes [N, 5] and [M, 5] (`rotated_iou`)."""
    if not aligned:
        boxes1, boxes2 = boxes1[:, None], boxes2[None]
    ious.copy_(rotated_iou(boxes1, boxes2, over_first=mode_flag == 1).flatten())


def rotated_iou(boxes1: Tensor, boxes2: Tensor, *, over_first: bool = False) -> Tensor:
    """Intersection over union of rotated boxes [..., 5], whose leading axes are broadcast.

    The intersection of two rectangles is a convex polygon. Its corners are among the corners of one that lie in the
    other and the crossings of their edges; its area comes from the corners in the order of their angle.

    Args:
        boxes1: center x, center y, width, height, angle in radians (clockwise in image coordinates).
        boxes2: the same.
        over_first: divide by the area of the first box instead of the union.
    """
    shape = torch.broadcast_shapes(boxes1.shape, boxes2.shape)
    dtype = torch.promote_types(compute_dtype(boxes1), torch.float64)  # thin boxes: differences of close numbers
    boxes1, boxes2 = boxes1.to(dtype).expand(shape), boxes2.to(dtype).expand(shape)
    centre = (boxes1[..., :2] + boxes2[..., :2]) / 2
    corners1, corners2 = _corners(boxes1, centre), _corners(boxes2, centre)
    crossings, crossed = _crossings(corners1, corners2)
    points = torch.cat([corners1, corners2, crossings], dim=-2)
    inside = torch.cat([_inside(corners1, boxes2, centre), _inside(corners2, boxes1, centre), crossed], dim=-1)
    intersection = _convex_area(points, inside)
    area1, area2 = boxes1[..., 2] * boxes1[..., 3], boxes2[..., 2] * boxes2[..., 3]
    return intersection / (area1 if over_first else area1 + area2 - intersection).clamp(min=1e-12)


def _corners(boxes: Tensor, origin: Tensor) -> Tensor:
    """[..., 5] to [..., 4, 2], in order, relative to `origin`."""
    half = boxes[..., 2:4] / 2
    signs = boxes.new_tensor([[-1, -1], [1, -1], [1, 1], [-1, 1]])
    x, y = (half[..., None, :] * signs).unbind(-1)
    cos, sin = boxes[..., 4:5].cos(), boxes[..., 4:5].sin()
    return torch.stack([x * cos - y * sin, x * sin + y * cos], dim=-1) + (boxes[..., :2] - origin)[..., None, :]


def _inside(points: Tensor, boxes: Tensor, origin: Tensor) -> Tensor:
    """Whether points [..., P, 2], relative to `origin`, lie in boxes [..., 5]."""
    x, y = (points - (boxes[..., :2] - origin)[..., None, :]).unbind(-1)
    cos, sin = boxes[..., 4:5].cos(), boxes[..., 4:5].sin()
    along, across = x * cos + y * sin, y * cos - x * sin
    slack = 1e-9 * (boxes[..., 2:3] + boxes[..., 3:4])  # a corner on the edge is in
    return (along.abs() <= boxes[..., 2:3] / 2 + slack) & (across.abs() <= boxes[..., 3:4] / 2 + slack)


def _crossings(corners1: Tensor, corners2: Tensor) -> tuple[Tensor, Tensor]:
    """Crossings of all pairs of edges, [..., 16, 2], and whether they exist, [..., 16]."""
    start1, start2 = corners1[..., :, None, :], corners2[..., None, :, :]
    edge1 = corners1.roll(-1, -2)[..., :, None, :] - start1
    edge2 = corners2.roll(-1, -2)[..., None, :, :] - start2
    gap = start2 - start1
    determinant = _cross(edge1, edge2)
    parallel = determinant.abs() <= 1e-12 * edge1.norm(dim=-1) * edge2.norm(dim=-1)
    determinant = torch.where(parallel, 1.0, determinant)
    at1, at2 = _cross(gap, edge2) / determinant, _cross(gap, edge1) / determinant
    crossed = ~parallel & (at1 >= 0) & (at1 <= 1) & (at2 >= 0) & (at2 <= 1)
    return (start1 + at1[..., None] * edge1).flatten(-3, -2), crossed.flatten(-2)


def _cross(a: Tensor, b: Tensor) -> Tensor:
    return a[..., 0] * b[..., 1] - a[..., 1] * b[..., 0]


def _convex_area(points: Tensor, valid: Tensor) -> Tensor:
    """Area of the convex polygon of the valid ones of points [..., P, 2]."""
    count = valid.sum(-1, keepdim=True)
    middle = (points * valid[..., None]).sum(-2, keepdim=True) / count.clamp(min=1)[..., None]
    spokes = points - middle
    angle = torch.atan2(spokes[..., 1], spokes[..., 0]).masked_fill(~valid, torch.inf)
    order = angle.argsort(-1)
    spokes = spokes.gather(-2, order[..., None].expand_as(spokes))
    in_order = valid.gather(-1, order)
    # the points that are not corners repeat the first one, which adds nothing and closes the polygon
    spokes = torch.where(in_order[..., None], spokes, spokes[..., :1, :])
    area = _cross(spokes, spokes.roll(-1, -2)).sum(-1).abs() / 2
    return torch.where(count[..., 0] >= 3, area, 0.0)
