"""Pyramids: backbones whose stages halve a map, on [B, H, W, C].

A pyramid is `stem`, `stages`, `norm`, `head`, and a stage is `downsample`, `blocks`, `norm`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from inspect import signature
from typing import Any

from timm.layers import ClassifierHead
from torch import Tensor, nn
from typing_extensions import Self, Unpack

from visionzoo.layers.mixers import build_mixer
from visionzoo.layers.nhwc import on_nhwc
from visionzoo.layers.outputs import recomputed
from visionzoo.models._contract import Contract, HeadOptions, drop_path_rates
from visionzoo.text import count_of, some


class Stage(nn.Module):
    """Downsampling, then blocks, then a norm where the family has one there.

    These take maps [B, H, W, C]. The stage itself takes and gives [B, C, H, W], a view in channels_last memory, so that
    hooks, graphs and whoever else takes features at the stages' ends get what they expect.
    """

    def __init__(self, downsample: nn.Module, blocks: Sequence[nn.Module], norm: nn.Module | None = None):
        super().__init__()
        self.downsample = downsample
        self.blocks = nn.Sequential(*blocks)
        self.norm = norm or nn.Identity()
        self.grad_checkpointing = False

    def forward(self, x: Tensor) -> Tensor:
        """[B, C_in, H, W] to [B, C_out, H', W']."""
        return on_nhwc(self.forward_map, x)

    def forward_map(self, x: Tensor) -> Tensor:
        """[B, H, W, C_in] to [B, H', W', C_out]."""
        return self.norm(self.forward_blocks(self.downsample(x)))

    def forward_blocks(self, x: Tensor) -> Tensor:
        """Run the blocks, with gradient checkpointing where that is set."""
        if self.grad_checkpointing and self.training:
            for block in self.blocks:
                x = recomputed(block, x)
            return x
        return self.blocks(x)


def build_stages(
    embed_dims: Sequence[int],
    depths: Sequence[int],
    num_heads: Sequence[int | None],
    mixers: Sequence[Sequence[Mapping[str, Any]]],
    *,
    downsample: Callable[[int, int], nn.Module] | Sequence[Callable[[int, int], nn.Module]],
    block: Callable[..., nn.Module] | Sequence[Callable[..., nn.Module] | Sequence[Callable[..., nn.Module]]],
    stage_norm: Callable[[int], nn.Module] | None = None,
    drop_path_rate: float = 0.0,
) -> list[Stage]:
    """Build the stages of a hierarchical backbone.

    Args:
        embed_dims: channels of each stage.
        depths: blocks in each stage.
        num_heads: heads for each stage's mixers where their options give none.
        mixers: for each stage the specs that its blocks take in turn (`visionzoo.layers.mixers.resolve_mixers`).
        downsample: called with (channels in, channels out) for every stage but the first; or one such for each of them.
        block: called with (channels, mixer, drop_path=rate); or for each stage one such, or several that its blocks
            take in turn.
        stage_norm: called with the channels, for a norm at the end of each stage; None for none.
        drop_path_rate: stochastic depth of the last block; rises linearly from 0 at the first.

    Raises:
        ValueError: if the sequences differ in length, `drop_path_rate` is not a probability below 1, or a mixer is
            one of tokens only.
    """
    if not len(embed_dims) == len(depths) == len(num_heads) == len(mixers):
        raise ValueError(
            f"expected one entry for each stage, got embed_dims={tuple(embed_dims)}, depths={tuple(depths)}, "
            f"num_heads={tuple(num_heads)} and {len(mixers)} stages of mixers"
        )
    if empty := [i for i, stage in enumerate(mixers) if depths[i] and not stage]:
        raise ValueError(f"stages {some(empty)} have blocks, but no mixer; expected one or more for each stage")
    rates = drop_path_rates(drop_path_rate, depths)
    turns = [[one] if callable(one) else one for one in ([block] * len(depths) if callable(block) else block)]
    downsample = [downsample] * (len(depths) - 1) if callable(downsample) else downsample
    stages = []
    for i, dim in enumerate(embed_dims):
        blocks = [
            turns[i][j % len(turns[i])](
                dim, _mixer_of_maps(mixers[i][j % len(mixers[i])], dim, num_heads[i]), drop_path=rates[i][j]
            )
            for j in range(depths[i])
        ]
        stages.append(
            Stage(
                downsample[i - 1](embed_dims[i - 1], dim) if i else nn.Identity(),
                blocks,
                stage_norm(dim) if stage_norm else None,
            )
        )
    return stages


def _mixer_of_maps(spec: Mapping[str, Any], dim: int, num_heads: int | None) -> nn.Module | None:
    mixer = build_mixer(spec, dim, num_heads)
    if mixer is not None and mixer.needs_prefix_tokens:
        raise ValueError(
            f"mixer {spec['type']!r} works on tokens beside a map, such as a class token, and a pyramid has none; use "
            f"it in an isotropic family, such as zoo_convit_t"
        )
    return mixer


def doubling(width: int, depths: Sequence[int], num_heads: Sequence[int] | None = None) -> dict[str, Any]:
    """Return `depths`, `embed_dims` and `num_heads` of a pyramid whose channels double from stage to stage.

    Args:
        width: channels of the first stage.
        depths: blocks of each stage.
        num_heads: heads of each stage; None for heads of 32 channels.
    """
    embed_dims = tuple(width * 2**i for i in range(len(depths)))
    return {"depths": depths, "embed_dims": embed_dims, "num_heads": num_heads or tuple(d // 32 for d in embed_dims)}


def per_stage(family: str, depths: Sequence[int], **option: Any) -> Sequence[Any]:
    """Return an option, given by its name, for each stage: one value that all share, or as many as there are stages.

    Raises:
        ValueError: if there are several values, but not one for each stage; it names `family`.
    """
    ((name, value),) = option.items()
    values = value if isinstance(value, Sequence) else [value] * len(depths)
    if len(values) != len(depths):
        raise ValueError(
            f"{family}: {name} must be one value, or one for each of {count_of(len(depths), 'stage')}, got "
            f"{name}={value}"
        )
    return values


class Pyramid(Contract):
    """A hierarchical backbone: the state is a map [B, C, H, W], a view in channels_last memory.

    Args:
        stem: image [B, in_chans, H, W] to the first map [B, embed_dims[0], H', W'].
        stages: each maps [B, C, H, W] to [B, C', H', W'].
        embed_dims: channels of each stage's output.
        reduction: image size over the first stage's map size; every further stage doubles it.
        norm: of the last map, [B, H, W, C], or a batch norm of [B, C, H, W]; None where the family normalizes after
            pooling.
        head_layer: timm's `ClassifierHead`, `NormMlpClassifierHead` or alike, on [B, C, H, W].
        in_chans: image channels.
        head: see `HeadOptions`.
    """

    UNITS = (
        (r"^stages\.(\d+)\.blocks\.(\d+)", None),
        (r"^stages\.(\d+)\.norm", (99999,)),
        (r"^stages\.(\d+)\.", (0,)),
        (r"^norm", (99999,)),
    )

    stem: nn.Module
    stages: nn.Sequential

    def __new__(cls, *args: Any, **kwargs: Any) -> Self:
        """Check the arguments by name, and that sequences have an entry for each stage.

        Raises:
            TypeError: if the class has no argument of a name.
            ValueError: if one is of another type than the constructor states, or sequences differ in length that the
                family's defaults have in one.
        """
        model = super().__new__(cls, **kwargs)
        own = {name: p.default for name, p in signature(cls).parameters.items() if isinstance(p.default, tuple)}
        stages = len(own.get("depths", ()))
        lengths = {name: len(kwargs.get(name, own[name])) for name in own if len(own[name]) == stages}
        if len(set(lengths.values())) > 1 or 0 in lengths.values():
            each = ", ".join(f"{name}={tuple(kwargs.get(name, own[name]))}" for name in lengths)
            raise ValueError(f"{cls.__name__}: expected one entry for each stage, got {each}")
        return model

    def __init__(
        self,
        *,
        stem: nn.Module,
        stages: Sequence[Stage],
        embed_dims: Sequence[int],
        reduction: int = 4,
        norm: nn.Module | None = None,
        head_layer: Callable[..., nn.Module] = ClassifierHead,
        in_chans: int,
        **head: Unpack[HeadOptions],
    ):
        super().__init__(
            stem={"stem": stem},
            parts=stages,
            norm=norm,
            feature_info=[{"num_chs": dim, "reduction": reduction * 2**i} for i, dim in enumerate(embed_dims)],
            num_features=embed_dims[-1],
            head_layer=head_layer,
            in_chans=in_chans,
            **head,
        )
        self.stages = nn.Sequential(*stages)  # as they are called
        self.norm_on_nchw = isinstance(self.norm, nn.BatchNorm2d)  # or what others put in its place later

    def begin(self, image: Tensor) -> Any:
        """Image [B, in_chans, H, W] to the stem's map [B, C, H', W']."""
        return self.stem(image)

    def read(self, i: int, state: Any, norm: bool = False) -> tuple[Tensor, Tensor | None]:
        """Return the map; the norm is for the last stage only."""
        feature = self.normalize(state) if norm and i == len(self.feature_info) - 1 else state
        return feature.permute(0, 2, 3, 1), None

    def finish(self, state: Any) -> Any:
        """Normalize the last map: [B, C, H, W]."""
        return self.normalize(state)

    def normalize(self, x: Tensor) -> Tensor:
        """Apply the last norm to a map [B, C, H, W]."""
        return self.norm(x) if self.norm_on_nchw else on_nhwc(self.norm, x)

    def prune_intermediate_layers(
        self, indices: int | Sequence[int] = 1, prune_norm: bool = False, prune_head: bool = True
    ) -> list[int]:
        """Drop the stages that the features `indices` do not need, their norm, and the head; return plain indices.

        Raises:
            ValueError: if an index is out of range.
        """
        last = self._take_indices(indices)[1]
        prune_norm = prune_norm or last < len(self.feature_info) - 1  # the norm has the width of the last stage
        return super().prune_intermediate_layers(indices, prune_norm, prune_head)

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Recompute blocks in the backward pass instead of keeping their activations."""
        for stage in self.stages:
            stage.grad_checkpointing = enable  # type: ignore[assignment]

    def blocks_in_order(self) -> Iterator[nn.Module]:
        """Yield the blocks of all stages."""
        for stage in self.stages:
            yield from stage.blocks.children()  # type: ignore[union-attr, operator]
