"""Evaluation of a trained network at the widths that budgets allow: table, curve, pictures, and the networks."""

import copy
import io
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.swa_utils import update_bn
from torch.utils.data import Subset

from visionzoo.decoders import MultiTaskNetwork
from visionzoo.engine.checkpoints import make_folder, read_checkpoint, write_atomically
from visionzoo.engine.errors import UserError, printable, require
from visionzoo.engine.images import batches, seed_everything
from visionzoo.engine.models import autocast
from visionzoo.engine.multi_task.data import SCENES, MaskedImages, SceneLoader, open_scenes
from visionzoo.engine.multi_task.drawing import draw_curve, draw_sheet
from visionzoo.engine.multi_task.flags import BudgetEvalConfig, MultiTaskTrainConfig, multi_task_parser
from visionzoo.engine.multi_task.search import (
    TASKS,
    Costs,
    choose_widths,
    grid,
    measure_costs,
    multiply_adds,
    read_preference,
    spread_budgets,
)
from visionzoo.engine.multi_task.task import PARTS, by_layers
from visionzoo.engine.multi_task.training import build_network, evaluate
from visionzoo.engine.options import filled, settings
from visionzoo.engine.outputs import add_rows, free_path
from visionzoo.engine.parallel import start_process
from visionzoo.engine.recorded import command_of, read_recorded, recorded_args
from visionzoo.models._checkpoint import unwrap_state_dict
from visionzoo.slimming import slim
from visionzoo.text import count_of, markdown_table

COLUMNS = ("budget", *(f"{task}_preference" for task in TASKS), *PARTS, "mmacs", "share", "params_m", "miou", "map")


@dataclass(frozen=True)
class TrainedTasks:
    """A network with its weights, and what its run records.

    Attributes:
        network: in eval mode.
        config: flags of the run that build it.
        data_config: input size, mean and deviation.
        names: of the classes of pixels.
    """

    network: MultiTaskNetwork
    config: MultiTaskTrainConfig
    data_config: dict[str, Any]
    names: list[str]


def restore_tasks(path: str, *, use_ema: bool = True) -> TrainedTasks:
    """Build the network of a checkpoint of `visionzoo multi-task`.

    Raises:
        UserError: it is not there, damaged, or of another command.
    """
    state = read_checkpoint(path)
    found, args = read_recorded(state, path), recorded_args(state)
    own = ("decoder", "classifier_dim", "min_width", "train_split", "val_split", "dataset")
    try:
        tensors = unwrap_state_dict(state, use_ema=use_ema)
    except ValueError as error:
        raise UserError(f"cannot load {path}: {error}") from error
    if command_of(args) != "multi-task" or "label_classes" not in tensors or not found.class_names:
        raise UserError(
            f"{path} is no checkpoint of a run of `visionzoo multi-task`; `visionzoo eval` takes the others"
        )
    typed = multi_task_parser().typed({name: args[name] for name in own if name in args}, path)
    values = {**settings(MultiTaskTrainConfig()), **typed, **found.model, "num_classes": len(found.class_names)}
    config = filled(MultiTaskTrainConfig, values)
    network = build_network(config, tensors["label_classes"].tolist())
    try:
        network.load_state_dict(tensors)
    except RuntimeError as error:
        raise UserError(f"cannot load {path} into the network that it describes: {error}") from error
    return TrainedTasks(network.eval(), config, dict(found.data_config), found.class_names)


def evaluate_budgets(config: BudgetEvalConfig) -> list[dict[str, Any]]:
    """Evaluate a network under budgets (`visionzoo multi-task --checkpoint`), write the results and return the rows.

    Raises:
        UserError: checkpoint or data are not there or do not fit, or a budget is too small.
    """
    given = config.budgets
    process = start_process(config.device.device)
    if process.distributed:
        raise UserError("budgets are evaluated in one process; leave torchrun out")
    require("matplotlib")
    preference = read_preference(given.preference)
    trained = restore_tasks(given.checkpoint, use_ema=not given.no_ema)
    root = _root(config, trained)
    count = len(trained.names)
    split = given.split or trained.config.splits.val_split
    images = MaskedImages(root, split, count, trained.data_config)
    norms = MaskedImages(root, trained.config.splits.train_split, count, trained.data_config)
    network = trained.network.to(process.device)
    size = trained.data_config["input_size"]
    widths = grid(trained.config.tasks.min_width)
    costs = measure_costs(network, size, widths)
    chosen = {
        b: choose_widths(b, preference, costs, widths)
        for b in sorted(set(given.budget or spread_budgets(costs, widths)))
    }
    loading: dict[str, Any] = {"batch_size": given.batch_size, "device": process.device, "workers": given.workers}
    loader = SceneLoader(images, **loading)
    calibration = SceneLoader(_spread(norms, given.norm_images), **loading)
    folder = free_path(Path(given.results or Path(given.checkpoint).parent / "budgets"))
    make_folder(folder)
    rows, networks = [], {}
    bar = require("tqdm").tqdm(total=len(chosen) * len(loader), unit=" batch", disable=not process.is_primary)
    for budget, shares in chosen.items():
        seed_everything(config.device.seed)
        slimmed = slimmed_network(network, shares, calibration, process.device)
        metrics = evaluate(
            slimmed, _counted(loader, bar), process.device, lambda: autocast(config.device, process.device)
        )
        networks[budget] = slimmed
        rows.append(_row(budget, preference, shares, slimmed, costs, size, metrics))
    bar.close()
    _write(folder, rows, trained, split, len(images))
    draw_sheet(folder / "scenes.png", networks, images, trained.names, process.device)
    print(printable(f"written to {folder}: budgets.csv, budgets.md, budgets.png, scenes.png"))
    if given.save_models:
        for budget, slimmed in networks.items():
            save_program(slimmed, size, folder / f"network-{budget:g}.pt2")
        print(f"and {count_of(len(networks), 'program')} of torch.export, network-BUDGET.pt2")
    return rows


