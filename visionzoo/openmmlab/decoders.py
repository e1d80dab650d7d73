"""Every decoder of the zoo as mmseg's decode head, and the backbones of published segmentors.

`custom_imports = dict(imports=['visionzoo.openmmlab.decoders'])` in a config registers both. They are apart from
`visionzoo.openmmlab`, as detectors have no use for mmseg. Checkpoints are those of `visionzoo.create_segmentor`:
`visionzoo.load_weights` takes mmseg's, and `init_cfg` of backbone and head takes any that it takes.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from mmengine.logging import print_log
from mmengine.model import BaseModule
from mmengine.registry import MODELS
from mmseg.models.decode_heads.decode_head import BaseDecodeHead
from torch import Tensor, nn

from visionzoo.decoders import DECODERS, SEGMENTORS
from visionzoo.decoders.segmentor import load_part
from visionzoo.engine.errors import UserError, closest
from visionzoo.layers.outputs import collect
from visionzoo.layers.specs import Spec, build_spec, read_spec
from visionzoo.models._checkpoint import checkpoint_tensors
from visionzoo.openmmlab.backbone import checkpoint_of
from visionzoo.openmmlab.checkpoints import read_any


@MODELS.register_module()
class ZooDecodeHead(BaseDecodeHead):
    """A decoder of the zoo as mmseg's decode head, with mmseg's losses.

    Exits of a decoder have these losses too, named `EXIT.loss_…`, and its terms are `loss_TERM`; each is multiplied by
    its weight in the decoder's `AUXILIARY`.

    Args:
        decoder: a name of `visionzoo.decoders.DECODERS` or `dict(type=name, **options)`.
        in_channels: channels of all maps of the backbone, finest first.
        in_index: which maps the decoder gets, finest first; None for the coarsest that it has places for.
        init_cfg: `dict(type='Pretrained', checkpoint=FILE_OR_URL)` starts from a segmentor's checkpoint, whoever's
            names it has; the decoders initialize themselves otherwise.
        head: of mmseg's `BaseDecodeHead`: `num_classes`, `out_channels`, `threshold`, `loss_decode`, `ignore_index`,
            `sampler`, `align_corners`. Dropout, norms and activations are the decoder's own.

    Raises:
        ValueError: if there is no such decoder, or it does not take the maps or options.
        UserError: if `init_cfg` is none of the above, or an option is one of layers that this head does not have.
    """

    def __init__(
        self,
        decoder: Spec,
        in_channels: Sequence[int],
        *,
        in_index: Sequence[int] | None = None,
        init_cfg: Mapping[str, Any] | None = None,
        **head: Any,
    ):
        if unused := [name for name in _OF_MMSEG if name in head]:
            raise UserError(f"ZooDecodeHead: it has no layers of mmseg's that {', '.join(unused)} would act on")
        kind = DECODERS[read_spec("decoder", decoder, DECODERS)["type"]]
        index = [*range(len(in_channels))][-kind.LEVELS :] if in_index is None else [*in_index]
        channels = [in_channels[i] for i in index]
        super().__init__(
            channels, 1, in_index=index, input_transform="multiple_select", dropout_ratio=0, init_cfg=None, **head
        )
        del self.conv_seg  # the decoder has its own
        self.checkpoint = checkpoint_of(init_cfg, "ZooDecodeHead")
        self.decoder = build_spec("decoder", decoder, DECODERS, channels, self.out_channels)

    def forward(self, inputs: Sequence[Tensor]) -> Tensor:
        """Turn the backbone's maps [B, C, H, W] into logits [B, out_channels, H', W'] at the finest's size."""
        logits: Tensor = self.decoder(self._transform_inputs(inputs))
        return logits

    def loss(self, inputs: Sequence[Tensor], batch_data_samples: Any, train_cfg: Any) -> dict[str, Tensor]:
        """Return the losses of the logits, and of the decoder's exits and terms, by name."""
        weights = self.decoder.AUXILIARY
        with collect() as terms:
            logits, exits = self.decoder.decode(self._transform_inputs(inputs))
        losses: dict[str, Tensor] = self.loss_by_feat(logits, batch_data_samples)
        for name, values in exits.items():
            own = self.loss_by_feat(values, batch_data_samples)  # its accuracy is not of interest
            losses |= {f"{name}.{key}": weights[name] * loss for key, loss in own.items() if "loss" in key}
        return losses | {f"loss_{name}": weights[name] * value for name, value in terms.items() if name in weights}

    def init_weights(self) -> None:
        """Load the checkpoint, once; the Runner calls it before training.

        Raises:
            UserError: if it cannot be read or does not fit.
        """
        _load_once(self, self.decoder, "decoder")


@MODELS.register_module()
class SegmentorBackbone(BaseModule):
    """The backbone of a published segmentor that is no model of timm, such as FFNet's.

    Args:
        name: of the segmentor (`visionzoo.decoders.list_segmentors`).
        init_cfg: `dict(type='Pretrained', checkpoint=FILE_OR_URL)` starts from a segmentor's checkpoint, whoever's
            names it has.
        pretrained: False; the hub has no weights of these.
        model: further arguments of the backbone, such as `in_chans`.

    Raises:
        UserError: if there is no such segmentor, its backbone is one of timm's, or `init_cfg` is none of the above.
    """

    def __init__(self, name: str, *, init_cfg: Mapping[str, Any] | None = None, pretrained: bool = False, **model: Any):
        super().__init__(init_cfg=None)
        own = {name: network for name, network in SEGMENTORS.items() if not isinstance(network.backbone, str)}
        if name in SEGMENTORS and name not in own:
            raise UserError(
                f"SegmentorBackbone: the backbone of {name} is dict(type='ZooBackbone', "
                f"name={SEGMENTORS[name].backbone!r})"
            )
        if name not in own:
            raise UserError(f"SegmentorBackbone: {name!r} is not a published segmentor{closest(name, own)}")
        if pretrained:
            raise UserError(f"SegmentorBackbone: the hub has no weights for {name}; set pretrained=False")
        network: Any = own[name]
        self.checkpoint = checkpoint_of(init_cfg, "SegmentorBackbone")
        self.model = network.backbone(**{**network.options, **model})
        self.out_channels = self.model.feature_info.channels()

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        """Image [B, in_chans, H, W] to its maps [B, C, H', W'], finest first."""
        return tuple(self.model(x))

    def init_weights(self) -> None:
        """Load the checkpoint, once; the Runner calls it before training.

        Raises:
            UserError: if it cannot be read or does not fit.
        """
        _load_once(self, self.model, "backbone")


_OF_MMSEG = ("channels", "dropout_ratio", "conv_cfg", "norm_cfg", "act_cfg", "input_transform")


def _load_once(part: Any, module: nn.Module, name: str) -> None:
    if part.checkpoint and not part._is_init:
        tensors = checkpoint_tensors(read_any(part.checkpoint), use_ema=True)
        try:
            report = load_part(module, name, tensors, part.checkpoint)
        except ValueError as error:
            raise UserError(f"{type(part).__name__}: {getattr(error, 'fact', error)}") from error
        print_log(f"{name} from {part.checkpoint}: {report}", logger="current")
    part._is_init = True
