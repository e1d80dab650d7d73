"""Training of several tasks: the engine's loop on images with masks, and what it validates by."""

from typing import Any

import timm
import torch
from timm.data import resolve_data_config
from torch import Tensor, nn
from torch.optim import SGD

from visionzoo.decoders import MultiTaskNetwork, create_segmentor
from visionzoo.engine.building import Notes, assemble_run
from visionzoo.engine.calling import autocast, try_images
from visionzoo.engine.data import check_ranges
from visionzoo.engine.errors import UserError
from visionzoo.engine.images import batches, seed_everything
from visionzoo.engine.multi_task.data import UNLABELED, MaskedImages, SceneLoader, open_scenes
from visionzoo.engine.multi_task.flags import MultiTaskConfig, MultiTaskTrainConfig
from visionzoo.engine.multi_task.task import PARTS, SandwichTask, balanced_weights, losses
from visionzoo.engine.multilabel import mean_average_precision
from visionzoo.engine.optimization import make_scheduler
from visionzoo.engine.options import changed, filled, settings
from visionzoo.engine.parallel import Process, start_process
from visionzoo.engine.run import Parts, Run
from visionzoo.engine.training import Training
from visionzoo.models._licenses import check
from visionzoo.slimming import slimmable
from visionzoo.text import count_of, some

METRIC = "mean"  # of mIoU and mean average precision: what the best checkpoint is best in


def train(config: MultiTaskConfig) -> dict[str, Any]:
    """Train what `config` describes (`visionzoo multi-task`); return the run's last row, best metric and folder.

    Raises:
        UserError: the input cannot work, the loss is not finite, or a checkpoint cannot be written.
        Interrupted: by a signal; a checkpoint is written and the command to continue is in the message.
    """
    return MultiTaskTraining(build_run(config, start_process(config.device.device))).fit()


def build_run(given: MultiTaskConfig, process: Process) -> Run:
    """Build all that a training of several tasks consists of, and take up what it is to continue from.

    Raises:
        UserError: data, backbone or decoder cannot be had, or they do not fit together; or as `assemble_run`.
    """
    if process.distributed:
        raise UserError("multi-task trains in one process; leave torchrun out")
    config = filled(MultiTaskTrainConfig, {**settings(MultiTaskTrainConfig()), **settings(given)})
    notes = Notes(process)
    seed_everything(config.device.seed)
    scenes = given.scenes
    root, names = open_scenes(scenes.dataset, scenes.data_dir)
    if scenes.train_split == scenes.val_split:
        raise UserError(f"--train-split and --val-split are both {scenes.val_split!r}; name a split of other images")
    check_ranges(given.batches, "scale", "ratio")
    prepared = prepare(config, config.input.img_size or 224)
    train_set = MaskedImages(
        root, scenes.train_split, len(names), prepared, batches=given.batches, seed=config.device.seed
    )
    val_set = MaskedImages(root, scenes.val_split, len(names), prepared)
    census = train_set.census()
    val_set.census()  # so that a mask that cannot be used stops the run now
    labels = [i for i, count in enumerate(census.images.tolist()) if 0 < count < len(train_set)]
    if not labels:
        raise UserError(
            "each class is in all or in none of the training images, so there is nothing to classify images by"
        )
    left_out = [name for i, name in enumerate(names) if i not in labels]
    notes.say(
        f"images are classified by {count_of(len(labels), 'class')}"
        + (f"; in all or none of them: {some(left_out)}" if left_out else "")
    )
    config = changed(config, num_classes=len(names))
    network = build_network(config, labels).to(process.device)
    _, epochs = make_scheduler(config.schedule, SGD(network.parameters()), 1, seed=0)  # with cool-down
    if config.tasks.min_width < 1 and config.tasks.slim_epoch >= epochs:
        raise UserError(
            f"--slim-epoch {config.tasks.slim_epoch}: the run ends before, after {count_of(epochs, 'epoch')}, so "
            "no slimmed width would learn; give a smaller one, or --min-width 1 for the full width only"
        )
    layers, fixed = slimmable(network)
    counts = {part: sum(name.startswith(prefix) for name in layers) for part, prefix in PARTS.items()}
    if config.tasks.min_width < 1 and not counts["encoder"]:
        raise UserError(
            f"--model {config.model.model} has no layers that can be slimmed; take another, such as zoo_pvtv2_b0, or "
            "train the full width only: --min-width 1"
        )
    listed = ", ".join(f"{count} of the {part}" for part, count in counts.items())
    notes.say(
        f"layers that are slimmed: {listed}"
        + (f"; at full width stay {count_of(len(fixed), 'mixer or MLP', 'mixers and MLPs')}" if fixed else "")
    )
    try_images(network, config.model.name, prepared["input_size"], training_batch=config.fit.batch_size)
    loading: dict[str, Any] = {
        "batch_size": config.fit.batch_size,
        "device": process.device,
        "workers": config.data.workers,
    }
    weights = balanced_weights(census.pixels, config.tasks.class_balance)
    parts = Parts(
        train_set=train_set,
        val_set=val_set,
        class_names=names,
        data_config=prepared,
        loader=SceneLoader(train_set, shuffle=True, **loading),
        val_loader=SceneLoader(val_set, **loading),
        task=SandwichTask(network, config.tasks, weights, process.device),
        metric=METRIC,
    )
    return assemble_run(config, process, parts, notes)


