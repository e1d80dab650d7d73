"""`visionzoo fit-gate`: how well each exit of a Mask2Former does on each image, and gates that learn to choose."""

from __future__ import annotations

import copy
import json
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import torch
from mmengine.config import Config
from torch import Tensor
from torch.nn import functional as F
from torch.utils.flop_counter import FlopCounterMode

from visionzoo.engine.checkpoints import write_atomically
from visionzoo.engine.errors import UserError, printable, require
from visionzoo.openmmlab.checked_runner import CheckingRunner, without_traceback
from visionzoo.openmmlab.checkpoints import check_fit, read_any
from visionzoo.openmmlab.config_errors import build
from visionzoo.openmmlab.configuring import config_classes, datasets
from visionzoo.openmmlab.data import check_data
from visionzoo.openmmlab.encoder_exits import GATE, ExitMask2FormerHead, LayersGate
from visionzoo.openmmlab.flags import FitGateConfig, LaunchConfig
from visionzoo.openmmlab.gate_report import draw, table_of
from visionzoo.openmmlab.running import make_folder, prepare, require_checkpoint, say_notes
from visionzoo.openmmlab.stopping import stopping_at_once
from visionzoo.text import count_of

STEPS = 500  # of AdamW, each on all images


@dataclass(frozen=True)
class Derived:
    """What the exits of a model make of N images.

    Attributes:
        layers: [E], after how many layers each exit stands.
        pooled: [N, C], what the gate sees of each image.
        areas: [N, E, 3, K], pixels of each class: right, predicted, labeled.
    """

    layers: Tensor
    pooled: Tensor
    areas: Tensor

    @cached_property
    def quality(self) -> Tensor:
        """The mean IoU of each image at each exit, over classes that are there or found, 0 to 1: [N, E]."""
        return _iou(self.areas).nanmean(-1)

    def targets(self, beta: float) -> Tensor:
        """Return for each image the number of the exit with the best quality less `beta` a layer, [N]."""
        return (self.quality - beta * self.layers).argmax(1)

    def measure(self, exits: Tensor) -> dict[str, float]:
        """Return mIoU over all images and the mean over images, both in %, and mean layers, for exits by image [N]."""
        images = torch.arange(len(exits))
        return {
            "miou": 100 * float(_iou(self.areas[images, exits].sum(0)).nanmean()),
            "image_iou": 100 * float(self.quality[images, exits].mean()),
            "layers": float(self.layers[exits].double().mean()),
        }


def _iou(areas: Tensor) -> Tensor:
    """Areas [..., 3, K] to [..., K]; NaN for a class that is neither there nor found."""
    right, found, labeled = areas.double().unbind(-2)
    return right / (found + labeled - right)


def fit_gate(config: FitGateConfig) -> dict[str, Any]:
    """Fit a gate for each price of a layer, measure all exits and gates; write, print and return the results.

    Raises:
        UserError: the config's head has no exits, its test data has no labels, config, data and checkpoint do not fit
            together, or the folder has such results already.
    """
    cfg = _prepared(config)
    loaders = [*_loaders(cfg), cfg.test_dataloader]
    say_notes(check_data(cfg, ["train_dataloader", "test_dataloader"]))
    make_folder(cfg.work_dir)
    runner = build(cfg, lambda: CheckingRunner.from_cfg(cfg))
    say_notes(check_fit(runner.model, cfg.load_from, cfg, config_classes(cfg)))
    runner.load_or_resume()
    model = runner.model.eval()
    with stopping_at_once():
        *learning, measured = (_derived(cfg, runner, model, loader) for loader in loaders)
        learned = Derived(measured.layers, *(torch.cat([getattr(d, n) for d in learning]) for n in ("pooled", "areas")))
        learned, measured = _with_labels(learned, "training"), _with_labels(measured, "test")
        shape, gmacs = exit_gmacs(model, runner.build_dataloader(cfg.test_dataloader))
    everywhere = torch.zeros(len(measured.pooled), dtype=torch.long)
    exits = [
        {**measured.measure(everywhere + number), "layers": int(layers), "gmacs": gmacs[number]}
        for number, layers in enumerate(measured.layers)
    ]
    gates, fitted = [], []
    for beta in config.beta:
        gate = fit(learned, beta, len(model.decode_head.used))
        chosen = choose(gate, measured)
        targets = measured.targets(beta)
        best = measured.measure(targets)
        shares = torch.bincount(chosen, minlength=len(exits)).double() / len(chosen)
        gates.append(
            {
                "beta": beta,
                **measured.measure(chosen),
                "gmacs": float(shares @ torch.tensor(gmacs, dtype=torch.double)),
                "shares": shares.tolist(),
                "target_layers": best["layers"],
                "target_miou": best["miou"],
            }
        )
        fitted.append(gate)
    result = {
        "config": Path(config.config).stem,
        "learned_images": len(learned.pooled),
        "images": len(measured.pooled),
        "input_size": shape,
        "exits": exits,
        "gates": gates,
    }
    _write(result, fitted, cfg)
    return result


