"""Early exits of a trained model: thresholds calibrated on held-out images, accuracy against cost, and their file."""

import json
import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import count
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from visionzoo.engine.calling import autocast
from visionzoo.engine.checkpoints import make_folder, write_atomically
from visionzoo.engine.errors import UserError, printable
from visionzoo.engine.flags import DeviceConfig
from visionzoo.engine.images import IGNORED, batches
from visionzoo.engine.trained_flags import EvalConfig, ExitConfig
from visionzoo.exits import END, EarlyExitModel, ExitModel, confidence, exit_costs
from visionzoo.models._contract import Contract
from visionzoo.text import count_of, markdown_table

# How much likelier an image is to stop at an exit than at the one before it, from early to late: the authors' of
# Dynamic Perceiver (adaptive_inference.py at 0d2a629).
RATIOS = tuple((i + 4) / 20 for i in range(17)) + tuple(20 / (i + 4) for i in range(15, 0, -1))
TIMED = 512  # images that speed is measured on at most


@dataclass(frozen=True)
class Seen:
    """What all classifiers of a model, its own last, made of some images."""

    confidence: Tensor  # [E, N], largest probability
    hit: Tensor  # [E, N], whether it is that of the right class

    def top1(self, thresholds: Mapping[str, float], names: Sequence[str]) -> tuple[float, list[float]]:
        """Return the accuracy in % where samples stop by thresholds, and the share of images that each answers."""
        exits = first_sure(self.confidence, thresholds, names)
        hits = self.hit.gather(0, exits[None])[0]
        shares = torch.bincount(exits, minlength=len(names)).double() / max(len(exits), 1)
        return 100 * float(hits.double().mean()), shares.tolist()


def first_sure(sure: Tensor, thresholds: Mapping[str, float], names: Sequence[str]) -> Tensor:
    """Return for each image the number of the first exit that is sure enough, else of the last: [E, N] to [N]."""
    exits = torch.full((sure.shape[1],), len(names) - 1)
    for number in range(len(names) - 2, -1, -1):
        if names[number] in thresholds:
            exits[sure[number] >= thresholds[names[number]]] = number
    return exits


def shares_of(ratio: float, names: Sequence[str], factors: Mapping[str, float]) -> list[float]:
    """Return the share of images that each exit is to answer: ratio, ratio², ... of a sum of 1.

    Each but the last is then multiplied by its factor, in turn, and what that leaves goes to the later ones.
    """
    shares = [ratio**k for k in range(1, len(names) + 1)]
    shares = [share / sum(shares) for share in shares]
    for k, name in enumerate(names[:-1]):
        shares[k] *= factors.get(name, 1.0)
        scale = (1 - sum(shares[: k + 1])) / sum(shares[k + 1 :])
        shares[k + 1 :] = [share * scale for share in shares[k + 1 :]]
    return shares


def calibrate(sure: Tensor, names: Sequence[str], shares: Sequence[float]) -> dict[str, float]:
    """Return the thresholds at which each exit answers its share of images, of those that no earlier one answers.

    Args:
        sure: how sure each classifier is of each image, [E, N].
        names: of the classifiers, the last of which answers all that are left.
        shares: of the images, by classifier.

    Returns:
        thresholds of the exits that answer one image at least.
    """
    left = torch.ones(sure.shape[1], dtype=torch.bool)
    thresholds = {}
    for row, name, share in zip(sure[:-1], names[:-1], shares, strict=False):
        number = min(math.floor(sure.shape[1] * share), int(left.sum()))
        if number:
            thresholds[name] = float(row[left].sort(descending=True).values[number - 1])
            left &= row < thresholds[name]
    return thresholds