def slimmed_network(
    network: MultiTaskNetwork, shares: Mapping[str, float], loader: SceneLoader, device: torch.device
) -> MultiTaskNetwork:
    """Return a network cut to a share of each part, its batch norms measured on a loader's images.

    At full width it is the network itself.
    """
    if all(share == 1 for share in shares.values()):
        return network
    smaller: Any = slim(network, by_layers(shares))
    update_bn(batches(loader), smaller, device)
    return smaller.eval()


class _Program(nn.Module):
    """What is exported: images to labels and pixels, without the maps."""

    def __init__(self, network: nn.Module):
        super().__init__()
        self.network = network

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """[B, 3, H, W] to [B, K] and [B, num_classes, H, W]."""
        labels, pixels, _ = self.network(images)
        return labels, pixels


@torch.no_grad()
def save_program(network: nn.Module, input_size: tuple[int, int, int], path: Path) -> None:
    """Write a network as a program of torch.export, for batches of any number, on the CPU; it needs only torch.

    Raises:
        UserError: the program, read again, does not give what the network gives.
    """
    program = _Program(copy.deepcopy(network).cpu().eval())
    images = torch.rand(2, *input_size)
    exported = torch.export.export(program, (images,), dynamic_shapes=({0: torch.export.Dim.DYNAMIC},), strict=False)
    file = io.BytesIO()
    torch.export.save(exported, file)
    write_atomically(path, lambda out: out.write(file.getvalue()))
    images = torch.rand(3, *input_size)
    for own, its in zip(program(images), torch.export.load(str(path)).module()(images), strict=True):
        if not torch.allclose(own, its, rtol=1e-4, atol=1e-4):
            raise UserError(f"{path} gives other numbers than the network it is of, by {(own - its).abs().max():.3g}")


def _root(config: BudgetEvalConfig, trained: TrainedTasks) -> Path:
    """Return the folder of the data to evaluate on.

    Raises:
        UserError: none is named, or it has other classes than the training.
    """
    given = config.budgets
    dataset = "" if given.data_dir else trained.config.data.dataset
    if not given.data_dir and dataset != SCENES:
        raise UserError(f"which data? {given.checkpoint} was trained on a folder; give --data-dir DIR")
    root, names = open_scenes(dataset, given.data_dir)
    if names != trained.names:
        raise UserError(
            f"{root} has the classes {', '.join(names[:8])}..., {given.checkpoint} was trained on "
            f"{', '.join(trained.names[:8])}...; both have to be the same, in the same order"
        )
    return root


def _spread(images: MaskedImages, number: int) -> Any:
    """Return that many images of a split, evenly spread over it."""
    number = min(number, len(images))
    return Subset(images, [i * len(images) // number for i in range(number)])


def _counted(loader: SceneLoader, bar: Any) -> Iterator[tuple[Tensor, Tensor]]:
    for batch in batches(loader):
        yield batch
        bar.update()


def _row(
    budget: float,
    preference: Mapping[str, float],
    shares: Mapping[str, float],
    network: nn.Module,
    costs: Costs,
    size: tuple[int, int, int],
    metrics: Mapping[str, float],
) -> dict[str, Any]:
    macs = multiply_adds(network, size)
    return {
        "budget": budget,
        **{f"{task}_preference": round(preference[task], 4) for task in TASKS},
        **{part: round(share, 4) for part, share in shares.items()},
        "mmacs": round(macs / 1e6, 3),
        "share": round(macs / costs.full, 4),
        "params_m": round(sum(p.numel() for p in network.parameters()) / 1e6, 4),
        "miou": round(metrics["miou"], 2),
        "map": round(metrics["map"], 2),
    }


def _write(folder: Path, rows: list[dict[str, Any]], trained: TrainedTasks, split: str, images: int) -> None:
    add_rows(folder / "budgets.csv", COLUMNS, rows)
    head = [
        "budget",
        "encoder",
        "segmentation",
        "classification",
        "million multiply-adds",
        "M parameters",
        "mIoU",
        "mAP",
    ]
    table = markdown_table(
        head,
        [
            [
                f"{row['budget']:g}",
                *(f"{row[part]:g}" for part in PARTS),
                f"{row['mmacs']:.1f} ({row['share']:.3f})",
                f"{row['params_m']:.3f}",
                f"{row['miou']:.1f}",
                f"{row['map']:.1f}",
            ]
            for row in rows
        ],
        numbers=True,
    )
    counted = ", ".join(f"{task} {rows[0][f'{task}_preference']:g}" for task in TASKS)
    about = (
        f"{trained.config.model.model}, {trained.data_config['input_size'][-1]} pixels, {count_of(images, 'image')} of "
        f"{split}; preference: {counted}. Encoder, segmentation and classification are shares of their widths."
    )
    write_atomically(folder / "budgets.md", lambda file: file.write(f"{about}\n\n{table}\n".encode()))
    print(f"{about}\n\n{table}")
    draw_curve(rows, folder / "budgets.png")
