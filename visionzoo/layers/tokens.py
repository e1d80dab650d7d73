"""Tokens of a map with prefix tokens (a class token and the like) before them, and the block that takes them."""

from __future__ import annotations

from math import isqrt
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from timm.layers import to_2tuple, trunc_normal_
from torch import Tensor, nn

from visionzoo.layers.arguments import Natural, Positive
from visionzoo.layers.block import Block
from visionzoo.layers.mixers.base import Mixer
from visionzoo.layers.part import Part
from visionzoo.layers.position import Mode, places_of, resize_table
from visionzoo.layers.tracing import one_node, replaced


class Tokens(NamedTuple):
    """A map as tokens, with P prefix tokens before them.

    Reducers (`visionzoo.layers.reducers`) leave M of the N = H·W tokens. Before them M is N, the last three are None.
    """

    x: Tensor  # [B, P + M, C]
    size: tuple[int, int]  # height and width of the map
    prefix: int = 0  # P
    source: Tensor | None = None  # [B, N]: which of the M tokens each place of the map reads, -1 where it was dropped
    keep: Tensor | None = None  # [B, M]: False for tokens that only fill the shape; None where there are none
    scores: Tensor | None = None  # [B, M]: what the last block says of its tokens, for the reducer that follows
    reader: Tensor | None = None  # [B, 1, C], a token that sees the others and that they do not see (`Memory`)

    @classmethod
    def of(cls, x: Tensor) -> Tokens:
        """Take a map [B, H, W, C]."""
        return cls(x.flatten(1, 2), (x.shape[1], x.shape[2]))

    def map(self) -> Tensor:
        """Return only the map: [B, H, W, C], zeros where a reducer dropped the token."""
        x = self.x[:, self.prefix :]
        if self.source is not None or self.keep is not None:
            x = put_back(x, self.source, self.keep)
        return x.unflatten(1, self.size)

    def with_map(self, x: Tensor) -> Tokens:
        """Put another map [B, H, W, C] in place of this one, behind the same prefix tokens; dropped tokens stay so."""
        x = x.flatten(1, 2)
        if self.source is not None:
            x = take_up(x, self.source, self.x.shape[1] - self.prefix)
        return replaced(self, x=torch.cat([self.x[:, : self.prefix], x], dim=1) if self.prefix else x)


def tokens_at(x: Tensor, at: Tensor) -> Tensor:
    """Return those of the tokens [B, N, C] that are at the places [B, K], [B, K, C]."""
    return x.gather(1, at.unsqueeze(-1).expand(-1, -1, x.shape[2]))


@one_node
def put_back(x: Tensor, source: Tensor | None, keep: Tensor | None, fill: Tensor | None = None) -> Tensor:
    """Put the tokens that reducers left back to their places.

    Args:
        x: tokens [B, M, C].
        source: which of them each of the N places reads, [B, N], see `Tokens`.
        keep: which of them are there, [B, M].
        fill: what dropped places get, [B, 1, C]; None for zeros.

    Returns:
        [B, N, C].
    """
    fill = x.new_zeros(()) if fill is None else fill
    if keep is not None:
        x = torch.where(keep.unsqueeze(-1), x, fill)
    if source is None:
        return x
    if x.shape[1] == 0:  # no image has kept a token
        return fill.expand(x.shape[0], source.shape[1], x.shape[2])
    placed = tokens_at(x, source.clamp(min=0))
    return torch.where((source >= 0).unsqueeze(-1), placed, fill)


@one_node
def take_up(x: Tensor, source: Tensor | None, tokens: int) -> Tensor:
    """[B, N, C] at the places of a map to the M tokens that are left, [B, M, C]; what `put_back` undoes."""
    if source is None:
        return x
    return tokens_at(x, places_of(source, tokens))


@one_node
def mean_token(x: Tensor, keep: Tensor | None) -> Tensor:
    """Return the mean [B, 1, C] of those of the tokens [B, M, C] that are there, `keep` [B, M]; of none it is zeros."""
    if keep is None:
        return x.mean(1, keepdim=True) if x.shape[1] else x.new_zeros(x.shape[0], 1, x.shape[2])
    weights = keep.unsqueeze(-1).to(x.dtype)
    return (x * weights).sum(1, keepdim=True) / weights.sum(1, keepdim=True).clamp(min=1)