def calibrate_exits(
    config: EvalConfig,
    model: nn.Module,
    loader: Any,
    process: Any,
    about: Mapping[str, Any],
    progress: Any,
    files: tuple[Path, Path, Path],
) -> dict[str, Any]:
    """Calibrate thresholds on a part of a loader's images, measure on the others, print, write and return the result.

    Args:
        config: of the evaluation.
        model: on its device.
        loader: of the evaluation.
        process: where it runs.
        about: what was evaluated on what, which comes first in the result.
        progress: wraps the batches in a bar.
        files: as `exits_files` returned them.

    Raises:
        UserError: the model has no exits, or there are too few images.
    """
    contract: Any = model.eval()
    names = (*contract.exit_places(), END)
    share = config.calibration.calibration_share
    draw = torch.Generator().manual_seed(config.device.seed)
    parts: tuple[list[tuple[Tensor, Tensor]], ...] = ([], [])  # measured on, calibrated on
    timed: list[Tensor] = []
    for images, targets in progress(batches(loader)):
        if config.model.channels_last:
            images = images.contiguous(memory_format=torch.channels_last)
        held_out = torch.rand(len(images), generator=draw) < share
        real = (targets != IGNORED).cpu()
        sure, hit = _ask_all(contract, images, targets, config.device, process.device)
        for part, chosen in zip(parts, (real & ~held_out, real & held_out), strict=True):
            part.append((sure[:, chosen], hit[:, chosen]))
        kept = images[(real & ~held_out).to(images.device)][: TIMED - sum(map(len, timed))]
        timed += [kept] if len(kept) else []
    measured, calibration = (Seen(*(torch.cat(each, 1) for each in zip(*part, strict=True))) for part in parts)
    if min(measured.hit.shape[1], calibration.hit.shape[1]) < len(names):
        raise UserError(
            f"--exits: {count_of(calibration.hit.shape[1], 'image')} to calibrate on and "
            f"{measured.hit.shape[1]} to measure on are too few; give more, or another --calibration-share than {share}"
        )
    channels, height, width = about["input_size"]
    costs = exit_costs(contract, (channels, height, width))
    batch = torch.cat(timed)

    def row(thresholds: dict[str, float], cost: float, **more: Any) -> dict[str, Any]:
        early = EarlyExitModel(contract, thresholds)
        speed = _images_per_second(early, batch.split(config.result.batch_size), config.device, process.device)
        return {**more, "gmacs": round(cost / 1e9, 6), "images_per_second": round(speed, 1)}

    exits = [
        {
            "exit": name,
            "top1": round(100 * float(measured.hit[k].double().mean()), 4),
            **row({} if name == END else {name: 0.0}, costs.until(name, {})),
        }
        for k, name in enumerate(names)
    ]
    settings: list[dict[str, Any]] = []
    for ratio in RATIOS:
        wanted = shares_of(ratio, names, contract.EXIT_FACTORS)
        thresholds = calibrate(calibration.confidence, names, wanted)
        if any(setting["thresholds"] == thresholds for setting in settings):
            continue
        top1, shares = measured.top1(thresholds, names)
        cost = sum(part * costs.until(name, thresholds) for part, name in zip(shares, names, strict=True))
        settings.append(
            {
                "thresholds": thresholds,
                "shares": {name: round(part, 6) for name, part in zip(names, shares, strict=True)},
                "calibration_top1": round(calibration.top1(thresholds, names)[0], 4),
                "top1": round(top1, 4),
                **row(thresholds, cost),
            }
        )
    result = {
        **about,
        "calibration_share": share,
        "calibration_images": calibration.hit.shape[1],
        "images": measured.hit.shape[1],
        "skipped_images": len(loader.dataset.bad_names()) if hasattr(loader.dataset, "bad_names") else 0,
        "timed_images": len(batch),
        "timed_on": _device_name(process.device),
        "exits": exits,
        "settings": sorted(settings, key=lambda setting: setting["gmacs"]),
    }
    _write(result, files)
    return result


@torch.inference_mode()
def _ask_all(
    model: Contract, images: Tensor, targets: Tensor, precision: DeviceConfig, device: torch.device
) -> tuple[Tensor, Tensor]:
    """Return how sure all classifiers are of each image, and whether they are right, both [E, B], on the CPU."""
    places = model.exit_places()
    said = []
    with autocast(precision, device):
        state = model.begin(images)
        for part in range(len(model.parts)):
            state = model.advance(part, state)
            said += [model.classify(name, state) for name, place in places.items() if place == part]
        said.append(model.forward_head(model.finish(state)))
    logits = torch.stack(said)
    sure = confidence(logits.flatten(0, 1)).unflatten(0, logits.shape[:2])
    return sure.cpu(), (logits.argmax(-1) == targets).cpu()


