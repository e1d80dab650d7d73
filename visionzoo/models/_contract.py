"""timm's model contract, written once, over a list of parts and whatever state passes between them.

Letters of shapes, here and everywhere: B batch, H height, W width, C channels, N tokens, P prefix tokens (class token
and the like), G heads, D head width.

An image becomes a state (`begin`), the parts advance it (`advance`), a map is read from it (`read`), and the state at
the end becomes what the head takes (`finish`). The state may be a map, a map with prefix tokens, two sets of tokens, or
anything else that is a tensor or a (named) tuple of them. `Pyramid` and `Isotropic` are the two that families build on.
Images come in as [B, C, H, W]; inside, maps are contiguous [B, H, W, C]; features leave as [B, C, H, W] (a view in
channels_last memory).
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import partial
from typing import Any, TypedDict

from timm.layers import calculate_drop_path_rates, trunc_normal_
from timm.models._features import feature_take_indices
from torch import Tensor, nn
from typing_extensions import Self

from visionzoo.layers.arguments import check_arguments
from visionzoo.layers.nhwc import DepthwiseConvNHWC
from visionzoo.layers.outputs import Exit, Outputs, WithOutputs, collect


class HeadOptions(TypedDict, total=False):
    """What every family takes for its head."""

    num_classes: int  # classes; 0 for pooled features
    global_pool: str  # timm's name of the pooling; "" for none
    drop_rate: float  # dropout probability before the classifier


class Contract(WithOutputs):
    """timm's interface over a list of parts.

    Args:
        stem: modules that an image passes before the parts, by name.
        parts: modules that the state passes through; their outputs are the features.
        norm: of the features after the last part; None where there is none.
        feature_info: for each feature what timm asks: `num_chs`, `reduction` (image size over map size). There is one
            for each part, or as many for each; then those of the first kind of all parts come first, and so on.
        num_features: channels that the head takes.
        head_layer: called with (num_features, num_classes, pool_type=..., drop_rate=...), as timm's heads.
        in_chans: image channels.
        head: see `HeadOptions`.

    Raises:
        ValueError: if the head has no place for the pooling.
    """

    PARTS = "stages"  # name of the list of parts
    UNITS: tuple[tuple[str, tuple[int, ...] | None], ...] = ()  # timm's patterns of layers that learn at one rate
    FORMATS: tuple[str, ...] = ("NCHW", "NHWC")  # of features
    HEAD_INPUT = "NCHW"  # what `forward_features` returns and the head takes; "NLC" for tokens, "NCHW, NLC" for both
    BRANCHES = 1  # how many such, in a tuple where there are several
    FEATURES: int | tuple[int, ...] = 4  # which of them, or how many of the last, features_only gives by default
    POOL = "avg"  # pooling where the caller names none
    POOLS: tuple[str, ...] = ("", "avg", "max", "avgmax", "catavgmax")  # poolings that the head has a place for
    UNFOLDED = ""  # pattern of batch norms that `visionzoo.fuse` leaves, for no layer comes directly before them
    INIT_CONVS = False  # whether convolutions are initialized as linear layers are
    ANY_SIZE = True  # whether images of any size are taken, or only of the model's own `img_size`
    DYNAMIC_SIZE = True  # whether torch.export makes a program for images of any size
    TWICE = True  # whether gradients have gradients under `use_backend("reference")`
    AUXILIARY: Mapping[str, float] = {}  # weights of what `exits` yields, by name; modules inside have their terms' so
    EXITS: Mapping[
        str, int
    ] = {}  # classifiers inside the model, cheapest first -> the part after which each may answer
    EXIT_FACTORS: Mapping[str, float] = {}  # what calibration multiplies an exit's share of images by; else 1
    CLASS_INPUTS: tuple[str, ...] = ()  # layers whose input is the logits of another, so as wide as there are classes
    head_reads_map = False  # whether the head takes the last map whatever the family's own takes, see `_heads`

    # Checkpoints of others that are the same network: origin -> [(pattern, replacement), ...] for re.sub, in order; the
    # replacement None leaves a tensor out that is not a weight (index tables, masks); a tuple of replacements cuts it
    # into as many equal parts along its first axis; names that end in #0, #1, ... are parts, joined along theirs.
    CHECKPOINT_KEYS: dict[str, list[tuple[str, Any]]] = {}

    head: Any
    norm: nn.Module
    pretrained_cfg: dict[str, Any]  # set by timm

    def __init_subclass__(cls, **kwargs: Any) -> None:
        """Show the options of the head in the signature of a family that passes them on."""
        super().__init_subclass__(**kwargs)
        own = inspect.signature(cls.__init__)
        options = {name: value.default for name, value in _HEAD_DEFAULTS.items()} | {"global_pool": cls.POOL}
        shown = [p for p in list(own.parameters.values())[1:] if p.kind is not p.VAR_KEYWORD]
        if len(shown) + 1 < len(own.parameters):
            families = [base for base in cls.__mro__[1:] if "visionzoo.models._" not in base.__module__]
            if families and issubclass(families[0], Contract):  # it is passed the rest
                taken = inspect.signature(families[0]).parameters
                shown += [parameter for name, parameter in taken.items() if name not in own.parameters]
                options = {name: value for name, value in options.items() if name not in taken}
            shown += [
                inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=value)
                for name, value in options.items()
                if name not in own.parameters
            ]
        cls.__signature__ = own.replace(parameters=shown)  # type: ignore[attr-defined]

    def __new__(cls, *args: Any, **kwargs: Any) -> Self:
        """Check the arguments by name before anything is built of them.

        Raises:
            TypeError: if the class has no argument of a name.
            ValueError: if one is of another type than the constructor states, or a number out of its range.
        """
        check_arguments(cls, kwargs)
        for name, value in kwargs.items():
            if name not in _RANGES or value is None:
                continue
            in_range, range_ = _RANGES[name]
            if not all(map(in_range, _numbers(value))):
                raise ValueError(f"{cls.__name__}: {name} must be {range_}, got {name}={value!r}")
            if isinstance(value, Sequence) and not value:
                raise ValueError(f"{cls.__name__}: {name} must have an entry, got {name}={value!r}")
        return super().__new__(cls)

    def __init__(
        self,
        *,
        stem: Mapping[str, nn.Module],
        parts: Sequence[nn.Module],
        norm: nn.Module | None,
        feature_info: Sequence[Mapping[str, Any]],
        num_features: int,
        head_layer: Callable[..., nn.Module],
        in_chans: int = 3,
        num_classes: int = 1000,
        global_pool: str | None = None,
        drop_rate: float = 0.0,
    ):
        super().__init__()
        self.in_chans = in_chans
        self.num_classes = num_classes
        self.num_features = num_features
        self.num_parts = len(parts)  # before any is pruned
        self.feature_info = [
            {**info, "module": f"{self.PARTS}.{i % self.num_parts}"} for i, info in enumerate(feature_info)
        ]
        self.stem_names = tuple(stem)
        for name, module in stem.items():
            self.add_module(name, module)
        self.add_module(self.PARTS, nn.ModuleList(parts))
        self.norm = norm or nn.Identity()
        self.head_layer = partial(head_layer, num_features, drop_rate=drop_rate)
        self.default_pool = self.POOL if global_pool is None else global_pool
        self.head = self._make_head(num_classes, self.default_pool)
        self.init_weights()

    def init_weights(self) -> None:
        """Initialize linear layers as the families here do (truncated normal of std 0.02, no bias); others as torch.

        With `INIT_CONVS` convolutions too. Weights on the meta device have no numbers, and are skipped.
        """
        kinds = (nn.Linear, nn.Conv2d, DepthwiseConvNHWC) if self.INIT_CONVS else nn.Linear
        for module in self.modules():
            if isinstance(module, kinds) and not module.weight.is_meta:
                trunc_normal_(module.weight, std=0.02)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)

    # -- what a base or a family says ---------------------------------------------------------------------------------

    def begin(self, image: Tensor) -> Any:
        """Image [B, in_chans, H, W] to the state before the first part."""
        raise NotImplementedError

    def advance(self, i: int, state: Any) -> Any:
        """Take the state through part i."""
        return self.parts[i](state)

    def read(self, i: int, state: Any, norm: bool = False) -> tuple[Tensor, Tensor | None]:
        """Return feature i, a map [B, H, W, C] of the state after its part, and the prefix tokens [B, P, C] or None."""
        raise NotImplementedError

    def finish(self, state: Any) -> Any:
        """Turn the state after the last part into what `forward_features` returns and the head takes."""
        raise NotImplementedError

    def exits(self, states: Sequence[Any], logits: Any) -> Iterable[Exit]:
        """Yield what classifiers inside the model say, given the state after each part and the logits at the end.

        Called in training only, where `set_auxiliary` asks for it; `AUXILIARY` has a weight for each exit. A target may
        be made of the logits, detached: then the exit learns from the end of its own model.
        """
        return (Exit(name, self.classify(name, states[part])) for name, part in self.exit_places().items())

    def classify(self, exit: str, state: Any) -> Tensor:
        """Return the logits [B, num_classes] of one of `EXITS`, given the state after its part."""
        raise NotImplementedError

    def exit_places(self) -> dict[str, int]:
        """Return the exits that this model has, cheapest first, and the part after which each may answer.

        There are none where there are no classes, or the parts were pruned.
        """
        return dict(self.EXITS) if self.num_classes and len(self.parts) == self.num_parts else {}

    # -- forward ------------------------------------------------------------------------------------------------------

    @property
    def parts(self) -> nn.ModuleList | nn.Sequential:
        """The modules whose outputs are the features."""
        parts: nn.ModuleList | nn.Sequential = getattr(self, self.PARTS)
        return parts

    def forward(self, x: Tensor) -> Any:
        """Image [B, in_chans, H, W] to logits [B, num_classes], or pooled features where num_classes is 0.

        In training `Outputs`, where `set_auxiliary` asks for them.
        """
        if not (self.training and self.auxiliary):
            return self.forward_head(self.forward_features(x))
        with collect() as terms:
            states: list[Any] = []
            logits = self.forward_head(self.forward_features(x, states))
            return Outputs(logits, tuple(self.exits(states, logits)), terms)

    def forward_features(self, x: Tensor, states: list[Any] | None = None) -> Any:
        """Image [B, in_chans, H, W] to what the head takes, normalized; `states` keeps the state after each part."""
        state = self.begin(x)
        for i in range(len(self.parts)):
            state = self.advance(i, state)
            if states is not None:
                states.append(state)
        return self._end(state)

    def forward_head(self, x: Any, pre_logits: bool = False) -> Any:
        """Features of `forward_features` to logits; with `pre_logits` to what the classifier would see.

        Raises:
            ValueError: if `pre_logits` is asked of a head that was replaced by another module.
        """
        if not pre_logits:
            return self.head(x)
        if not hasattr(self.head, "reset"):
            raise ValueError(
                f"forward_head: the head was replaced by a {type(self.head).__name__}, which has no pre_logits; call "
                f"forward_features, or reset_classifier(num_classes) for a head of {type(self).__name__}"
            )
        return self.head(x, pre_logits=True)

    def forward_intermediates(
        self,
        x: Tensor,
        indices: int | Sequence[int] | None = None,
        norm: bool = False,
        stop_early: bool = False,
        output_fmt: str = "NCHW",
        intermediates_only: bool = False,
        return_prefix_tokens: bool = False,
    ) -> Any:
        """Image [B, in_chans, H, W] to the features of the parts, in their order in `feature_info`.

        Args:
            x: image.
            indices: which features: None all, an int that many of the last, a sequence these (negative from the end).
            norm: apply the model's last norm, where it fits.
            stop_early: leave out parts after the last one asked for.
            output_fmt: one of `FORMATS`: "NCHW", "NHWC" or, where there are tokens, "NLC" [B, N, C].
            intermediates_only: return only the list, not (features, list).
            return_prefix_tokens: have (map, prefix tokens [B, P, C]) in the list, where the model has such tokens.

        Raises:
            ValueError: if the format is unknown or an index is out of range.
        """
        output_fmt = getattr(output_fmt, "value", output_fmt)
        if output_fmt not in self.FORMATS:
            raise ValueError(f"forward_intermediates: output_fmt must be one of {self.FORMATS}, got {output_fmt!r}")
        take, last = self._take_indices(indices)
        state = self.begin(x)
        found: dict[int, Any] = {}
        for part in range(min(last + 1, len(self.parts)) if stop_early else len(self.parts)):
            state = self.advance(part, state)
            for i in range(part, len(self.feature_info), self.num_parts):
                if i not in take:
                    continue
                feature, prefix = self.read(i, state, norm)
                if output_fmt == "NCHW":
                    feature = feature.permute(0, 3, 1, 2)
                elif output_fmt == "NLC":
                    feature = feature.flatten(1, 2)
                found[i] = (feature, prefix) if return_prefix_tokens and prefix is not None else feature
        intermediates = [found[i] for i in sorted(found)]
        return intermediates if intermediates_only else (self._end(state), intermediates)

    @property
    def head_hidden_size(self) -> int:
        """Width of `forward_head(x, pre_logits=True)`: what the head pools, twice it where two poolings are joined."""
        pool: Any = getattr(self.head, "global_pool", None)
        pooled = getattr(self.head, "in_features", self.num_features)
        return pooled * (pool.feat_mult() if hasattr(pool, "feat_mult") else 1)

    # -- what others adapt --------------------------------------------------------------------------------------------

    def prune_intermediate_layers(
        self, indices: int | Sequence[int] = 1, prune_norm: bool = False, prune_head: bool = True
    ) -> list[int]:
        """Drop the parts that the features `indices` do not need, and the norm and head; return plain indices.

        Raises:
            ValueError: if an index is out of range.
        """
        take, last = self._take_indices(indices)
        setattr(self, self.PARTS, self.parts[: last + 1])
        if prune_norm:
            self.norm = nn.Identity()
        if prune_head:
            self.reset_classifier(0, "")
            self.head = _NoHead()
        return take

    def get_classifier(self) -> Any:
        """Return the last linear layer, both of a distilled head, or the module that replaced the head."""
        if getattr(self.head, "distilled", False):
            return self.head.fc, self.head.fc_dist
        return getattr(self.head, "fc", self.head)

    def reset_classifier(self, num_classes: int, global_pool: str | None = None) -> None:
        """Replace the classifier by a new one; 0 classes for none, `global_pool=''` for no pooling.

        Raises:
            ValueError: if the head has no place for the pooling.
        """
        if global_pool is not None:
            self._check_pool(global_pool)
        if hasattr(self.head, "reset"):
            self.head.reset(num_classes, global_pool)
        else:  # replaced by hand
            self.head = self._make_head(num_classes, self.default_pool if global_pool is None else global_pool)
        self.num_classes = num_classes
        parameter = next(self.parameters())
        self.head.to(device=parameter.device, dtype=parameter.dtype)

    def set_distilled_training(self, enable: bool = True) -> None:
        """Let training mode return (logits, logits for the teacher's targets) instead of their mean.

        Raises:
            ValueError: if the head has one classifier only.
        """
        if enable and not getattr(self.head, "distilled", False):
            advice = (
                "build it with distilled=True"
                if "distilled" in inspect.signature(type(self)).parameters
                else ("models with a second one, such as LeViT's, have the option distilled=True")
            )
            raise ValueError(f"{type(self).__name__} has one classifier and cannot learn from a teacher's: {advice}")
        self.head.distilled_training = enable

    def set_epoch(self, epoch: int) -> None:
        """Prepare for an epoch of training, counted from 0; nothing to do but where a family follows a schedule."""

    def group_matcher(self, coarse: bool = False) -> dict[str, Any]:
        """Patterns that order parameters from input to output, for layer-wise learning-rate decay."""
        blocks: Any = rf"^{self.PARTS}\.(\d+)" if coarse else list(self.UNITS)
        return {"stem": rf"^(?:{'|'.join(self.stem_names)})\b", "blocks": blocks}

    def no_weight_decay(self) -> set[str]:
        """Names of parameters of two axes and more that weight decay would harm, as their modules declare them."""
        return {
            f"{name}.{parameter}" if name else parameter
            for name, module in self.named_modules()
            for parameter in getattr(module, "NO_WEIGHT_DECAY", ())
        }

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Recompute blocks in the backward pass instead of keeping their activations."""
        raise NotImplementedError

    def first_layers(self, parts: int) -> list[nn.Module]:
        """Return what an image passes until the end of the first `parts` parts, for freezing.

        Raises:
            ValueError: if the model has fewer parts.
        """
        if not 0 <= parts <= len(self.parts):
            raise ValueError(f"{type(self).__name__} has {len(self.parts)} {self.PARTS}, got {parts=}")
        return [*(getattr(self, name) for name in self.stem_names), *self.parts[:parts]]

    def blocks_in_order(self) -> Iterator[nn.Module]:
        """Yield the blocks of all parts, which sharding takes one by one."""
        raise NotImplementedError

    def absent(self) -> tuple[str, ...]:
        """Beginnings of the names of tensors that the whole model has and this one was built or pruned without."""
        names = [f"{self.PARTS}.{i}." for i in range(len(self.parts), self.num_parts)]
        classifier = getattr(self.head, "fc", None)
        if classifier is None or not classifier.state_dict():
            names.append("head.fc.")
        if not hasattr(self.head, "fc_dist"):
            names += ["head.norm_dist.", "head.fc_dist."]
        names += [f"{part}." for part in ("norm", "head") if not getattr(self, part).state_dict()]
        return tuple(names)

    def _end(self, state: Any) -> Any:
        """Return what `forward_features` returns and the head takes: what `finish` makes, or the last map."""
        if not self.head_reads_map:
            return self.finish(state)
        last = len(self.parts) - 1
        ends = range(last, last + self.BRANCHES * self.num_parts, self.num_parts)
        maps = tuple(self.read(i, state, norm=True)[0].permute(0, 3, 1, 2) for i in ends)
        return maps if self.BRANCHES > 1 else maps[0]

    def _make_head(self, num_classes: int, global_pool: str) -> nn.Module:
        self._check_pool(global_pool)
        return self.head_layer(num_classes, pool_type=global_pool)

    def _check_pool(self, global_pool: str) -> None:
        if global_pool not in self.POOLS:
            raise ValueError(f"{type(self).__name__} cannot have {global_pool=}, expected one of {self.POOLS}")

    def _take_indices(self, indices: int | Sequence[int] | None) -> tuple[list[int], int]:
        """Return the features as plain numbers, and the last part that they need."""
        try:
            take, _ = feature_take_indices(
                len(self.feature_info), indices if indices is None or isinstance(indices, int) else list(indices)
            )
        except AssertionError as error:
            count = len(self.feature_info)
            what = self.PARTS if count == self.num_parts else "features"
            raise ValueError(
                f"feature indices must be from {-count} to {count - 1} ({count} {what}), got {indices!r}"
            ) from error
        return take, max(i % self.num_parts for i in take)


def drop_path_rates(last: float, depths: Sequence[int]) -> list[list[float]]:
    """Return the stochastic depth of each block of each part, which rises linearly from 0 at the first.

    Args:
        last: of the last block.
        depths: blocks of each part.

    Raises:
        ValueError: if it is not a probability below 1.
    """
    if not 0 <= last < 1:
        raise ValueError(f"drop_path_rate must be from 0 to below 1, got drop_path_rate={last}")
    rates: Any = calculate_drop_path_rates(last, list(depths), stagewise=True)
    return rates


def _numbers(value: Any) -> Iterator[Any]:
    """Yield a number, or those of sequences, and of sequences in them."""
    for each in value if isinstance(value, Sequence) else ():
        yield from _numbers(each)
    if not isinstance(value, Sequence):
        yield value


_SIZES = (
    *("in_chans", "patch_size", "depth", "embed_dim", "embed_dims", "mid_dims", "inner_dim", "inner_stride"),
    *("stem_dim", "stem_dims", "stem_kernel", "group_size", "head_dim", "final_dim", "projection"),
)
_RATIOS = ("mlp_ratio", "mlp_ratios", "expand_ratio", "value_ratio", "width")
_RANGES: dict[str, tuple[Callable[[Any], bool], str]] = {  # of arguments by their names, in any family
    **dict.fromkeys(_SIZES, (lambda x: x >= 1, "1 or more")),
    **dict.fromkeys(("num_classes", "depths"), (lambda x: x >= 0, "0 or more")),
    **dict.fromkeys(_RATIOS, (lambda x: x > 0, "more than 0")),
    "drop_rate": (lambda x: 0 <= x <= 1, "from 0 to 1"),
}
_HEAD_DEFAULTS = {
    name: parameter
    for name, parameter in inspect.signature(Contract.__init__).parameters.items()
    if name in HeadOptions.__annotations__
}


class _NoHead(nn.Identity):
    """In place of a pruned head."""

    fc = None

    def forward(self, x: Any, pre_logits: bool = False) -> Any:
        return x

    def reset(self, num_classes: int, global_pool: str | None = None) -> None:
        if num_classes:
            raise ValueError(f"the head of this model was pruned: cannot set {num_classes=}; build the model anew")
