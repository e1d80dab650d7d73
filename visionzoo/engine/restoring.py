"""A trained model: from a checkpoint that knows its own, or with published or random weights."""

import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from types import MappingProxyType
from typing import Any

from timm.data import resolve_data_config
from torch import Tensor, nn

from visionzoo.engine.checkpoints import read_checkpoint
from visionzoo.engine.data import image_mode
from visionzoo.engine.errors import UserError
from visionzoo.engine.flags import InputConfig, ModelConfig
from visionzoo.engine.models import build_model, check_channels, check_name, data_config
from visionzoo.engine.options import settings
from visionzoo.engine.recorded import (
    DATA_CONFIG,
    Recorded,
    check_data_config,
    per_channel,
    read_recorded,
    recorded_beside,
    take_model,
)
from visionzoo.engine.trained_flags import WeightsConfig
from visionzoo.engine.weights import load
from visionzoo.models._checkpoint import EMA_CONTAINERS, checkpoint_tensors, rename, unwrap_state_dict
from visionzoo.models._hub import READING, not_finite, published
from visionzoo.text import count_of

DENSE_HEADS = ("decode_head.", "bbox_head.", "rpn_head.", "roi_head.", "panoptic_head.")  # as OpenMMLab names them
NO_USE = "they cannot classify any image: take an earlier checkpoint, or the file from where it is from"


@dataclass
class Trained:
    """A model with its weights and what is recorded of how it was trained.

    Attributes:
        model: with its weights.
        data_config: input size, mean, std, crop and interpolation.
        class_names: in the order of the logits, None where nothing names them.
        args: flags of the training run as far as they may be taken, empty for other weights.
        recorded: all that may be taken of them.
        reading: which of `READING` are given or recorded: how image files are to be read and logits to be understood.
        averaged: whether the weights are a checkpoint's moving average.
    """

    model: nn.Module
    data_config: dict[str, Any]
    class_names: list[str] | None = None
    args: dict[str, Any] = field(default_factory=dict)
    reading: dict[str, Any] = field(default_factory=dict)
    recorded: Recorded = field(default_factory=Recorded)
    averaged: bool = False

    @property
    def num_classes(self) -> int:
        """The number of classes that the model tells apart."""
        return int(self.model.num_classes)  # type: ignore[arg-type]

    @property
    def mode(self) -> str:
        """PIL's mode of the input images; raises UserError as `image_mode`."""
        return image_mode(self.data_config["input_size"][0], self.reading.get("input_img_mode"))

    @property
    def upright(self) -> bool:
        """Whether images are turned as their EXIF orientation says."""
        return bool(self.reading.get("apply_exif_orientation"))

    @property
    def multi_label(self) -> bool:
        """Whether an image may have several labels, so that each logit has a sigmoid of its own."""
        return bool(self.reading.get("multi_label"))


def restore(
    config: ModelConfig,
    input: InputConfig,
    weights: WeightsConfig,
    reading: Mapping[str, Any] = MappingProxyType({}),
    *,
    complete: Callable[[nn.Module, dict[str, Tensor]], Mapping[str, Tensor]] | None = None,
    state: Mapping[str, Any] | None = None,
) -> Trained:
    """Build the model of a checkpoint, or the one that is named where there is none; flags win over what is recorded.

    Of weights that record nothing, the rows of the classifier say how many classes the model gets, where no flag does.
    Recorded is in the checkpoint of a run, ours or of timm's script, and in the config.json of a folder or a hub's
    repository (`local-dir:`, `hf-hub:`).

    Args:
        config: the model, as far as it is named.
        input: what it sees, as far as it is given.
        weights: the checkpoint, if there is one.
        reading: flags of the command, those of `READING` among them.
        complete: with it the checkpoint may be of another form of the model, for which the rest of the record holds
            too; it returns the tensors and those that the other form lacks.
        state: what the checkpoint holds, where it is read already.

    Raises:
        UserError: no model is given, or two sources of weights, or two sizes; or the weights do not fit it or are no
            numbers.
    """
    _check_size(input)
    if not weights.checkpoint:
        if weights.no_ema:
            raise UserError("--no-ema chooses among the weights of a --checkpoint; give one, or leave it out")
        if config.model and not config.pretrained:
            check_name(config.model)
            raise UserError(f"{config.model} has no weights: give --checkpoint or --pretrained")
        model: Any = build_model(config, input)
        own = published(model)
        if model.num_classes != own["num_classes"]:
            raise UserError(
                f"the weights of {config.model} are of {count_of(own['num_classes'], 'class')}, the model is "
                f"asked to have {model.num_classes}: its classifier would be random; leave --num-classes out, "
                "or train one"
            )
        if ":" in config.name:  # of a folder or a hub: anybody's
            check_data_config(model.pretrained_cfg, config.name)
        found = Recorded(images=own["reading"], class_names=own["class_names"])
        return _trained(config.name, reading, model, data_config(config, input, model), found)
    path = weights.checkpoint
    if config.pretrained:
        raise UserError("--pretrained together with --checkpoint; give one")
    state = read_checkpoint(path) if state is None else state
    _refuse_dense(state, path)
    found = recorded_beside(path) or read_recorded(state, path)
    if complete and config.model and "model" in found.model:
        found.model["model"] = config.model
    config = replace(take_model(config, found, path), pretrained=False)  # the weights come from the checkpoint
    model = build_model(config, input)
    source = complete(model, _tensors(state, weights)) if complete else state
    try:
        load(model, source, path, use_ema=not weights.no_ema)
    except UserError:
        classes = None if config.num_classes else _classes_in(model, state, use_ema=not weights.no_ema)
        if classes in (None, model.num_classes):
            raise
        print(f"{path}: its classifier has {count_of(classes, 'row')}, so the model gets {count_of(classes, 'class')}")
        config = replace(config, num_classes=classes)
        return restore(config, input, weights, reading, complete=complete, state=state)
    recorded = dict(found.data_config)
    check_channels(input, config.in_chans or (input.input_size or recorded.get("input_size") or [3])[0])
    if input.img_size or input.input_size:
        recorded.pop("input_size", None)
    given = {**settings(input), "in_chans": config.in_chans}
    given = {name: value for name in (*DATA_CONFIG, "img_size", "in_chans") if (value := given.get(name))}
    prepared = per_channel(resolve_data_config({**recorded, **given}, model=model))
    if found.left_out:
        print(f"{path}: not taken from its record: {', '.join(found.left_out)}", file=sys.stderr)
    averaged = not weights.no_ema and any(isinstance(state.get(key), Mapping) for key in EMA_CONTAINERS)
    return replace(_trained(path, reading, model, prepared, found), averaged=averaged)