def _images_per_second(
    model: EarlyExitModel, images: Sequence[Tensor], precision: DeviceConfig, device: torch.device
) -> float:
    """Measure a pass over the images in batches, after one that warms up."""

    def run() -> float:
        start = time.perf_counter()
        with autocast(precision, device):
            for batch in images:
                model(batch)
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        return time.perf_counter() - start

    run()
    return sum(map(len, images)) / run()


def _device_name(device: torch.device) -> str:
    return (
        torch.cuda.get_device_name(device)
        if device.type == "cuda"
        else f"{device.type}, {count_of(torch.get_num_threads(), 'thread')}"
    )


# -- the files --------------------------------------------------------------------------------------------------------


def exits_files(given: str, default: Path) -> tuple[Path, Path, Path]:
    """Return where result, table and curve go: names of one stem at which nothing lies, or those of --results-file.

    Raises:
        UserError: --results-file is there and no result of --exits, or does not end in .json.
    """
    if not given:
        stem = default.with_name(f"{default.stem}-exits")
        for number in count():
            files = _named(stem, number)
            if not any(path.exists() for path in files):
                return files
    path = Path(given)
    if path.suffix != ".json":
        raise UserError(f"--results-file {path}: with --exits it is a JSON beside a table and a curve; end it in .json")
    if path.exists():
        read_settings(path)
    return path, path.with_suffix(".md"), path.with_suffix(".png")


def _named(stem: Path, number: int) -> tuple[Path, Path, Path]:
    name = f"{stem.name}-{number}" if number else stem.name
    return stem.with_name(f"{name}.json"), stem.with_name(f"{name}.md"), stem.with_name(f"{name}.png")


def _write(result: dict[str, Any], files: tuple[Path, Path, Path]) -> None:
    path, table, curve = files
    make_folder(path.parent)
    text = table_of(result)
    write_atomically(path, lambda file: file.write(f"{json.dumps(result, indent=2)}\n".encode()))
    write_atomically(table, lambda file: file.write(text.encode()))
    draw_curve(result, curve)
    print(text)
    print(printable(f"written to {path}, {table} and {curve}; classify by it with visionzoo predict --exits {path}"))


def table_of(result: Mapping[str, Any]) -> str:
    """Return a result as Markdown: each exit by itself (anytime), then the settings (budgeted batch)."""
    names = [entry["exit"] for entry in result["exits"]]
    about = (
        f"{result['model']}, {result['input_size'][1]} x {result['input_size'][2]} pixels: "
        f"{count_of(result['images'], 'image')}, "
        f"thresholds calibrated on {result['calibration_images']} others. Multiply-adds are means over the images; "
        f"images/s on {result['timed_images']} of them ({result['timed_on']}, batches of {result['batch_size']})."
    )
    anytime = markdown_table(
        ["exit", "top-1", "GMACs", "images/s"],
        [
            [e["exit"], f"{e['top1']:.2f}", f"{e['gmacs']:.4f}", f"{e['images_per_second']:.1f}"]
            for e in result["exits"]
        ],
        numbers=True,
    )
    rows = [
        [
            f"{s['gmacs']:.4f}",
            f"{s['top1']:.2f}",
            f"{s['images_per_second']:.1f}",
            *(f"{100 * s['shares'][name]:.1f} %" for name in names),
            *(f"{s['thresholds'][name]:.4f}" if name in s["thresholds"] else "—" for name in names[:-1]),
        ]
        for s in result["settings"]
    ]
    head = ["GMACs", "top-1", "images/s", *(f"at {name}" for name in names), *(f"threshold {n}" for n in names[:-1])]
    budgeted = markdown_table(head, rows, numbers=True)
    return f"{about}\n\nEach exit for all images:\n\n{anytime}\n\nThe first exit that is sure:\n\n{budgeted}\n"


