"""RelationNet++: dense heads that look at corners and centers of objects, NeurIPS 2020, arXiv:2010.15831.

Facts from https://github.com/microsoft/RelationNet2 at 0930752 (MIT license, mmdet 2); the code here is our own, with
the authors' names of tensors. Left out are settings that their code reads nowhere (`keypoint_score_thr`,
`with_key_score`) and their test-time augmentation with box voting; mmdet has its own augmentation. Where we differ:
images without objects train, small images may have fewer key points than `cross_level_topk`, and places are computed in
float32 at least.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from mmcv.cnn import ConvModule
from mmengine.model import BaseModule, bias_init_with_prob
from mmengine.registry import MODELS
from torch import Tensor, nn

from visionzoo.kernels.precision import without_autocast
from visionzoo.layers.bridging import BridgingAttention
from visionzoo.layers.tokens import tokens_at

KINDS = ("top_left_corner", "bottom_right_corner", "center")
Levels = list[Tensor]


@MODELS.register_module()
class BVRKeypointHead(BaseModule):
    """Predict corners and centers of objects: class scores and offsets on each level, for each kind of key point.

    Args:
        num_classes: classes.
        in_channels: of the levels.
        feat_channels: of the convolutions.
        stacked_convs: convolutions of each kind.
        shared_stacked_convs: convolutions before these, for all kinds.
        logits_convs: convolutions after these, each for scores and for offsets.
        strides: of the levels.
        head_types: kinds of key points, of "top_left_corner", "bottom_right_corner", "center".
        corner_pooling: let corners look along rows and columns (CornerNet, arXiv:1808.01244) after their convolutions.
        gaussian_iou: overlap at which a box with a displaced corner counts as found: it decides how far the targets
            of a box reach.
        loss_cls: of the scores.
        loss_offset: of the offsets, in strides.
        conv_cfg: of the convolutions.
        norm_cfg: of the norms; None for convolutions with bias.
        init_cfg: in place of normal weights of deviation 0.01.

    Raises:
        ValueError: if a kind is unknown or missing, or an option is out of range.
    """

    def __init__(
        self,
        num_classes: int,
        in_channels: int,
        feat_channels: int = 256,
        stacked_convs: int = 2,
        shared_stacked_convs: int = 0,
        logits_convs: int = 0,
        strides: Sequence[int] = (8, 16, 32, 64, 128),
        head_types: Sequence[str] = KINDS,
        corner_pooling: bool = False,
        gaussian_iou: float = 0.7,
        loss_cls: Mapping[str, Any] = {"type": "GaussianFocalLoss", "loss_weight": 0.25},
        loss_offset: Mapping[str, Any] = {"type": "SmoothL1Loss", "loss_weight": 1.0},
        conv_cfg: Mapping[str, Any] | None = None,
        norm_cfg: Mapping[str, Any] | None = None,
        init_cfg: Any = None,
    ):
        super().__init__(init_cfg or {"type": "Normal", "layer": "Conv2d", "std": 0.01})
        if not head_types or not set(head_types) <= set(KINDS) or len(set(head_types)) < len(head_types):
            raise ValueError(f"BVRKeypointHead: head_types must be some of {KINDS}, each once, got {head_types=}")
        if not 0 < gaussian_iou < 1:
            raise ValueError(f"BVRKeypointHead: gaussian_iou must be between 0 and 1, got {gaussian_iou=}")
        if min(num_classes, in_channels, feat_channels, *strides) < 1:
            raise ValueError(
                f"BVRKeypointHead: classes, channels and strides must be 1 or more, got {num_classes=}, "
                f"{in_channels=}, {feat_channels=}, {strides=}"
            )
        if stacked_convs + shared_stacked_convs == 0 and in_channels != feat_channels:
            raise ValueError(
                f"BVRKeypointHead: without convolutions feat_channels must be in_channels={in_channels}, "
                f"got {feat_channels=}"
            )
        self.num_classes, self.strides, self.head_types = num_classes, tuple(strides), tuple(head_types)
        self.gaussian_iou = gaussian_iou
        made: dict[str, Any] = {"conv_cfg": conv_cfg, "norm_cfg": norm_cfg}

        def convs(channels: int, count: int) -> list[nn.Module]:
            widths = [channels, *[feat_channels] * count][:count]
            return [ConvModule(width, feat_channels, 3, padding=1, **made) for width in widths]

        self.shared_layers = nn.ModuleList(convs(in_channels, shared_stacked_convs))
        width = feat_channels if shared_stacked_convs else in_channels
        self.keypoint_layers, self.keypoint_cls_heads, self.keypoint_offset_heads = (nn.ModuleDict() for _ in range(3))
        for kind in head_types:
            layers = convs(width, stacked_convs)
            if corner_pooling and kind != "center":
                sides = ("top", "left") if kind == "top_left_corner" else ("bottom", "right")
                layers.append(_CornerPooling(feat_channels, sides, **made))
            self.keypoint_layers[kind] = nn.ModuleList(layers)
            for heads, channels in ((self.keypoint_cls_heads, num_classes), (self.keypoint_offset_heads, 2)):
                last = nn.Conv2d(feat_channels, channels, 3, padding=1)
                heads[kind] = nn.ModuleList([*convs(feat_channels, logits_convs), last])
        self.loss_cls, self.loss_offset = MODELS.build(dict(loss_cls)), MODELS.build(dict(loss_offset))

    def init_weights(self) -> None:
        """Draw the weights; scores begin at 0.01."""
        super().init_weights()
        for kind in self.head_types:
            nn.init.constant_(self.keypoint_cls_heads[kind][-1].bias, bias_init_with_prob(0.01))  # type: ignore[index]

    def forward(self, levels: Sequence[Tensor]) -> tuple[dict[str, Levels], dict[str, Levels]]:
        """Levels [B, C, H, W] to logits [B, classes, H, W] and offsets [B, 2, H, W] of each level, for each kind."""
        logits: dict[str, Levels] = {kind: [] for kind in self.head_types}
        offsets: dict[str, Levels] = {kind: [] for kind in self.head_types}
        for x in levels:
            shared = _through(self.shared_layers, x)
            for kind in self.head_types:
                features = _through(self.keypoint_layers[kind], shared)
                logits[kind].append(_through(self.keypoint_cls_heads[kind], features))
                offsets[kind].append(_through(self.keypoint_offset_heads[kind], features))
        return logits, offsets

    def locations(self, levels: Sequence[Tensor]) -> Levels:
        """Return where the pixels of levels [B, C, H, W] lie in the image: [H·W, 2] as (x, y), float32 at least."""
        found = []
        for x, stride in zip(levels, self.strides, strict=True):
            dtype = torch.promote_types(x.dtype, torch.float32)
            rows, columns = (torch.arange(n, device=x.device, dtype=dtype) * stride + stride // 2 for n in x.shape[2:])
            found.append(torch.stack(torch.meshgrid(columns, rows, indexing="xy"), -1).flatten(0, 1))
        return found

    def loss(self, logits: dict[str, Levels], offsets: dict[str, Levels], objects: Sequence[Any]) -> dict[str, Tensor]:
        """Return the losses of all kinds; `objects` are mmdet's InstanceData of each image, with bboxes and labels."""
        from mmdet.utils import reduce_mean

        places = self.locations(logits[self.head_types[0]])
        with without_autocast(places[0].device):
            targets = [
                self._targets(places, kind, each.bboxes, each.labels) for kind in self.head_types for each in objects
            ]
            heat, moved, chosen = (torch.stack(part) for part in zip(*targets, strict=True))
            predicted, offset = (
                torch.cat(
                    [
                        torch.cat([x.flatten(2) for x in maps[kind]], 2).mT.to(places[0].dtype)
                        for kind in self.head_types
                    ]
                )
                for maps in (logits, offsets)
            )
            count = reduce_mean(chosen.sum()).clamp(min=1)
            weight = chosen[..., None].expand_as(offset)
            return {
                "loss_point_cls": self.loss_cls(predicted.sigmoid(), heat, avg_factor=count),
                "loss_point_offset": self.loss_offset(offset, moved, weight=weight, avg_factor=count),
            }

    def _targets(self, places: Levels, kind: str, boxes: Any, labels: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return of all pixels P the target scores [P, classes], offsets [P, 2], and which have an offset, [P]."""
        every = torch.cat(places)
        heat, moved, chosen = every.new_zeros(len(every), self.num_classes), torch.zeros_like(every), every[:, 0] * 0
        if len(labels) == 0:
            return heat, moved, chosen
        boxes = getattr(boxes, "tensor", boxes).to(every)
        first, last = boxes[:, :2], boxes[:, 2:]
        wanted = {"top_left_corner": first, "bottom_right_corner": last, "center": first * 0.5 + last * 0.5}[kind]
        spread = ((2 * gaussian_radius(last - first, self.gaussian_iou) + 1) / 6).square()
        scores, nearest, start = [], [], 0
        for level in places:
            closest = (level[:, None] - wanted).square().sum(2).argmin(0)
            scores.append(torch.exp(-0.5 * (level[:, None] - level[closest]).square().sum(2) / spread))
            nearest.append(start + closest)
            start += len(level)
        best, which = torch.cat(scores).max(1)
        heat[torch.arange(len(every), device=heat.device), labels[which]] = best
        at = torch.cat(nearest)
        strides = torch.cat([x.new_full((len(x), 1), s) for x, s in zip(places, self.strides, strict=True)])
        moved[at] = (wanted[which[at]] - every[at]) / strides[at]
        chosen[at] = 1
        return heat, moved, chosen

    def best_points(
        self, logits: dict[str, Levels], offsets: dict[str, Levels], kinds: Sequence[str], max_points: int
    ) -> tuple[Levels, Levels, Levels]:
        """Return the points of each level that score best: kinds beside each other on the batch's axis.

        Returns:
            scores [kinds·B, K], places in the image [kinds·B, K, 2] as (x, y), and of which pixel, [kinds·B, K].
        """
        found = []
        joined = (
            zip(*(logits[kind] for kind in kinds), strict=True),
            zip(*(offsets[kind] for kind in kinds), strict=True),
        )
        places = self.locations(logits[kinds[0]])
        for maps, moved, level, stride in zip(*joined, places, self.strides, strict=True):
            scores = torch.cat(maps).to(level.dtype).sigmoid()
            scores = scores * (F.max_pool2d(scores, 3, stride=1, padding=1) == scores)
            count = min(len(level), max_points)
            per_class, pixels = scores.flatten(2).topk(count)
            best, order = per_class.flatten(1).topk(count)
            at = pixels.flatten(1).gather(1, order)
            offset = tokens_at(torch.cat(moved).to(level.dtype).flatten(2).mT, at)
            found.append((best, level[at] + offset * stride, at))
        scores_, places_, pixels_ = (list(part) for part in zip(*found, strict=True))
        return scores_, places_, pixels_


@MODELS.register_module()
class BVRHead(BaseModule):
    """A dense head of mmdet whose features first look at key points: at centers to classify, at corners for boxes.

    Between the convolutions of the head and its predictions stand two `BridgingAttention`. `train_cfg` and `test_cfg`
    of the detector are those of the dense head.

    Args:
        bbox_head_cfg: the dense head: mmdet's RetinaHead, FCOSHead or ATSSHead.
        keypoint_head_cfg: a `BVRKeypointHead`.
        cls_keypoint_types: kinds of key points that the features for classes look at; none to leave them.
        reg_keypoint_types: those that the features for boxes look at.
        keypoint_pos: what the key points are predicted from: "input" of the head, its features for classes "cls" or for
            boxes "reg".
        max_points: key points of each kind and level.
        block_grad: key points learn from their own losses only.
        selection_method: take the features of key points at the pixel that predicts them ("index") or where they
            lie ("interpolation").
        cross_level_topk: of all levels' points each level sees that many, the best; 0 to see its own.
        cross_level_selection: the features come from the level of the point; else from that which looks, which needs
            "interpolation".
        num_attn_heads: heads of the attention.
        scale_position: measure distances on each level in its stride; else in the first level's.
        scale_factor: of that.
        location: options of `visionzoo.layers.bridging.RelativeLocation`; None for no locations.
        appearance: compare by features.
        shared_location: one table of locations for the kinds of points.
        shared_location_outer: one for classes and boxes.
        reg_cat_offset: join the features for boxes with the mean offset of what they look at.
        train_cfg: of the dense head.
        test_cfg: of the dense head.
        init_cfg: unused by the attention, which has the initial weights of the authors'.

    Raises:
        ValueError: if the head is another, a kind of points is not predicted, or options do not fit each other.
    """

    def __init__(
        self,
        bbox_head_cfg: Mapping[str, Any],
        keypoint_head_cfg: Mapping[str, Any],
        cls_keypoint_types: Sequence[str] = ("center",),
        reg_keypoint_types: Sequence[str] = ("top_left_corner", "bottom_right_corner"),
        keypoint_pos: str = "input",
        max_points: int = 20,
        block_grad: bool = False,
        selection_method: str = "index",
        cross_level_topk: int = 50,
        cross_level_selection: bool = True,
        num_attn_heads: int = 8,
        scale_position: bool = False,
        scale_factor: float = 1.0,
        location: Mapping[str, Any] | None = {"base_size": (400, 400), "log_scale": True},
        appearance: bool = True,
        shared_location: bool = True,
        shared_location_outer: bool = False,
        reg_cat_offset: bool = False,
        train_cfg: Any = None,
        test_cfg: Any = None,
        init_cfg: Any = None,
    ):
        super().__init__(init_cfg)
        from mmdet.models.dense_heads import ATSSHead, FCOSHead, RetinaHead

        self._predict = {RetinaHead: _retina, FCOSHead: _fcos, ATSSHead: _atss}
        self.bbox_head = MODELS.build({**bbox_head_cfg, "train_cfg": train_cfg, "test_cfg": test_cfg})
        if type(self.bbox_head) not in self._predict:
            raise ValueError(
                f"BVRHead: bbox_head_cfg must be of {[kind.__name__ for kind in self._predict]}, "
                f"got {type(self.bbox_head).__name__}"
            )
        self.keypoint_head = MODELS.build(dict(keypoint_head_cfg))
        if not isinstance(self.keypoint_head, BVRKeypointHead):
            raise ValueError(
                f"BVRHead: keypoint_head_cfg must be of BVRKeypointHead, got {type(self.keypoint_head).__name__}"
            )
        self.kinds = {"cls": tuple(cls_keypoint_types), "reg": tuple(reg_keypoint_types)}
        if unknown := set(sum(self.kinds.values(), ())) - set(self.keypoint_head.head_types):
            raise ValueError(
                f"BVRHead: key points {sorted(unknown)} are not predicted; the head has {self.keypoint_head.head_types}"
            )
        if keypoint_pos not in ("input", "cls", "reg"):
            raise ValueError(f"BVRHead: keypoint_pos must be 'input', 'cls' or 'reg', got {keypoint_pos=}")
        if selection_method not in ("index", "interpolation"):
            raise ValueError(f"BVRHead: selection_method must be 'index' or 'interpolation', got {selection_method=}")
        if max_points < 1 or cross_level_topk < 0:
            raise ValueError(
                f"BVRHead: max_points must be 1 or more and cross_level_topk 0 or more, got {max_points=}, "
                f"{cross_level_topk=}"
            )
        if cross_level_topk and not cross_level_selection and selection_method == "index":
            raise ValueError(
                "BVRHead: a level has no pixel for the points of another; pass cross_level_selection=True or "
                "selection_method='interpolation'"
            )
        own = tuple(getattr(self.bbox_head.prior_generator, "strides", ()))
        if [stride[0] for stride in own] != list(self.keypoint_head.strides):
            raise ValueError(
                f"BVRHead: the strides of both heads must be the same, got {[stride[0] for stride in own]} and "
                f"{list(self.keypoint_head.strides)}"
            )
        if shared_location_outer and not (all(self.kinds.values()) and shared_location):
            raise ValueError(
                "BVRHead: shared_location_outer needs key points for classes and boxes, and shared_location=True"
            )
        self.keypoint_pos, self.max_points, self.block_grad = keypoint_pos, max_points, block_grad
        self.selection_method, self.cross_level_topk = selection_method, cross_level_topk
        self.cross_level_selection = cross_level_selection
        self.units = [
            scale_factor * (stride if scale_position else self.keypoint_head.strides[0])
            for stride in self.keypoint_head.strides
        ]
        options: dict[str, Any] = {
            "location": None if location is None else dict(location),
            "appearance": appearance,
            "shared_location": shared_location,
        }
        for branch, kinds in self.kinds.items():
            if kinds:
                if branch == "reg":
                    options["location_of"] = self.cls_transformer if shared_location_outer else None
                    options["cat_offset"] = reg_cat_offset
                dim = self.bbox_head.feat_channels
                layer = BridgingAttention(dim, num_attn_heads, num_kinds=len(kinds), **options)
                setattr(self, f"{branch}_transformer", layer)

    def forward(self, levels: Sequence[Tensor]) -> tuple[Levels, ...]:
        """Levels [B, C, H, W] to the predictions of the dense head, lists of each level's maps."""
        return self._outputs(levels)[0]

    def _outputs(self, levels: Sequence[Tensor]) -> tuple[tuple[Levels, ...], dict[str, Levels], dict[str, Levels]]:
        head = self.bbox_head
        features = {
            "input": list(levels),
            "cls": [_through(head.cls_convs, x) for x in levels],
            "reg": [_through(head.reg_convs, x) for x in levels],
        }
        logits, offsets = self.keypoint_head(features[self.keypoint_pos])
        for branch, kinds in self.kinds.items():
            if kinds:
                features[branch] = self._look(branch, features[branch], logits, offsets)
        predicted = self._predict[type(head)](head, features["cls"], features["reg"])
        return tuple(list(maps) for maps in zip(*predicted, strict=True)), logits, offsets

    def _look(self, branch: str, maps: Levels, logits: dict[str, Levels], offsets: dict[str, Levels]) -> Levels:
        """Let maps [B, C, H, W] attend to the key points of their branch."""
        kinds = self.kinds[branch]
        scores, places, pixels = self.keypoint_head.best_points(logits, offsets, kinds, self.max_points)
        if self.block_grad:
            places = [xy.detach() for xy in places]
        width, height = (self.keypoint_head.strides[0] * n for n in (maps[0].shape[3], maps[0].shape[2]))
        if not self.cross_level_topk:
            points = [self._features(*each, width, height) for each in zip(maps, places, pixels, strict=True)]
        else:
            every = torch.cat(scores, 1)
            best = every.topk(min(self.cross_level_topk, every.shape[1])).indices
            chosen = tokens_at(torch.cat(places, 1), best)
            if self.cross_level_selection:
                each = [self._features(*level, width, height) for level in zip(maps, places, pixels, strict=True)]
                points = [tokens_at(torch.cat(each, 1), best)] * len(maps)
            else:
                points = [self._features(x, chosen, None, width, height) for x in maps]
            places = [chosen] * len(maps)
        grid = [
            xy.view(1, *x.shape[2:], 2).expand(len(x), -1, -1, -1)
            for x, xy in zip(maps, self.keypoint_head.locations(maps), strict=True)
        ]
        found = getattr(self, f"{branch}_transformer")(
            [x.permute(0, 2, 3, 1) for x in maps],
            grid,
            [x.chunk(len(kinds)) for x in points],
            [xy.chunk(len(kinds)) for xy in places],
            self.units,
        )
        return [x.permute(0, 3, 1, 2) for x in found]

    def _features(self, maps: Tensor, places: Tensor, pixels: Tensor | None, width: int, height: int) -> Tensor:
        """Return the features [kinds·B, K, C] of points of a map [B, C, H, W]."""
        maps = maps.repeat(len(places) // len(maps), 1, 1, 1)
        if self.selection_method == "index":
            return tokens_at(maps.flatten(2).mT, pixels)  # type: ignore[arg-type]
        x, y = places[:, None].unbind(-1)
        grid = torch.stack([x * 2 / width, y * 2 / height], -1) - 1
        sampled = F.grid_sample(maps.to(grid.dtype), grid, padding_mode="border", align_corners=False)
        return sampled[:, :, 0].mT.to(maps.dtype)

    def loss(self, levels: Sequence[Tensor], batch_data_samples: Sequence[Any]) -> dict[str, Tensor]:
        """Return the losses of the dense head, as bbox_…, and of the key points, as kpt_…."""
        from mmdet.models.utils import unpack_gt_instances

        predicted, logits, offsets = self._outputs(levels)
        objects, ignored, metas = unpack_gt_instances(batch_data_samples)
        losses = self.keypoint_head.loss(logits, offsets, objects)
        own = self.bbox_head.loss_by_feat(*predicted, objects, metas, ignored)
        return {f"kpt_{name}": loss for name, loss in losses.items()} | {f"bbox_{name}": x for name, x in own.items()}

    def predict(self, levels: Sequence[Tensor], batch_data_samples: Sequence[Any], rescale: bool = False) -> Any:
        """Return the boxes that the dense head finds in each image, as mmdet's InstanceData."""
        metas = [sample.metainfo for sample in batch_data_samples]
        return self.bbox_head.predict_by_feat(*self(levels), batch_img_metas=metas, rescale=rescale)


class _CornerPooling(nn.Module):
    """Corner pooling on [B, C, H, W] as CornerNet has it: maxima towards two sides, joined with the map."""

    def __init__(self, channels: int, sides: tuple[str, str], width: int = 64, **made: Any):
        super().__init__()
        from mmcv.ops import CornerPool

        if channels % 32:
            raise ValueError(f"BVRKeypointHead: corner_pooling needs a multiple of 32 channels, got {channels}")
        self.p1_conv1, self.p2_conv1 = (ConvModule(channels, width, 3, padding=1, **made) for _ in range(2))
        self.p_conv1 = nn.Conv2d(width, channels, 3, padding=1, bias=False)
        self.p_gn1 = nn.GroupNorm(32, channels)
        self.conv1 = nn.Conv2d(channels, channels, 1, bias=False)
        self.gn1 = nn.GroupNorm(32, channels)
        self.conv2 = ConvModule(channels, channels, 1, **made)
        self.pool1, self.pool2 = (CornerPool(side) for side in sides)

    def forward(self, x: Tensor) -> Tensor:
        pooled = self.pool1(self.p1_conv1(x)) + self.pool2(self.p2_conv1(x))
        return self.conv2(F.relu(self.p_gn1(self.p_conv1(pooled)) + self.gn1(self.conv1(x))))


def gaussian_radius(sizes: Tensor, iou: float) -> Tensor:
    """Return how far a corner of boxes [N, 2] may move for an overlap of `iou`: CornerNet's least of three cases."""
    total, area = sizes.sum(1), sizes.prod(1)
    cases = ((1, total, area * (1 - iou) / (1 + iou)), (4, 2 * total, (1 - iou) * area))
    inside = [(b - (b.square() - 4 * a * c).sqrt()) / (2 * a) for a, b, c in cases]
    a, b, c = 4 * iou, -2 * iou * total, (iou - 1) * area
    return torch.stack([*inside, (b + (b.square() - 4 * a * c).sqrt()) / (2 * a)], 1).amin(1)


def _through(layers: Any, x: Tensor) -> Tensor:
    for layer in layers:
        x = layer(x)
    return x


def _retina(head: Any, of_classes: Levels, of_boxes: Levels) -> list[tuple[Tensor, ...]]:
    return [(head.retina_cls(c), head.retina_reg(r)) for c, r in zip(of_classes, of_boxes, strict=True)]


def _atss(head: Any, of_classes: Levels, of_boxes: Levels) -> list[tuple[Tensor, ...]]:
    levels = zip(of_classes, of_boxes, head.scales, strict=True)
    return [(head.atss_cls(c), scale(head.atss_reg(r)).float(), head.atss_centerness(r)) for c, r, scale in levels]


def _fcos(head: Any, of_classes: Levels, of_boxes: Levels) -> list[tuple[Tensor, ...]]:
    found: list[tuple[Tensor, ...]] = []
    for c, r, scale, stride in zip(of_classes, of_boxes, head.scales, head.strides, strict=True):
        boxes = scale(head.conv_reg(r)).float()
        unit = 1 if head.training else stride
        boxes = boxes.clamp(min=0) * unit if head.norm_on_bbox else boxes.exp()
        found.append((head.conv_cls(c), boxes, head.conv_centerness(r if head.centerness_on_reg else c)))
    return found
