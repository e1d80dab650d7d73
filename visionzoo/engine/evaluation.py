"""Top-1, top-5 and loss over a data set, exact on any number of processes."""

import json
import re
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
import torch.distributed
from timm.models import safe_model_name
from torch import nn

from visionzoo.engine.calling import autocast, compile_model, try_images
from visionzoo.engine.checkpoints import make_folder, write_atomically
from visionzoo.engine.data import (
    check_labels,
    class_names,
    eval_loader,
    open_split,
    resolve_num_classes,
    with_same_classes,
)
from visionzoo.engine.errors import UserError, printable, require
from visionzoo.engine.exits import calibrate_exits, exits_files, with_exits
from visionzoo.engine.images import IGNORED, batches, loading_death
from visionzoo.engine.multilabel import mean_average_precision
from visionzoo.engine.options import given_flags, settings
from visionzoo.engine.outputs import add_rows, check_table, free_path
from visionzoo.engine.parallel import Process, start_process
from visionzoo.engine.recorded import take_data
from visionzoo.engine.restoring import restore
from visionzoo.engine.trained_flags import EvalConfig, ResultConfig

COLUMNS = ("model", "img_size", "top1", "top1_err", "top5", "top5_err", "param_count", "crop_pct", "interpolation")

MEASURED = ("loss", "top1", "top1_err", "top5", "top5_err", "map", "images", "skipped_images")


@dataclass(frozen=True)
class Metrics:
    """Averages over the images that could be read; in % top1 and top5, or map where images have several labels."""

    loss: float
    top1: float
    top5: float
    count: int
    map: float | None = None

    def named(self) -> dict[str, float]:
        """Return the metrics that there are by name, without the count."""
        if self.map is not None:
            return {"loss": self.loss, "map": self.map}
        return {"loss": self.loss, "top1": self.top1, "top5": self.top5}


@torch.inference_mode()
def evaluate(
    models: Sequence[nn.Module],
    loader: Any,
    process: Process,
    *,
    precision: Callable[[], AbstractContextManager[Any]],
    channels_last: bool = False,
    progress: Callable[[Any], Any] = iter,
) -> list[Metrics]:
    """Return the metrics of each model over one pass of the loader; `progress` may wrap the batches in a bar.

    Raises:
        UserError: no image could be read.
    """
    for model in models:
        model.eval()
    # a row a model: loss, top-1, top-5, images
    sums = torch.zeros(len(models), 4, dtype=torch.float64, device=process.device)
    seen = 0
    own = _own_images(loader, process)
    several: list[tuple[torch.Tensor, torch.Tensor]] = []  # logits and labels where an image may have several
    for images, targets in progress(batches(loader)):
        if channels_last:
            images = images.contiguous(memory_format=torch.channels_last)
        real = targets != IGNORED if targets.ndim == 1 else (targets != IGNORED).all(-1)
        if own is not None:  # the sampler repeats images to give each process as many
            real &= seen + torch.arange(len(targets), device=targets.device) < own
        seen += len(targets)
        targets = targets[real]
        for row, model in zip(sums, models, strict=True):
            with precision():
                logits = model(images)
            logits = logits[real].float()
            if targets.ndim == 2:
                loss = nn.functional.binary_cross_entropy_with_logits(logits, targets.float(), reduction="none")
                row += torch.stack([loss.mean(-1).sum(), loss.new_zeros(()), loss.new_zeros(()), real.sum()])
                several.append((logits, targets))
                continue
            hits = logits.topk(min(5, logits.shape[1])).indices == targets[:, None]
            loss = nn.functional.cross_entropy(logits, targets, reduction="sum")
            row += torch.stack([loss, hits[:, 0].sum(), hits.sum(), real.sum()])
    if process.distributed:
        torch.distributed.all_reduce(sums)
    if not sums[0, 3]:
        raise UserError("no image to evaluate on could be used")
    maps: list[float | None] = [None] * len(models)
    if several:
        for index in range(len(models)):
            logits, targets = (torch.cat(parts) for parts in zip(*several[index :: len(models)], strict=True))
            maps[index] = mean_average_precision(logits, targets, process.distributed)
    return [
        Metrics(loss / count, 100 * top1 / count, 100 * top5 / count, int(count), average)
        for (loss, top1, top5, count), average in zip(sums.tolist(), maps, strict=True)
    ]


def _own_images(loader: Any, process: Process) -> int | None:
    if not process.distributed or isinstance(loader.dataset, torch.utils.data.IterableDataset):
        return None
    return len(range(process.rank, len(loader.dataset), process.world_size))


