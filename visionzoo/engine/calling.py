"""How a model is called: its precision, its compiler, a trial of it, and the epoch that it is in."""

import copy
from collections.abc import Sequence
from typing import Any

import torch
from timm.task import TrainingTask
from torch import nn

from visionzoo._torch_private import count_terms_once, keep_memory_formats, list_mode_options
from visionzoo.engine.errors import UserError
from visionzoo.engine.flags import CompiledModelConfig, DeviceConfig
from visionzoo.models._contract import Contract


def autocast(precision: DeviceConfig, device: torch.device) -> torch.autocast:
    """Return the mixed-precision context that is asked for, a disabled one without --amp."""
    return torch.autocast(device.type, dtype=getattr(torch, precision.amp_dtype), enabled=precision.amp)


def prepare_compiler(config: CompiledModelConfig) -> None:
    """Make torch.compile ready for --torchcompile, where it is given.

    Under --channels-last Inductor leaves memory formats as they are: it would have others before convolutions, which it
    is wrong about in models whose maps are [B, H, W, C].

    Raises:
        UserError: torch has no such backend or mode; it would say so after the first batch is loaded. Or a mode
            is given without --torchcompile.
    """
    if not config.torchcompile and not config.torchcompile_mode:
        return
    if not config.torchcompile:
        raise UserError(f"--torchcompile-mode {config.torchcompile_mode} is of --torchcompile, which is not given")
    if config.torchcompile not in torch.compiler.list_backends(exclude_tags=()):
        backends = ", ".join(torch.compiler.list_backends())
        raise UserError(f"--torchcompile: expected one of {backends}, got {config.torchcompile!r}")
    if config.torchcompile_mode is not None and config.torchcompile == "inductor":
        modes = list(list_mode_options())
        if config.torchcompile_mode not in modes:
            raise UserError(
                f"--torchcompile-mode: expected one of {', '.join(modes)}, got {config.torchcompile_mode!r}"
            )
    count_terms_once()
    if config.channels_last:
        keep_memory_formats()


def compile_model(config: CompiledModelConfig, model: nn.Module) -> None:
    """Let a model, or the task that trains one, be compiled at its first call, where --torchcompile asks for it.

    Args:
        config: with the flags.
        model: stays what it is; a task's moving average is compiled too.

    Raises:
        UserError: as `prepare_compiler`.
    """
    prepare_compiler(config)
    if config.torchcompile:
        model.compile(backend=config.torchcompile, mode=config.torchcompile_mode)
        if isinstance(model, TrainingTask):
            model.compile_ema(backend=config.torchcompile, mode=config.torchcompile_mode)


def try_images(model: nn.Module, name: str, input_size: Sequence[int], *, training_batch: int | None = None) -> None:
    """Run the model on one blank image of (channels, height, width), before anything is read or written.

    Args:
        model: on its device.
        name: of the model, for the message.
        input_size: of the image.
        training_batch: images of a batch where the model is to be trained.

    Raises:
        UserError: the model does not take such images, or cannot be trained on so few of them.
    """
    was_training = model.training
    alone = training_batch == 1  # then batch norms see one image, and need a map of more than one pixel
    probe = copy.deepcopy(model).train() if alone else model.eval()
    try:
        with torch.no_grad():
            probe(torch.zeros(1, *input_size, device=next((p.device for p in model.parameters()), None)))
    except torch.OutOfMemoryError:
        raise
    except (AssertionError, RuntimeError, ValueError) as error:
        height, width = input_size[-2:]
        if alone and "more than 1 value per channel" in str(error):
            advice = "a larger --batch-size or --img-size may do"
        else:
            cfg: Any = getattr(model, "pretrained_cfg", {})
            own = cfg.get("input_size")
            advice = "another --img-size may do" + (f"; the model's own is {own[-2]} x {own[-1]}" if own else "")
            if hasattr(model, "set_input_size"):
                side = height if height == width else f"{height},{width}"
                advice += f". To build it for these: --model-kwargs img_size={side}"
        batch = " one by one" if alone else ""
        raise UserError(
            f"{name} does not take images of {height} x {width} pixels{batch}: {error}; {advice}"
        ) from error
    finally:
        model.train(was_training)


def set_epoch(model: nn.Module | None, epoch: int) -> None:
    """Tell the models of the zoo inside a module, if there is one, which epoch of training begins, counted from 0."""
    for module in model.modules() if model is not None else ():
        if isinstance(module, Contract):
            module.set_epoch(epoch)
