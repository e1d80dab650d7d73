"""CrossViT: Cross-Attention Multi-Scale Vision Transformer for Image Classification, ICCV 2021, arXiv:2103.14899.

Facts from https://github.com/IBM/CrossViT at 3f7ab77 (Apache-2.0); the code here is our own. As released the branch of
small patches sees the image and the one of large patches the image made smaller, by bicubic interpolation; the models
named after 224 take 240 pixels and make 224 of them, those of 384 take 408. The classifier's mean is one of logits.
A fusion is one attention; more of them, which the authors' code can build and no released model has, would follow on
only the token, and are left out, as are `qk_scale` and dropout other than that of the classifiers.
Where we differ: images of any size and shape are taken, the second view has the same proportion to the first, and
positions are interpolated; the authors resize every image to the two squares that the model is built for.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any

from torch import Tensor, nn

from visionzoo.layers.branches import BranchStems, ClassTokenFusion, MultiScaleBlock
from visionzoo.layers.conv_norm import ConvNorm
from visionzoo.layers.heads import BranchHead, TokenHead
from visionzoo.layers.mixers import build_mixer, resolve_mixers
from visionzoo.layers.norm import LayerNorm
from visionzoo.layers.outputs import recomputed
from visionzoo.layers.stem import ConvNormStem, Stem
from visionzoo.layers.tokens import PrefixTokens, TokenBlock, TokenPositions, Tokens
from visionzoo.layers.tracing import replaced
from visionzoo.models._contract import Contract, drop_path_rates
from visionzoo.models._isotropic import Isotropic, has_place_for_prefix_tokens, takes_prefix_tokens
from visionzoo.models._registry import Published, Variant, register_family

_Norm = partial(LayerNorm, eps=1e-6)
_CONVS = {12: ((4, 3), (3, 0), (1, 1)), 16: ((4, 3), (2, 1), (2, 1))}  # strides and paddings of a patch's convolutions


class CrossViT(Contract):
    """CrossViT.

    Features are, as timm's, the maps of the branch of small patches after each multi-scale block, then those of the
    branch of large patches. Where `features_only` takes none of a later block, class tokens after the last block that
    is left are not fused.

    Args:
        depths: for each multi-scale block the blocks of either branch.
        embed_dims: channels of either branch.
        num_heads: attention heads of either branch.
        mlp_ratios: hidden width of the MLPs of either branch over its channels.
        qkv_bias: whether the projections to q, k, v have a bias.
        patch_sizes: side of the patches of either branch in pixels of its view.
        view_ratio: size of the second branch's view over the image's, a fraction.
        conv_stem: make patches by three convolutions, not one (the models with a dagger).
        img_size: image size in pixels, or (height, width), for which the tables of positions are made.
        mixers: other token mixers for some multi-scale blocks, an entry for each, see
            `visionzoo.layers.mixers.resolve_mixers`; the blocks of either branch take them in turn.
        in_chans: image channels.
        drop_path_rate: stochastic depth of the last block.
        head: `num_classes`, `global_pool` and `drop_rate` of the head.

    Raises:
        ValueError: if arguments are not for two branches, there are no three convolutions for a patch size, or a rate
            is not a probability.
    """

    PARTS = "blocks"
    UNITS = Isotropic.UNITS
    FORMATS = Isotropic.FORMATS
    HEAD_INPUT = "NLC"
    BRANCHES = 2
    FEATURES = (2, 5)
    POOL = "token"
    POOLS = TokenHead.POOLS
    CHECKPOINT_KEYS = {
        "authors": [
            (r"^patch_embed\.(\d)\.proj\.(weight|bias)$", r"stem.\1.conv.\2"),
            (r"^patch_embed\.(\d)\.proj\.(\d)\.", r"stem.\1.\2.conv."),
            (r"^pos_embed[._](\d)$", r"positions.\1.table"),
            (r"^cls_token[._](\d)$", r"prefix.\1.cls_token"),
            (r"^(blocks\.\d+)\.blocks\.", r"\1.branches."),
            (r"\.fusion\.(\d)\.0\.", r".fusion.\1."),  # depths [.., .., 1], the same as [.., .., 0]
            (r"\.projs\.(\d)\.", r".fusion.\1.enter."),
            (r"\.revert_projs\.(\d)\.", r".fusion.\1.leave."),
            (r"\.fusion\.(\d)\.norm1\.", r".fusion.\1.norm."),
            (r"\.fusion\.(\d)\.attn\.wq\.", r".fusion.\1.q."),
            (r"\.fusion\.(\d)\.attn\.wk\.(.*)$", r".fusion.\1.kv.\2#0"),
            (r"\.fusion\.(\d)\.attn\.wv\.(.*)$", r".fusion.\1.kv.\2#1"),
            (r"\.fusion\.(\d)\.attn\.", r".fusion.\1."),
            (r"\.attn\.", ".mixer."),
            (r"^head\.(\d)\.(weight|bias)$", r"head.\1.fc.\2"),
        ],
    }

    stem: nn.Module
    positions: nn.ModuleList
    prefix: nn.ModuleList
    blocks: nn.ModuleList

    def __init__(
        self,
        *,
        depths: Sequence[Sequence[int]] = ((1, 4), (1, 4), (1, 4)),
        embed_dims: Sequence[int] = (96, 192),
        num_heads: Sequence[int] = (3, 3),
        mlp_ratios: Sequence[float] = (4.0, 4.0),
        qkv_bias: bool = True,
        patch_sizes: Sequence[int] = (12, 16),
        view_ratio: tuple[int, int] = (14, 15),
        conv_stem: bool = False,
        img_size: int | tuple[int, int] = 240,
        mixers: Any = None,
        in_chans: int = 3,
        drop_path_rate: float = 0.0,
        **head: Any,
    ):
        given = {"embed_dims": embed_dims, "num_heads": num_heads, "mlp_ratios": mlp_ratios, "patch_sizes": patch_sizes}
        given |= {f"depths[{i}]": pair for i, pair in enumerate(depths)}
        for name, value in given.items():
            if len(value) != 2 or min(value) <= 0:
                raise ValueError(f"CrossViT: {name} must be a positive number for each of 2 branches, got {value!r}")
        if len(view_ratio) != 2 or min(view_ratio) < 1:
            raise ValueError(f"CrossViT: view_ratio must be a fraction, such as (14, 15), got {view_ratio=}")
        rates = drop_path_rates(drop_path_rate, [max(pair) for pair in depths])
        specs = resolve_mixers([[{"type": "full", "qkv_bias": qkv_bias}]] * len(depths), mixers)
        parts = []
        for pair, turns, drops in zip(depths, specs, rates, strict=True):
            branches = [
                [
                    TokenBlock(
                        dim,
                        build_mixer(turns[j % len(turns)], dim, heads),
                        mlp_ratio=ratio,
                        norm_layer=_Norm,
                        drop_path=drops[j],
                    )
                    for j in range(depth)
                ]
                for depth, dim, heads, ratio in zip(pair, embed_dims, num_heads, mlp_ratios, strict=True)
            ]
            fusion = [
                ClassTokenFusion(
                    embed_dims[i], embed_dims[1 - i], num_heads[1 - i], qkv_bias=qkv_bias, drop_path=drops[-1]
                )
                for i in (0, 1)
            ]
            parts.append(MultiScaleBlock(branches, fusion))
        takes_prefix_tokens("CrossViT", parts, 1)  # it says by which mixers class tokens pass; the fusion takes them in
        ratios = ((1, 1), (view_ratio[0], view_ratio[1]))
        make: Callable[..., nn.Module] = _conv_stem if conv_stem else _patch_stem
        stems = [make(in_chans, dim, side) for dim, side in zip(embed_dims, patch_sizes, strict=True)]
        stem = BranchStems(stems, patch_sizes, ratios)
        positions = [
            TokenPositions(dim, size, prefix=1) for dim, size in zip(embed_dims, stem.map_sizes(img_size), strict=True)
        ]
        reductions = [round(side * below / above) for side, (above, below) in zip(patch_sizes, ratios, strict=True)]
        super().__init__(
            stem={
                "stem": stem,
                "positions": nn.ModuleList(positions),
                "prefix": nn.ModuleList(PrefixTokens(dim) for dim in embed_dims),
            },
            parts=parts,
            norm=nn.ModuleList(_Norm(dim) for dim in embed_dims),
            feature_info=[
                {"num_chs": dim, "reduction": reduction}
                for dim, reduction in zip(embed_dims, reductions, strict=True)
                for _ in depths
            ],
            num_features=sum(embed_dims),
            head_layer=partial(BranchHead, dims=embed_dims),
            in_chans=in_chans,
            **head,
        )
        self.num_prefix_tokens = 1
        self.grad_checkpointing = False
        self.pruned: list[str] = []

    def begin(self, image: Tensor) -> Any:
        """Image [B, in_chans, H, W] to the tokens of both branches before the first block."""
        maps = zip(self.stem(image), self.prefix, self.positions, strict=True)
        return tuple([positions(prefix(Tokens.of(x.permute(0, 2, 3, 1)))) for x, prefix, positions in maps])

    def advance(self, i: int, state: Any) -> Any:
        """Take the tokens of both branches through multi-scale block i."""
        if self.grad_checkpointing and self.training:
            return recomputed(self.blocks[i], state)
        return super().advance(i, state)

    def read(self, i: int, state: Any, norm: bool = False) -> tuple[Tensor, Tensor | None]:
        """Return the map and the class token of the branch that feature i is of, normalized on request."""
        branch = i // self.num_parts
        tokens = self._normalize(branch, state[branch]) if norm else state[branch]
        return tokens.map(), tokens.x[:, : tokens.prefix] if tokens.prefix else None

    def finish(self, state: Any) -> Any:
        """Normalize the tokens: [B, 1 + N, C] for each branch."""
        return tuple(self._normalize(branch, tokens).x for branch, tokens in enumerate(state))

    def _normalize(self, branch: int, tokens: Tokens) -> Tokens:
        norm = self.norm[branch] if isinstance(self.norm, nn.ModuleList) else self.norm
        return replaced(tokens, x=norm(tokens.x))

    def get_classifier(self) -> Any:
        """Return the last linear layer of each branch, or the module that replaced the head."""
        return tuple(head.fc for head in self.head) if isinstance(self.head, BranchHead) else super().get_classifier()

    def prune_intermediate_layers(
        self, indices: int | Sequence[int] = 1, prune_norm: bool = False, prune_head: bool = True
    ) -> list[int]:
        """Drop what the features `indices` do not need, and the norm and head; return plain indices.

        With the head goes what only class tokens or maps need that no feature depends on: the last fusion, and blocks,
        stem and norm of a branch.

        Raises:
            ValueError: if an index is out of range.
        """
        take = super().prune_intermediate_layers(indices, prune_norm, prune_head)
        if not prune_head:
            return take
        maps: set[int] = set()  # branches whose map is needed after a part, and those whose class token is
        tokens: set[int] = set()
        for part in range(len(self.blocks) - 1, -1, -1):
            block: Any = self.blocks[part]
            maps |= {0, 1} if tokens else {i // self.num_parts for i in take if i % self.num_parts == part}
            self._drop(f"blocks.{part}.fusion", {0, 1} - tokens)
            self._drop(f"blocks.{part}.branches", {0, 1} - maps)
            tokens |= {branch for branch in maps if has_place_for_prefix_tokens(block.branches[branch].children())}
        self._drop("stem", {0, 1} - maps)
        self._drop("positions", {0, 1} - maps)
        self._drop("prefix", {0, 1} - tokens)
        if isinstance(self.norm, nn.ModuleList):
            self._drop("norm", {0, 1} - {i // self.num_parts for i in take})
        return take

    def _drop(self, path: str, branches: set[int]) -> None:
        for branch in sorted(branches):
            self.pruned.append(f"{path}.{branch}.")
            self.set_submodule(f"{path}.{branch}", nn.Identity())

    def absent(self) -> tuple[str, ...]:
        """Beginnings of the names of tensors that the whole model has and this one was built or pruned without."""
        return (*super().absent(), *self.pruned)

    def set_input_size(self, img_size: int | tuple[int, int]) -> None:
        """Make the tables of positions those for images of this size in pixels, so that none is interpolated."""
        stem: Any = self.stem
        for positions, size in zip(self.positions, stem.map_sizes(img_size), strict=True):
            positions.set_size(size)  # type: ignore[operator]

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Recompute multi-scale blocks in the backward pass instead of keeping their activations."""
        self.grad_checkpointing = enable

    def blocks_in_order(self) -> Iterator[nn.Module]:
        """Yield the blocks of all multi-scale blocks, those of one branch after those of the other."""
        for part in self.blocks:
            yield from part.blocks  # type: ignore[union-attr, misc]


