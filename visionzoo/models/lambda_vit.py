"""MLP Can Be A Good Transformer Learner, CVPR 2024, https://arxiv.org/abs/2404.05657: attention degenerates into MLP.

Facts from https://github.com/sihaoevery/lambda_vit at 4092b17 (BSD-2-Clause); the code here is our own. DeiT some of
whose blocks fade out their attention in training: they compute (2 - λ)·x + λ·attention(norm(x)), then the MLP's branch.
λ falls from 1 in the first epoch to 0 in epoch 299. At 0 attention and its norm are gone, and the residual is doubled:
2·x. `removed` names such blocks; they have no parameters of attention, and a checkpoint's are left out. `fading` names
those in transition: `visionzoo train` sets their λ before every epoch (`set_epoch`), and what is trained so loads into
a model with `removed` instead of `fading`. The numbers in names are the blocks without attention; the published
accuracies are those of the authors' torch 1.7.1. They publish no parameters or multiply-adds.

Where we differ: images of any size and shape are taken, with positions interpolated.
"""

from __future__ import annotations

from collections.abc import Collection
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from visionzoo.layers.norm import LayerNorm
from visionzoo.layers.tokens import TokenBlock, Tokens
from visionzoo.layers.tracing import replaced
from visionzoo.models._isotropic import VIT_KEYS, Isotropic, build_blocks
from visionzoo.models._registry import Published, Variant, register_family


class FadingBlock(TokenBlock):
    """`TokenBlock` that adds λ times its mixer's branch to 2 - λ times its tokens; λ is the buffer `share`."""

    share: Tensor

    def __init__(self, dim: int, mixer: nn.Module | None, **options: Any):
        super().__init__(dim, mixer, **options)
        self.register_buffer("share", torch.ones(()), persistent=False)

    def init_non_persistent_buffers(self) -> None:
        """Set λ to 1, where the block was built on the meta device."""
        self.share.fill_(1)

    def join_tokens(self, x: Tensor, mixed: Tensor) -> tuple[Tensor, Tensor | None]:
        """Return what becomes of the tokens [B, P + N, C] and the mixer's branch, and its norm where that is known."""
        return super().join_tokens((2 - self.share) * x, self.share * mixed)


class DoublingBlock(TokenBlock):
    """`TokenBlock` that, without a mixer, doubles its tokens in the mixer's place."""

    def mix_channels(self, tokens: Tokens, seen: Tensor | None = None) -> Tokens:  # type: ignore[override]
        """Add the MLP's branch to the doubled tokens."""
        if self.mixer is None:
            tokens = replaced(tokens, x=2 * tokens.x)
            if tokens.reader is not None:
                reader = 2 * tokens.reader
                tokens = replaced(tokens, reader=self.join_channels(reader, self.mlp(self.norm2(reader))))
        return super().mix_channels(tokens, seen)


