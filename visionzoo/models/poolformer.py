"""PoolFormer: MetaFormer Is Actually What You Need for Vision, CVPR 2022, https://arxiv.org/abs/2111.11418.

Facts from https://github.com/sail-sg/poolformer at a075575 (Apache-2.0); the code here is our own. As the authors' and
unlike timm's `poolformer_*` the last map is normalized over channels and positions before it is pooled. timm's weights
are the authors' and load here, but give the authors' logits, not timm's. Norms of the maps that only their detection
and segmentation backbones have (`norm0` to `norm6`) are left out when those checkpoints are loaded: `out_norm` of the
detection configs is their place.

`zoo_metaformer_*` are the repository's networks of the same shape with other mixers: none but the norm ("id"), or
attention in the last one or two stages ("pppa", "ppaa"), which follow a table of positions, interpolated to other maps
than theirs. Those with a linear layer over the places ("pppf", "ppff") are not here.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

from timm.layers import to_2tuple
from torch import Tensor, nn

from visionzoo.layers.block import Block
from visionzoo.layers.conv_norm import ConvNorm
from visionzoo.layers.mixers import combine_mixers, resolve_mixers
from visionzoo.layers.nhwc import GroupNorm1
from visionzoo.layers.norm import LayerNorm
from visionzoo.layers.position import PositionTable
from visionzoo.layers.stem import ConvNormStem
from visionzoo.models._pyramid import Pyramid, build_stages
from visionzoo.models._registry import Published, Variant, register_family


class MapPositions(PositionTable):
    """A `PositionTable` whose checkpoints may have the channels first, [1, C, h, w]."""

    def fit_weight(self, name: str, weight: Tensor) -> Tensor:
        """Bring a checkpoint's table, channels first or last, to the size of ours."""
        dim = self.table.shape[3]
        if weight.ndim == 4 and weight.shape[1] == dim != weight.shape[3]:
            weight = weight.permute(0, 2, 3, 1)
        return super().fit_weight(name, weight)


class PoolFormer(Pyramid):
    """PoolFormer.

    Args:
        depths: blocks of each stage.
        embed_dims: channels of each stage.
        pool_size: side of the pooled neighborhood, odd.
        mlp_ratio: hidden width of the MLPs over the channels.
        layer_scale: initial value of the learned scales of both branches; 0 for no scales.
        norm_layer: "group_norm", of a whole map, or "layer_norm", of each token.
        mixers: other token mixers for some stages, see `visionzoo.layers.mixers.resolve_mixers`.
        in_chans: image channels.
        drop_path_rate: stochastic depth of the last block.
        head: `num_classes`, `global_pool` and `drop_rate` of the head.

    Raises:
        ValueError: if the norm is another.
    """

    NORMS: dict[str, type[nn.Module]] = {"group_norm": GroupNorm1, "layer_norm": LayerNorm}
    CHECKPOINT_KEYS = {
        "authors": [
            (r"^norm\d\.", None),
            (r"^patch_embed\.proj\.", "stem.conv."),
            (r"^network\.([135])\.proj\.", lambda m: f"stages.{(int(m[1]) + 1) // 2}.downsample.conv."),
            (r"^network\.([0246])\.(\d+)\.", lambda m: f"stages.{int(m[1]) // 2}.blocks.{m[2]}."),
            (r"\.layer_scale_([12])$", r".ls\1.gamma"),
            (r"^head\.(weight|bias)$", r"head.fc.\1"),
        ],
        "timm": [
            (r"\.layer_scale([12])\.scale$", r".ls\1.gamma"),
            (r"^head\.norm\.", "norm."),
        ],
    }

    def __init__(
        self,
        *,
        depths: Sequence[int] = (2, 2, 6, 2),
        embed_dims: Sequence[int] = (64, 128, 320, 512),
        pool_size: int = 3,
        mlp_ratio: float = 4.0,
        layer_scale: float = 1e-5,
        norm_layer: str = "group_norm",
        mixers: Any = None,
        in_chans: int = 3,
        drop_path_rate: float = 0.0,
        **head: Any,
    ):
        if norm_layer not in self.NORMS:
            raise ValueError(f"{type(self).__name__}: unknown {norm_layer=}, expected one of {tuple(self.NORMS)}")
        norm = self.NORMS[norm_layer]
        super().__init__(
            stem=ConvNormStem(in_chans, embed_dims[0], 7, 4, 2),
            stages=build_stages(
                embed_dims,
                depths,
                [None] * len(depths),
                resolve_mixers([[{"type": "pool", "pool_size": pool_size}]] * len(depths), mixers),
                downsample=self._downsamples(embed_dims),
                block=partial(self._block, mlp_ratio=mlp_ratio, norm_layer=norm, layer_scale=layer_scale or None),
                drop_path_rate=drop_path_rate,
            ),
            embed_dims=embed_dims,
            norm=norm(embed_dims[-1]),
            in_chans=in_chans,
            **head,
        )

    @staticmethod
    def _block(dim: int, mixer: nn.Module | None, **options: Any) -> Block:
        return Block(dim, mixer, **options)

    def _downsamples(self, embed_dims: Sequence[int]) -> Sequence[Any]:
        return [partial(ConvNorm, kernel_size=3, stride=2, padding=1)] * (len(embed_dims) - 1)