def mix_tokens(mixer: nn.Module, tokens: Tokens, unnormed: Tokens | None = None) -> Tensor:
    """Return what a mixer of maps makes of tokens, [B, P + M, C].

    Where the mixer has a place for prefix tokens (`Mixer.takes_prefix_tokens`), they take part like any other token.
    Else it sees only the map, and the prefix tokens get zeros: a residual branch leaves them as they are. Tokens that
    reducers left are for mixers that `takes_dropped_tokens`, as those who put the reducers in have checked. A mixer
    that `sees_input` gets `unnormed`, the tokens before the norm, as well.
    """
    given = [tokens] if unnormed is None or not getattr(mixer, "sees_input", False) else [tokens, unnormed]
    reduced = tokens.source is not None or tokens.keep is not None
    if reduced or (tokens.prefix and isinstance(mixer, Mixer) and mixer.takes_prefix_tokens):
        return mixer(*(each.x.unsqueeze(1) for each in given), **_beside(mixer, tokens)).squeeze(1)
    mixed = mixer(*(each.map() for each in given)).flatten(1, 2)
    return F.pad(mixed, (0, 0, tokens.prefix, 0)) if tokens.prefix else mixed


def mix_and_score(mixer: nn.Module, tokens: Tokens, kind: str) -> tuple[Tensor, Tensor]:
    """Return what a mixer makes of tokens, [B, P + M, C], and its scores of the map's tokens, [B, M].

    Args:
        mixer: one that gives scores of this kind, see `Mixer.SCORES`.
        tokens: what it mixes.
        kind: of the scores.
    """
    mixed, scores = mixer(tokens.x.unsqueeze(1), score=kind, **_beside(mixer, tokens))
    return mixed.squeeze(1), scores[:, tokens.prefix :]


def _beside(mixer: Any, tokens: Tokens) -> dict[str, Any]:
    """Return what a mixer takes beside the tokens."""
    beside: dict[str, Any] = {"map_size": tokens.size} if mixer.needs_map_size or mixer.needs_places else {}
    if mixer.needs_places:
        beside = {**beside, "prefix": tokens.prefix, "source": tokens.source}
    if mixer.takes_dropped_tokens:
        beside["keep"] = _with_prefix(tokens.keep, tokens.prefix)
    return beside


@one_node
def _with_prefix(keep: Tensor | None, prefix: int) -> Tensor | None:
    """[B, M] to [B, P + M]: prefix tokens always stay."""
    return keep if keep is None else F.pad(keep, (prefix, 0), value=True)


