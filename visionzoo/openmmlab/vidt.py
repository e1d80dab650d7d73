"""ViDT: a detector whose objects walk through the backbone as tokens, ICLR 2022, arXiv:2110.03921.

Facts from https://github.com/naver-ai/vidt at a8c48b5 (Apache-2.0); the code here is our own, on mmdet's decoder, head,
matching and losses. Checkpoints may have the authors' names, and their rows for the 91 ids of COCO's categories.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from mmdet.models.detectors import DeformableDETR
from mmdet.models.detectors.base_detr import DetectionTransformer
from mmdet.models.layers import DeformableDetrTransformerDecoder, inverse_sigmoid
from mmengine.registry import MODELS
from torch import Tensor, nn

from visionzoo.engine.errors import UserError
from visionzoo.layers.pyramid_fusion import PyramidFusion
from visionzoo.models._checkpoint import rename
from visionzoo.models._detection_tokens import AUTHORS_KEYS, DetectionTokens
from visionzoo.openmmlab.backbone import ZooBackbone

# ids of COCO's 80 categories, of 1 to 90
COCO_IDS = [i for i in range(1, 91) if i not in (12, 26, 29, 30, 45, 66, 68, 69, 71, 83)]


@MODELS.register_module()
class DetectionTokenBackbone(ZooBackbone):
    """A Swin of the zoo with detection tokens beside its map, see `visionzoo.models._detection_tokens`.

    Args:
        name: of a model whose blocks attend in windows, `zoo_swin_*`.
        num_tokens: detection tokens, of which each finds one object at most.
        position_dim: channels of their positions.
        cross_stages: stages, negative from the end, whose tokens see the map.
        out_dim: channels of the last map.
        options: those of `ZooBackbone`, but `out_indices` and `out_norm`.

    Raises:
        UserError: the model has other blocks, or an option is out of range or not for this backbone.
    """

    CHECKPOINT_KEYS = {"authors": AUTHORS_KEYS}

    def __init__(
        self,
        name: str,
        *,
        num_tokens: int = 100,
        position_dim: int = 256,
        cross_stages: Sequence[int] = (-1,),
        out_dim: int = 256,
        **options: Any,
    ):
        if wrong := [name for name in ("out_indices", "out_norm") if options.get(name) is not None]:
            raise UserError(
                f"DetectionTokenBackbone: it gives the maps of all stages but the first, as they are; remove {wrong[0]}"
            )
        super().__init__(name, **options)
        try:
            self.tokens = DetectionTokens(
                self.model,
                num_tokens=num_tokens,
                position_dim=position_dim,
                cross_stages=cross_stages,
                out_dim=out_dim,
            )
        except ValueError as error:
            raise UserError(str(error)) from error
        self.out_channels = [*self.tokens.dims[1:], out_dim]
        self.register_load_state_dict_pre_hook(type(self).take_names)

    def forward(self, x: Tensor, padded: Tensor | None = None) -> Any:
        """Image and where it is padded, to maps [B, C, H', W'] and tokens [B, P, C]: `DetectionTokens.forward`."""
        return self.tokens(self.model, x, padded)

    def take_names(self, state: dict[str, Tensor], prefix: str, *_: Any) -> None:
        """Give the backbone's tensors in a checkpoint, whose names begin with `prefix`, our names, in place."""
        own = {name.removeprefix(prefix): state.pop(name) for name in list(state) if name.startswith(prefix)}
        state.update({prefix + name: value for name, value in rename(own, self)[0].items()})


