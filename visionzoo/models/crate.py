"""CRATE: White-Box Transformers via Sparse Rate Reduction, NeurIPS 2023, https://arxiv.org/abs/2306.01129.

Facts from model/crate.py of https://github.com/Ma-Lab-Berkeley/CRATE at 674408f (MIT); the code here is our own. A
block is two steps on one objective: attention inside subspaces, added to the tokens, lowers their coding rate there; a
step towards sparse codes (ISTA), which starts from the normalized tokens and is added to nothing, makes values zero.
`visionzoo sparse-rate` measures both, layer by layer. Patches are normalized before and after their projection, over
all channels of the image together: weights for three channels fit no other number, and are refused.

Left out are dropout, which no released model has, and the mean of all tokens before the norm as another pooling; "avg"
here is that of the map's normalized tokens. The autoencoders of the same repository (CRATE-MAE) are not here. Where we
differ: images of any size and shape are taken, padded to whole patches and with positions interpolated.
"""

from __future__ import annotations

from functools import partial
from typing import Any

from torch import Tensor, nn

from visionzoo.layers.mlp import IstaStep
from visionzoo.layers.norm import LayerNorm
from visionzoo.layers.stem import NormedPatchStem
from visionzoo.layers.tokens import TokenBlock
from visionzoo.models._isotropic import Isotropic, build_blocks
from visionzoo.models._registry import Published, Variant, register_family


class SparseBlock(TokenBlock):
    """Block whose second step takes the place of the tokens; stochastic depth is only that of the first."""

    def join_channels(self, x: Tensor, branch: Tensor) -> Tensor:
        """Return the codes [B, P + N, C], which have the tokens in them."""
        return branch


class CRATE(Isotropic):
    """CRATE.

    Args:
        depth: blocks.
        embed_dim: channels.
        num_heads: subspaces, attention heads.
        head_dim: dimensions of a subspace; None for embed_dim / num_heads.
        step_size: η of the step towards sparse codes, positive.
        penalty: λ of their absolute sum, not negative.
        patch_size: side of the patches in pixels.
        img_size: image size in pixels, or (height, width), for which the table of positions is made.
        class_token: have a class token.
        reg_tokens: number of register tokens beside it.
        mixers: other token mixers for some blocks, see `visionzoo.layers.mixers.resolve_mixers`.
        in_chans: image channels.
        drop_path_rate: stochastic depth of the last block.
        head: `num_classes`, `global_pool` and `drop_rate` of the head.

    Raises:
        ValueError: if `step_size` or `penalty` is out of its range.
    """

    CHECKPOINT_KEYS = {
        "authors": [
            (r"^to_patch_embedding\.1\.", "stem.norm1."),
            (r"^to_patch_embedding\.2\.", "stem.proj."),
            (r"^to_patch_embedding\.3\.", "stem.norm2."),
            (r"^pos_embedding$", "positions.table"),
            (r"^cls_token$", "prefix.cls_token"),
            (r"^transformer\.layers\.(\d+)\.0\.norm\.", r"blocks.\1.norm1."),
            (r"^transformer\.layers\.(\d+)\.0\.fn\.qkv\.", r"blocks.\1.mixer.subspaces."),
            (r"^transformer\.layers\.(\d+)\.0\.fn\.to_out\.0\.", r"blocks.\1.mixer.proj."),
            (r"^transformer\.layers\.(\d+)\.1\.norm\.", r"blocks.\1.norm2."),
            (r"^transformer\.layers\.(\d+)\.1\.fn\.", r"blocks.\1.mlp."),
            (r"^mlp_head\.0\.", "norm."),
            (r"^mlp_head\.1\.", "head.fc."),
        ],
    }

    def __init__(
        self,
        *,
        depth: int = 12,
        embed_dim: int = 384,
        num_heads: int = 6,
        head_dim: int | None = None,
        step_size: float = 0.1,
        penalty: float = 0.1,
        patch_size: int = 16,
        img_size: int | tuple[int, int] = 224,
        class_token: bool = True,
        reg_tokens: int = 0,
        mixers: Any = None,
        in_chans: int = 3,
        drop_path_rate: float = 0.0,
        **head: Any,
    ):
        super().__init__(
            blocks=build_blocks(
                embed_dim,
                num_heads,
                [{"type": "subspace", "head_dim": head_dim}] * depth,
                mixers,
                block=partial(SparseBlock, mlp_layer=partial(IstaStep, step_size=step_size, penalty=penalty)),
                drop_path_rate=drop_path_rate,
            ),
            embed_dim=embed_dim,
            patch_size=patch_size,
            img_size=img_size,
            stem=NormedPatchStem(in_chans, embed_dim, patch_size),
            class_token=class_token,
            reg_tokens=reg_tokens,
            norm=LayerNorm(embed_dim),
            in_chans=in_chans,
            **head,
        )

    def init_weights(self) -> None:
        """Initialize as released: linear layers as torch's, positions and prefix tokens standard normal."""
        for parameter in (self.positions.table, *(p for n, p in self.named_parameters() if n.startswith("prefix."))):
            nn.init.normal_(parameter)


def _published(params_m: float, top1: float, **kwargs: Any) -> Variant:
    small = kwargs.get("embed_dim") == 576
    return Variant(
        kwargs,
        Published(params_m, top1=top1, source="paper, table 1, not checked against its text"),
        no_weights="the authors' is linked in https://github.com/Ma-Lab-Berkeley/CRATE#pre-trained-checkpoints-imagenet-1k"
        if small
        else "the authors published none for this size",
    )


VARIANTS = {
    "zoo_crate_t": _published(6.09, 66.7),
    "zoo_crate_s": _published(13.12, 69.2, embed_dim=576, num_heads=12),
    "zoo_crate_b": _published(22.80, 70.8, embed_dim=768, num_heads=12),
    "zoo_crate_l": _published(77.64, 71.3, depth=24, embed_dim=1024, num_heads=16),
}

TINY = {"zoo_crate_t": {"depth": 2, "embed_dim": 16, "num_heads": 2, "img_size": 64}}

register_family(
    __name__,
    CRATE,
    VARIANTS,
    tiny=TINY,
    first_conv=(),  # patches are normalized over all channels: there is none that could be cut to others
    pool_size=None,
    interpolation="bilinear",
    paper_ids="arXiv:2306.01129",
    origin_url="https://github.com/Ma-Lab-Berkeley/CRATE",
    license="mit",
)
