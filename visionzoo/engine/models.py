"""Building a model from flags, and from a checkpoint that knows its own."""

import contextlib
import copy
import random
import re
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import islice
from pathlib import Path
from types import MappingProxyType
from typing import Any

import timm
import torch
from huggingface_hub.errors import LocalEntryNotFoundError
from timm.data import create_transform, resolve_data_config
from torch import Tensor, nn

import visionzoo  # noqa: F401  registers the zoo_* models
from visionzoo._torch_private import count_terms_once, keep_memory_formats, list_mode_options
from visionzoo.engine.checkpoints import read_checkpoint
from visionzoo.engine.data import image_mode
from visionzoo.engine.errors import NotNamedError, UserError, closest, printable
from visionzoo.engine.flags import CompiledModelConfig, DeviceConfig, InputConfig, ModelConfig
from visionzoo.engine.image_files import find_images
from visionzoo.engine.images import readable_images, skipped_images
from visionzoo.engine.options import settings
from visionzoo.engine.quantization import check_quantizers, quantize_model
from visionzoo.engine.recorded import (
    DATA_CONFIG,
    Recorded,
    check_data_config,
    command_of,
    per_channel,
    read_recorded,
    recorded_args,
    recorded_beside,
    take_model,
)
from visionzoo.engine.trained_flags import WeightsConfig
from visionzoo.models._checkpoint import (
    EMA_CONTAINERS,
    WeightsError,
    checkpoint_tensors,
    load_weights,
    rename,
    unwrap_state_dict,
)
from visionzoo.models._contract import Contract
from visionzoo.models._hub import READING, not_finite, published
from visionzoo.models._licenses import NonCommercialError, check
from visionzoo.models._network import check_reachable, unreachable
from visionzoo.models._registry import check_download
from visionzoo.quantization import holds_quantizers, is_quantized
from visionzoo.text import count_of, some

DENSE_HEADS = ("decode_head.", "bbox_head.", "rpn_head.", "roi_head.", "panoptic_head.")  # as OpenMMLab names them
NO_USE = "they cannot classify any image: take an earlier checkpoint, or the file from where it is from"


def autocast(precision: DeviceConfig, device: torch.device) -> torch.autocast:
    """Return the mixed-precision context that is asked for, a disabled one without --amp."""
    return torch.autocast(device.type, dtype=getattr(torch, precision.amp_dtype), enabled=precision.amp)


def build_model(
    config: ModelConfig,
    input: InputConfig,
    *,
    pretrained_path: str | None = None,
    say: Callable[[str], object] = print,
    **more: Any,
) -> nn.Module:
    """Create a model by timm.

    Args:
        config: which one.
        input: what it sees, of which the channels count.
        pretrained_path: file of weights instead of the published ones.
        say: is called for tensors that weights lack beside the classifier's.
        more: further arguments of timm.create_model, None meaning unset.

    Raises:
        UserError: the name or an argument is unknown, or the published weights are missing, or of another model.
    """
    if not config.model:
        raise NotNamedError("which model?", "give --model, or --checkpoint of a run of `visionzoo train`")
    check_name(config.model)
    is_local_name = ":" not in config.model
    arguments: dict[str, Any] = dict(in_chans=config.in_chans, num_classes=config.num_classes, global_pool=config.gp)
    arguments |= {**more, **config.model_kwargs}
    if input.input_size and config.in_chans is None:
        arguments["in_chans"] = input.input_size[0]
    accepted = config.non_commercial
    path = pretrained_path
    if path and not Path(path).exists():
        raise UserError(f"no checkpoint at {path} (--pretrained-path)")
    pretrained = config.pretrained or bool(path)
    if accepted and config.model.startswith("zoo_"):
        arguments["non_commercial"] = True
    try:
        _check_reachable(config.model, pretrained=pretrained and not path)
        with _loaded() as loaded:
            model: Any = timm.create_model(config.model, pretrained=pretrained, **arguments)
        if pretrained and not path:
            check(config.model, model.pretrained_cfg.get("license"), accepted=accepted)
        for module, result in loaded:
            if module is model and (said := _lacking(model, result, path or config.model)):
                say(said)
        quantize_model(model, config)
        return model
    except UserError:
        raise
    except NonCommercialError as error:
        raise UserError(str(error)) from error
    except TypeError as error:  # an argument that the model does not have
        if config.model_kwargs:
            raise UserError(f"{config.model} does not take --model-kwargs {config.model_kwargs}: {error}") from error
        if "unexpected keyword argument" not in str(error) and is_local_name:
            raise
        if not is_local_name:
            raise _damaged(config.model, error) from error
        raise UserError(f"{config.model} does not take one of the flags: {error}") from error
    except LocalEntryNotFoundError as error:  # before ValueError and OSError, which it is in some releases
        raise _unreachable(config.model, error) from error
    except (ValueError, AssertionError) as error:
        raise UserError(f"cannot build {config.model}: {error}") from error
    except (RuntimeError, OSError) as error:
        if is_local_name and "Invalid pretrained tag" in str(error):
            known = ", ".join(timm.list_pretrained(f"{config.model.split('.')[0]}.*")) or "none"
            raise UserError(f"{error} Published weights: {known}") from error
        if is_local_name and not pretrained:
            raise
        raise UserError(f"no weights for {config.model}{f' from {path}' if path else ''}: {error}") from error
    except Exception as error:  # what lies in a folder or on a hub is anybody's
        if is_local_name:
            raise
        raise _damaged(config.model, error) from error


