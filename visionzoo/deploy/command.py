"""`visionzoo export` for classifiers: a model to files, and a description of their input and output."""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from timm.models import safe_model_name

from visionzoo.deploy.exporting import Exported
from visionzoo.deploy.files import check_flags, shape_of, write_files
from visionzoo.engine.errors import UserError
from visionzoo.engine.exits import model_of_exit
from visionzoo.engine.models import Trained, build_model, data_config, restore
from visionzoo.engine.parallel import start_process
from visionzoo.engine.recorded import per_channel


def export_classifier(args: argparse.Namespace) -> list[Exported]:
    """Export what the flags name; write the files with NAME.json beside them, and return them.

    Raises:
        UserError: there is no such model or checkpoint, or it cannot be exported so.
    """
    check_flags(args)
    device = start_process(args).device
    trained = _build(args)
    model = trained.model.to(device).eval()
    if args.channels_last:
        model = model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    name = safe_model_name(str(args.model or trained.args.get("model")).rstrip("/"))
    if args.exit:
        model, name = model_of_exit(model, name, args.exit), f"{name}-{args.exit}"
    shape = shape_of(args, tuple(trained.data_config["input_size"]))
    description = {
        "model": args.model or trained.args.get("model"),
        "task": "classification",
        "preprocessing": {
            **{key: trained.data_config[key] for key in ("mean", "std", "interpolation", "crop_pct", "crop_mode")},
            "channels": _channels(trained),
            "upright": trained.upright,
            "range": "divide pixels by 255, subtract mean, divide by std",
        },
        "outputs": [{"name": "logits"}],
        **({"exit": args.exit} if args.exit else {}),
        "activation": "sigmoid" if trained.multi_label else "softmax",
        "class_names": trained.class_names,
    }
    return write_files(model, Path(args.output) / name, shape, description, args)


def _channels(trained: Trained) -> str:
    """Return PIL's mode of the images; their number where no mode has as many."""
    try:
        return trained.mode
    except UserError:
        return f"{trained.data_config['input_size'][0]} channels"


def _build(args: argparse.Namespace) -> Trained:
    if not args.random_weights:
        if args.model and not (args.checkpoint or args.pretrained):
            raise UserError(
                f"{args.model} has no weights: give --checkpoint or --pretrained, or --random-weights to measure speed"
            )
        return restore(args)
    if args.checkpoint or args.pretrained:
        raise UserError("--random-weights together with --checkpoint or --pretrained; give one")
    model = build_model(args)
    return Trained(model, per_channel(data_config(args, model)))