class LambdaViT(Isotropic):
    """DeiT with blocks whose attention is removed, or fades out in training.

    Args:
        depth: blocks.
        embed_dim: channels.
        num_heads: attention heads.
        mlp_ratio: hidden width of the MLPs over the channels.
        qkv_bias: whether the projections to q, k, v have a bias.
        removed: numbers of the blocks without attention.
        fading: numbers of the blocks whose attention fades out.
        fading_epochs: epochs until it is gone.
        patch_size: side of the patches in pixels.
        img_size: image size in pixels, or (height, width), for which the table of positions is made.
        class_token: have a class token.
        reg_tokens: number of register tokens beside it.
        mixers: other token mixers for some blocks, see `visionzoo.layers.mixers.resolve_mixers`; in a block without
            attention a mixer takes its place.
        in_chans: image channels.
        drop_path_rate: stochastic depth of the last block.
        head: `num_classes`, `global_pool` and `drop_rate` of the head.

    Raises:
        ValueError: if there is no block of a number, or it is removed and fading, or all are removed, or the epochs are
            not positive.
    """

    CHECKPOINT_KEYS = {"authors": VIT_KEYS}

    def __init__(
        self,
        *,
        depth: int = 12,
        embed_dim: int = 192,
        num_heads: int = 3,
        mlp_ratio: float = 4.0,
        qkv_bias: bool = True,
        removed: Collection[int] = (),
        fading: Collection[int] = (),
        fading_epochs: int = 299,
        patch_size: int = 16,
        img_size: int | tuple[int, int] = 224,
        class_token: bool = True,
        reg_tokens: int = 0,
        mixers: Any = None,
        in_chans: int = 3,
        drop_path_rate: float = 0.0,
        **head: Any,
    ):
        wrong = [i for i in (*removed, *fading) if not 0 <= i < depth] or sorted({*removed} & {*fading})
        if wrong or len({*removed}) == depth:
            raise ValueError(
                f"LambdaViT: expected numbers of the {depth} blocks, none of them both removed and fading, and one at "
                f"least with attention, got removed={tuple(removed)} and fading={tuple(fading)}"
            )
        if fading_epochs < 1:
            raise ValueError(f"LambdaViT: fading_epochs must be positive, got {fading_epochs=}")
        self_attention = {"type": "full", "qkv_bias": qkv_bias}
        norm = partial(LayerNorm, eps=1e-6)
        kinds: dict[int, type[TokenBlock]] = {i: DoublingBlock for i in removed} | {i: FadingBlock for i in fading}
        super().__init__(
            blocks=build_blocks(
                embed_dim,
                num_heads,
                [{"type": "none"} if i in removed else self_attention for i in range(depth)],
                mixers,
                block=[partial(kinds.get(i, TokenBlock), mlp_ratio=mlp_ratio, norm_layer=norm) for i in range(depth)],
                drop_path_rate=drop_path_rate,
            ),
            embed_dim=embed_dim,
            patch_size=patch_size,
            img_size=img_size,
            class_token=class_token,
            reg_tokens=reg_tokens,
            norm=norm(embed_dim),
            in_chans=in_chans,
            **head,
        )
        self.fading_epochs = fading_epochs

    def set_epoch(self, epoch: int) -> None:
        """Give attention its share in the fading blocks in an epoch, counted from 0."""
        for block in self.blocks:
            if isinstance(block, FadingBlock):
                block.share.fill_(max(0.0, 1 - epoch / self.fading_epochs))

    def absent(self) -> tuple[str, ...]:
        """Beginnings of the names of tensors that the whole model has and this one was built or pruned without."""
        without = [i for i, block in enumerate(self.blocks) if block.mixer is None]
        return super().absent() + tuple(f"blocks.{i}.{part}." for i in without for part in ("norm1", "mixer"))


_README = "README.md of sihaoevery/lambda_vit"
_CLOUD = "the authors' are linked in https://github.com/sihaoevery/lambda_vit#checkpoints"
_SIZES: dict[str, dict[str, Any]] = {
    "t": {},
    "s": {"embed_dim": 384, "num_heads": 6},
    "b": {"embed_dim": 768, "num_heads": 12},
}
_TOP1 = {
    ("t", "024"): 72.94,
    ("t", "0246"): 71.9,
    ("s", "024"): 80.31,
    ("s", "0246"): 79.9,
    ("b", "01346"): 81.83,
    ("b", "013469"): 81.33,
}

VARIANTS = {
    f"zoo_lambda_vit_{size}_{blocks}": Variant(
        {**_SIZES[size], "removed": tuple(map(int, blocks))}, Published(top1=top1, source=_README), no_weights=_CLOUD
    )
    for (size, blocks), top1 in _TOP1.items()
}

_SMALL: dict[str, Any] = {"depth": 3, "embed_dim": 16, "num_heads": 2}
TINY = {
    "zoo_lambda_vit_t_024": _SMALL | {"removed": (0, 2)},
    "zoo_lambda_vit_s_024": _SMALL | {"removed": (), "fading": (1,)},
}

register_family(
    __name__,
    LambdaViT,
    VARIANTS,
    tiny=TINY,
    first_conv="stem.conv",
    pool_size=None,
    paper_ids="arXiv:2404.05657",
    origin_url="https://github.com/sihaoevery/lambda_vit",
    license="bsd-2-clause",
)