def check_name(name: str) -> None:
    """Stop where timm has no model of this name; `hf-hub:...` and `local-dir:...` are looked up elsewhere.

    Raises:
        UserError: it has none.
    """
    if ":" not in name and not timm.is_model(name):
        near = closest(name.split(".")[0], timm.list_models())
        raise UserError(
            f"unknown model {name!r}{near or '; `visionzoo models` lists those of the zoo, timm.list_models() all'}"
        )


def _check_reachable(name: str, *, pretrained: bool) -> None:
    """Look once for what timm is to fetch; the models of the zoo do so themselves."""
    scheme, _, place = name.replace("hf_hub:", "hf-hub:", 1).partition(":")
    if scheme == "hf-hub":  # what it is stands there too, so it is fetched without --pretrained
        check_reachable(name, place, ("config.json",))
    elif pretrained and not place and not name.startswith("zoo_") and (cfg := timm.get_pretrained_cfg(name)):
        check_download(name, cfg)


def _unreachable(name: str, error: Exception) -> NotNamedError:
    """Say where weights were looked for, and what to do without a network."""
    cfg = None if ":" in name else timm.get_pretrained_cfg(name)
    repository = name.partition(":")[2] if cfg is None else str(cfg.hf_hub_id)
    return NotNamedError(
        f"{unreachable(name, repository, error.__cause__ or error.__context__ or error)}. Try again with a network and "
        "without HF_HUB_OFFLINE, or",
        "give a file of them: `visionzoo train` takes --initial-checkpoint FILE, or --pretrained-path FILE for another "
        "number of classes, the other commands --checkpoint FILE",
    )


def _damaged(name: str, error: Exception) -> UserError:
    text = str(error).strip().split("\n")[0]
    return UserError(f"cannot load {name}, it is damaged or no model of timm's: {type(error).__name__}: {text}")


@contextlib.contextmanager
def _loaded() -> Iterator[list[tuple[nn.Module, Any]]]:
    """Keep what loading says within `with`: timm, which loads strictly only as many classes, does not pass it on."""
    load: Any = nn.Module.load_state_dict
    results: list[tuple[nn.Module, Any]] = []

    def kept(module: nn.Module, *args: Any, **kwargs: Any) -> Any:
        result = load(module, *args, **kwargs)
        results.append((module, result))
        return result

    nn.Module.load_state_dict = kept  # type: ignore
    try:
        yield results
    finally:
        nn.Module.load_state_dict = load  # type: ignore[method-assign]


def _lacking(model: Any, result: Any, where: str) -> str | None:
    """Return words on the tensors beside the classifier's that weights lacked.

    Raises:
        UserError: they lacked more than a tenth, so they are of another model, or of a part of it; or they have
            quantizers, which the model gets later, or decoders.
    """
    classifier = model.pretrained_cfg.get("classifier") or ()
    classifiers = tuple(f"{name}." for name in ([classifier] if isinstance(classifier, str) else classifier))
    if any(name.endswith("quantize_input.scale") for name in result.unexpected_keys):
        raise UserError(
            f"{where} is of a quantized model, whose quantizers would be left out; start from it by "
            "--initial-checkpoint, with --quantize as it was"
        )
    if "label_classes" in result.unexpected_keys:  # of MultiTaskNetwork
        raise _of_tasks(where)
    names = [name for name in model.state_dict() if not name.endswith(".num_batches_tracked")]
    names = [name for name in names if not (classifiers and name.startswith(classifiers))]
    missing = sorted(set(names) & set(result.missing_keys))
    if len(missing) > 0.1 * len(names):
        raise UserError(
            f"{where} fits only {len(names) - len(missing)} of the {count_of(len(names), 'tensor')} of the model "
            "beside its "
            f"classifier; {some(missing, 3)} are not in it. It is of another model or a part of one: from it, training "
            "would begin at random weights"
        )
    if not missing:
        return None
    lacking = count_of(len(missing), "tensor is not", "tensors are not")
    return f"{lacking} in {where}, so random at first: {some(missing)}"


