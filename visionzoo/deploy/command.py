"""`visionzoo export` for classifiers: a model to files, and a description of their input and output."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from timm.models import safe_model_name

from visionzoo.deploy.exporting import Exported
from visionzoo.deploy.files import check_flags, shape_of, write_files
from visionzoo.deploy.flags import ExportConfig
from visionzoo.deploy.tasks import export_tasks
from visionzoo.engine.checkpoints import read_checkpoint
from visionzoo.engine.errors import UserError
from visionzoo.engine.exits import model_of_exit
from visionzoo.engine.models import check_name
from visionzoo.engine.options import given_flags, settings
from visionzoo.engine.parallel import start_process
from visionzoo.engine.recorded import command_of, recorded_args
from visionzoo.engine.restoring import Trained, restore, untrained
from visionzoo.quantization import calibrate, is_quantized
from visionzoo.text import count_of


def export_model(config: ExportConfig) -> list[Exported]:
    """Export what the flags name; write the files with NAME.json beside them, and return them.

    Raises:
        UserError: there is no such model or checkpoint, or it cannot be exported so.
    """
    check_flags(config.files, torchcompile=config.model.torchcompile or config.model.torchcompile_mode)
    path = config.source.weights.checkpoint
    state = read_checkpoint(path) if path else {}
    if command_of(recorded_args(state)) == "multi-task":
        return export_tasks(config, state)
    if flags := given_flags(config.tasks):
        raise UserError(
            f"{flags[0]} is for checkpoints of `visionzoo multi-task`; give one by --checkpoint, or leave it out"
        )
    if flags := given_flags(config.sweep):
        raise UserError(f"{flags[0]} is of the table that --all makes; give --all, or leave it out")
    device = start_process(config.files.device).device
    trained = _build(config, state)
    del state  # with its averages and the optimizer's, which are larger than the model
    model = trained.model.to(device).eval()
    if config.model.channels_last:
        model = model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    name = safe_model_name(str(config.model.model or trained.args.get("model")).rstrip("/"))
    if config.source.exit:
        model, name = model_of_exit(model, name, config.source.exit), f"{name}-{config.source.exit}"
    shape = shape_of(config.files, tuple(trained.data_config["input_size"]))
    quantized = dict(config.model.quantize) or trained.args.get("quantize")
    description = {
        "model": config.model.model or trained.args.get("model"),
        "task": "classification",
        "preprocessing": {
            **{key: trained.data_config[key] for key in ("mean", "std", "interpolation", "crop_pct", "crop_mode")},
            "channels": _channels(trained, config.source.input_img_mode),
            "upright": trained.upright,
            "range": "divide pixels by 255, subtract mean, divide by std",
        },
        "outputs": [{"name": "logits"}],
        **({"exit": config.source.exit} if config.source.exit else {}),
        **({"quantized": quantized} if quantized else {}),
        "activation": "sigmoid" if trained.multi_label else "softmax",
        "class_names": trained.class_names,
    }
    return write_files(model, Path(config.files.output) / name, shape, description, config.files)


def _channels(trained: Trained, given: str | None) -> str:
    """Return PIL's mode of the images; their number where none is given and no mode has as many.

    Raises:
        UserError: the mode that is given is none, or has not as many.
    """
    try:
        return trained.mode
    except UserError:
        if given:
            raise
        return count_of(trained.data_config["input_size"][0], "channel")


def _build(config: ExportConfig, state: Mapping[str, Any]) -> Trained:
    if not config.source.random_weights:
        if config.model.model and not (config.source.weights.checkpoint or config.model.pretrained):
            check_name(config.model.model)
            raise UserError(
                f"{config.model.model} has no weights: give --checkpoint or --pretrained, or --random-weights to "
                "measure speed"
            )
        return restore(config.model, config.input, config.source.weights, settings(config.source), state=state)
    trained = untrained(config.model, config.input, config.source.weights, settings(config.source))
    if is_quantized(trained.model):
        calibrate(trained.model, torch.randn(2, *trained.data_config["input_size"]))
    return trained
