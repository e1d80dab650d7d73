"""Mega: Moving Average Equipped Gated Attention, ICLR 2023, https://arxiv.org/abs/2209.10655: its image classifiers.

Facts from https://github.com/XuezheMax/mega-image at df6b22f (MIT); the code here is our own. As released: patches are
a sequence, row by row, of which attention sees moving averages; there is no class token, and every token is projected
before the mean. The transforms of the averages are float32 at least (theirs always float32). Where we differ: images of
any size and shape are taken, with positions interpolated, as are the biases of distances, read as offsets on the map
that they were made for. Stochastic depth leaves a branch out, where the released code gates towards zeros in its place.
Dropout inside the blocks, which is off in the released training, is not here. Only the base model was trained.
"""

from __future__ import annotations

from functools import partial
from typing import Any

from torch import Tensor, nn

from visionzoo.layers.heads import TokenHead
from visionzoo.layers.norm import LayerNorm, ScaleNorm, TokenBatchNorm
from visionzoo.layers.stem import PatchStem
from visionzoo.layers.tokens import TokenBlock, map_size
from visionzoo.models._isotropic import Isotropic, build_blocks
from visionzoo.models._registry import Published, Variant, register_family


class ProjectionTokenHead(TokenHead):
    """Projection of every token with SiLU, pooling, hidden layer with SiLU where there is one, linear classifier.

    Args:
        in_features: channels C.
        num_classes: classes; 0 for what the classifier would see.
        pool_type: see `TokenHead`.
        drop_rate: dropout probability before the classifier.
        prefix_tokens: how many tokens are not the map's.
        hidden_features: channels of the hidden layer; None for none.
    """

    POOLS = ("avg", "max", "avgmax", "")

    def __init__(
        self,
        in_features: int,
        num_classes: int,
        pool_type: str = "avg",
        drop_rate: float = 0.0,
        *,
        prefix_tokens: int = 0,
        hidden_features: int | None = None,
    ):
        super().__init__(hidden_features or in_features, num_classes, pool_type, drop_rate, prefix_tokens=prefix_tokens)
        self.dim = in_features
        self.proj, self.act = nn.Linear(in_features, in_features), nn.SiLU()
        self.hidden = nn.Linear(in_features, hidden_features) if hidden_features else None

    def pool(self, x: Tensor) -> Tensor:
        """[B, P + N, C] to [B, C'], or [B, P + N, C'] where there is no pooling."""
        x = super().pool(self.act(self.proj(x)))
        return x if self.hidden is None else self.act(self.hidden(x))


class Mega(Isotropic):
    """Mega.

    Args:
        depth: blocks.
        embed_dim: channels.
        value_ratio: channels of the attention's values over the channels.
        mlp_ratio: hidden width of the MLPs over the channels.
        qk_dim: channels of queries and keys.
        num_averages: moving averages of each channel and direction.
        norm_layer: "layer_norm", "scale_norm" or "batch_norm".
        attention: what makes weights of scores, "laplace", "relu2" or "softmax".
        hidden_features: channels of a hidden layer before the classifier; None for none.
        position_table: add a learned vector to each patch.
        patch_size: side of the patches in pixels.
        img_size: image size in pixels, or (height, width), for which the tables of positions are made.
        mixers: other token mixers for some blocks, see `visionzoo.layers.mixers.resolve_mixers`.
        in_chans: image channels.
        drop_path_rate: stochastic depth of the last block.
        head: `num_classes`, `global_pool` and `drop_rate` of the head.

    Raises:
        ValueError: if norm or attention are others.
    """

    NORMS = {"layer_norm": LayerNorm, "scale_norm": ScaleNorm, "batch_norm": TokenBatchNorm}
    POOL = "avg"
    POOLS = ProjectionTokenHead.POOLS
    CHECKPOINT_KEYS = {
        "authors": [
            (r"^pos_embed$", "positions.table"),
            (r"^patch_embed\.pemb\.proj\.", "stem.conv."),
            (r"\.mega_layer\.norm\.norm\.", ".norm1."),
            (r"\.mega_layer\.move\.", ".mixer.average."),
            (r"\.mega_layer\.rel_pos_bias\.rel_pos_bias$", ".mixer.bias.table"),
            (r"\.mega_layer\.", ".mixer."),
            (r"\.nffn\.norm\.norm\.", ".norm2."),
            (r"\.nffn\.", ".mlp."),
            (r"^final_norm\.norm\.", "norm."),
            (r"^out_proj\.fc\.", "head.proj."),
            (r"^pre_logits\.fc\.", "head.hidden."),
            (r"^head\.(weight|bias)$", r"head.fc.\1"),
        ]
    }
    CHECKPOINT_KEYS["authors, with batch norm"] = [
        *CHECKPOINT_KEYS["authors"],
        (r"((^|\.)norm[12]?)\.", r"\1.bn."),
    ]

    def __init__(
        self,
        *,
        depth: int = 12,
        embed_dim: int = 192,
        value_ratio: float = 2.0,
        mlp_ratio: float = 2.0,
        qk_dim: int = 64,
        num_averages: int = 16,
        norm_layer: str = "layer_norm",
        attention: str = "laplace",
        hidden_features: int | None = None,
        position_table: bool = True,
        patch_size: int = 16,
        img_size: int | tuple[int, int] = 224,
        mixers: Any = None,
        in_chans: int = 3,
        drop_path_rate: float = 0.0,
        **head: Any,
    ):
        if norm_layer not in self.NORMS:
            raise ValueError(f"Mega: unknown {norm_layer=}, expected one of {tuple(self.NORMS)}")
        if hidden_features is not None and hidden_features < 1:
            raise ValueError(f"Mega: hidden_features must be positive or None, got {hidden_features=}")
        norm = self.NORMS[norm_layer]
        own = {
            "type": "moving_average",
            "value_ratio": value_ratio,
            "qk_dim": qk_dim,
            "num_averages": num_averages,
            "attention": attention,
            "map_size": map_size(img_size, patch_size),
        }
        super().__init__(
            blocks=build_blocks(
                embed_dim,
                None,
                [own] * depth,
                mixers,
                block=partial(TokenBlock, mlp_ratio=mlp_ratio, norm_layer=norm, act_layer=nn.SiLU),
                drop_path_rate=drop_path_rate,
            ),
            embed_dim=embed_dim,
            patch_size=patch_size,
            img_size=img_size,
            stem=PatchStem(in_chans, embed_dim, patch_size),
            class_token=False,
            positions="map" if position_table else "none",
            norm=norm(embed_dim),
            head_layer=partial(ProjectionTokenHead, hidden_features=hidden_features),
            in_chans=in_chans,
            **head,
        )


VARIANTS = {
    "zoo_mega_t": Variant({}, Published(), no_weights="none were published"),
    "zoo_mega_b": Variant(
        {"embed_dim": 768, "qk_dim": 256},
        Published(90, top1=82.4, source="paper, as quoted by others, not checked against its text"),
        no_weights="the authors' are linked in https://github.com/XuezheMax/mega-image#model-checkpoints",
    ),
}

TINY: dict[str, dict[str, Any]] = {
    "zoo_mega_t": {"depth": 2, "embed_dim": 16, "qk_dim": 8, "num_averages": 4, "img_size": 64}
}

register_family(
    __name__,
    Mega,
    VARIANTS,
    tiny=TINY,
    first_conv="stem.conv",
    pool_size=None,
    paper_ids="arXiv:2209.10655",
    origin_url="https://github.com/XuezheMax/mega-image",
    license="mit",
)