def prepare_compiler(config: CompiledModelConfig) -> None:
    """Make torch.compile ready for --torchcompile; under --channels-last Inductor leaves memory formats as they are.

    It would have others before convolutions, which it is wrong about in models whose maps are [B, H, W, C].

    Raises:
        UserError: torch has no such backend or mode; it would say so after the first batch is loaded. Or a mode
            is given without --torchcompile.
    """
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


def data_config(config: ModelConfig, input: InputConfig, model: nn.Module) -> dict[str, Any]:
    """Return input size, mean, std, crop and interpolation: the flags' where given, else the model's, of each channel.

    Raises:
        UserError: means or deviations are not as many as the channels.
    """
    for name in ("mean", "std"):
        channels = config.in_chans or (input.input_size or [3])[0]
        if (values := getattr(input, name)) and len(values) not in (1, channels):
            raise UserError(
                f"--{name}: expected 1 or {count_of(channels, 'number')}, one per channel, got {len(values)}"
            )
    return per_channel(resolve_data_config({**settings(input), "in_chans": config.in_chans}, model=model))


def set_epoch(model: nn.Module | None, epoch: int) -> None:
    """Tell the models of the zoo inside a module, if there is one, which epoch of training begins, counted from 0."""
    for module in model.modules() if model is not None else ():
        if isinstance(module, Contract):
            module.set_epoch(epoch)


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
    image = torch.zeros(1, *input_size, device=next((p.device for p in model.parameters()), None))
    try:
        with torch.no_grad():
            probe(image)
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


def load(
    model: nn.Module,
    source: Mapping[str, Any],
    where: str,
    *,
    use_ema: bool = True,
    new_parts: bool = False,
    advice: str = "",
) -> None:
    """Load a checkpoint's weights; models that are timm's own are loaded by name.

    With `new_parts` a model with gates, reducers, memory or another head also takes the checkpoint of one without, as
    `load_weights` says. `advice` is what a user of the command may do where the weights do not fit.

    Raises:
        UserError: the weights do not fit; it names `where` they come from and what does not fit.
    """
    if command_of(recorded_args(source)) == "multi-task":
        raise _of_tasks(where)
    try:
        if is_quantized(model) or holds_quantizers(source):
            tensors = unwrap_state_dict(source, use_ema=use_ema)
            check_quantizers(model, tensors, where, recorded_args(source).get("quantize"), new_parts=new_parts)
        if hasattr(model, "CHECKPOINT_KEYS"):
            new = dict.fromkeys(("new_gates", "new_reducers", "new_memory", "new_head"), new_parts)
            report = load_weights(model, source, use_ema=use_ema, **new)
            if report.missing:
                print(f"{where}: {report}")
        else:
            model.load_state_dict(unwrap_state_dict(source, use_ema=use_ema))
    except (ValueError, RuntimeError) as error:
        text = shortened((error.fact if isinstance(error, WeightsError) else str(error)) + advice)
        raise UserError(f"cannot load {where} into {type(model).__name__}: {text}") from error


def _refuse_dense(source: Mapping[str, Any], where: str) -> None:
    """Stop where a detector or segmentor is given in place of a classifier.

    Raises:
        UserError: so it is; it names the commands that take it.
    """
    if any(str(name).startswith(DENSE_HEADS) for name in checkpoint_tensors(source, use_ema=False)):
        raise UserError(
            f"{where} is of a detector or segmentor, not of a classifier: name the config that it was trained by too, "
            f"`visionzoo predict|eval|view|export CONFIG.py ... --checkpoint {where}` (`visionzoo configs` lists "
            "ours); here take a checkpoint of `visionzoo train CONFIG.yaml`, or other weights of a classifier"
        )


def _of_tasks(where: str) -> UserError:
    """Say what takes a checkpoint of several tasks, and what to take instead."""
    return UserError(
        f"{where} is of a run of `visionzoo multi-task`, of a network with decoders: `visionzoo multi-task "
        f"--checkpoint {where}` evaluates it, `visionzoo export` writes it as files; here take a checkpoint of "
        "`visionzoo train`, or other weights of a classifier"
    )