def _prepared(config: FitGateConfig) -> Config:
    folder = config.work_dir or str(Path("work_dirs") / f"{Path(config.config).stem}-gate")
    cfg = prepare(config.config, folder, config.data, LaunchConfig(config.cfg_options, "none"))
    head: Any = cfg.model.get("decode_head") or {}
    if head.get("type") != "ExitMask2FormerHead":
        raise UserError(
            f"{config.config} has no exits to choose from: expected model.decode_head.type 'ExitMask2FormerHead', got "
            f"{head.get('type')!r}; the configs eco-mask2former_* have it"
        )
    if cfg.model.get("test_cfg", {}).get("mode") == "slide":
        raise UserError("fit-gate: the gate sees whole images, not windows; set model.test_cfg.mode=whole")
    if (Path(folder) / "gate.json").exists():
        raise UserError(f"--work-dir {folder} has the results of fit-gate already; name another folder")
    head.encoder_layers = None
    cfg.load_from = require_checkpoint(config.checkpoint)
    return cfg


def _derived(cfg: Config, runner: CheckingRunner, model: Any, loader: Any) -> Derived:
    derived: Derived = without_traceback(lambda: derive(model, build(cfg, lambda: runner.build_dataloader(loader))))
    return derived


def _loaders(cfg: Config) -> list[Any]:
    """Return the training images' loaders with the pipeline of the test images, labels and all."""
    inner = {name: [dataset for loader, dataset in datasets(cfg) if loader == name] for name, _ in datasets(cfg)}
    pipeline = inner["test_dataloader"][0].pipeline
    if not any(step["type"] == "LoadAnnotations" for step in pipeline):
        raise UserError("fit-gate: test_dataloader loads no annotations, by which the exits are measured")
    loaders = []
    for dataset in inner["train_dataloader"]:
        loader = copy.deepcopy(cfg.test_dataloader)
        loader.dataset = {**copy.deepcopy(dataset), "pipeline": copy.deepcopy(pipeline)}
        loaders.append(loader)
    return loaders


@torch.no_grad()
def derive(model: Any, loader: Any) -> Derived:
    """Measure every exit that has a weight on every image of a loader (mmseg's segmentor, whole images).

    Raises:
        UserError: labels have not the size of their image.
    """
    from mmseg.evaluation import IoUMetric

    head: ExitMask2FormerHead = model.decode_head
    exits = [*head.exit_weights]
    pooled, areas = [], []
    bar = require("tqdm").tqdm(total=len(loader.dataset), unit="image", disable=None)
    for batch in loader:
        data = model.data_preprocessor(batch, training=False)
        samples = data["data_samples"]
        metas = [sample.metainfo for sample in samples]
        maps = model.extract_feat(data["inputs"])
        pooled.append(LayersGate.pool(maps[-1]).cpu())
        of_batch = []
        for decoded in head.pixel_decoder.decode_after(maps, exits):
            found = model.postprocess_result(head.predict(decoded, metas, model.test_cfg), samples)
            for sample in found:
                seen = sample.pred_sem_seg.data[0]
                label = sample.gt_sem_seg.data[0].to(seen.device)
                if label.shape != seen.shape:
                    raise UserError(
                        f"fit-gate: {sample.img_path} is predicted in its own size {tuple(seen.shape)}, and its labels "
                        f"are {tuple(label.shape)}: put LoadAnnotations after what resizes in the pipeline"
                    )
                right, _, predicted, labeled = IoUMetric.intersect_and_union(
                    seen, label, head.num_classes, head.ignore_index
                )
                of_batch.append(torch.stack([right, predicted, labeled]).int())
        areas.append(torch.stack(of_batch).unflatten(0, (len(exits), -1)).transpose(0, 1))
        bar.update(len(samples))
    bar.close()
    return Derived(torch.tensor(exits), torch.cat(pooled), torch.cat(areas))