@MODELS.register_module()
class ViDT(DetectionTransformer):
    """Detection tokens of the backbone, refined by a decoder that looks at a few places of its maps; no encoder.

    The tokens themselves predict boxes and classes, and so does each layer of mmdet's Deformable DETR decoder after
    them, each from the boxes of the one before.

    Args:
        backbone: `DetectionTokenBackbone`.
        neck: of its maps to levels of the decoder's width, in any order: mmdet's `ChannelMapper`, or `EPFF` of ViDT+.
        decoder: options of mmdet's `DeformableDetrTransformerDecoder`.
        bbox_head: mmdet's `DeformableDETRHead`, whose `num_pred_layer` is set here.
        options: `train_cfg`, `test_cfg`, `data_preprocessor` and `init_cfg` of mmdet's detectors.
    """

    CHECKPOINT_KEYS = {
        "authors": [
            (r"^transformer\.(decoder\.bbox_embed|level_embed)\b", None),  # the head's again; not used
            (r"^transformer\.reference_points\.", "reference_points_fc."),
            (r"^transformer\.decoder\.", "decoder."),
            (r"\.self_attn\.", ".self_attn.attn."),
            (r"\.norm2\.", ".norms.0."),
            (r"\.norm1\.", ".norms.1."),
            (r"\.norm3\.", ".norms.2."),
            (r"\.linear1\.", ".ffn.layers.0.0."),
            (r"\.linear2\.", ".ffn.layers.1."),
            (r"^class_embed\.", "bbox_head.cls_branches."),
            (r"^bbox_embed\.(\d+)\.layers\.(\d)\.", lambda m: f"bbox_head.reg_branches.{m[1]}.{2 * int(m[2])}."),
            (r"^input_proj\.(\d)\.0\.", r"neck.convs.\1.conv."),
            (r"^input_proj\.(\d)\.1\.", r"neck.convs.\1.gn."),
            (r"^tgt_proj\.", "query_proj."),
            (r"^fusion\.", "neck."),
            *PyramidFusion.CHECKPOINT_KEYS["authors"],
            (r"^iou_embed\.(\d+)\.layers\.(\d)\.", lambda m: f"bbox_head.overlap_branches.{m[1]}.{2 * int(m[2])}."),
            (r"^vector_embed\.\d+\.layers\.(\d)\.", lambda m: f"bbox_head.vector_branch.{2 * int(m[1])}."),  # shared
            (r"^transformer\.enc_output\.", "bbox_head.memory_trans_fc."),
            (r"^transformer\.enc_output_norm\.", "bbox_head.memory_trans_norm."),
            (r"^transformer\.token_embed\.", "bbox_head.label_branch."),
        ]
    }

    backbone: Any
    decoder: Any  # its options, then itself
    query_proj: Any
    query_pos_proj: Any

    def __init__(
        self,
        backbone: Mapping[str, Any],
        neck: Mapping[str, Any],
        decoder: Mapping[str, Any],
        bbox_head: Mapping[str, Any],
        **options: Any,
    ):
        head = {**bbox_head, "num_pred_layer": decoder["num_layers"] + 1}
        super().__init__(backbone, neck=neck, decoder=decoder, bbox_head=head, **options)
        self.register_load_state_dict_pre_hook(type(self).take_names)

    def _init_layers(self) -> None:
        self.decoder = DeformableDetrTransformerDecoder(**self.decoder)
        self.embed_dims = width = self.decoder.embed_dims
        tokens = self.backbone.tokens

        def projection(channels: int) -> nn.Module:  # normalized over all tokens, as released
            return nn.Sequential(nn.Conv2d(channels, width, 1), nn.GroupNorm(32, width))

        self.query_proj = projection(tokens.dims[-1])
        self.query_pos_proj = projection(tokens.position.shape[-1])
        self.reference_points_fc = nn.Linear(width, 2)

    def init_weights(self) -> None:
        """Draw the weights as the authors do, and load those of the backbone."""
        super().init_weights()
        for parameter in [*self.decoder.parameters(), self.reference_points_fc.weight]:
            if parameter.ndim > 1:
                nn.init.xavier_uniform_(parameter)
        for layer in self.decoder.layers:
            layer.cross_attn.init_weights()
        for projection in (self.query_proj, self.query_pos_proj):
            nn.init.xavier_uniform_(projection[0].weight)
            nn.init.zeros_(projection[0].bias)

    def extract_feat(self, batch_inputs: Tensor) -> Tensor:
        """Return the images as they are: the backbone has to know where they are padded, see `pre_transformer`."""
        return batch_inputs

    def pre_transformer(self, images: Tensor, batch_data_samples: Any = None) -> tuple[dict[str, Any], dict[str, Any]]:
        """Images [B, 3, H, W] to what the decoder looks at, and with which tokens."""
        padded = padding(images, batch_data_samples)
        maps, tokens = self.backbone(images, padded)
        levels = self.neck(maps)
        sizes = [level.shape[2:] for level in levels]
        shapes = torch.tensor([list(size) for size in sizes], device=images.device)
        places: dict[str, Any] = {
            "memory_mask": None,
            "spatial_shapes": shapes,
            "level_start_index": torch.cat([shapes.new_zeros(1), shapes.prod(1).cumsum(0)[:-1]]),
            "valid_ratios": images.new_ones(len(images), len(levels), 2),
        }
        if padded is not None:
            masks = [F.interpolate(padded[None].float(), size=size)[0].bool() for size in sizes]
            places["memory_mask"] = torch.cat([mask.flatten(1) for mask in masks], 1)
            places["valid_ratios"] = torch.stack([DeformableDETR.get_valid_ratio(mask) for mask in masks], 1)
        memory = torch.cat([level.flatten(2).mT for level in levels], 1)
        labeled = {key: places[key] for key in ("memory_mask", "spatial_shapes")}
        return {"memory": memory, "tokens": tokens, **labeled}, places

    def forward_encoder(self, **given: Any) -> dict[str, Any]:  # type: ignore[override]
        """Return what is given: there is no encoder."""
        return given

    def pre_decoder(  # type: ignore[override]
        self, memory: Tensor, tokens: Tensor, **places: Any
    ) -> tuple[dict[str, Any], dict[str, Any]]:
        """Project tokens and their positions, from which come the first places to look at; label the patches."""
        query = self.query_proj(tokens.mT.unsqueeze(-1)).squeeze(-1).mT
        position = self.query_pos_proj(self.backbone.tokens.position.mT.unsqueeze(-1)).squeeze(-1).mT
        position = position.expand(len(tokens), -1, -1)
        reference = self.reference_points_fc(position).sigmoid()
        decoder = {"query": query, "query_pos": position, "memory": memory, "reference_points": reference}
        if not self.training:
            return decoder, {}
        label = getattr(self.bbox_head, "label_patches", None)
        return decoder, {"enc_outputs_class": label and label(memory, **places), "enc_outputs_coord": None}

    def forward_decoder(  # type: ignore[override]
        self, query: Tensor, query_pos: Tensor, memory: Tensor, reference_points: Tensor, **places: Any
    ) -> dict[str, Any]:
        """Return states of the tokens, those of the backbone first, and the boxes that each starts from."""
        first, *later = self.bbox_head.reg_branches
        boxes = first(query)
        moved = boxes[..., :2] + inverse_sigmoid(reference_points)
        boxes = torch.cat([moved, boxes[..., 2:]], -1).sigmoid().detach()
        states, references = self.decoder(
            query=query,
            value=memory,
            query_pos=query_pos,
            key_padding_mask=places.pop("memory_mask"),
            reference_points=boxes,
            reg_branches=later,
            **places,
        )
        return {"hidden_states": torch.cat([query[None], states]), "references": [reference_points, boxes, *references]}

    def take_names(self, state: dict[str, Tensor], prefix: str, *_: Any) -> None:
        """Give the tensors in a checkpoint, but for the backbone's, our names, in place."""
        apart = f"{prefix}backbone."
        own = {
            name.removeprefix(prefix): state.pop(name)
            for name in list(state)
            if name.startswith(prefix) and not name.startswith(apart)
        }
        for name, value in rename(own, self)[0].items():
            classes = self.bbox_head.num_classes
            kept = COCO_IDS if classes == 80 else [*range(1, 91)]
            if name.startswith("bbox_head.cls_branches.") and len(value) == 91 != classes:
                value = value[kept]
            if name.startswith("bbox_head.label_branch.") and len(value) == 91:  # its first is any object
                value = value[[0, *kept]]
            state[prefix + name] = value


def padding(images: Tensor, samples: Sequence[Any] | None) -> Tensor | None:
    """Return where images [B, C, H, W] are padded, [B, H, W], as mmdet's samples say; None if nowhere."""
    sizes = [tuple(sample.img_shape[:2]) for sample in samples or ()]
    if all(size == images.shape[2:] for size in sizes):
        return None
    padded = images.new_ones(len(images), *images.shape[2:], dtype=torch.bool)
    for one, (height, width) in zip(padded, sizes, strict=True):
        one[:height, :width] = False
    return padded
