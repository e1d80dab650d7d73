"""How fast a model of a comparison trains and infers, how fast its images load, and the memory that it takes."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import nn

from visionzoo.benchmark.timing import Budget, host_timing, release, replayed_ms
from visionzoo.engine.calling import autocast, compile_model
from visionzoo.engine.data import mixing
from visionzoo.engine.distillation import make_task
from visionzoo.engine.errors import UserError
from visionzoo.engine.flags import TrainConfig
from visionzoo.engine.images import announce_epoch, batches
from visionzoo.engine.models import build_model, data_config
from visionzoo.engine.optimization import learning_rate, make_optimizer, total_batch
from visionzoo.engine.options import changed
from visionzoo.engine.parallel import start_process
from visionzoo.engine.probing import choose_head
from visionzoo.engine.profiling import peak_memory
from visionzoo.engine.run import Run
from visionzoo.graphs import WARMUP, CudaRecorder, TrainingStep, make_capturable
from visionzoo.kernels.small_maps import device_name

LOADER_SECONDS = 5.0  # how long the loader is watched at most
INFERENCE = Budget(warmup_ms=500, repeat_ms=2000)
SPEED = Budget(warmup_ms=300, repeat_ms=700)  # of each model when speeds are measured apart
REPLAYED = Budget(warmup_ms=0, repeat_ms=100)  # calls that are recorded together, whose replay is timed ten times


def measure_speed(config: TrainConfig) -> dict[str, Any]:
    """Measure steps of training, and inference, of a model by itself, on images that are on the device.

    Both are compiled with --torchcompile, as in training; with --cuda-graphs they are replays of what was recorded.

    Returns:
        Images a second of both, the peak memory of training in MiB (None where it is not counted), and the device.

    Raises:
        UserError: nothing could be recorded.
    """
    own = choose_head(config.fit, config.model)
    num_classes = 10 if own.num_classes is None else own.num_classes
    config = changed(replace(config, model=own), num_classes=num_classes, initial_checkpoint="")
    batch = config.fit.batch_size
    device = start_process(config.device.device).device
    model: Any = build_model(config.model, config.input, drop_path_rate=config.fit.drop_path).to(device)
    if config.model.channels_last:
        model = model.to(memory_format=torch.channels_last)
    prepared = data_config(config.model, config.input, model)
    lr, _ = learning_rate(config.schedule, config.optimizer.opt, total_batch(config.fit, 1))
    task: Any = make_task(config, model, prepared, None, device)
    optimizer: Any = make_optimizer(config.optimizer, lr, task.get_trainable_module())
    graphs = config.fit.cuda_graphs and device.type == "cuda"
    if graphs:
        make_capturable(optimizer)
    compile_model(config.model, task)
    images = _images(config, batch, prepared["input_size"], device)
    labels = torch.arange(batch, device=device) % num_classes
    if mixing(config.augmentation):
        labels = nn.functional.one_hot(labels, num_classes).float()
    model.train()

    def forward(images: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        with autocast(config.device, device):
            return task(images, labels)["loss"]

    release()
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    step = TrainingStep(forward, optimizer, recorder=CudaRecorder(device) if graphs else None)
    for _ in range(2 * WARMUP + 2 if graphs else 1):  # warm up and record, first the passes, then the update
        step(images, labels)
    if graphs and not step.recorded:
        raise UserError(f"--cuda-graphs: nothing could be recorded: {'; '.join(step.remarks)}")
    training = 1e3 * batch / host_timing(partial(step, images, labels), device, SPEED).median_ms
    peak = peak_memory(device).get("peak_memory_mib")
    return {
        "train_images_per_second": training,
        "inference_images_per_second": inference_rate(task.get_eval_model(), config, prepared["input_size"], SPEED),
        "peak_memory_mib": peak,
        "device": device_name(device),
    }


def _images(config: TrainConfig, batch: int, size: Sequence[int], device: torch.device) -> torch.Tensor:
    images = torch.randn(batch, *size, device=device)
    return images.contiguous(memory_format=torch.channels_last) if config.model.channels_last else images


def loader_rate(run: Run) -> float:
    """Return the images a second that the training loader gives to a model that takes no time."""
    announce_epoch(run.loader, run.config.device.seed, run.num_epochs)
    images, started = 0, time.perf_counter()
    for batch, _ in batches(run.loader):
        images += len(batch)
        if time.perf_counter() - started > LOADER_SECONDS:
            break
    return images / (time.perf_counter() - started)


def inference_rate(model: nn.Module, config: TrainConfig, size: Sequence[int], budget: Budget) -> float:
    """Return the images a second of only the model, in training's precision, on a batch that is on the device."""
    device = next(p.device for p in model.parameters())
    images = _images(config, config.fit.validation_batch_size or config.fit.batch_size, size, device)

    def infer() -> None:
        with torch.inference_mode(), autocast(config.device, device):
            model(images)

    model.eval()
    replayed = replayed_ms(infer, device, REPLAYED) if config.fit.cuda_graphs else None
    return 1e3 * len(images) / (replayed or host_timing(infer, device, budget).median_ms)