def prepare(config: MultiTaskTrainConfig, side: int) -> dict[str, Any]:
    """Return size, mean and deviation of what a network sees, in timm's names."""
    name = config.model.name
    cfg = timm.get_pretrained_cfg(name) if timm.is_model(name) else None
    given = {key: tuple(value) for key in ("mean", "std") if (value := getattr(config.input, key))}
    fixed = {"input_size": (3, side, side), "interpolation": "bilinear", "crop_pct": 1.0, "crop_mode": "center"}
    own = resolve_data_config(fixed, pretrained_cfg=cfg.to_dict() if cfg else {})
    return {**own, **given, **fixed}


def build_network(config: MultiTaskTrainConfig, labels: list[int]) -> MultiTaskNetwork:
    """Build the network that a configuration describes.

    Args:
        config: with the number of classes.
        labels: classes that images are classified by.

    Raises:
        UserError: the backbone, the decoder or an argument of one cannot be had.
    """
    model = config.model
    options: dict[str, Any] = dict(model.model_kwargs)
    if config.fit.drop_path is not None:
        options["drop_path_rate"] = config.fit.drop_path
    if model.non_commercial and model.name.startswith("zoo_"):
        options["non_commercial"] = True
    try:
        segmentor = create_segmentor(
            model.name, config.tasks.decoder[-1], model.num_classes, pretrained=model.pretrained, **options
        )
        if model.pretrained:
            cfg: Any = getattr(segmentor.backbone, "pretrained_cfg", {})
            check(model.name, cfg.get("license"), accepted=model.non_commercial)
        return MultiTaskNetwork(segmentor, labels, hidden_dim=config.tasks.classifier_dim)
    except (ValueError, TypeError, RuntimeError, AssertionError, OSError) as error:
        raise UserError(f"cannot build {model.name} with the decoder {config.tasks.decoder[-1]}: {error}") from error


class MultiTaskTraining(Training):
    """The engine's loop, which validates both tasks at the full width."""

    def _train_epoch(self) -> None:
        task: Any = self.run.task
        task.set_epoch(self.run.progress.epoch)
        super()._train_epoch()

    def _validate(self) -> dict[str, float]:
        run = self.run
        models = {"eval": run.task.get_eval_model(ema=True), "raw": run.task.get_eval_model()}
        first, *raw = [model for model in models.values() if model is not None]
        with self.stop.at_once():
            row = {f"eval_{name}": value for name, value in self._measured(first).items()}
            if raw:
                row["raw_mean"] = self._measured(raw[0])[METRIC]
        return row

    def _measured(self, model: Any) -> dict[str, float]:
        run = self.run
        return evaluate(
            model,
            self._stoppable(batches(run.val_loader)),
            run.process.device,
            lambda: autocast(run.config.device, run.process.device),
        )


@torch.inference_mode()
def evaluate(model: nn.Module, loaded: Any, device: torch.device, precision: Any) -> dict[str, float]:
    """Return `loss`, `miou` and `map` in percent, and their `mean`, of a network over batches of images and masks.

    mIoU is the mean over the classes that occur; so is the mean average precision of the images' labels.

    Args:
        model: a `MultiTaskNetwork`, slimmed or not, or what averages one.
        loaded: the batches.
        device: that sums are on.
        precision: makes a context for the forward pass.
    """
    network: Any = getattr(model, "module", model).eval()
    classes = network.num_classes
    confusion = torch.zeros(classes * classes, dtype=torch.int64, device=device)
    logits: list[Tensor] = []
    targets: list[Tensor] = []
    total, count = 0.0, 0
    for images, masks in loaded:
        with precision():
            answers = network(images)
        parts = losses(network, answers, masks)
        total, count = total + float(sum(parts.values())) * len(images), count + len(images)
        known = masks != UNLABELED
        pairs = classes * masks[known] + answers.pixels.argmax(1)[known]
        confusion += torch.bincount(pairs, minlength=classes * classes)
        logits.append(answers.labels.float())
        targets.append(network.label_targets(masks).long())
    table = confusion.view(classes, classes).double()
    hits, union = table.diag(), table.sum(0) + table.sum(1) - table.diag()
    miou = 100 * float((hits[union > 0] / union[union > 0]).mean())
    average = mean_average_precision(torch.cat(logits), torch.cat(targets), distributed=False)
    return {"loss": total / count, "miou": miou, "map": average, METRIC: (miou + average) / 2}
