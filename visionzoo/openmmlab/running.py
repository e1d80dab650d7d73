"""Training and evaluation by mmengine's Runner, from a config and flags."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Any

import torch
from mmengine.config import Config
from mmengine.config.utils import ConfigParsingError
from mmengine.hooks import Hook
from mmengine.registry import HOOKS
from mmengine.runner import Runner, find_latest_checkpoint

from visionzoo.engine.errors import UserError, require
from visionzoo.openmmlab import trial  # noqa: F401  # its hooks
from visionzoo.openmmlab.checked_runner import CheckingRunner, without_traceback
from visionzoo.openmmlab.checkpoints import check_fit, check_start, read_any
from visionzoo.openmmlab.config_checks import check_boxes, check_channels, check_windows
from visionzoo.openmmlab.config_errors import build, merge_options, unmerged, unread
from visionzoo.openmmlab.configuring import (
    config_classes,
    datasets,
    format_only,
    task_of,
    use_classes,
    use_dataset,
    use_root,
)
from visionzoo.openmmlab.data import check_data
from visionzoo.openmmlab.flags import EvalConfig, LaunchConfig, OwnDataConfig, TrainConfig
from visionzoo.openmmlab.meta import check_resumed
from visionzoo.openmmlab.stopping import stopping_at_once, stopping_between_steps


def train(config: TrainConfig) -> Runner:
    """Train what the flags ask for and return the Runner.

    Raises:
        UserError: if the config, its data and its classes do not fit together, before the first step; if an image or
            mask cannot be used, at the step that reads it; with --skip-bad-images only those of validation.
        Interrupted: by a signal; a checkpoint is written and named.
    """
    cfg = prepare(config.config, config.work_dir, config.data, config.launch)
    if config.resume:
        cfg.resume, cfg.load_from = True, None if config.resume == "auto" else require_checkpoint(config.resume)
    if config.seed is not None:
        cfg.randomness = {"seed": config.seed}
    if config.amp:
        if not torch.cuda.is_available():
            raise UserError("--amp: mmengine's mixed precision needs a GPU, and torch finds none; leave --amp out")
        cfg.optim_wrapper.type = "AmpOptimWrapper"
        cfg.optim_wrapper.setdefault("loss_scale", "dynamic")
    if config.auto_scale_lr:
        if "auto_scale_lr" not in cfg:
            raise UserError("--auto-scale-lr: the config does not say for which batch size its learning rate is")
        cfg.auto_scale_lr.enable = True
    say_notes(check_data(cfg))
    make_folder(cfg.work_dir)
    _log_to(cfg, config)
    # mmengine's checkpoints hold Python objects; at the end the last and the best are also written as bare tensors
    cfg.default_hooks.checkpoint.setdefault("published_keys", ["meta", "state_dict"])
    cfg.setdefault("custom_hooks", []).append({"type": "ProgressBarHook"})
    cfg.custom_hooks.append({"type": "TrialValidationHook"})
    if config.skip_bad_images:
        cfg.skip_bad_images = True
        cfg.custom_hooks.append({"type": "SkippedImagesHook"})
    runner = build(cfg, lambda: CheckingRunner.from_cfg(cfg))
    if cfg.get("resume"):
        if checkpoint := cfg.get("load_from") or find_latest_checkpoint(cfg.work_dir):
            say_notes(check_fit(runner.model, checkpoint, cfg, config_classes(cfg)))
            check_resumed(read_any(checkpoint), cfg, checkpoint)
    elif cfg.get("load_from"):
        say_notes(check_start(runner.model, require_checkpoint(cfg.load_from), config_classes(cfg)))
    with stopping_between_steps(runner):
        without_traceback(lambda: build(cfg, runner.train))
    return runner


def evaluate(config: EvalConfig) -> dict[str, float]:
    """Evaluate a checkpoint on the config's test data, print its metrics and return them.

    Raises:
        UserError: if there is no such checkpoint, or it, the config and the data do not fit together.
    """
    cfg = prepare(config.config, config.work_dir, config.data, config.launch)
    cfg.load_from = require_checkpoint(config.checkpoint)
    if config.show_dir:
        folder = str(Path(config.show_dir).resolve())
        cfg.default_hooks.visualization.update(draw=True)
        if task_of(cfg) == "detection":
            cfg.default_hooks.visualization.update(type="FoldersVisualizationHook", test_out_dir=folder)
        else:  # mmseg's hook has no folder of its own, and draws every 50th picture
            cfg.default_hooks.visualization.update(interval=1)
            cfg.visualizer.update(save_dir=folder)
    if format_only(cfg, "test_dataloader"):
        leave_annotations_out(cfg)
    say_notes(check_data(cfg, ["test_dataloader"]))
    make_folder(cfg.work_dir)
    runner = build(cfg, lambda: CheckingRunner.from_cfg(cfg))
    say_notes(check_fit(runner.model, cfg.load_from, cfg, config_classes(cfg)))
    with stopping_at_once():
        metrics: dict[str, float] = without_traceback(lambda: build(cfg, runner.test))
    return metrics


def prepare(path: str, work_dir: str | None, data: OwnDataConfig, launch: LaunchConfig) -> Config:
    """Read a config and apply the flags that training and evaluation share."""
    cfg = read_config(path)
    if launch.cfg_options:
        merge_options(cfg, launch.cfg_options)
    if data.data_root:
        use_root(cfg, data.data_root)
    if data.dataset:
        use_dataset(cfg, data.dataset)
    if data.classes:
        use_classes(cfg, [name.strip() for name in data.classes.split(",") if name.strip()])
    cfg.launcher = launch.launcher or ("pytorch" if "TORCHELASTIC_RUN_ID" in os.environ else "none")
    os.environ.setdefault("LOCAL_RANK", str(launch.local_rank))
    if not torch.cuda.is_available():
        # on CPUs mmengine would set the process's GPU, and name it to torch
        cfg.setdefault("model_wrapper_cfg", {"device_ids": None, "broadcast_buffers": False})
        if cfg.launcher == "pytorch" and not torch.distributed.is_initialized():
            torch.distributed.init_process_group("gloo")
    cfg.work_dir = work_dir or cfg.get("work_dir") or str(Path("work_dirs") / Path(path).stem)
    check_channels(cfg)
    check_windows(cfg)
    check_boxes(cfg)
    return cfg


def make_folder(path: str) -> None:
    """Make the folder of logs and checkpoints.

    Raises:
        UserError: it cannot be made, or nothing can be written into it.
    """
    try:
        Path(path).mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"the work folder {path} cannot be made: {error}; name another by --work-dir") from error
    if not os.access(path, os.W_OK | os.X_OK):
        raise UserError(f"the work folder {path} cannot be written to; name another by --work-dir")


def leave_annotations_out(cfg: Config) -> None:
    """Let a segmentor's test images come without masks, as those of a test server do; mmdet's may anyhow."""
    if task_of(cfg) == "segmentation":
        for loader, dataset in datasets(cfg):
            if loader == "test_dataloader":
                dataset.pipeline = [step for step in dataset.pipeline if step["type"] != "LoadAnnotations"]


def _log_to(cfg: Config, config: TrainConfig) -> None:
    require("tensorboard")
    backends = cfg.visualizer.setdefault("vis_backends", [])
    wanted: list[dict[str, Any]] = [{"type": "TensorboardVisBackend"}]
    if config.log_wandb:
        require("wandb", extra="wandb")
        run = {"project": config.wandb_project, "name": Path(cfg.work_dir).name}
        wanted.append({"type": "WandbVisBackend", "init_kwargs": {k: v for k, v in run.items() if v}})
    there = {backend["type"] for backend in backends}
    backends += [backend for backend in wanted if backend["type"] not in there]


def read_config(path: str) -> Config:
    """Read a config file, and say what it sets that nothing reads.

    Raises:
        UserError: if there is none, it cannot be read, or it is not a config of a model.
    """
    if not Path(path).is_file():
        raise UserError(f"no config at {path}")
    try:
        cfg = Config.fromfile(path)
    except (SyntaxError, FileNotFoundError, ConfigParsingError) as error:
        raise UserError(f"the config {path} cannot be read: {error}") from error
    except TypeError as error:
        if reason := unmerged(error):
            raise UserError(f"the config {reason}") from error
        raise
    if "model" not in cfg or "default_scope" not in cfg:
        raise UserError(f"{path} is not a config of a detector or segmentor: it has no model or no default_scope")
    say_notes(unread(cfg))
    return cfg


def require_checkpoint(path: str) -> str:
    """Return the path of a checkpoint.

    Raises:
        UserError: if there is none.
    """
    if not (path.startswith(("http://", "https://")) or Path(path).is_file()):
        raise UserError(f"no checkpoint at {path}")
    return path


@HOOKS.register_module()
class ProgressBarHook(Hook):
    """A bar over the iterations of the whole training, with their rate and the loss, on a terminal."""

    def before_train(self, runner: Runner) -> None:
        """Start it, in the first process."""
        self._bar: Any = None
        if runner.rank == 0 and sys.stderr.isatty():
            self._bar = require("tqdm").tqdm(total=runner.max_iters, initial=runner.iter, unit="it", dynamic_ncols=True)

    def after_train_iter(
        self, runner: Runner, batch_idx: int, data_batch: Any = None, outputs: dict[str, Any] | None = None
    ) -> None:
        """Move it."""
        if self._bar is not None:
            if outputs and "loss" in outputs and runner.iter % 10 == 0:
                self._bar.set_postfix_str(f"loss {float(outputs['loss']):.4g}", refresh=False)
            self._bar.update()

    def after_train(self, runner: Runner) -> None:
        """Close it."""
        if self._bar is not None:
            self._bar.close()


def say_notes(notes: list[str]) -> None:
    """Print what is worth saying, in the first process."""
    if int(os.environ.get("RANK", 0)) == 0:
        for note in notes:
            print(f"note: {note}", file=sys.stderr)
