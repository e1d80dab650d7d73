"""ViDT+: masks as vectors beside the boxes of ViDT, and two more losses, arXiv:2204.07962.

Facts from methods/vidt of https://github.com/naver-ai/vidt at a8c48b5 (Apache-2.0); the code here is our own. Where we
differ: classes and boxes are learned by mmdet's losses, which add 1e-7 to the number of objects that they are divided
by; cosines are summed in plain torch, where the authors call OpenCV.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from math import pi
from typing import Any

import torch
import torch.nn.functional as F
from mmdet.models.dense_heads import DeformableDETRHead
from mmdet.models.detectors import DeformableDETR
from mmdet.models.roi_heads.mask_heads.fcn_mask_head import _do_paste_mask
from mmdet.structures.bbox import bbox_cxcywh_to_xyxy, bbox_overlaps
from mmdet.utils import reduce_mean
from mmengine.model import bias_init_with_prob
from mmengine.registry import MODELS
from torch import Tensor, nn
from torchvision.ops import roi_align

from visionzoo.layers.pyramid_fusion import PyramidFusion

MODELS.register_module("EPFF", module=PyramidFusion)


@MODELS.register_module()
class ViDTPlusHead(DeformableDETRHead):
    """mmdet's head of Deformable DETR, which also predicts masks and learns overlaps and what each patch shows.

    A mask is a vector of the lowest frequencies of its discrete cosine transform, in its box; the layers share what
    predicts it (the unified query representation). The overlap of each box with its object, and the classes of patches,
    are learned only: nothing else reads them.

    Args:
        vector_size: frequencies of a mask, in zigzag order.
        mask_size: side of the masks in their boxes, in pixels.
        vector_weight: of the loss of the vectors, a mean of absolute differences.
        overlap_weight: of the loss of the overlaps.
        label_weight: of the two losses of the patches' classes (token labeling).
        options: those of `DeformableDETRHead`.

    Raises:
        ValueError: a mask has fewer frequencies, or none are asked for.
    """

    assigner: Any

    def __init__(
        self,
        *args: Any,
        vector_size: int = 256,
        mask_size: int = 128,
        vector_weight: float = 3.0,
        overlap_weight: float = 2.0,
        label_weight: float = 2.0,
        **options: Any,
    ):
        if not 1 <= vector_size <= mask_size**2:
            raise ValueError(
                f"ViDTPlusHead: vector_size must be from 1 to mask_size² = {mask_size**2}, got {vector_size=}"
            )
        self.vector_size, self.mask_size = vector_size, mask_size
        self.vector_weight, self.overlap_weight, self.label_weight = vector_weight, overlap_weight, label_weight
        super().__init__(*args, **options)
        if self.train_cfg:
            self.assigner = _Remembering(self.assigner)

    def _init_layers(self) -> None:
        super()._init_layers()
        width = self.embed_dims

        def branch(out: int) -> nn.Module:
            return nn.Sequential(
                nn.Linear(width, width), nn.ReLU(), nn.Linear(width, width), nn.ReLU(), nn.Linear(width, out)
            )

        self.overlap_branches = nn.ModuleList(branch(1) for _ in range(self.num_pred_layer))
        self.vector_branch = branch(self.vector_size)
        self.memory_trans_fc, self.memory_trans_norm = nn.Linear(width, width), nn.LayerNorm(width)
        self.label_branch = nn.Linear(width, self.num_classes + 1)

    def init_weights(self) -> None:
        """Draw the weights as the authors do."""
        super().init_weights()
        last: Any = self.vector_branch[-1]  # type: ignore[index]
        nn.init.zeros_(last.weight)
        nn.init.constant_(last.bias, -2.0)
        nn.init.zeros_(last.bias[:2])
        for layer in (self.memory_trans_fc, self.label_branch):
            nn.init.xavier_uniform_(layer.weight)
        nn.init.constant_(self.label_branch.bias, bias_init_with_prob(0.01))

    def label_patches(self, memory: Tensor, memory_mask: Tensor | None, spatial_shapes: Tensor) -> list[Tensor]:
        """Levels [B, N, C], one after the other, to logits [B, H, W, 1 + classes] of each: any object first."""
        seen = DeformableDETR.gen_encoder_output_proposals(self, memory, memory_mask, spatial_shapes)[0]
        sizes = spatial_shapes.tolist()
        parts = self.label_branch(seen).split([height * width for height, width in sizes], 1)
        return [part.unflatten(1, size) for part, size in zip(parts, sizes, strict=True)]

    def loss(
        self,
        hidden_states: Tensor,
        references: list[Tensor],
        enc_outputs_class: list[Tensor],
        enc_outputs_coord: None,
        batch_data_samples: Sequence[Any],
    ) -> dict[str, Tensor]:
        """Return mmdet's losses, and of each layer those of overlap and vectors, for the objects that it matched."""
        objects = [sample.gt_instances for sample in batch_data_samples]
        metas = [sample.metainfo for sample in batch_data_samples]
        logits, boxes = self(hidden_states, references)
        self.assigner.found = []
        losses = self.loss_by_feat(logits, boxes, None, None, objects, metas)
        found, last = self.assigner.found, len(logits) - 1
        vectors, sizes = self._targets(objects, metas, boxes)
        count = reduce_mean(boxes.new_tensor([float(len(sizes))])).clamp(min=1)
        for i, states in enumerate(hidden_states):
            # the assigner was asked for each image of a layer: 0, or 1 + which object a token is to find
            given = found[i * len(objects) : (i + 1) * len(objects)]
            starts = torch.tensor([0, *(len(each) for each in objects)]).cumsum(0).tolist()
            which = torch.cat([(each > 0) * (each + start) for each, start in zip(given, starts, strict=False)])
            at = which.nonzero()[:, 0]
            targets = which[at] - 1
            chosen = states.flatten(0, 1)[at]
            overlap = bbox_overlaps(
                bbox_cxcywh_to_xyxy(boxes[i].flatten(0, 1)[at]), sizes[targets], is_aligned=True, eps=1e-12
            )
            score = self.overlap_branches[i](chosen)[:, 0]
            # the target has a gradient, as released
            of_layer = {
                "loss_overlap": F.binary_cross_entropy_with_logits(score, overlap, reduction="sum") / count.squeeze(),
                "loss_vector": F.l1_loss(self.vector_branch(chosen), vectors[targets], reduction="sum")
                / max(1, vectors[targets].numel()),
            }
            weights = {"loss_overlap": self.overlap_weight, "loss_vector": self.vector_weight}
            name = "" if i == last else f"d{i}."
            losses |= {f"{name}{key}": weights[key] * loss for key, loss in of_layer.items()}
        return losses | self._label_losses(enc_outputs_class, objects, metas, count.squeeze())

    def _targets(self, objects: Sequence[Any], metas: Sequence[Any], like: Tensor) -> tuple[Tensor, Tensor]:
        """Return the vectors [N, vector_size] and boxes [N, 4] (corners over the image's sides) of all objects."""
        vectors, boxes = [like.new_zeros(0, self.vector_size)], [like.new_zeros(0, 4)]
        for each, meta in zip(objects, metas, strict=True):
            if len(each) == 0:
                continue
            corners = getattr(each.bboxes, "tensor", each.bboxes)
            masks = each.masks.to_tensor(torch.float32, corners.device)
            inside = roi_align(
                masks[:, None], list(corners.to(masks)[:, None]), self.mask_size, sampling_ratio=0, aligned=True
            )
            vectors.append(to_vectors((inside[:, 0] >= 0.5).to(like.dtype), self.vector_size))
            boxes.append(corners.to(like) / like.new_tensor(meta["img_shape"][::-1]).repeat(2))
        return torch.cat(vectors), torch.cat(boxes)

    def _label_losses(
        self, logits: Sequence[Tensor], objects: Sequence[Any], metas: Sequence[Any], count: Tensor
    ) -> dict[str, Tensor]:
        """Return the focal and the dice loss of the patches' classes; a patch has shares of those of its pixels."""
        shown = torch.stack(
            [
                _classes_of_pixels(each, meta["batch_input_shape"], logits[0].device)
                for each, meta in zip(objects, metas, strict=True)
            ]
        )
        pixels = F.one_hot(shown, self.num_classes + 1).permute(0, 3, 1, 2).to(logits[0].dtype)
        pixels[:, 0] = 1 - pixels[:, 0]  # any object
        focal: Any = 0
        dice: Any = 0
        for level in logits:
            target = F.adaptive_avg_pool2d(pixels, (level.shape[1], level.shape[2])).permute(0, 2, 3, 1)
            share = level.sigmoid()
            right = share * target + (1 - share) * (1 - target)
            weight = (0.25 * target + 0.75 * (1 - target)) * (1 - right).square()
            entropy = F.binary_cross_entropy_with_logits(level, target, reduction="none")
            focal = focal + (weight * entropy).sum() / target[0, ..., 0].numel()
            both = 2 * (share * target).sum((1, 2, 3)) + 1
            dice = dice + (1 - both / (share.sum((1, 2, 3)) + target.sum((1, 2, 3)) + 1)).sum()
        return {
            "loss_label_focal": self.label_weight * focal / count,
            "loss_label_dice": self.label_weight * dice / count,
        }

    def predict(
        self, hidden_states: Tensor, references: list[Tensor], batch_data_samples: Sequence[Any], rescale: bool = True
    ) -> list[Any]:
        """Return the boxes as mmdet does, with their masks [N, H, W] in the image."""
        metas = [sample.metainfo for sample in batch_data_samples]
        logits, boxes = self(hidden_states, references)
        results = self.predict_by_feat(logits, boxes, batch_img_metas=metas, rescale=rescale)
        for i, (result, meta) in enumerate(zip(results, metas, strict=True)):
            chosen = logits[-1, i].sigmoid().view(-1).topk(len(result)).indices // self.num_classes
            height, width = meta["ori_shape" if rescale else "img_shape"][:2]
            # the whole boxes: mmdet cuts those that it gives at the border
            corners = bbox_cxcywh_to_xyxy(boxes[-1, i, chosen]) * boxes.new_tensor([width, height] * 2)
            small = from_vectors(self.vector_branch(hidden_states[-1, i, chosen]), self.mask_size)
            result.masks = torch.cat(
                [
                    _do_paste_mask(mask[:, None].float(), box.float(), height, width, skip_empty=False)[0] >= 0.5
                    for mask, box in zip(small.split(25), corners.split(25), strict=True)  # for memory
                ]
            )
        return results


