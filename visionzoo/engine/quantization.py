"""--quantize and --quantize-anneal: a model's quantizers, where their scales begin, and the end of its training."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch.distributed
from torch import Tensor, nn

from visionzoo.engine.data import end_loading, train_loader
from visionzoo.engine.errors import UserError
from visionzoo.engine.flags import ModelConfig, TrainConfig
from visionzoo.engine.images import announce_epoch, batches, seed_everything
from visionzoo.engine.options import changed
from visionzoo.engine.parallel import Process
from visionzoo.quantization import LSQ, Annealing, calibrate, describe, is_quantized, quantize
from visionzoo.text import count_of, some

KEYS = ("weights", "activations", "weight_quantizer", "reparameterize")


def quantize_model(model: nn.Module, config: ModelConfig) -> None:
    """Put quantizers into a model, as --quantize says; nothing without it.

    Raises:
        UserError: the flag is incomplete, or has what is none of its options, or the model does not take it.
    """
    given = dict(config.quantize)
    if not given:
        return
    if unknown := [key for key in given if key not in KEYS]:
        raise UserError(f"--quantize: expected {', '.join(KEYS)}, got {', '.join(map(str, unknown))}")
    if missing := [key for key in KEYS[:2] if key not in given]:
        raise UserError(f"--quantize: {' and '.join(missing)} missing; give both, as weights=4 activations=4")
    try:
        quantize(model, **given)
    except ValueError as error:
        raise UserError(f"--quantize: {config.name}: {error}") from error


def check_quantizers(
    model: nn.Module, tensors: Mapping[str, Tensor], where: str, recorded: Any, *, new_parts: bool = False
) -> None:
    """Refuse weights whose quantizers are not the model's: levels of other bits would load, and mean something else.

    Args:
        model: that is to take them.
        tensors: of the checkpoint, by the model's names.
        where: they come from, for messages.
        recorded: what --quantize was for them, as far as their checkpoint says.
        new_parts: whether the model may have quantizers that they lack.

    Raises:
        UserError: only one of both is quantized, or each in another way; it names the flag.
    """
    own = {name: module for name, module in model.named_modules() if isinstance(module, LSQ)}
    ending = ".scale"
    theirs = [name.removesuffix(ending) for name in tensors if name.endswith(ending) and "quantize_" in name]
    if not own and not theirs:
        return
    known = [f"{key}={recorded[key]}" for key in KEYS if isinstance(recorded, Mapping) and key in recorded]
    how = f"--quantize {' '.join(known) or 'as it was trained with'}"
    if not theirs:
        raise UserError(
            f"{where} is of a model that is not quantized: leave --quantize out; `visionzoo train "
            "--initial-checkpoint` starts a quantized one from such weights"
        )
    if not own:
        raise UserError(f"{where} is of a quantized model: give {how}, or take a checkpoint that is not quantized")
    same = own.keys() >= set(theirs) if new_parts else own.keys() == set(theirs)
    lowest = [tensors.get(f"{name}.low") for name in theirs]
    if not same or not all(
        low is not None and own[name].takes(tensors[f"{name}{ending}"], low)
        for name, low in zip(theirs, lowest, strict=True)
    ):
        raise UserError(
            f"{where} is quantized in another way than this model: give {how}; `visionzoo train --initial-checkpoint` "
            "starts one of any bits from weights that are not quantized"
        )


def begin_scales(
    config: TrainConfig, model: nn.Module, train_set: Any, prepared: Any, process: Process, say: Callable[[str], object]
) -> None:
    """Let scales that are not loaded begin by a batch of training images, alike in all processes; say what learns.

    Args:
        config: of the training.
        model: on its device; nothing is done where it has no quantizers.
        train_set: its images.
        prepared: how they are prepared.
        process: where it runs.
        say: prints what is quantized, and which quantizers have nothing to do.
    """
    if not is_quantized(model):
        return
    say(str(describe(model)))
    # loaded here: loading processes would be ahead of the first epoch by as many batches as they had time for
    loader = train_loader(changed(config, workers=0), train_set, prepared, process)
    seed_everything(config.device.seed, process.rank)
    announce_epoch(loader, config.device.seed, 0)
    images, _ = next(iter(batches(loader)))
    end_loading(loader)
    unseen = calibrate(model, images)
    if unseen:
        say(
            f"{count_of(len(unseen), 'quantizer')} in layers that are never called stay unused: {some(unseen, 3)}; "
            "what reads their weights reads them in float"
        )
    if process.distributed:
        for module in model.modules():
            if isinstance(module, LSQ):
                torch.distributed.broadcast(module.scale.data, 0)
                torch.distributed.broadcast(module.low, 0)


def make_annealing(config: TrainConfig, model: nn.Module, num_epochs: int, process: Process) -> Annealing | None:
    """Return what freezes weights in the last epochs, as --quantize-anneal says; None without it.

    Raises:
        UserError: there are no epochs before, nothing that learns is quantized by StatsQ, or another flag has no place
            beside it.
    """
    fit = config.fit
    if not fit.quantize_anneal:
        return None
    if not is_quantized(model):
        raise UserError("--quantize-anneal is the end of a training with --quantize: give that too")
    if fit.quantize_anneal >= num_epochs:
        raise UserError(
            f"--quantize-anneal {fit.quantize_anneal}: the run has {count_of(num_epochs, 'epoch')}, and weights have "
            "to learn before; give fewer, or as many --cooldown-epochs"
        )
    for name in ("cuda_graphs", "fsdp"):
        if getattr(fit, name):
            raise UserError(
                f"--quantize-anneal chooses anew in each update what learns, which --{name.replace('_', '-')} has no "
                "place for; leave one of them out"
            )
    try:
        return Annealing(model, fit.quantize_margin)
    except ValueError as error:
        advice = "leave --freeze out" if fit.freeze else "give --quantize weight_quantizer=statsq"
        raise UserError(f"--quantize-anneal: {error}; {advice}") from error