def _with_labels(derived: Derived, what: str) -> Derived:
    """Leave images without a labeled pixel out, and say how many."""
    kept = derived.areas[:, 0, 2].sum(-1) > 0
    if missing := int((~kept).sum()):
        say_notes([f"{count_of(missing, f'{what} image')} without a labeled pixel left out"])
    if not kept.any():
        raise UserError(f"fit-gate: no {what} image has a labeled pixel")
    return Derived(derived.layers, derived.pooled[kept], derived.areas[kept])


def fit(derived: Derived, beta: float, number: int) -> LayersGate:
    """Return a gate over `number` layers that learned the best exit of each image at a price of `beta` a layer."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        gate = LayersGate(derived.pooled.shape[1], number)
    with torch.no_grad():
        for layers in {*range(1, number + 1)} - {*derived.layers.tolist()}:
            gate.score.bias[layers - 1] = -torch.inf  # no exit
    targets = derived.layers[derived.targets(beta)] - 1
    optimizer = torch.optim.AdamW(gate.parameters(), lr=1e-2, weight_decay=1e-2)
    for _ in range(STEPS):
        optimizer.zero_grad()
        F.cross_entropy(gate(derived.pooled), targets).backward()
        optimizer.step()
    return gate


@torch.no_grad()
def choose(gate: LayersGate, derived: Derived) -> Tensor:
    """Return the number of the exit that a gate chooses for each image, [N]."""
    layers = gate(derived.pooled).argmax(1) + 1
    return torch.searchsorted(derived.layers, layers)


@torch.no_grad()
def exit_gmacs(model: Any, loader: Any) -> tuple[list[int], list[float]]:
    """Return height and width of a loader's first image, as the model sees it, and 10⁹ multiply-adds by exit.

    They are those that torch's FlopCounterMode counts: of convolutions and matrix products, not of sampling.
    """
    data = model.data_preprocessor(loader.collate_fn([loader.dataset[0]]), training=False)
    metas = [sample.metainfo for sample in data["data_samples"]]
    head: ExitMask2FormerHead = model.decode_head
    with FlopCounterMode(display=False) as counter:
        maps = model.extract_feat(data["inputs"])
        shared = counter.get_total_flops()
    gmacs = []
    for layers in head.exit_weights:
        with FlopCounterMode(display=False) as counter:
            (decoded,) = head.pixel_decoder.decode_after(maps, [layers])
            head.predict(decoded, metas, model.test_cfg)
        gmacs.append((shared + counter.get_total_flops()) / 2e9)
    return [*data["inputs"].shape[-2:]], gmacs


def _write(result: dict[str, Any], gates: Sequence[LayersGate], cfg: Config) -> None:
    folder = Path(cfg.work_dir)
    content = read_any(cfg.load_from)
    weights = content.get("state_dict", content)
    cfg = copy.deepcopy(cfg)
    cfg.model.decode_head.encoder_layers, cfg.load_from = GATE, None
    config = folder / Path(cfg.filename).name
    cfg.dump(str(config))
    meta = {**content.get("meta", {}), "cfg": cfg.pretty_text}
    for entry, gate in zip(result["gates"], gates, strict=True):
        own = {f"decode_head.gate.{name}": value for name, value in gate.state_dict().items()}
        entry["checkpoint"] = f"gate-{entry['beta']:g}.pth"
        checkpoint = {"meta": meta, "state_dict": {**weights, **own}}
        write_atomically(folder / entry["checkpoint"], partial(torch.save, checkpoint))
    text = table_of(result)
    write_atomically(folder / "gate.md", lambda file: file.write(text.encode()))
    draw(result, folder / "gate.png")
    write_atomically(folder / "gate.json", lambda file: file.write(f"{json.dumps(result, indent=2)}\n".encode()))
    print(text)
    print(printable(f"written to {folder}; visionzoo eval {config} --checkpoint {folder / 'gate-BETA.pth'}"))
