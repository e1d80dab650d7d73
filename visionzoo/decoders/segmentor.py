"""A backbone and a decoder as one network that labels pixels."""

from __future__ import annotations

import logging
import re
from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor, nn

from visionzoo.decoders.base import Decoder, resize
from visionzoo.layers.outputs import Exit, Outputs, WithOutputs, collect
from visionzoo.layers.tracing import is_traced
from visionzoo.models._checkpoint import Composite, LoadReport, WeightsError, load_weights, rename
from visionzoo.models._contract import Contract
from visionzoo.text import count_of, some

_logger = logging.getLogger(__name__)

# Names in checkpoints: of this class, of mmseg's EncoderDecoder, also with our heads in it, and of FFNet's authors,
# behind what wrappers put before them.
_PARTS = re.compile(
    r"^(?:(?:module|model|net|_orig_mod|_forward_module)\.)*"
    r"(?:(?P<backbone>backbone|backbone_model)|(?P<decoder>decode_head\.decoder|decode_head|decoder|head))\.(?P<name>.+)$"
)


class Segmentor(WithOutputs, Composite):
    """An encoder-decoder: a backbone's maps, decoded to logits of each pixel.

    `visionzoo.create_segmentor` builds it, `visionzoo.load_weights` loads checkpoints of it, by our names or the
    authors'.

    Args:
        backbone: gives maps of an image, as timm's `features_only=True` does, and describes them in `feature_info`.
        decoder: takes its last maps of different strides.
        upsample: interpolate the logits to the image's size, bilinearly; else they stay at the decoder's stride.
        keys: the authors' names of a whole network that they do not cut into backbone and decoder, as
            `Contract.CHECKPOINT_KEYS` has them.
    """

    def __init__(
        self,
        backbone: nn.Module,
        decoder: Decoder,
        *,
        upsample: bool = True,
        keys: Sequence[tuple[str, Any]] = (),
    ):
        super().__init__()
        self.CHECKPOINT_KEYS = {"authors": keys} if keys else {}
        self.levels = pyramid_levels(backbone)[-decoder.LEVELS :]
        self.backbone, self.decoder, self.upsample = backbone, decoder, upsample
        self.num_classes = decoder.num_classes

    def forward(self, x: Tensor) -> Any:
        """Image [B, in_chans, H, W] to logits [B, num_classes, H, W], or [B, num_classes, H', W'] without `upsample`.

        In training `Outputs`, where `set_auxiliary` asks for them.

        Raises:
            ValueError: if there are other than four axes.
        """
        if not is_traced(x) and x.ndim != 4:
            raise ValueError(f"Segmentor: expected images [B, C, H, W], got {tuple(x.shape)}")
        if not (self.training and self.auxiliary):
            return self.decode_maps(self.forward_maps(x), x)
        with collect() as terms:
            logits, exits = self.decoder.decode(self.forward_maps(x))
        return Outputs(
            self._full(logits, x), tuple(Exit(name, self._full(value, x)) for name, value in exits.items()), terms
        )

    def _full(self, logits: Tensor, image: Tensor) -> Tensor:
        """Bring logits [B, num_classes, H', W'] to the image's size, where that is asked for."""
        return resize(logits, image) if self.upsample else logits

    def decode_maps(self, maps: Sequence[Tensor], x: Tensor) -> Tensor:
        """Decode the maps of an image [B, in_chans, H, W] to the logits that `forward` gives of it."""
        return self._full(self.decoder(maps), x)

    def forward_maps(self, x: Tensor) -> list[Tensor]:
        """Image [B, in_chans, H, W] to the maps [B, C, H', W'] that the decoder takes, finest first."""
        return pyramid_maps(self.backbone, self.levels, x)

    def load_parts(
        self, tensors: Mapping[str, Tensor], where: str, *, strict: bool, allow_partial: bool, **new: bool
    ) -> LoadReport:
        """Load a segmentor's checkpoint, see `visionzoo.load_weights`; what is beside backbone and decoder is reported.

        Raises:
            ValueError: if it is no segmentor's, or does not fit; nothing is loaded then.
        """
        tensors, whole = rename(tensors, self) if self.CHECKPOINT_KEYS else (tensors, "visionzoo")
        parts, beside = split_parts(tensors)
        if empty := [part for part, found in parts.items() if not found]:
            raise ValueError(
                f"{where} has no tensors of a {' and a '.join(empty)} (expected names that begin with 'backbone.' and "
                f"'decoder.' or 'decode_head.'), it has {some(tensors)}. For weights of the backbone only, call "
                f"load_weights(model.backbone, ...)"
            )
        state, decoder = _fit(self.decoder, parts["decoder"], where, strict)
        if isinstance(getattr(self.backbone, "model", None), Contract):
            options = {"strict": strict, "allow_partial": allow_partial, **new}
            _check(decoder, self.decoder, "decoder", where, strict, allow_partial)
            backbone = load_weights(self.backbone, parts["backbone"], **options)
        else:
            own, backbone = _fit(self.backbone, parts["backbone"], where, strict)
            _check(backbone, self.backbone, "backbone", where, strict, allow_partial)
            _check(decoder, self.decoder, "decoder", where, strict, allow_partial)
            self.backbone.load_state_dict(own, strict=False)
        self.decoder.load_state_dict(state, strict=False)
        names = dict.fromkeys((backbone.names, decoder.names) if whole == "visionzoo" else (whole,))
        report = LoadReport(" and ".join(names), beside=beside)
        for part, of in (("backbone", backbone), ("decoder", decoder)):
            for title in ("loaded", "missing", "unexpected", "adapted", "dropped", "unused", "beside"):
                getattr(report, title).extend(f"{part}.{entry}" for entry in getattr(of, title))
        _logger.info("%s: %s", where, report)
        return report


