"""Learnable memory: Fine-tuning Image Transformers using Learnable Memory, CVPR 2022, https://arxiv.org/abs/2203.15243.

The authors published no code. Facts from learnable_memory_vit.py of https://github.com/lucidrains/vit-pytorch at
69d24fe (MIT), a third party's reading; the code here is our own. A ViT of the usual sizes whose further class token,
the reader, attends to memory tokens in every block. `host_classes` keeps the head of the task before and freezes all
but reader, memory tokens and new head: then `forward_tasks` gives the logits of both, those of the task before bit for
bit what they were without memory. Weights of timm's ViTs fit the host. Any other isotropic model takes a memory by
`timm.create_model(name, memory=5)`, or `visionzoo.models._memory.add_memory(model, 5)`.

Where we differ: images of any size and shape are taken, with positions interpolated. With `patch_norm=True`,
`qkv_bias=False`, `norm_eps=1e-5` and `host_classes` the network is that third party's.
"""

from __future__ import annotations

import logging
from functools import partial
from typing import Any

from visionzoo.layers.norm import LayerNorm
from visionzoo.layers.stem import NormedPatchStem
from visionzoo.layers.tokens import TokenBlock
from visionzoo.models._isotropic import VIT_KEYS, Isotropic, build_blocks, has_place_for_prefix_tokens
from visionzoo.models._memory import add_memory
from visionzoo.models._registry import Variant, register_family

_logger = logging.getLogger(__name__)


class MemoryViT(Isotropic):
    """ViT with learnable memory.

    Args:
        depth: blocks.
        embed_dim: channels.
        num_heads: attention heads.
        head_dim: width of a head; None for embed_dim / num_heads.
        mlp_ratio: hidden width of the MLPs over the channels.
        qkv_bias: whether the projections to q, k, v have a bias.
        memory_tokens: memory tokens of each block.
        host_classes: classes of the task before, whose head is kept; 0 for none.
        patch_norm: norms before and after the projection of the patches.
        norm_eps: ε of the norms but for these.
        patch_size: side of the patches in pixels.
        img_size: image size in pixels, or (height, width), for which the table of positions is made.
        class_token: have a class token beside the reader.
        reg_tokens: number of register tokens.
        mixers: other token mixers for some blocks, see `visionzoo.layers.mixers.resolve_mixers`.
        in_chans: image channels.
        drop_path_rate: stochastic depth of the last block.
        head: `num_classes`, `global_pool` and `drop_rate` of the head.

    Raises:
        ValueError: if there are no memory tokens, or no mixer has a place for them and `host_classes` are to be kept.
    """

    def __init__(
        self,
        *,
        depth: int = 12,
        embed_dim: int = 192,
        num_heads: int = 3,
        head_dim: int | None = None,
        mlp_ratio: float = 4.0,
        qkv_bias: bool = True,
        memory_tokens: int = 5,
        host_classes: int = 0,
        patch_norm: bool = False,
        norm_eps: float = 1e-6,
        patch_size: int = 16,
        img_size: int | tuple[int, int] = 224,
        class_token: bool = True,
        reg_tokens: int = 0,
        mixers: Any = None,
        in_chans: int = 3,
        drop_path_rate: float = 0.0,
        num_classes: int = 1000,
        global_pool: str | None = None,
        **head: Any,
    ):
        norm = partial(LayerNorm, eps=norm_eps)
        super().__init__(
            blocks=build_blocks(
                embed_dim,
                num_heads,
                [{"type": "full", "qkv_bias": qkv_bias, "head_dim": head_dim}] * depth,
                mixers,
                block=partial(TokenBlock, mlp_ratio=mlp_ratio, norm_layer=norm),
                drop_path_rate=drop_path_rate,
            ),
            embed_dim=embed_dim,
            patch_size=patch_size,
            img_size=img_size,
            stem=NormedPatchStem(in_chans, embed_dim, patch_size) if patch_norm else None,
            class_token=class_token,
            reg_tokens=reg_tokens,
            norm=norm(embed_dim),
            in_chans=in_chans,
            num_classes=host_classes,
            **head,
        )
        if host_classes or has_place_for_prefix_tokens(self.blocks):
            add_memory(self, memory_tokens, num_classes=num_classes, keep_head=bool(host_classes))
        else:
            _logger.warning("MemoryViT: none of the mixers has a place for memory, the model is built without")
        self.default_pool = self.default_pool if global_pool is None else global_pool
        self.reset_classifier(num_classes, self.default_pool)
        norms = ("norm.", "memory.norm.") if host_classes else ("", "norm.")
        self.CHECKPOINT_KEYS = {
            "timm": VIT_KEYS,
            "vit-pytorch": [
                (r"^memory_cls_token$", "memory.token"),
                (r"^memories_per_layer$", tuple(f"blocks.{i}.memory" for i in range(depth))),
                (r"^vit\.mlp_head\.0\.", norms[0] or None),
                (r"^vit\.mlp_head\.1\.", "memory.head.fc." if host_classes else None),
                (r"^mlp_head\.0\.", norms[1]),
                (r"^mlp_head\.1\.", "head.fc."),
                (r"^attn_mask$", None),
                (r"^vit\.pos_embedding$", "positions.table"),
                (r"^vit\.cls_token$", "prefix.cls_token"),
                (r"^vit\.to_patch_embedding\.1\.", "stem.norm1."),
                (r"^vit\.to_patch_embedding\.2\.", "stem.proj."),
                (r"^vit\.to_patch_embedding\.3\.", "stem.norm2."),
                (r"^vit\.transformer\.layers\.", "blocks."),
                (r"\.0\.norm\.", ".norm1."),
                (r"\.0\.to_q\.(weight|bias)$", r".mixer.qkv.\1#0"),
                (r"\.0\.to_kv\.(weight|bias)$", r".mixer.qkv.\1#1"),
                (r"\.0\.to_out\.0\.", ".mixer.proj."),
                (r"\.1\.net\.0\.", ".norm2."),
                (r"\.1\.net\.1\.", ".mlp.fc1."),
                (r"\.1\.net\.4\.", ".mlp.fc2."),
            ],
        }


_NO_WEIGHTS = "the authors published none; those of timm's ViTs fit the host (visionzoo.load_weights)"

VARIANTS = {
    "zoo_memory_vit_t": Variant({}, no_weights=_NO_WEIGHTS),
    "zoo_memory_vit_s": Variant({"embed_dim": 384, "num_heads": 6}, no_weights=_NO_WEIGHTS),
    "zoo_memory_vit_b": Variant({"embed_dim": 768, "num_heads": 12}, no_weights=_NO_WEIGHTS),
    "zoo_memory_vit_l": Variant({"embed_dim": 1024, "depth": 24, "num_heads": 16}, no_weights=_NO_WEIGHTS),
}

_SMALL: dict[str, Any] = {"depth": 2, "embed_dim": 16, "num_heads": 2}
TINY = {
    "zoo_memory_vit_t": _SMALL,
    "zoo_memory_vit_s": _SMALL | {"class_token": False, "patch_norm": True, "qkv_bias": False},
}

register_family(
    __name__,
    MemoryViT,
    VARIANTS,
    tiny=TINY,
    first_conv="stem.conv",
    pool_size=None,
    crop_pct=0.9,
    mean=(0.5, 0.5, 0.5),
    std=(0.5, 0.5, 0.5),
    paper_ids="arXiv:2203.15243",
    origin_url="https://github.com/lucidrains/vit-pytorch",
    license="mit",
)
