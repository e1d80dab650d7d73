"""`visionzoo export` for networks of several tasks: the labels of images and of their pixels, at a budget's widths."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from timm.models import safe_model_name

from visionzoo.deploy.exporting import Exported
from visionzoo.deploy.files import shape_of, write_files
from visionzoo.deploy.flags import ExportConfig, TasksConfig
from visionzoo.engine.errors import UserError
from visionzoo.engine.multi_task.restoring import (
    LabelsAndPixels,
    TrainedTasks,
    data_of,
    norm_loader,
    restore_tasks,
    slimmed_network,
)
from visionzoo.engine.multi_task.search import choose_widths, grid, measure_costs, read_preference
from visionzoo.engine.multi_task.task import PARTS
from visionzoo.engine.options import given_flags
from visionzoo.engine.parallel import start_process


def export_tasks(config: ExportConfig, state: Mapping[str, Any]) -> list[Exported]:
    """Export a network of `visionzoo multi-task`, and return the files; they have an output for each task.

    Args:
        config: names the checkpoint.
        state: what it holds.

    Raises:
        UserError: a flag says what its run has recorded, the data or the budget do not fit it, or it cannot be
            exported so.
    """
    given, path = config.tasks, config.source.weights.checkpoint
    for flag in (flag for part in (config.model, config.input, config.source) for flag in given_flags(part)):
        if flag not in ("--checkpoint", "--no-ema"):
            raise UserError(
                f"{flag} has no effect on {path}: a run of `visionzoo multi-task` records its whole network and its "
                "images; leave it out"
            )
    if given.budget == 1 and (flags := given_flags(given)):
        raise UserError(f"{flags[0]} has no effect on the whole network: leave it out, or give a --budget below 1")
    preference = read_preference(given.preference)
    device = start_process(config.files.device).device
    trained = restore_tasks(path, use_ema=not config.source.weights.no_ema, state=state)
    network = trained.network.to(device)
    size = tuple(trained.data_config["input_size"])
    shares = dict.fromkeys(PARTS, 1.0)
    name = f"{safe_model_name(str(trained.config.model.model))}-tasks"
    if given.budget < 1:
        widths = grid(trained.config.tasks.min_width)
        shares = choose_widths(given.budget, preference, measure_costs(network, size, widths), widths)
        root = data_of(given.data_dir, path, trained)
        loader = norm_loader(root, trained, given.norm_images, batch_size=16, device=device, workers=0)
        network = slimmed_network(network, shares, loader, device)
        name += f"-{given.budget:g}"
    description = _describe(trained, given, shares, network.label_classes.tolist())
    model = LabelsAndPixels(network).eval()
    return write_files(model, Path(config.files.output) / name, shape_of(config.files, size), description, config.files)


def _describe(
    trained: TrainedTasks, given: TasksConfig, shares: dict[str, float], label_classes: list[int]
) -> dict[str, Any]:
    return {
        "model": trained.config.model.model,
        "task": "classification and segmentation",
        "budget": given.budget,
        "widths": shares,
        "preprocessing": {
            **{key: trained.data_config[key] for key in ("mean", "std")},
            "channels": "RGB",
            "size": "resize the shorter side to the input's bilinearly, cut out the center",
            "range": "divide pixels by 255, subtract mean, divide by std",
        },
        "outputs": [
            {
                "name": "labels",
                "activation": "sigmoid",
                "class_names": [trained.names[number] for number in label_classes],
            },
            {"name": "pixels", "activation": "softmax over the channels", "class_names": trained.names},
        ],
    }