class _Remembering:
    """An assigner that keeps what it found."""

    def __init__(self, assigner: Any):
        self.assigner = assigner
        self.found: list[Tensor] = []

    def assign(self, **given: Any) -> Any:
        result = self.assigner.assign(**given)
        self.found.append(result.gt_inds)
        return result


@lru_cache
def _zigzag(size: int, count: int) -> tuple[list[int], list[int]]:
    """Return rows and columns of the first frequencies: diagonals, downwards and upwards in turn."""
    places = [(row, column) for row in range(size) for column in range(size) if row + column <= 2 * count]
    places.sort(key=lambda at: (sum(at), at[0] if sum(at) % 2 else at[1]))
    rows, columns = zip(*places[:count], strict=True)
    return list(rows), list(columns)


def _cosines(size: int, like: Tensor) -> Tensor:
    """Return the orthonormal basis of the discrete cosine transform, frequencies in rows."""
    steps = torch.arange(size, device=like.device, dtype=torch.float64)
    basis = torch.cos(pi / size * (steps + 0.5) * steps[:, None]) * (2 / size) ** 0.5
    basis[0] /= 2**0.5
    return basis.to(like.dtype)


def to_vectors(masks: Tensor, count: int) -> Tensor:
    """Masks [N, S, S] to their first frequencies [N, count].

    >>> to_vectors(torch.ones(1, 8, 8), 3)[0].round(decimals=4).abs().tolist()
    [8.0, 0.0, 0.0]
    """
    basis = _cosines(masks.shape[-1], masks)
    rows, columns = _zigzag(masks.shape[-1], count)
    return (basis @ masks @ basis.mT)[:, rows, columns]


def from_vectors(vectors: Tensor, size: int) -> Tensor:
    """First frequencies [N, count] to masks [N, size, size] of bools, cut between the least and the largest value."""
    basis = _cosines(size, vectors)
    rows, columns = _zigzag(size, vectors.shape[1])
    spectrum = vectors.new_zeros(len(vectors), size, size)
    spectrum[:, rows, columns] = vectors
    masks = basis.mT @ spectrum @ basis
    return masks > (masks.amax((1, 2), keepdim=True) + masks.amin((1, 2), keepdim=True)) / 2


def _classes_of_pixels(objects: Any, size: Sequence[int], device: torch.device) -> Tensor:
    """Return 1 + the class of the first object that covers a pixel of an image padded to `size`, [H, W]; 0 for none."""
    shown = torch.zeros(tuple(size), dtype=torch.long, device=device)
    if len(objects):
        masks = objects.masks.pad(tuple(size)).to_tensor(torch.bool, device)
        first = masks.int().argmax(0)
        shown = torch.where(masks.any(0), objects.labels[first] + 1, shown)
    return shown
