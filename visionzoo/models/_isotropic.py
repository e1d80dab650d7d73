"""Isotropic backbones: patches become tokens of one width, which stay as they are to the end.

Such a backbone is `stem`, `positions`, `prefix`, `blocks`, `norm`, `head`; positions and prefix tokens are optional.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from typing_extensions import Self, Unpack

from visionzoo.layers.heads import TokenHead
from visionzoo.layers.memory import Memory
from visionzoo.layers.mixers import build_mixer, resolve_mixers
from visionzoo.layers.mixers.base import Mixer
from visionzoo.layers.outputs import recomputed
from visionzoo.layers.stem import ConvNormStem
from visionzoo.layers.tokens import (
    PrefixTokens,
    TokenBlock,
    TokenPositions,
    Tokens,
    map_size,
    mean_token,
    put_back,
)
from visionzoo.layers.tracing import replaced
from visionzoo.models._contract import Contract, HeadOptions, drop_path_rates

_logger = logging.getLogger(__name__)

VIT_KEYS: list[tuple[str, Any]] = [  # entries of `Contract.CHECKPOINT_KEYS` for names as in timm's ViT
    (r"^patch_embed\.proj\.", "stem.conv."),
    (r"^pos_embed$", "positions.table"),
    (r"^(cls_token|dist_token|reg_token)$", r"prefix.\1"),
    (r"\.attn\.", ".mixer."),
    (r"^head\.(weight|bias)$", r"head.fc.\1"),
]


def build_blocks(
    dim: int,
    num_heads: int | None,
    own: Sequence[Mapping[str, Any]],
    mixers: Any,
    *,
    block: Callable[..., nn.Module] | Sequence[Callable[..., nn.Module]] = TokenBlock,
    build: Callable[..., nn.Module | None] = build_mixer,
    drop_path_rate: float = 0.0,
) -> list[nn.Module]:
    """Build the blocks of an isotropic backbone.

    Args:
        dim: channels.
        num_heads: heads of mixers whose options give none.
        own: for each block the spec of the family's mixer.
        mixers: the caller's in their place: None, a spec for all blocks, or an entry for each block
            (`visionzoo.layers.mixers.resolve_mixers`).
        block: called with (dim, mixer, drop_path=rate); or one such for each block.
        build: called with (spec, dim, num_heads), where the family's own mixer is none that others take.
        drop_path_rate: stochastic depth of the last block; rises linearly from 0 at the first.

    Raises:
        ValueError: if a mixer is unknown, or `drop_path_rate` is not a probability below 1.
    """
    (rates,) = drop_path_rates(drop_path_rate, [len(own)])
    specs = resolve_mixers([[spec] for spec in own], mixers)
    blocks = block if isinstance(block, Sequence) else [block] * len(own)
    return [
        make(dim, build(turns[0], dim, num_heads), drop_path=rate)
        for make, turns, rate in zip(blocks, specs, rates, strict=True)
    ]


class Isotropic(Contract):
    """A backbone of one width: the state is `visionzoo.layers.tokens.Tokens`.

    Args:
        blocks: each takes and returns `Tokens`.
        embed_dim: channels.
        patch_size: side of the patches in pixels. Images are padded with zeros to whole patches.
        img_size: pixels, or (height, width), that the table of positions is made for; others interpolate it.
        stem: image [B, in_chans, H, W] to a map [B, embed_dim, H / patch_size, W / patch_size]; None for a convolution.
        class_token: have a class token.
        dist_token: have a distillation token.
        reg_tokens: number of registers.
        prefix_at: the block before which these tokens join; 0 for the first.
        positions: which tokens have learned positions: "all", "map" or "none".
        norm: of the tokens after the last block; None for none.
        pos_drop_rate: dropout probability of the tokens before the first block.
        head_layer: `visionzoo.layers.heads.TokenHead` or alike, on [B, P + N, C].
        in_chans: image channels.
        head: see `HeadOptions`. The pooling is "token" where there is a class token that some mixer takes in, and "avg"
            elsewhere.

    Raises:
        ValueError: if the head is to read a class token that passes by all mixers.
    """

    PARTS = "blocks"
    UNITS = ((r"^blocks\.(\d+)", None), (r"^norm", (99999,)))
    FORMATS = ("NCHW", "NHWC", "NLC")
    HEAD_INPUT = "NLC"
    FEATURES = 3
    POOL = "token"
    POOLS: tuple[str, ...] = TokenHead.POOLS
    test_registers = 0  # tokens of zeros that join before block `registers_at`
    registers_at = 0
    register_neurons: Mapping[int, tuple[int, ...]] = {}  # whose activations they have, by the number of the block

    stem: nn.Module
    prefix: PrefixTokens
    positions: TokenPositions
    blocks: nn.ModuleList

    def __init__(
        self,
        *,
        blocks: Sequence[nn.Module],
        embed_dim: int,
        patch_size: int = 16,
        img_size: int | tuple[int, int] = 224,
        stem: nn.Module | None = None,
        class_token: bool = True,
        dist_token: bool = False,
        reg_tokens: int = 0,
        prefix_at: int = 0,
        positions: str = "all",
        norm: nn.Module | None = None,
        pos_drop_rate: float = 0.0,
        head_layer: Callable[..., nn.Module] = TokenHead,
        in_chans: int = 3,
        **head: Unpack[HeadOptions],
    ):
        if positions not in ("all", "map", "none"):
            raise ValueError(f"{type(self).__name__}: positions must be 'all', 'map' or 'none', got {positions=}")
        prefix = PrefixTokens(embed_dim, class_token=class_token, dist_token=dist_token, reg_tokens=reg_tokens)
        modules: dict[str, nn.Module] = {
            "stem": stem or ConvNormStem(in_chans, embed_dim, patch_size, patch_size, pad_to_stride=True)
        }
        if positions != "none":
            modules["positions"] = TokenPositions(
                embed_dim, map_size(img_size, patch_size), prefix=prefix.count if positions == "all" else 0
            )
        if prefix.count:
            modules["prefix"] = prefix
        if not class_token:
            self.POOLS = tuple(pool for pool in self.POOLS if pool != "token")
        given = head.get("global_pool")
        seen = takes_prefix_tokens(type(self).__name__, blocks[prefix_at:], prefix.count)
        if given == "token" and class_token and not seen:
            raise ValueError(
                f"{type(self).__name__}: the class token would never see the image, for none of the mixers has a place "
                f"for tokens beside the map; pass global_pool='avg', or keep a mixer that has, such as 'full'"
            )
        if given is None:
            head["global_pool"] = "token" if class_token and seen else "avg"
        super().__init__(
            stem=modules,
            parts=blocks,
            norm=norm,
            feature_info=[{"num_chs": embed_dim, "reduction": patch_size}] * len(blocks),
            num_features=embed_dim,
            head_layer=partial(head_layer, prefix_tokens=prefix.count),
            in_chans=in_chans,
            **head,
        )
        self.patch_size, self.prefix_at, self.num_prefix_tokens = patch_size, prefix_at, prefix.count
        self.pos_drop = nn.Dropout(pos_drop_rate)
        self.memory: Memory | None = None  # `visionzoo.models._memory` fills it
        self.grad_checkpointing = False

    def begin(self, image: Tensor) -> Tokens:
        """Image [B, in_chans, H, W] to the tokens before the first block."""
        return self.join(Tokens.of(self.stem(image).permute(0, 2, 3, 1)))

    def join(self, tokens: Tokens) -> Tokens:
        """Join the map's tokens with the prefix tokens, where these come before the first block, and add positions."""
        if self.prefix_at == 0 and hasattr(self, "prefix"):
            tokens = self.prefix(tokens)
        if hasattr(self, "positions"):
            tokens = self.positions(tokens)
        tokens = replaced(tokens, x=self.pos_drop(tokens.x))
        return tokens if self.memory is None else self.memory(tokens)

    def advance(self, i: int, state: Any) -> Any:
        """Take the tokens through block i."""
        if i == self.prefix_at and i and hasattr(self, "prefix"):
            state = self.prefix(state)
        if self.test_registers and i == self.registers_at:
            state = self.add_registers(state)
        if self.grad_checkpointing and self.training:
            return recomputed(self.blocks[i], state)
        return super().advance(i, state)

    def add_registers(self, state: Any) -> Any:
        """Put `test_registers` tokens of zeros behind the prefix tokens (`visionzoo.models._registers`)."""
        tokens = state if isinstance(state, Tokens) else state.tokens
        x, prefix = tokens.x, tokens.prefix
        zeros = x.new_zeros(1, 1, 1).expand(x.shape[0], self.test_registers, x.shape[2])
        x = torch.cat([x[:, :prefix], zeros, x[:, prefix:]], 1)
        tokens = replaced(tokens, x=x, prefix=prefix + self.test_registers)
        return tokens if isinstance(state, Tokens) else replaced(state, tokens=tokens)

    def read(self, i: int, state: Any, norm: bool = False) -> tuple[Tensor, Tensor | None]:
        """Return the map and the prefix tokens, normalized on request."""
        x, prefix = state.map(), state.x[:, : state.prefix] if state.prefix else None
        if norm:
            x, prefix = self.norm(x), None if prefix is None else self.norm(prefix)
        if self.memory is not None:
            reader = self.memory.normalized(state, self.norm) if norm else state.reader
            prefix = reader if prefix is None else torch.cat([reader, prefix], 1)
        return x, prefix

    def finish(self, state: Any) -> Any:
        """Normalize the tokens: [B, P + N, C]; with a memory, its reader is the first of the P.

        For the places of dropped tokens see `visionzoo.models._reducing`.
        """
        x = self._normalized(state)
        return x if self.memory is None else torch.cat([self.memory.normalized(state, self.norm), x], 1)

    def _normalized(self, state: Any) -> Tensor:
        if state.source is None and state.keep is None:
            return self.norm(state.x)
        x, tokens = state.x[:, : state.prefix], state.x[:, state.prefix :]
        if getattr(self.head, "pool_type", "") in ("", "token"):
            return self.norm(torch.cat([x, put_back(tokens, state.source, state.keep)], 1))
        tokens = self.norm(tokens)
        fill = mean_token(tokens, state.keep)
        return torch.cat([self.norm(x), put_back(tokens, state.source, state.keep, fill)], 1)

    def forward_tasks(self, x: Tensor) -> tuple[Any, Any]:
        """Image to the logits of the task that has the memory, and to those of the model without it, in one pass.

        Raises:
            ValueError: if the model has no memory, or none beside its own head.
        """
        if self.memory is None or self.memory.head is None:
            raise ValueError(
                f"forward_tasks: this {type(self).__name__} has one task; build it with memory=5, which adds another"
            )
        features = self.forward_features(x)
        return self.head(features), self.memory.head(features[:, 1:].contiguous())

    def train(self, mode: bool = True) -> Self:
        """Set training mode; with a memory beside its own head the model itself stays in that of evaluation."""
        super().train(mode)
        if self.memory is not None and self.memory.head is not None:
            for module in (
                *(getattr(self, name) for name in self.stem_names),
                self.blocks,
                self.norm,
                self.memory.head,
            ):
                module.eval()
        return self

    def prune_intermediate_layers(
        self, indices: int | Sequence[int] = 1, prune_norm: bool = False, prune_head: bool = True
    ) -> list[int]:
        """Drop the blocks that the features `indices` do not need, and the norm and head; return plain indices.

        Prefix tokens go too where no block that is left takes them in, and a memory goes with the head.

        Raises:
            ValueError: if an index is out of range.
        """
        take = super().prune_intermediate_layers(indices, prune_norm, prune_head)
        if prune_head and self.memory is not None:
            self.memory = None
            self.num_prefix_tokens -= 1
            for block in self.blocks:
                block.register_parameter("memory", None)
        if prune_head and hasattr(self, "prefix") and not has_place_for_prefix_tokens(self.blocks[self.prefix_at :]):
            self.num_prefix_tokens -= self.prefix.count
            del self.prefix
            self.stem_names = tuple(name for name in self.stem_names if name != "prefix")
        return take

    def absent(self) -> tuple[str, ...]:
        """Beginnings of the names of tensors that the whole model has and this one was built or pruned without."""
        names = super().absent()
        if self.memory is None:
            names += ("memory.", *(f"blocks.{i}.memory" for i in range(len(self.blocks))))
        return names if hasattr(self, "prefix") else (*names, "prefix.")

    def set_input_size(self, img_size: int | tuple[int, int]) -> None:
        """Make the table of positions one for images of this size in pixels, so that none is interpolated for them."""
        if hasattr(self, "positions"):
            self.positions.set_size(map_size(img_size, self.patch_size))

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Recompute blocks in the backward pass instead of keeping their activations."""
        self.grad_checkpointing = enable

    def blocks_in_order(self) -> Iterator[nn.Module]:
        """Yield the blocks."""
        yield from self.blocks


def takes_prefix_tokens(family: str, blocks: Sequence[nn.Module], count: int) -> bool:
    """Whether prefix tokens meet the map's in some block; log which mixers they pass by."""
    passed = sorted({type(mixer).__name__ for mixer in mixers_of(blocks) if not mixer.takes_prefix_tokens})
    if count and passed:
        _logger.warning("%s: %d prefix tokens pass by %s unchanged", family, count, ", ".join(passed))
    return not mixers_of(blocks) or has_place_for_prefix_tokens(blocks)


def mixers_of(blocks: Iterable[nn.Module]) -> list[Mixer]:
    """Return the mixers inside blocks."""
    return [module for block in blocks for module in block.modules() if isinstance(module, Mixer)]


def has_place_for_prefix_tokens(blocks: Iterable[nn.Module]) -> bool:
    """Whether any mixer of these blocks takes in tokens that are not the map's."""
    return any(mixer.takes_prefix_tokens for mixer in mixers_of(blocks))