def shortened(text: str) -> str:
    """Return torch's message, which names every tensor that is missing, with the first few, and not all sizes."""
    text = re.sub(r'"[^"\n]+"(?:, "[^"\n]+")+', lambda names: some(names[0].split(", "), 3), text)
    return text if len(text) < 1500 else f"{text[:800]} ... {text[-500:]}"


@dataclass
class Trained:
    """A model with its weights and what is recorded of how it was trained.

    Attributes:
        model: with its weights.
        data_config: input size, mean, std, crop and interpolation.
        class_names: in the order of the logits, None where nothing names them.
        args: flags of the training run as far as they may be taken, empty for other weights.
        recorded: all that may be taken of them.
        reading: which of `READING` are given or recorded: how image files are to be read and logits to be understood.
        averaged: whether the weights are a checkpoint's moving average.
    """

    model: nn.Module
    data_config: dict[str, Any]
    class_names: list[str] | None = None
    args: dict[str, Any] = field(default_factory=dict)
    reading: dict[str, Any] = field(default_factory=dict)
    recorded: Recorded = field(default_factory=Recorded)
    averaged: bool = False

    @property
    def num_classes(self) -> int:
        """The number of classes that the model tells apart."""
        return int(self.model.num_classes)  # type: ignore[arg-type]

    @property
    def mode(self) -> str:
        """PIL's mode of the input images; raises UserError as `image_mode`."""
        return image_mode(self.data_config["input_size"][0], self.reading.get("input_img_mode"))

    @property
    def upright(self) -> bool:
        """Whether images are turned as their EXIF orientation says."""
        return bool(self.reading.get("apply_exif_orientation"))

    @property
    def multi_label(self) -> bool:
        """Whether an image may have several labels, so that each logit has a sigmoid of its own."""
        return bool(self.reading.get("multi_label"))


def restore(
    config: ModelConfig,
    input: InputConfig,
    weights: WeightsConfig,
    reading: Mapping[str, Any] = MappingProxyType({}),
    *,
    complete: Callable[[nn.Module, dict[str, Tensor]], Mapping[str, Tensor]] | None = None,
) -> Trained:
    """Build the model of a checkpoint, or the one that is named where there is none; flags win over what is recorded.

    Of weights that record nothing, the rows of the classifier say how many classes the model gets, where no flag does.
    Recorded is in the checkpoint of a run, ours or of timm's script, and in the config.json of a folder or a hub's
    repository (`local-dir:`, `hf-hub:`).

    Args:
        config: the model, as far as it is named.
        input: what it sees, as far as it is given.
        weights: the checkpoint, if there is one.
        reading: flags of the command, those of `READING` among them.
        complete: with it the checkpoint may be of another form of the model, for which the rest of the record holds
            too; it returns the tensors and those that the other form lacks.

    Raises:
        UserError: no model is given, or the weights do not fit it or are no numbers.
    """
    if not weights.checkpoint:
        if weights.no_ema:
            raise UserError("--no-ema chooses among the weights of a --checkpoint; give one, or leave it out")
        if config.model and not config.pretrained:
            check_name(config.model)
            raise UserError(f"{config.model} has no weights: give --checkpoint or --pretrained")
        model: Any = build_model(config, input)
        own = published(model)
        if model.num_classes != own["num_classes"]:
            raise UserError(
                f"the weights of {config.model} are of {count_of(own['num_classes'], 'class')}, the model is "
                f"asked to have {model.num_classes}: its classifier would be random; leave --num-classes out, "
                "or train one"
            )
        if ":" in config.name:  # of a folder or a hub: anybody's
            check_data_config(model.pretrained_cfg, config.name)
        found = Recorded(images=own["reading"], class_names=own["class_names"])
        return _trained(config.name, reading, model, data_config(config, input, model), found)
    path = weights.checkpoint
    state = read_checkpoint(path)
    _refuse_dense(state, path)
    found = recorded_beside(path) or read_recorded(state, path)
    if complete and config.model and "model" in found.model:
        found.model["model"] = config.model
    config = replace(take_model(config, found, path), pretrained=False)  # the weights come from the checkpoint
    model = build_model(config, input)
    source = complete(model, _tensors(state, weights)) if complete else state
    try:
        load(model, source, path, use_ema=not weights.no_ema)
    except UserError:
        classes = None if config.num_classes else _classes_in(model, state, use_ema=not weights.no_ema)
        if classes in (None, model.num_classes):
            raise
        print(f"{path}: its classifier has {count_of(classes, 'row')}, so the model gets {count_of(classes, 'class')}")
        return restore(replace(config, num_classes=classes), input, weights, reading, complete=complete)
    recorded = dict(found.data_config)
    if input.img_size or input.input_size:
        recorded.pop("input_size", None)
    given = {**settings(input), "in_chans": config.in_chans}
    given = {name: value for name in (*DATA_CONFIG, "img_size", "in_chans") if (value := given.get(name))}
    prepared = per_channel(resolve_data_config({**recorded, **given}, model=model))
    if found.left_out:
        print(f"{path}: not taken from its record: {', '.join(found.left_out)}", file=sys.stderr)
    averaged = not weights.no_ema and any(isinstance(state.get(key), Mapping) for key in EMA_CONTAINERS)
    return replace(_trained(path, reading, model, prepared, found), averaged=averaged)


