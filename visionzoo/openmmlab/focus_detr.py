"""Focus-DETR: DINO whose encoder refines only the tokens that may lie in objects, ICCV 2023, arXiv:2307.12612.

Facts from Focus-DETR/projects/focus_detr/modeling of https://github.com/huawei-noah/noah-research at aa0f80c (license
Apache-2.0); the code here is our own, on mmdet's DINO. As in the authors' code, all layers of the encoder look at the
maps of the neck, not at the tokens that earlier layers refined. Where we differ: images without objects train, small
images may have fewer tokens than `num_dual_tokens`, and padding is masked in evaluation, too, as mmdet does (the
authors evaluate one image at a time).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar

import torch
from mmdet.models.detectors import DINO
from mmdet.models.layers.transformer.utils import MLP
from mmengine.registry import MODELS
from torch import Tensor, nn

from visionzoo.layers.foreground import (
    BestTokensAttention,
    ForegroundScores,
    foreground_loss,
    foreground_targets,
    with_tokens,
)
from visionzoo.layers.tokens import tokens_at
from visionzoo.models._checkpoint import rename
from visionzoo.text import count_of


@MODELS.register_module()
class FocusDETR(DINO):
    """DINO with a sparse encoder: tokens are scored as foreground, and each layer refines the best of them.

    The scores are learned from the boxes. Before a layer's deformable attention those of its tokens that score best as
    foreground and by class, in the head of the first stage, attend to each other (`BestTokensAttention`). Checkpoints
    may have our names or those of the authors, the backbone's aside.

    Args:
        args: those of mmdet's DINO.
        focus_ratio: share of an image's tokens that are foreground, in (0, 1].
        keep_ratios: share of these that each layer of the encoder refines, in (0, 1].
        num_dual_tokens: tokens that attend to each other.
        strides: of the levels, in pixels, finest first.
        object_sizes: for each level the distances from a token to the farthest side of a box, in pixels, at which the
            box belongs to the level: above the first number, and up to the second.
        foreground_weight: of the loss of the scores.
        options: those of mmdet's DINO.

    Raises:
        ValueError: if an option is out of range, there are other numbers of layers or levels, or the encoder's layers
            are checkpointed.
    """

    CHECKPOINT_KEYS: ClassVar[dict[str, list[tuple[str, Any]]]] = {
        "authors": [
            # heads under further names
            (r"^(transformer\.(encoder\.enhance_MCSP|decoder\.(class|bbox)_embed)|enhance_MCSP_layerlist)\.", None),
            (r"^transformer\.alpha$", "foreground.factors"),
            (r"^transformer\.enc_mask_predictor\.layer1\.", "foreground.proj."),
            (r"^transformer\.enc_mask_predictor\.layer2\.", "foreground.mlp."),
            (r"^transformer\.encoder\.layers\.(\d+)\.attentions\.0\.attn\.", r"dual_attention.\1.attention."),
            (r"^transformer\.encoder\.layers\.(\d+)\.norm2\.", r"dual_attention.\1.norm."),
            (r"^transformer\.encoder\.layers\.(\d+)\.attentions\.1\.", r"encoder.layers.\1.self_attn."),
            (r"^transformer\.decoder\.layers\.(\d+)\.attentions\.0\.", r"decoder.layers.\1.self_attn."),
            (r"^transformer\.decoder\.layers\.(\d+)\.attentions\.1\.", r"decoder.layers.\1.cross_attn."),
            (r"^transformer\.(encoder|decoder)\.", r"\1."),
            (r"^(encoder|decoder)\.layers\.(\d+)\.ffns\.0\.", r"\1.layers.\2.ffn."),
            (r"^transformer\.tgt_embed\.", "query_embedding."),
            (r"^transformer\.level_embeds$", "level_embed"),
            (r"^transformer\.enc_output\.", "memory_trans_fc."),
            (r"^transformer\.enc_output_norm\.", "memory_trans_norm."),
            (r"^class_embed\.", "bbox_head.cls_branches."),
            (
                r"^bbox_embed\.(\d+)\.layers\.(\d+)\.",
                lambda found: f"bbox_head.reg_branches.{found[1]}.{2 * int(found[2])}.",
            ),
            (r"^label_enc\.", "dn_query_generator.label_embedding."),
            (r"^(neck\..*)\.norm\.", r"\1.gn."),
        ]
    }

    def __init__(
        self,
        *args: Any,
        focus_ratio: float = 0.5,
        keep_ratios: Sequence[float] = (1.0, 0.8, 0.6, 0.6, 0.4, 0.2),
        num_dual_tokens: int = 300,
        strides: Sequence[int] = (8, 16, 32, 64),
        object_sizes: Sequence[tuple[float, float]] = ((-1, 64), (64, 128), (128, 256), (256, float("inf"))),
        foreground_weight: float = 1.5,
        **options: Any,
    ):
        super().__init__(*args, **options)
        if not all(0 < ratio <= 1 for ratio in (focus_ratio, *keep_ratios)):
            raise ValueError(
                f"FocusDETR: ratios must be above 0 and at most 1, got {focus_ratio=} and "
                f"keep_ratios={list(keep_ratios)}"
            )
        if len(keep_ratios) != self.encoder.num_layers:
            raise ValueError(
                f"FocusDETR: keep_ratios must have one entry for each layer of the encoder, which has "
                f"{self.encoder.num_layers}, got {list(keep_ratios)}"
            )
        if not len(strides) == len(object_sizes) == self.num_feature_levels:
            raise ValueError(
                f"FocusDETR: strides and object_sizes must have one entry for each of the "
                f"num_feature_levels={self.num_feature_levels}, got {list(strides)} and {list(object_sizes)}"
            )
        if min(strides) < 1 or foreground_weight < 0:
            raise ValueError(
                f"FocusDETR: strides must be 1 or more and foreground_weight 0 or more, got strides={list(strides)} "
                f"and {foreground_weight=}"
            )
        if self.encoder.num_cp > 0:
            raise ValueError("FocusDETR: layers of the encoder are not checkpointed; leave num_cp out")
        self.focus_ratio, self.keep_ratios = focus_ratio, tuple(keep_ratios)
        self.strides, self.object_sizes, self.foreground_weight = tuple(strides), tuple(object_sizes), foreground_weight
        self.decoder.ref_point_head = _PlaceMLP(2 * self.embed_dims, self.embed_dims, self.embed_dims, 2)
        self.foreground = ForegroundScores(self.embed_dims, self.num_feature_levels)
        self.dual_attention = nn.ModuleList(
            BestTokensAttention(
                self.embed_dims,
                layer.self_attn.num_heads,
                num_tokens=num_dual_tokens,
                dropout=layer.self_attn.dropout.p,
            )
            for layer in self.encoder.layers
        )
        self.register_load_state_dict_pre_hook(type(self).take_names)

    def take_names(self, state: dict[str, Tensor], prefix: str, *_: Any) -> None:
        """Give the detector's tensors in a checkpoint, whose names begin with `prefix`, our names, in place."""
        names = [name for name in state if name.startswith(prefix)]
        renamed = rename({name.removeprefix(prefix): state.pop(name) for name in names}, self)[0]
        state.update({f"{prefix}{name}": value for name, value in renamed.items()})

    def pre_transformer(self, mlvl_feats: Sequence[Tensor], batch_data_samples: Any = None) -> Any:
        """Return what encoder and decoder take from the levels [B, C, H, W] of the neck.

        Raises:
            ValueError: if there are not `num_feature_levels`, or their pixels are fewer than `num_queries`.
        """
        if len(mlvl_feats) != self.num_feature_levels:
            raise ValueError(
                f"FocusDETR: expected num_feature_levels={self.num_feature_levels} levels of the neck, "
                f"got {len(mlvl_feats)}; its num_outs must be the same"
            )
        if (tokens := sum(x.shape[2] * x.shape[3] for x in mlvl_feats)) < self.num_queries:
            raise ValueError(
                f"FocusDETR: images of this size have {count_of(tokens, 'token')}, of which "
                f"num_queries={self.num_queries} must be chosen: pass larger images or fewer queries"
            )
        return super().pre_transformer(mlvl_feats, batch_data_samples)

    def forward_encoder(
        self,
        feat: Tensor,
        feat_mask: Tensor | None,
        feat_pos: Tensor,
        spatial_shapes: Tensor,
        level_start_index: Tensor,
        valid_ratios: Tensor,
    ) -> dict[str, Any]:
        """Refine the tokens [B, N, C] that score best.

        Args:
            feat: tokens of all levels, finest first.
            feat_mask: which of them are padding, [B, N]; None for none.
            feat_pos: their positions, [B, N, C].
            spatial_shapes: height and width of the levels, [L, 2].
            level_start_index: where each level begins, [L].
            valid_ratios: shares of width and height of the levels that are no padding, [B, L, 2].

        Returns:
            What `pre_decoder` takes: the tokens, `feat_mask`, `spatial_shapes`, and the logits of the scores, [B, N].
        """
        projected, _ = self.gen_encoder_output_proposals(feat + feat_pos, feat_mask, spatial_shapes)
        logits = self.foreground(projected, [tuple(size) for size in spatial_shapes.tolist()])
        scores = logits.detach()
        if feat_mask is None:
            valid = torch.full((len(scores),), scores.shape[1], device=scores.device)
        else:
            scores, valid = scores.masked_fill(feat_mask, scores.min()), (~feat_mask).sum(1)
        counts = ((valid * self.focus_ratio).int() + 1).minimum(valid)
        order = scores.topk(int(counts.max())).indices
        places = self.encoder.get_encoder_reference_points(spatial_shapes, valid_ratios, device=feat.device)
        geometry = {"spatial_shapes": spatial_shapes, "level_start_index": level_start_index}
        classify = self.bbox_head.cls_branches[self.decoder.num_layers]
        memory = feat
        for layer, attend, ratio in zip(self.encoder.layers, self.dual_attention, self.keep_ratios, strict=True):
            at = order[:, : max(1, int(ratio * order.shape[1]))]
            before, positions = tokens_at(memory, at), tokens_at(feat_pos, at)
            # not under no_grad: autocast of torch 2.7 would keep the head's weights, without their gradient
            best = classify(before.detach()).amax(-1) * scores.gather(1, at)
            x = attend(before, positions, best)
            x = layer.self_attn(
                x,
                value=feat,
                query_pos=positions,
                key_padding_mask=feat_mask,
                reference_points=tokens_at(places.flatten(2), at).unflatten(2, places.shape[2:]),
                **geometry,
            )
            x = layer.norms[1](layer.ffn(layer.norms[0](x)))
            own = torch.arange(at.shape[1], device=at.device) < counts[:, None]  # a smaller image has fewer
            memory = with_tokens(memory, at, torch.where(own[..., None], x, before))
        return {"memory": memory, "memory_mask": feat_mask, "spatial_shapes": spatial_shapes, "foreground": logits}

    def pre_decoder(
        self,
        memory: Tensor,
        memory_mask: Tensor | None,
        spatial_shapes: Tensor,
        foreground: Tensor,
        batch_data_samples: Any = None,
    ) -> tuple[dict[str, Any], dict[str, Any]]:
        """Return what the decoder takes, and what the head takes; in training also the logits, for `loss`."""
        to_decoder, to_head = super().pre_decoder(memory, memory_mask, spatial_shapes, batch_data_samples)
        return to_decoder, to_head | ({"foreground": (foreground, spatial_shapes)} if self.training else {})

    def loss(self, batch_inputs: Tensor, batch_data_samples: Any) -> dict[str, Tensor]:
        """Return the losses of DINO, and `loss_foreground` of the scores."""
        to_head = self.forward_transformer(self.extract_feat(batch_inputs), batch_data_samples)
        logits, shapes = to_head.pop("foreground")
        losses = self.bbox_head.loss(**to_head, batch_data_samples=batch_data_samples)
        return losses | {"loss_foreground": self.foreground_loss(logits, shapes.tolist(), batch_data_samples)}

    def foreground_loss(self, logits: Tensor, sizes: Sequence[tuple[int, int]], batch_data_samples: Any) -> Tensor:
        """Return the weighted loss of the scores' logits [B, N], for levels of these heights and widths."""
        boxes = [sample.gt_instances.bboxes for sample in batch_data_samples]
        targets = [
            foreground_targets(getattr(each, "tensor", each), sizes, self.strides, self.object_sizes) for each in boxes
        ]
        return self.foreground_weight * foreground_loss(logits, torch.stack(targets))


class _PlaceMLP(MLP):
    """DINO's MLP from C/2 sines and cosines of each coordinate of a box; mmdet 3.5 gives C, with more frequencies."""

    def forward(self, x: Tensor) -> Tensor:
        every = x.shape[-1] // self.layers[0].in_features
        return super().forward(x.unflatten(-1, (-1, every, 2))[..., 0, :].flatten(-2))
