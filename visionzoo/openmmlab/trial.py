"""One batch of validation before the first step, and pictures of a test in their own folders."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from traceback import walk_tb
from typing import Any

import torch
from mmdet.engine.hooks import DetVisualizationHook
from mmengine.hooks import Hook
from mmengine.registry import HOOKS
from mmengine.runner import Runner
from mmengine.structures import InstanceData

from visionzoo.engine.errors import Interrupted, UserError, closest
from visionzoo.openmmlab.console import results_unseen
from visionzoo.text import some


@HOOKS.register_module()
class TrialValidationHook(Hook):
    """Validates one batch before the first step, so that what would fail at validation fails at once.

    Raises:
        UserError: model or metric cannot take the batch, or a hook waits for a metric that there is none of.
    """

    priority = "LOWEST"

    def before_train(self, runner: Runner) -> None:
        """Take the batch through model and metric; draw no random number of the training."""
        loop = runner.val_loop
        if loop is None or not len(loop.dataloader.dataset):
            return
        runner.logger.info("one batch of validation is tried before the first step")
        training = runner.model.training
        with torch.random.fork_rng(), results_unseen(runner.logger):
            try:
                metrics = _validate(runner, loop)
            except (UserError, Interrupted):
                raise
            except Exception as error:
                frame, line = [*walk_tb(error.__traceback__)][-1]
                raise UserError(
                    f"the first batch of val_dataloader cannot be validated, so that training would end there: {error} "
                    f"({type(error).__name__} in {Path(frame.f_code.co_filename).name}, line {line})"
                ) from error
            finally:
                runner.model.train(training)
        for hook in runner.hooks:
            for key in _awaited(hook):
                if metrics and key not in metrics:
                    raise UserError(
                        f"{type(hook).__name__} waits for the metric {key!r}, validation gives {some(sorted(metrics))}"
                        f"{closest(key, metrics)}"
                    )


def _validate(runner: Runner, loop: Any) -> dict[str, Any]:
    loader, evaluator = loop.dataloader, loop.evaluator
    size = min(getattr(loader, "batch_size", None) or 1, len(loader.dataset))
    batch = loader.collate_fn([loader.dataset[number] for number in range(size)])
    runner.model.eval()
    with torch.no_grad():
        outputs = runner.model.val_step(batch)  # type: ignore[operator]
    found = [sample.get("pred_instances") for sample in outputs]
    if found[0] is not None and not any(len(instances) for instances in found):
        outputs[0].pred_instances = _made_up(outputs[0])  # without detections COCO's metric names no result
    evaluator.process(data_samples=outputs, data_batch=batch)
    metrics: dict[str, Any] = evaluator.evaluate(size * runner.world_size)
    return metrics


def _made_up(sample: Any) -> InstanceData:
    """Return a detection of the first class over half the image."""
    height, width = sample.ori_shape
    empty = sample.pred_instances
    made = InstanceData()
    made.bboxes = empty.bboxes.new_tensor([[0, 0, width / 2, height / 2]])
    made.scores, made.labels = empty.scores.new_ones(1), empty.labels.new_zeros(1)
    if "masks" in empty:
        made.masks = torch.ones(1, height, width, dtype=torch.bool, device=empty.scores.device)
    return made


def _awaited(hook: Hook) -> list[str]:
    keys = [*(getattr(hook, "key_indicators", None) or []), getattr(hook, "monitor", None)]
    return [key for key in keys if isinstance(key, str) and key != "auto"]


@HOOKS.register_module()
class FoldersVisualizationHook(DetVisualizationHook):
    """mmdet's hook, with the folders of the pictures in the folder of the results: pictures may share a name."""

    def after_test_iter(self, runner: Runner, batch_idx: int, data_batch: dict, outputs: Sequence[Any]) -> None:
        """Draw each picture where its own path says, below the folder that all of them are in."""
        if not self.draw:
            return
        top: Any = getattr(self, "test_out_dir", None) or ""
        dataset: Any = runner.test_dataloader.dataset
        images = getattr(dataset, "data_prefix", {}).get("img", "")
        for sample in outputs:
            inside = os.path.relpath(Path(sample.img_path).parent, images) if images else "."
            self.test_out_dir = str(Path(top, inside)) if ".." not in Path(inside).parts else top
            super().after_test_iter(runner, batch_idx, data_batch, [sample])
        self.test_out_dir = top