class TokenBlock(Block):
    """`Block` on `Tokens`; its convolutions `cpe1` and `cpe2`, its `peg` and its gate see only the map.

    `reducer` is a place for a reducer of the tokens that come in, and `score` says what the reducer of the next block
    needs to know of those that go out (`visionzoo.models._reducing` fills both). `memory` is one for memory tokens
    [M, C] (`visionzoo.models._memory` fills it). Then the tokens' `reader` goes through the block like a further token
    of theirs, for which the mixer sees the memory tokens, too.
    """

    score = ""  # a kind of `Mixer.SCORE_KINDS`, or "shift": how far the MLP moved each token
    takes_memory = True  # whether `forward` takes a reader through

    def __init__(self, dim: int, mixer: nn.Module | None, **options: Any):
        super().__init__(dim, mixer, **options)
        self.reducer: nn.Module | None = None
        self.register_parameter("memory", None)

    @property
    def NO_WEIGHT_DECAY(self) -> tuple[str, ...]:
        """Names of the parameters, which weight decay would harm."""
        return () if self.memory is None else ("memory",)

    def forward(self, tokens: Tokens) -> Tokens:  # type: ignore[override]
        """Take the tokens through the block; without a reducer their number stays."""
        if self.reducer is not None:
            x, source, keep = self.reducer(tokens.x, tokens.source, tokens.keep, tokens.scores, tokens.prefix)
            tokens = replaced(tokens, x=x, source=source, keep=keep, scores=None)
        if self.cpe1 is not None:
            tokens = tokens.with_map(self.cpe1(x := tokens.map(), residual=x))
        seen = None
        if self.mixer is not None:
            normalized = replaced(tokens, x=self.norm1(tokens.x))
            if tokens.reader is not None and self.memory is not None:
                tokens = replaced(tokens, reader=self.read(tokens.reader, normalized))
            if self.score in Mixer.SCORE_KINDS:
                mixed, scores = mix_and_score(self.mixer, normalized, self.score)
                tokens = replaced(tokens, scores=scores)
            else:
                mixed = mix_tokens(self.mixer, normalized, tokens)
            x, seen = self.join_tokens(tokens.x, mixed)
            tokens = replaced(tokens, x=x)
        if self.cpe2 is not None:
            tokens = tokens.with_map(self.cpe2(x := tokens.map(), residual=x))
        return self.mix_channels(tokens, seen)

    def mix_channels(self, tokens: Tokens, seen: Tensor | None = None) -> Tokens:  # type: ignore[override]
        """Add the MLP's branch to the tokens; it sees `norm2` of them, or `seen` [B, P + N, C] in its place."""
        before = tokens.x
        branch = replaced(tokens, x=self.mlp(self.norm2(before) if seen is None else seen))
        if not isinstance(self.branch_gate, nn.Identity):
            branch = branch.with_map(self.branch_gate(branch.map()))
        tokens = replaced(tokens, x=self.join_channels(before, branch.x))
        if self.score == "shift":
            tokens = replaced(tokens, scores=_length((tokens.x - before)[:, tokens.prefix :]))
        return tokens if isinstance(self.peg, nn.Identity) else tokens.with_map(self.peg(tokens.map()))

    def join_channels(self, x: Tensor, branch: Tensor) -> Tensor:
        """Return what becomes of the tokens [B, P + N, C] and the MLP's branch."""
        return self._add(x, branch, self.ls2)

    def read(self, reader: Tensor, seen: Tokens) -> Tensor:
        """Take the reader [B, 1, C] through the block; it sees the other tokens as the mixer does."""
        mixer: Any = self.mixer
        memory: Any = self.memory
        memory = memory.to(seen.x.dtype).expand(seen.x.shape[0], -1, -1)
        mixed = mixer.mix_first(torch.cat([self.norm1(reader), memory, seen.x], 1), **_beside(mixer, seen))
        reader, normalized = self.join_tokens(reader, mixed)
        return self._add(reader, self.mlp(self.norm2(reader) if normalized is None else normalized), self.ls2)


class OneNormTokenBlock(TokenBlock):
    """`TokenBlock` whose mixer and MLP share the norm `norm2` (Activator, NiNformer); options as those of `Block`."""

    def __init__(self, dim: int, mixer: Mixer | None, **options: Any):
        super().__init__(dim, mixer, **options)
        if mixer is not None:
            del self.norm1

    @property
    def norm1(self) -> nn.Module:  # type: ignore[override]
        """The norm of the MLP's branch, which serves the mixer's too."""
        return self.norm2


def _length(x: Tensor) -> Tensor:
    """[B, M, C] to the vectors' lengths [B, M], float32 at least; no gradient passes."""
    x = x.detach()
    return torch.linalg.vector_norm(x.to(torch.promote_types(x.dtype, torch.float32)), dim=-1)