class MetaFormer(PoolFormer):
    """PoolFormer with mixers by their initials, and a table of positions before the first that attends.

    Args:
        token_mixers: for each stage "identity", "pool" or "attention", whose heads are 32 channels wide.
        img_size: image size in pixels, or (height, width), for which the table is made.
        norm_layer: as `PoolFormer` takes it.
        embed_dims: channels of each stage.
        depths: blocks of each stage.
        mixers: other token mixers for some stages, see `visionzoo.layers.mixers.resolve_mixers`.
        others: as `PoolFormer` takes them.

    Raises:
        ValueError: if a mixer or the norm is another, or the first stage attends.
    """

    MIXERS: dict[str, dict[str, Any]] = {
        "identity": {"type": "none"},
        "pool": {"type": "pool"},
        "attention": {"type": "full"},
    }

    def __init__(
        self,
        *,
        token_mixers: Sequence[str] = ("pool", "pool", "pool", "attention"),
        img_size: int | tuple[int, int] = 224,
        depths: Sequence[int] = (2, 2, 6, 2),
        embed_dims: Sequence[int] = (64, 128, 320, 512),
        norm_layer: str = "layer_norm",
        mixers: Any = None,
        **others: Any,
    ):
        if wrong := [name for name in token_mixers if name not in self.MIXERS]:
            raise ValueError(f"MetaFormer: unknown token_mixers {wrong}, expected some of {tuple(self.MIXERS)}")
        attends = [i for i, name in enumerate(token_mixers) if name == "attention"]
        self._positions_at = attends[0] if attends else 0
        if attends and not self._positions_at:
            raise ValueError(f"MetaFormer: the first stage cannot attend, got token_mixers={tuple(token_mixers)}")
        shrinks = 4 * 2**self._positions_at
        height, width = to_2tuple(img_size)
        self._table_size = (-(-height // shrinks), -(-width // shrinks))
        super().__init__(
            depths=depths,
            embed_dims=embed_dims,
            norm_layer=norm_layer,
            mixers=combine_mixers([[self.MIXERS[name]] for name in token_mixers], mixers),
            **others,
        )

    @staticmethod
    def _block(dim: int, mixer: nn.Module | None, **options: Any) -> Block:
        return Block(dim, nn.Identity() if mixer is None else mixer, **options)

    def _downsamples(self, embed_dims: Sequence[int]) -> Sequence[Any]:
        downsamples = list(super()._downsamples(embed_dims))
        if at := self._positions_at:
            conv = downsamples[at - 1]
            downsamples[at - 1] = lambda in_dim, dim: nn.Sequential(
                conv(in_dim, dim), MapPositions(dim, self._table_size, std=0)
            )
        return downsamples

    @property
    def CHECKPOINT_KEYS(self) -> dict[str, list[tuple[str, Any]]]:  # type: ignore[override]
        """Tables of names; where there are positions, they count as one of the authors' layers."""
        at = self._positions_at
        place = 2 * at if at else 99

        def renumber(m: Any) -> str:
            return f"network.{int(m[1]) - (int(m[1]) > place)}."

        return {
            "authors": [
                (rf"^network\.{place}\.pos_embed$", f"stages.{at}.downsample.1.table"),
                (r"^network\.(\d+)\.", renumber),
                (r"\.token_mixer\.(qkv|proj)\.", r".mixer.\1."),
                *PoolFormer.CHECKPOINT_KEYS["authors"],
                (rf"^stages\.{at or 99}\.downsample\.conv\.", f"stages.{at}.downsample.0.conv."),
            ]
        }


def _weights(size: str, crop_pct: float) -> dict[str, Any]:
    return {"tag": "sail_in1k", "hf_hub_id": f"timm/poolformer_{size}.sail_in1k", "crop_pct": crop_pct}


_README = "README.md of sail-sg/poolformer"
_S36, _M48 = (6, 6, 18, 6), (8, 8, 24, 8)
_M = {"embed_dims": (96, 192, 384, 768), "layer_scale": 1e-6}

VARIANTS = {
    "zoo_poolformer_s12": Variant(
        {"depths": (2, 2, 6, 2)}, Published(12, 1.8, 77.2, source=_README), _weights("s12", 0.9)
    ),
    "zoo_poolformer_s24": Variant(
        {"depths": (4, 4, 12, 4)}, Published(21, 3.4, 80.3, source=_README), _weights("s24", 0.9)
    ),
    "zoo_poolformer_s36": Variant(
        {"depths": _S36, "layer_scale": 1e-6}, Published(31, 5.0, 81.4, source=_README), _weights("s36", 0.9)
    ),
    "zoo_poolformer_m36": Variant(
        {"depths": _S36, **_M}, Published(56, 8.8, 82.1, source=_README), _weights("m36", 0.95)
    ),
    "zoo_poolformer_m48": Variant(
        {"depths": _M48, **_M}, Published(73, 11.6, 82.5, source=_README), _weights("m48", 0.95)
    ),
}

_RELEASES = "https://github.com/sail-sg/poolformer/releases/download/v1.0"


def _metaformer(mixers: str, weights: str, **options: Any) -> Variant:
    names = {"i": "identity", "p": "pool", "a": "attention"}
    return Variant(
        {"token_mixers": tuple(names[letter] for letter in mixers), **options},
        no_weights=f"timm has none; the authors' are at {_RELEASES}/{weights}.pth.tar",
    )


METAFORMERS = {
    "zoo_metaformer_id_s12": _metaformer("iiii", "metaformer_id_s12", norm_layer="group_norm"),
    "zoo_metaformer_pppa_s12": _metaformer("pppa", "metaformer_pppa_s12_224"),
    "zoo_metaformer_ppaa_s12": _metaformer("ppaa", "metaformer_ppaa_s12_224"),
}

_SMALL: dict[str, Any] = {"depths": (1, 1, 1, 1), "embed_dims": (8, 16, 16, 24)}
TINY = {"zoo_poolformer_s12": _SMALL, "zoo_metaformer_ppaa_s12": _SMALL, "zoo_metaformer_id_s12": _SMALL}

for _model, _variants in ((PoolFormer, VARIANTS), (MetaFormer, METAFORMERS)):
    register_family(
        __name__,
        _model,
        _variants,
        tiny=TINY,
        first_conv="stem.conv",
        paper_ids="arXiv:2111.11418",
        origin_url="https://github.com/sail-sg/poolformer",
        license="apache-2.0",
    )
