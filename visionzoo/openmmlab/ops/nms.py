"""Non-maximum suppression."""

from __future__ import annotations

import torch
import torchvision
from torch import Tensor

from visionzoo.openmmlab.ops.boxes import pairwise_overlaps, rotated_iou
from visionzoo.openmmlab.ops.call import compute_dtype


def nms(boxes: Tensor, scores: Tensor, *, iou_threshold: float, offset: int) -> Tensor:
    """Return the indices that greedy suppression keeps, best score first.

    Args:
        boxes: [N, 4] as x1, y1, x2, y2.
        scores: [N].
        iou_threshold: boxes that overlap a better one by more are dropped.
        offset: added to widths and heights, 0 or 1.
    """
    boxes = boxes.to(compute_dtype(boxes))
    if offset:
        boxes = torch.cat([boxes[:, :2], boxes[:, 2:] + offset], dim=1)
    return torchvision.ops.nms(boxes, scores.to(boxes.dtype), iou_threshold)


def softnms(
    boxes: Tensor,
    scores: Tensor,
    dets: Tensor,
    *,
    iou_threshold: float,
    sigma: float,
    min_score: float,
    method: int,
    offset: int,
) -> Tensor:
    """Lower the scores of boxes that overlap better ones (Soft-NMS, arXiv:1704.04503), best first.

    Equal scores are taken in the order of the input; mmcv's own order among them depends on how it moves memory.

    Args:
        boxes: [N, 4].
        scores: [N].
        dets: [N, 5], is filled with the kept boxes and their new scores.
        iou_threshold: of the naive (0) and linear (1) method.
        sigma: of the Gaussian method (2).
        min_score: boxes that fall below are dropped.
        method: 0, 1 or 2.
        offset: added to widths and heights, 0 or 1.

    Returns:
        The indices of the kept boxes.
    """
    scores = scores.clone()
    left = torch.ones_like(scores, dtype=torch.bool)
    kept: list[int] = []
    while left.any():
        best = int(scores.masked_fill(~left, -torch.inf).argmax())
        dets[len(kept), :4], dets[len(kept), 4] = boxes[best], scores[best]
        kept.append(best)
        left[best] = False
        overlap = pairwise_overlaps(boxes[best : best + 1], boxes, offset=offset)[0]
        if method == 2:
            weight = torch.exp(-(overlap**2) / sigma)
        else:
            weight = torch.where(overlap >= iou_threshold, 1 - overlap if method == 1 else 0 * overlap, 1.0)
        scores = torch.where(left, scores * weight, scores)
        left &= scores >= min_score
    return torch.tensor(kept, dtype=torch.long, device=boxes.device)


def nms_match(dets: Tensor, *, iou_threshold: float) -> list[list[int]]:
    """Group boxes [N, 5] (with scores) by the better box that suppresses them, each group best first."""
    order = dets[:, 4].argsort(descending=True, stable=True).tolist()
    overlaps = pairwise_overlaps(dets[:, :4], dets[:, :4])
    groups = []
    while order:
        best, rest = order[0], order[1:]
        suppressed = (overlaps[best, rest] >= iou_threshold).tolist()
        groups.append([best, *(i for i, gone in zip(rest, suppressed, strict=True) if gone)])
        order = [i for i, gone in zip(rest, suppressed, strict=True) if not gone]
    return groups


def nms_rotated(
    boxes: Tensor,
    scores: Tensor,
    order: Tensor,
    boxes_sorted: Tensor,
    labels: Tensor,
    iou_threshold: float,
    multi_label: bool = False,
) -> Tensor:
    """Return the indices that greedy suppression of rotated boxes keeps, best score first.

    Args:
        boxes: [N, 5] as center x, center y, width, height, angle in radians; with the label as sixth if `multi_label`.
        scores: [N].
        order: [N], the indices by falling score.
        boxes_sorted: `boxes[order]`.
        labels: [N], unused: boxes carry them.
        iou_threshold: boxes that overlap a better one of their label by more are dropped.
        multi_label: suppress boxes of equal labels only.
    """
    suppresses = rotated_iou(boxes_sorted[:, None, :5], boxes_sorted[None, :, :5]) > iou_threshold
    if multi_label:
        suppresses &= boxes_sorted[:, None, 5] == boxes_sorted[None, :, 5]
    suppresses = suppresses.cpu()
    left = torch.ones(len(order), dtype=torch.bool)
    for i in range(len(order)):
        if left[i]:
            left[i + 1 :] &= ~suppresses[i, i + 1 :]
    return order[left.to(order.device)]
