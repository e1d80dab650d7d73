"""Evaluation of a trained network at the widths that budgets allow: table, curve, pictures, and the networks."""

import copy
import io
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from visionzoo.engine.calling import autocast
from visionzoo.engine.checkpoints import make_folder, write_atomically
from visionzoo.engine.errors import UserError, printable, require
from visionzoo.engine.images import batches, seed_everything
from visionzoo.engine.multi_task.data import MaskedImages, SceneLoader
from visionzoo.engine.multi_task.drawing import draw_curve, draw_sheet
from visionzoo.engine.multi_task.flags import BudgetEvalConfig
from visionzoo.engine.multi_task.restoring import (
    LabelsAndPixels,
    TrainedTasks,
    data_of,
    norm_loader,
    restore_tasks,
    slimmed_network,
)
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
from visionzoo.engine.multi_task.task import PARTS
from visionzoo.engine.multi_task.training import evaluate
from visionzoo.engine.outputs import add_rows, free_path
from visionzoo.engine.parallel import start_process
from visionzoo.text import count_of, markdown_table

COLUMNS = ("budget", *(f"{task}_preference" for task in TASKS), *PARTS, "mmacs", "share", "params_m", "miou", "map")


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
    root = data_of(given.data_dir, given.checkpoint, trained)
    count = len(trained.names)
    split = given.split or trained.config.splits.val_split
    images = MaskedImages(root, split, count, trained.data_config)
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
    calibration = norm_loader(root, trained, given.norm_images, **loading)
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


@torch.no_grad()
def save_program(network: nn.Module, input_size: tuple[int, int, int], path: Path) -> None:
    """Write a network as a program of torch.export, for batches of any number, on the CPU; it needs only torch.

    Raises:
        UserError: the program, read again, does not give what the network gives.
    """
    program = LabelsAndPixels(copy.deepcopy(network).cpu().eval())
    images = torch.rand(2, *input_size)
    exported = torch.export.export(program, (images,), dynamic_shapes=({0: torch.export.Dim.DYNAMIC},), strict=False)
    file = io.BytesIO()
    torch.export.save(exported, file)
    write_atomically(path, lambda out: out.write(file.getvalue()))
    images = torch.rand(3, *input_size)
    for own, its in zip(program(images), torch.export.load(str(path)).module()(images), strict=True):
        if not torch.allclose(own, its, rtol=1e-4, atol=1e-4):
            raise UserError(f"{path} gives other numbers than the network it is of, by {(own - its).abs().max():.3g}")


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