def untrained(
    config: ModelConfig, input: InputConfig, weights: WeightsConfig, reading: Mapping[str, Any] = MappingProxyType({})
) -> Trained:
    """Build a model with random weights; the arguments are those of `restore`.

    Raises:
        UserError: as `build_model`; or weights are asked for too, or two sizes.
    """
    _check_size(input)
    if weights.checkpoint or config.pretrained:
        raise UserError("--random-weights together with --checkpoint or --pretrained; give one")
    model = build_model(config, input)
    return _trained(config.name, reading, model, data_config(config, input, model), Recorded())


def _check_size(input: InputConfig) -> None:
    size, side = input.input_size, input.img_size
    if size and side and list(size[1:]) != [side, side]:
        raise UserError(f"--img-size {side} together with --input-size {' '.join(map(str, size))}; give one")


def _refuse_dense(source: Mapping[str, Any], where: str) -> None:
    """Stop where a detector or segmentor is given in place of a classifier.

    Raises:
        UserError: so it is; it names the commands that take it.
    """
    if any(str(name).startswith(DENSE_HEADS) for name in checkpoint_tensors(source, use_ema=False)):
        raise UserError(
            f"{where} is of a detector or segmentor, not of a classifier: name the config that it was trained by too, "
            f"`visionzoo predict|eval|view|export CONFIG.py ... --checkpoint {where}` (`visionzoo configs` lists "
            "ours); here take a checkpoint of `visionzoo train CONFIG.yaml`, or other weights of a classifier"
        )


def _classes_in(model: Any, source: Mapping[str, Any], *, use_ema: bool) -> int | None:
    """Return of how many classes the classifier in a checkpoint is, by its rows; None where they do not say it."""
    try:
        tensors = rename(unwrap_state_dict(source, use_ema=use_ema), model)[0]
    except ValueError:
        return None
    names = model.pretrained_cfg.get("classifier") or ()
    found = [tensors.get(f"{name}.weight") for name in ([names] if isinstance(names, str) else names)]
    rows = {len(weight) for weight in found if weight is not None and weight.ndim > 1}
    return rows.pop() if len(rows) == 1 else None


def _tensors(state: Mapping[str, Any], weights: WeightsConfig) -> dict[str, Tensor]:
    try:
        return unwrap_state_dict(state, use_ema=not weights.no_ema)
    except ValueError as error:
        raise UserError(f"cannot load {weights.checkpoint}: {error}") from error


def _trained(
    source: str, given: Mapping[str, Any], model: nn.Module, config: dict[str, Any], found: Recorded
) -> Trained:
    if spoilt := not_finite(model):
        raise UserError(
            f"{source}: {count_of(len(spoilt), 'tensor holds', 'tensors hold')} NaN or infinite weights, such as "
            f"{spoilt[0]}; {NO_USE}"
        )
    reading = {name: value for name in READING if (value := given.get(name) or found.images.get(name))}
    names = found.class_names
    if names and len(names) != model.num_classes:
        raise UserError(
            f"{source} names {count_of(len(names), 'class')}, the model has {model.num_classes}; give the right one"
        )
    return Trained(model, config, names, {**found.model, **found.images}, reading, found)