def draw_curve(result: Mapping[str, Any], path: Path) -> None:
    """Write a picture of accuracy against multiply-adds and against images/s: settings as a curve, exits as points."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 4), layout="constrained")
    axes = figure.subplots(1, 2, sharey=True)
    for axis, key, label in zip(axes, ("gmacs", "images_per_second"), ("GMACs per image", "images/s"), strict=True):
        settings = sorted(result["settings"], key=lambda setting: setting[key])
        axis.plot([s[key] for s in settings], [s["top1"] for s in settings], ".-", label="first exit that is sure")
        axis.plot(
            [e[key] for e in result["exits"]], [e["top1"] for e in result["exits"]], "s", label="one exit for all"
        )
        for entry in result["exits"]:
            axis.annotate(entry["exit"], (entry[key], entry["top1"]), xytext=(4, -10), textcoords="offset points")
        axis.set_xlabel(label)
        axis.grid(alpha=0.3)
    axes[0].set_ylabel("top-1 (%)")
    axes[0].legend()
    figure.suptitle(printable(str(result["model"])))
    write_atomically(path, lambda file: figure.savefig(file, format="png", dpi=120))


def read_settings(path: str | Path) -> dict[str, Any]:
    """Return a result of `visionzoo eval --exits`.

    Raises:
        UserError: there is none, or the file is another.
    """
    try:
        content = json.loads(Path(path).read_text(encoding="utf-8"))
        settings = content["settings"]
        fits = isinstance(content["model"], str) and bool(settings)
        for each in settings:
            fits = fits and isinstance(each["thresholds"], dict)
            fits = fits and all(isinstance(each[key], int | float) for key in ("gmacs", "calibration_top1"))
    except OSError as error:
        raise UserError(f"cannot read {path} (--exits): {error.strerror}") from error
    except (ValueError, TypeError, KeyError) as error:
        what = f"{type(error).__name__}: {error}"
        raise UserError(f"{path} is not a result of `visionzoo eval --exits` ({what})") from error
    if not fits:
        raise UserError(f"{path} is not a result of `visionzoo eval --exits`; name the JSON that it wrote")
    return dict(content)


def choose_thresholds(content: Mapping[str, Any], budget: float | None, where: str) -> dict[str, float]:
    """Return the thresholds of the setting that was best at calibration within a budget, the cheapest of equals.

    Args:
        content: what `read_settings` returned.
        budget: multiply-adds of an image on average, in billions; None for any.
        where: the file, for the message.

    Raises:
        UserError: no setting is within the budget.
    """
    within = [each for each in content["settings"] if budget is None or each["gmacs"] <= budget]
    if not within:
        least = min(each["gmacs"] for each in content["settings"])
        raise UserError(f"--budget {budget}: the settings of {where} need {least} GMACs an image and more")
    best: dict[str, Any] = max(within, key=lambda each: (each["calibration_top1"], -each["gmacs"]))
    return dict(best["thresholds"])


def early_exit_model(given: ExitConfig, model: nn.Module, name: str) -> EarlyExitModel | None:
    """Return the model with the thresholds that `visionzoo predict` is given; None where it is given none.

    Raises:
        UserError: they are of another model, or out of range, or the model has no exits.
    """
    if given.budget is not None and not given.exits:
        raise UserError("--budget chooses among the settings of a file; give it by --exits")
    if given.exits and given.thresholds:
        raise UserError("--exits together with --thresholds; give one")
    if not given.exits and not given.thresholds:
        return None
    thresholds = given.thresholds
    if given.exits:
        content = read_settings(given.exits)
        if content["model"] != name:
            raise UserError(f"{given.exits} (--exits) is of {content['model']}, and this model is {name}")
        thresholds = choose_thresholds(content, given.budget, given.exits)
    return with_exits(model, name, thresholds)


def model_of_exit(model: nn.Module, name: str, exit: str) -> ExitModel:
    """Return what one exit of a model answers, without the parts after it.

    Raises:
        UserError: it has no exits, or none of this name.
    """
    try:
        return ExitModel(model, exit)
    except ValueError as error:
        raise UserError(f"--exit {exit}: {name}: {error}") from error


def with_exits(model: nn.Module, name: str, thresholds: Mapping[str, float] | None = None) -> EarlyExitModel:
    """Return a model whose samples stop by thresholds.

    Raises:
        UserError: it has no exits, or a threshold does not fit.
    """
    try:
        return EarlyExitModel(model, thresholds or {})
    except ValueError as error:
        raise UserError(f"{name}: {error}") from error