def evaluate_checkpoint(config: EvalConfig) -> dict[str, Any]:
    """Evaluate what `config` names (`visionzoo eval`), print and write the result, and return it.

    Raises:
        UserError: the model, its weights or the data set are not there or do not fit.
    """
    process = start_process(config.device.device)
    if config.calibration.exits:
        _check_exit_flags(config, process)
    elif flags := given_flags(config.calibration):
        raise UserError(f"{flags[0]} is of --exits; give that too, or leave it out")
    else:
        _check_files(config.result)
    trained = restore(config.model, config.input, config.result, settings(config.data))
    config = take_data(config, trained.recorded, config.result.checkpoint)
    result = config.result
    split = result.split or "validation"
    data = replace(
        config.data,
        input_img_mode=trained.reading.get("input_img_mode"),
        multi_label=trained.multi_label,
        apply_exif_orientation=trained.upright,
    )

    def open_images(class_map: Any) -> Any:
        return open_split(
            data,
            is_training=False,
            split=split,
            root=data.data_dir,
            channels=trained.data_config["input_size"][0],
            seed=config.device.seed,
            batch_size=result.batch_size,
            num_samples=result.num_samples,
            class_map=class_map,
        )

    dataset = with_same_classes(open_images(data.class_map), trained.class_names, open_images)
    if result.num_samples and not isinstance(dataset, torch.utils.data.IterableDataset):
        raise UserError("--num-samples is the length of a split that is streamed, this one is not; leave it out")
    resolve_num_classes(trained.num_classes, class_names(dataset))
    check_labels(dataset, trained.num_classes)
    model = trained.model.to(process.device)
    name = config.model.model or trained.args["model"]
    try_images(model, name, trained.data_config["input_size"])
    about = {"model": name, "img_size": trained.data_config["input_size"][-1]}
    if config.calibration.exits:
        if data.multi_label:
            raise UserError("--exits: exits are for models with one label per image")
        with_exits(model, name)
        files = exits_files(result.results_file, _default_file(about, result.checkpoint))
    if config.model.channels_last:
        model = model.to(memory_format=torch.channels_last)
    compile_model(config.model, model)
    tqdm = require("tqdm").tqdm
    loader = eval_loader(data, dataset, trained.data_config, process, batch_size=result.batch_size)

    def progress(batches: Any) -> Any:
        return tqdm(batches, total=len(loader), unit="batch", disable=not process.is_primary)

    try:
        if config.calibration.exits:
            about |= {"input_size": list(trained.data_config["input_size"]), "checkpoint": result.checkpoint}
            about |= {"averaged_weights": trained.averaged, "data": data.data_dir or data.dataset, "split": split}
            about |= {"batch_size": result.batch_size, "seed": config.device.seed}
            return calibrate_exits(config, model, loader, process, about, progress, files)
        (metrics,) = evaluate(
            [model],
            loader,
            process,
            precision=lambda: autocast(config.device, process.device),
            channels_last=config.model.channels_last,
            progress=progress,
        )
    except RuntimeError as error:
        if died := loading_death(error):
            raise died from error
        raise
    measured = {
        **about,
        **_accuracy(metrics),
        "param_count": round(sum(p.numel() for p in trained.model.parameters()) / 1e6, 2),
        "crop_pct": trained.data_config["crop_pct"],
        "interpolation": trained.data_config["interpolation"],
        "loss": round(metrics.loss, 6),
        "images": metrics.count,
        "skipped_images": len(dataset.bad_names()) if hasattr(dataset, "bad_names") else 0,
        "checkpoint": result.checkpoint,
        "averaged_weights": trained.averaged,
        "data": data.data_dir or data.dataset,
        "split": split,
    }
    if process.is_primary:
        for note in getattr(dataset, "notes", []):
            print(note)
        _write(measured, result)
    return measured


def _accuracy(metrics: Metrics) -> dict[str, float]:
    if metrics.map is not None:
        return {"map": round(metrics.map, 4)}
    one, five = metrics.top1, metrics.top5
    values = {"top1": one, "top1_err": 100 - one, "top5": five, "top5_err": 100 - five}
    return {name: round(value, 4) for name, value in values.items()}


def _check_exit_flags(config: EvalConfig, process: Process) -> None:
    """Refuse what does not go with --exits.

    Raises:
        UserError: there is such a flag, or there are several processes.
    """
    if process.distributed:
        raise UserError("--exits runs in one process; leave torchrun out")
    if config.model.torchcompile:
        raise UserError("--exits runs a model part by part, and --torchcompile makes one of all; leave it out")
    if config.result.results_csv:
        raise UserError("--results-csv takes one row per model, and --exits has a table of its own; leave it out")
    require("matplotlib")


def _check_files(given: ResultConfig) -> None:
    """Refuse, before hours of work, to write over what is no earlier result.

    Raises:
        UserError: --results-file or --results-csv is another file.
    """
    if given.results_csv:
        check_table(Path(given.results_csv), COLUMNS)
    path = Path(given.results_file)
    make_folder(path.parent)
    if given.results_file and path.exists() and _read(path) is None:
        raise UserError(f"--results-file {path} exists and is not a result of `visionzoo eval`; name another file")


def _write(result: dict[str, Any], given: ResultConfig) -> None:
    text = json.dumps(result, indent=2)
    print(text)
    path = Path(given.results_file or _default_file(result, given.checkpoint))
    if not given.results_file and _read(path) != _what(result):
        path = free_path(path)
    make_folder(path.parent)
    write_atomically(path, lambda file: file.write(f"{text}\n".encode()))
    print(f"written to {printable(str(path))}")
    if given.results_csv:
        add_rows(Path(given.results_csv), COLUMNS, [result])


def _read(path: Path) -> dict[str, Any] | None:
    """Return what an earlier result says that it is of; None where there is none, or another file."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return _what(content) if isinstance(content, dict) and {"model", "loss"} <= content.keys() else None


def _what(result: dict[str, Any]) -> dict[str, Any]:
    """Return what was evaluated on what, without what came out."""
    return {name: value for name, value in result.items() if name not in MEASURED}


def _default_file(result: dict[str, Any], checkpoint: str) -> Path:
    if not checkpoint:
        return Path("output/eval") / f"{safe_model_name(result['model'])}-{result['img_size']}.json"
    path = Path(checkpoint)
    name = re.sub(r"(\.(pth|pt|bin|ckpt|safetensors))?(\.tar)?$", "", path.name)  # exp_v1.0.pth is not exp_v1.5.pth
    return path.with_name(f"eval-{name}.json")