def map_size(img_size: int | tuple[int, int], patch_size: int) -> tuple[int, int]:
    """Return height and width of the map of patches, the last ones padded, of an image of this size in pixels.

    Raises:
        ValueError: if it is not a size.
    """
    height, width = to_2tuple(img_size)
    if min(height, width) < 1:
        raise ValueError(f"img_size must be pixels or (height, width), got {img_size!r}")
    return -(-height // patch_size), -(-width // patch_size)


class PrefixTokens(Part):
    """Learned tokens that are put before those of a map: class, distillation, registers, in this order.

    Args:
        dim: channels C.
        class_token: have a class token.
        dist_token: have a distillation token.
        reg_tokens: number of registers.

    >>> PrefixTokens(8, reg_tokens=4)(Tokens.of(torch.zeros(2, 3, 5, 8))).x.shape
    torch.Size([2, 20, 8])
    """

    def __init__(self, dim: Positive, *, class_token: bool = True, dist_token: bool = False, reg_tokens: int = 0):
        super().__init__()
        counts = {"cls_token": int(class_token), "dist_token": int(dist_token), "reg_token": reg_tokens}
        if reg_tokens < 0:
            raise ValueError(f"PrefixTokens: reg_tokens must not be negative, got {reg_tokens=}")
        self.dim = dim
        self.names = tuple(name for name, count in counts.items() if count)
        for name in self.names:
            self.register_parameter(name, nn.Parameter(torch.zeros(1, counts[name], dim)))
            trunc_normal_(self.get_parameter(name), std=0.02)
        self.count = sum(counts.values())

    @property
    def NO_WEIGHT_DECAY(self) -> tuple[str, ...]:
        """Names of the parameters, which weight decay would harm."""
        return self.names

    def forward(self, tokens: Tokens) -> Tokens:
        """Put the prefix tokens before those that are there."""
        self.check_inputs("B N C", tokens.x, any_dtype=True, C=self.dim)
        own = [getattr(self, name).expand(tokens.x.shape[0], -1, -1) for name in self.names]
        x = torch.cat([*(t.to(tokens.x.dtype) for t in own), tokens.x], 1)
        return replaced(tokens, x=x, prefix=self.count)


class TokenPositions(Part):
    """A learned vector for each token, added to it; those of the map are interpolated to maps of other sizes.

    Args:
        dim: channels C.
        size: height and width of the map that the table is made for.
        prefix: prefix tokens that have vectors too; 0 leaves them without.
        mode: of the interpolation, "bilinear" or "bicubic".
    """

    NO_WEIGHT_DECAY: tuple[str, ...] = ("table",)

    def __init__(self, dim: Positive, size: tuple[int, int], *, prefix: Natural = 0, mode: Mode = "bicubic"):
        super().__init__()
        if min(size) < 1:
            raise ValueError(f"TokenPositions: size must be positive, got {size=}")
        self.size, self.prefix, self.mode = tuple(size), prefix, mode
        self.table = nn.Parameter(torch.zeros(1, prefix + size[0] * size[1], dim))
        trunc_normal_(self.table, std=0.02)

    def forward(self, tokens: Tokens) -> Tokens:
        """Add the positions, in the tokens' dtype."""
        self.check_inputs("B N C", tokens.x, any_dtype=True, C=self.table.shape[2])
        table = self.resized(tokens.size).to(tokens.x.dtype)
        if missing := tokens.prefix - self.prefix:
            table = F.pad(table, (0, 0, missing, 0))
        return replaced(tokens, x=tokens.x + table)

    def resized(self, size: tuple[int, int]) -> Tensor:
        """Return the table [1, P + H·W, C] for a map of this size."""
        return _resize(self.table, self.prefix, self.size, size, self.mode)

    @torch.no_grad()
    def set_size(self, size: tuple[int, int]) -> None:
        """Make the table one for maps of this size."""
        self.table = nn.Parameter(self.resized(size).clone(), requires_grad=self.table.requires_grad)
        self.size = tuple(size)

    def fit_weight(self, name: str, weight: Tensor) -> Tensor:
        """Bring a checkpoint's table, of a square map with as many prefix tokens or none, to the size of ours.

        Raises:
            ValueError: if the table is not one of a square map.
        """
        for prefix in dict.fromkeys((self.prefix, 0, 1, 2)):
            side = isqrt(weight.shape[1] - prefix)
            if side * side == weight.shape[1] - prefix:
                break
        else:
            raise ValueError(
                f"{name}: expected positions [1, P + N, C] of a square map with {self.prefix} prefix tokens, got "
                f"{tuple(weight.shape)}"
            )
        if prefix < self.prefix:  # the model's further prefix tokens start without position
            weight, prefix = F.pad(weight, (0, 0, self.prefix - prefix, 0)), self.prefix
        weight = weight[:, prefix - self.prefix :]
        return _resize(weight, self.prefix, (side, side), self.size, self.mode)


def _resize(table: Tensor, prefix: int, old: tuple[int, ...], new: tuple[int, ...], mode: str) -> Tensor:
    on_map = resize_table(table[:, prefix:].unflatten(1, old), (new[0], new[1]), mode).flatten(1, 2)
    return torch.cat([table[:, :prefix], on_map], 1) if prefix else on_map