def _classes_in(model: Any, source: Mapping[str, Any], *, use_ema: bool) -> int | None:
    """Return of how many classes the classifier in a checkpoint is, by its rows; None where they do not say it."""
    try:
        tensors = rename(unwrap_state_dict(source, use_ema=use_ema), model)[0]
    except ValueError:
        return None
    names = model.pretrained_cfg.get("classifier") or ()
    found = [tensors.get(f"{name}.weight") for name in ([names] if isinstance(names, str) else names)]
    rows = {len(weight) for weight in found if weight is not None and weight.ndim > 1}
    return rows.pop() if len(rows) == 1 else None


def untrained(
    config: ModelConfig, input: InputConfig, weights: WeightsConfig, reading: Mapping[str, Any] = MappingProxyType({})
) -> Trained:
    """Build a model with random weights; the arguments are those of `restore`.

    Raises:
        UserError: as `build_model`; or weights are asked for too.
    """
    if weights.checkpoint or config.pretrained:
        raise UserError("--random-weights together with --checkpoint or --pretrained; give one")
    model = build_model(config, input)
    return _trained(config.name, reading, model, data_config(config, input, model), Recorded())


def _tensors(state: Mapping[str, Any], weights: WeightsConfig) -> dict[str, Tensor]:
    try:
        return unwrap_state_dict(state, use_ema=not weights.no_ema)
    except ValueError as error:
        raise UserError(f"cannot load {weights.checkpoint}: {error}") from error


def _trained(
    source: str, given: Mapping[str, Any], model: nn.Module, config: dict[str, Any], found: Recorded
) -> Trained:
    if spoilt := not_finite(model):
        raise UserError(
            f"{source}: {count_of(len(spoilt), 'tensor holds', 'tensors hold')} NaN or infinite weights, such as "
            f"{spoilt[0]}; {NO_USE}"
        )
    reading = {name: value for name in READING if (value := given.get(name) or found.images.get(name))}
    names = found.class_names
    if names and len(names) != model.num_classes:
        raise UserError(
            f"{source} names {count_of(len(names), 'class')}, the model has {model.num_classes}; give the right one"
        )
    return Trained(model, config, names, {**found.model, **found.images}, reading, found)


def draw_images(sources: Sequence[str], number: int, trained: Trained, *, seed: int, skip_bad_images: bool) -> Tensor:
    """Return a batch of the images that a command names, drawn without replacement, transformed.

    Args:
        sources: files, folders and patterns.
        number: of the images.
        trained: whose images they are to be.
        seed: of the draw.
        skip_bad_images: skip those that cannot be read.

    Raises:
        UserError: none can be read, or one cannot and is not to be skipped.
    """
    notes: list[str] = []
    paths = list(dict.fromkeys(find_images(sources, notes)))
    if len(paths) < number:
        notes.append(f"{count_of(len(paths), 'image is', 'images are')} there, of --num-images {number}")
    random.Random(seed).shuffle(paths)
    transform: Any = create_transform(**trained.data_config, is_training=False)
    skipped: list[str] | None = [] if skip_bad_images else None
    readable = readable_images(paths, trained.mode, upright=trained.upright, skipped=skipped)
    batch: list[Tensor] = [transform(image) for _, image in islice(readable, number)]
    if skipped:
        notes.append(f"{skipped_images(skipped)}: {'; '.join(skipped)}")
    for note in notes:
        print(printable(note))
    if not batch:
        raise UserError("no image could be used")
    return torch.stack(batch)