def split_parts(tensors: Mapping[str, Tensor]) -> tuple[dict[str, dict[str, Tensor]], list[str]]:
    """Return a checkpoint's tensors of "backbone" and "decoder", without these prefixes, and the names of others."""
    parts: dict[str, dict[str, Tensor]] = {"backbone": {}, "decoder": {}}
    beside = []
    for name, value in tensors.items():
        if found := _PARTS.match(name):
            parts["backbone" if found["backbone"] else "decoder"][found["name"]] = value
        else:
            beside.append(name)
    return parts, beside


def load_part(module: nn.Module, part: str, tensors: Mapping[str, Tensor], where: str) -> LoadReport:
    """Load one part of a segmentor's checkpoint, by whoever's names, into a module; a classifier of others stays.

    Args:
        module: a decoder, or a backbone that is no model of timm.
        part: "backbone" or "decoder".
        tensors: of the checkpoint.
        where: its origin, for messages.

    Raises:
        ValueError: if there is no such part, or it does not fit; nothing is loaded then.
    """
    found = split_parts(tensors)[0][part]
    if not found:
        raise ValueError(f"{where} has no tensors of a {part}, it has {some(tensors)}")
    state, report = _fit(module, found, where, strict=False)
    _check(report, module, part, where, strict=False, allow_partial=False)
    module.load_state_dict(state, strict=False)
    return report


def pyramid_levels(backbone: nn.Module, name: str | None = None) -> list[int]:
    """Return which of a backbone's maps make a pyramid: the last of each stride, finest first.

    Args:
        backbone: as `Segmentor` takes it.
        name: of the backbone, for messages.

    Raises:
        ValueError: if it does not describe its maps, or they have one stride only.
    """
    name = name or type(backbone).__name__
    info: Any = getattr(backbone, "feature_info", None)
    if not callable(getattr(info, "reduction", None)):
        raise ValueError(
            f"{name} gives no maps of its stages: pass the name of a model of timm, or build it with "
            f"timm.create_model(..., features_only=True)"
        )
    strides = info.reduction()
    last = {stride: i for i, stride in enumerate(strides)}
    if len(last) < 2:
        why = "name more of them in out_indices" if len(strides) == 1 else "it is isotropic"
        raise ValueError(
            f"a decoder needs maps of two strides or more, {name} has {len(strides)} of stride {strides[0]}: {why}. "
            f"Take a hierarchical backbone, such as zoo_pvtv2_b0 or zoo_eft_t"
        )
    return [last[stride] for stride in sorted(last)]


def pyramid_maps(backbone: nn.Module, levels: Sequence[int], x: Tensor) -> list[Tensor]:
    """Return those maps [B, C, H', W'] that a backbone gives of an image [B, in_chans, H, W]."""
    maps = backbone(x)
    nhwc = getattr(backbone, "output_fmt", "NCHW") == "NHWC"  # timm's Swin and alike
    return [maps[i].permute(0, 3, 1, 2) if nhwc else maps[i] for i in levels]


def _check(report: LoadReport, part: nn.Module, name: str, where: str, strict: bool, allow_partial: bool) -> None:
    count = len(report.loaded) + len(report.missing)
    if len(report.loaded) < 0.9 * count and not allow_partial:
        raise WeightsError(
            f"{where} fits only {len(report.loaded)} of the {count} tensors of the {name} {type(part).__name__} "
            f"(less than 90 %), so it is probably of another one. {report}.",
            "Pass allow_partial=True to load it all the same.",
        )
    if strict and (report.missing or report.unexpected):
        raise WeightsError(
            f"{where} does not fit the {name} {type(part).__name__}. {report}.",
            "Pass strict=False to load what fits.",
        )


def _fit(
    module: nn.Module, tensors: Mapping[str, Tensor], where: str, strict: bool
) -> tuple[dict[str, Tensor], LoadReport]:
    """Return a part's tensors by its own names, and what became of them.

    Raises:
        ValueError: if shapes differ.
    """
    own = module.state_dict()
    state, names = rename(tensors, module)
    report = LoadReport(names)
    table = getattr(module, "CHECKPOINT_KEYS", {}).get(names, [])
    unused = [pattern for pattern, replacement in table if replacement is None]
    report.dropped = [name for name in tensors if any(re.search(pattern, name) for pattern in unused)]
    wrong = []
    classifier = f"{getattr(module, 'CLASSIFIER', '')}."
    kept = set()
    for name in [name for name in state if name in own and state[name].shape != own[name].shape]:
        have, want = tuple(state[name].shape), tuple(own[name].shape)
        if not (name.startswith(classifier) and have[1:] == want[1:]):
            wrong.append(f"{name} {have} instead of {want}")
        elif strict:
            raise WeightsError(
                f"{where} has {count_of(have[0], 'class')}, the model {want[0]}.",
                f"Build the model with num_classes={have[0]}, or pass strict=False to keep the model's own classifier.",
            )
        else:
            del state[name]
            kept.add(name)
            report.adapted.append(
                f"{name} ({count_of(have[0], 'class')} in the checkpoint, left at its initial values)"
            )
    if wrong:
        raise ValueError(
            f"{where} has tensors of other shapes than {type(module).__name__}: {some(wrong)}. It is probably a "
            f"checkpoint of another variant."
        )
    optional = {name for name in own if name.endswith(".num_batches_tracked")} | kept
    report.loaded = [name for name in own if name in state]
    report.missing = [name for name in own if name not in state and name not in optional]
    report.unexpected = [name for name in state if name not in own]
    return state, report
