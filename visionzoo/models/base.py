"""timm's model contract, written once: what every backbone of the zoo is and can do.

Letters of shapes, here and everywhere: B batch, H height, W width, C channels, N tokens, G heads, D head width.

A backbone is `stem`, `stages`, `norm`, `head`, and a stage is `downsample`, `blocks`. Images come in as [B, C, H, W];
inside, maps are contiguous [B, H, W, C]; features leave as [B, C, H, W] (a view in channels_last memory).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from timm.layers import ClassifierHead, calculate_drop_path_rates, trunc_normal_
from timm.models import checkpoint_seq
from timm.models._features import feature_take_indices
from torch import Tensor, nn

from visionzoo.layers.mixers import build_mixer


class Stage(nn.Module):
    """Downsampling, then blocks, then a norm where the family has one there, on [B, H, W, C] maps."""

    def __init__(self, downsample: nn.Module, blocks: Sequence[nn.Module], norm: nn.Module | None = None):
        super().__init__()
        self.downsample = downsample
        self.blocks = nn.Sequential(*blocks)
        self.norm = norm or nn.Identity()
        self.grad_checkpointing = False

    def forward(self, x: Tensor) -> Tensor:
        """[B, H, W, C_in] to [B, H', W', C_out]."""
        return self.norm(self.forward_blocks(self.downsample(x)))

    def forward_blocks(self, x: Tensor) -> Tensor:
        """Run the blocks, with gradient checkpointing where that is set."""
        if self.grad_checkpointing and self.training:
            return checkpoint_seq(self.blocks, x)
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
        ValueError: if the sequences differ in length, or `drop_path_rate` is no probability below 1.
    """
    if not len(embed_dims) == len(depths) == len(num_heads) == len(mixers):
        raise ValueError(
            f"expected one entry for each stage, got embed_dims={tuple(embed_dims)}, depths={tuple(depths)}, "
            f"num_heads={tuple(num_heads)} and {len(mixers)} stages of mixers"
        )
    if not 0 <= drop_path_rate < 1:
        raise ValueError(f"drop_path_rate must be from 0 to below 1, got {drop_path_rate=}")
    rates: Any = calculate_drop_path_rates(drop_path_rate, list(depths), stagewise=True)
    block = [block] * len(depths) if callable(block) else block
    turns = [[one] if callable(one) else one for one in block]
    downsample = [downsample] * (len(depths) - 1) if callable(downsample) else downsample
    stages = []
    for i, dim in enumerate(embed_dims):
        blocks = [
            turns[i][j % len(turns[i])](
                dim, build_mixer(mixers[i][j % len(mixers[i])], dim, num_heads[i]), drop_path=rates[i][j]
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


class Backbone(nn.Module):
    """A hierarchical backbone under timm's contract.

    Args:
        stem: image [B, H, W, in_chans] to the first map [B, H', W', embed_dims[0]].
        stages: each maps [B, H, W, C] to [B, H', W', C'].
        embed_dims: channels of each stage's output.
        reductions: input size over map size for each stage.
        norm: of the last map, [B, H, W, C]; `nn.Identity()` where the family normalises after pooling.
        in_chans: image channels.
        num_classes: classes; 0 for pooled features.
        global_pool: timm's pooling type; "" for none.
        drop_rate: dropout probability before the classifier.
        head_layer: timm's `ClassifierHead`, `NormMlpClassifierHead` or alike, on [B, C, H, W].
    """

    INIT_CONVS = False  # whether convolutions are initialised as linear layers are

    # Checkpoints of others that are the same network: origin -> [(pattern, replacement), ...] for re.sub, in order; the
    # replacement None leaves a tensor out that is not a weight (index tables, masks); a tuple of replacements cuts it
    # into as many equal parts along its first axis; names that end in #0, #1, ... are parts, joined along theirs.
    CHECKPOINT_KEYS: dict[str, list[tuple[str, Any]]] = {}

    stages: nn.ModuleList
    head: Any
    pretrained_cfg: dict[str, Any]  # set by timm

    def __init__(
        self,
        *,
        stem: nn.Module,
        stages: Sequence[Stage],
        embed_dims: Sequence[int],
        reductions: Sequence[int],
        norm: nn.Module,
        in_chans: int,
        num_classes: int = 1000,
        global_pool: str = "avg",
        drop_rate: float = 0.0,
        head_layer: Callable[..., nn.Module] = ClassifierHead,
    ):
        super().__init__()
        self.in_chans = in_chans
        self.num_classes = num_classes
        self.num_features = embed_dims[-1]
        self.feature_info = [
            {"num_chs": dim, "reduction": reduction, "module": f"stages.{i}"}
            for i, (dim, reduction) in enumerate(zip(embed_dims, reductions, strict=True))
        ]
        self.stem = stem
        self.stages = nn.ModuleList(stages)
        self.norm = norm
        try:
            self.head = head_layer(embed_dims[-1], num_classes, pool_type=global_pool, drop_rate=drop_rate)
        except AssertionError as error:  # timm's, of a pooling that the head has no place for
            raise ValueError(f"{type(self).__name__} cannot have {global_pool=}: {error}") from error
        self.init_weights()

    def init_weights(self) -> None:
        """Initialise linear layers as the families here do (truncated normal of std 0.02, no bias); others as torch.

        With `INIT_CONVS` convolutions too.
        """
        kinds = (nn.Linear, nn.Conv2d) if self.INIT_CONVS else nn.Linear
        for module in self.modules():
            if isinstance(module, kinds):
                trunc_normal_(module.weight, std=0.02)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)

    # -- forward ------------------------------------------------------------------------------------------------------

    def forward(self, x: Tensor) -> Tensor:
        """Image [B, in_chans, H, W] to logits [B, num_classes], or pooled features where num_classes is 0."""
        return self.forward_head(self.forward_features(x))

    def forward_features(self, x: Tensor) -> Tensor:
        """Image [B, in_chans, H, W] to the last map, normalised: [B, C, H', W']."""
        x = self.stem(_to_nhwc(x))
        for stage in self.stages:
            x = stage(x)
        return _to_nchw(self.norm(x))

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        """Last map [B, C, H, W] to logits; with `pre_logits` to what the classifier would see."""
        return self.head(x, pre_logits=pre_logits)

    def forward_intermediates(
        self,
        x: Tensor,
        indices: int | Sequence[int] | None = None,
        norm: bool = False,
        stop_early: bool = False,
        output_fmt: str = "NCHW",
        intermediates_only: bool = False,
    ) -> list[Tensor] | tuple[Tensor, list[Tensor]]:
        """Image [B, in_chans, H, W] to the outputs of stages.

        Args:
            x: image.
            indices: which stages: None all, an int the last so many, a sequence these (negative from the end).
            norm: apply the model's last norm to the last stage's output.
            stop_early: leave out stages after the last one asked for.
            output_fmt: "NCHW" or "NHWC".
            intermediates_only: return the list alone, not (last map, list).

        Raises:
            ValueError: if the format is unknown or an index is out of range.
        """
        output_fmt = getattr(output_fmt, "value", output_fmt)
        if output_fmt not in ("NCHW", "NHWC"):
            raise ValueError(f"forward_intermediates: expected output_fmt 'NCHW' or 'NHWC', got {output_fmt!r}")
        take, last = self._take_indices(indices)
        x = self.stem(_to_nhwc(x))
        intermediates = []
        for i, stage in enumerate(self.stages[: last + 1] if stop_early else self.stages):
            x = stage(x)
            if i in take:
                feature = self.norm(x) if norm and i == len(self.feature_info) - 1 else x
                intermediates.append(_to_nchw(feature) if output_fmt == "NCHW" else feature)
        if intermediates_only:
            return intermediates
        return _to_nchw(self.norm(x)), intermediates

    @property
    def head_hidden_size(self) -> int:
        """Width of `forward_head(x, pre_logits=True)`: what the head pools, twice it where two poolings are joined."""
        pool: Any = getattr(self.head, "global_pool", None)
        return getattr(self.head, "in_features", self.num_features) * (
            pool.feat_mult() if hasattr(pool, "feat_mult") else 1
        )

    # -- what others adapt --------------------------------------------------------------------------------------------

    def prune_intermediate_layers(
        self, indices: int | Sequence[int] = 1, prune_norm: bool = False, prune_head: bool = True
    ) -> list[int]:
        """Drop the stages that the features `indices` do not need, and the norm and head; return plain indices.

        Raises:
            ValueError: if an index is out of range.
        """
        take, last = self._take_indices(indices)
        self.stages = self.stages[: last + 1]
        if prune_norm:
            self.norm = nn.Identity()
        if prune_head:
            self.reset_classifier(0, "")
            self.head = _NoHead()
        return take

    def get_classifier(self) -> nn.Module:
        """Return the last linear layer."""
        return self.head.fc

    def reset_classifier(self, num_classes: int, global_pool: str | None = None) -> None:
        """Replace the classifier by a new one; 0 classes for none, `global_pool=''` for no pooling.

        Raises:
            ValueError: if the head has no place for the pooling.
        """
        try:
            self.head.reset(num_classes, global_pool)
        except AssertionError as error:
            raise ValueError(f"{type(self).__name__} cannot have {global_pool=}: {error}") from error
        self.num_classes = num_classes
        parameter = next(self.parameters())
        self.head.to(device=parameter.device, dtype=parameter.dtype)

    def group_matcher(self, coarse: bool = False) -> dict[str, Any]:
        """Patterns that order parameters from input to output, for layer-wise learning-rate decay."""
        if coarse:
            return {"stem": r"^stem", "blocks": r"^stages\.(\d+)"}
        return {
            "stem": r"^stem",
            "blocks": [
                (r"^stages\.(\d+)\.blocks\.(\d+)", None),
                (r"^stages\.(\d+)\.norm", (99999,)),
                (r"^stages\.(\d+)\.", (0,)),
                (r"^norm", (99999,)),
            ],
        }

    def no_weight_decay(self) -> set[str]:
        """Names of parameters of two axes and more that weight decay would harm, as their modules declare them."""
        return {
            f"{name}.{parameter}" if name else parameter
            for name, module in self.named_modules()
            for parameter in getattr(module, "NO_WEIGHT_DECAY", ())
        }

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Recompute blocks in the backward pass instead of keeping their activations."""
        for stage in self.stages:
            stage.grad_checkpointing = enable  # type: ignore[assignment]

    def _take_indices(self, indices: int | Sequence[int] | None) -> tuple[list[int], int]:
        try:
            return feature_take_indices(
                len(self.feature_info), indices if indices is None or isinstance(indices, int) else list(indices)
            )
        except AssertionError as error:
            raise ValueError(
                f"feature indices must be from {-len(self.feature_info)} to {len(self.feature_info) - 1} "
                f"({len(self.feature_info)} stages), got {indices!r}"
            ) from error


class DistilledBackbone(Backbone):
    """A backbone whose head may have a second classifier that learns from a teacher (`BatchNormHead`)."""

    def get_classifier(self) -> Any:
        """Return the last linear layer, or both of a distilled head."""
        return (self.head.fc, self.head.fc_dist) if getattr(self.head, "distilled", False) else self.head.fc

    def set_distilled_training(self, enable: bool = True) -> None:
        """Let training mode return (logits, logits for the teacher's targets) instead of their mean.

        Raises:
            ValueError: if the head has one classifier only.
        """
        if enable and not getattr(self.head, "distilled", False):
            raise ValueError(f"{type(self).__name__} has one classifier: build it with distilled=True to distill")
        self.head.distilled_training = enable


class _NoHead(nn.Identity):
    """In place of a pruned head."""

    fc = None

    def reset(self, num_classes: int, global_pool: str | None = None) -> None:
        if num_classes:
            raise ValueError(f"the head of this model was pruned: cannot set {num_classes=}; build the model anew")


def _to_nhwc(image: Tensor) -> Tensor:
    return image.permute(0, 2, 3, 1).contiguous()


def _to_nchw(x: Tensor) -> Tensor:
    return x.permute(0, 3, 1, 2)