def _patch_stem(in_chans: int, dim: int, side: int) -> nn.Module:
    return ConvNormStem(in_chans, dim, side, side)


def _conv_stem(in_chans: int, dim: int, side: int) -> nn.Module:
    if side not in _CONVS:
        raise ValueError(f"CrossViT: conv_stem=True needs patch_sizes of {sorted(_CONVS)}, got {side}")
    layers: list[nn.Module] = []
    dims = (in_chans, dim // 4, dim // 2, dim)
    for i, (stride, padding) in enumerate(_CONVS[side]):
        layers += [ConvNorm(dims[i], dims[i + 1], 3 if i else 7, stride, padding), nn.ReLU()]
    return Stem(*layers[:-1])


_PAPER = "paper, not checked against its text"
_SIZES: dict[str, dict[str, Any]] = {
    "t": {},
    "s": {"embed_dims": (192, 384), "num_heads": (6, 6)},
    "b": {"embed_dims": (384, 768), "num_heads": (12, 12)},
    "9": {"embed_dims": (128, 256), "num_heads": (4, 4), "depths": ((1, 3),) * 3, "mlp_ratios": (3.0, 3.0)},
    "15": {"embed_dims": (192, 384), "num_heads": (6, 6), "depths": ((1, 5),) * 3, "mlp_ratios": (3.0, 3.0)},
    "18": {"embed_dims": (224, 448), "num_heads": (7, 7), "depths": ((1, 6),) * 3, "mlp_ratios": (3.0, 3.0)},
}
_PUBLISHED = {  # millions of parameters, GMACs, top-1
    "t": (6.9, 1.6, 73.4),
    "s": (26.7, 5.6, 81.0),
    "b": (104.7, 21.2, 82.2),
    "9": (8.6, 1.8, 73.9),
    "15": (27.4, 5.8, 81.5),
    "18": (43.3, 9.0, 82.5),
    "9_dagger": (8.8, 2.0, 77.1),
    "15_dagger": (28.2, 6.1, 82.3),
    "18_dagger": (44.3, 9.5, 82.8),
    "15_dagger_384": (28.5, 21.4, 83.5),
    "18_dagger_384": (44.6, 32.4, 83.9),
}


def _variant(name: str) -> Variant:
    size, *more = name.split("_")
    kwargs, side = dict(_SIZES[size]), 240
    weights: dict[str, Any] = {"tag": "in1k"}
    if "dagger" in more:
        kwargs["conv_stem"] = True
        weights["first_conv"] = ("stem.0.0.conv", "stem.1.0.conv")
    if "384" in more:
        side = 408
        kwargs |= {"img_size": side, "view_ratio": (16, 17)}
        weights["crop_pct"] = 1.0
    theirs = {"t": "tiny", "s": "small", "b": "base"}.get(size, size) + ("_dagger" if "dagger" in more else "")
    weights |= {"hf_hub_id": f"timm/crossvit_{theirs}_{side}.in1k", "input_size": (3, side, side)}
    params, gmacs, top1 = _PUBLISHED[name]
    return Variant(kwargs, Published(params, gmacs, top1, size=side, source=_PAPER), weights)


VARIANTS = {f"zoo_crossvit_{name}": _variant(name) for name in _PUBLISHED}

_TINY = {"depths": ((1, 2), (1, 1), (1, 1)), "embed_dims": (16, 24), "num_heads": (2, 2)}
TINY = {"zoo_crossvit_t": _TINY, "zoo_crossvit_9_dagger": _TINY}

register_family(
    __name__,
    CrossViT,
    VARIANTS,
    tiny=TINY,
    first_conv=("stem.0.conv", "stem.1.conv"),
    classifier=("head.0.fc", "head.1.fc"),
    pool_size=None,
    paper_ids="arXiv:2103.14899",
    origin_url="https://github.com/IBM/CrossViT",
    license="apache-2.0",
)
