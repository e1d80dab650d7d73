"""Weights of others and our own into our models: reading files safely, recognizing names, reporting what fitted."""

from __future__ import annotations

import argparse
import logging
import pickle
import re
import zipfile
import zlib
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from visionzoo.former_names import FORMER_KEYS
from visionzoo.layers.fuse import fuse, has_quantized_layers, unfused_part
from visionzoo.models._contract import Contract
from visionzoo.models._gating import PLACE, PUT_IN, gate_tensors, keep_gates
from visionzoo.models._heads import drop_other_head, head_tensors, keep_head
from visionzoo.models._memory import as_host, keep_memory, memory_tensors
from visionzoo.text import count_of, some

_logger = logging.getLogger(__name__)

ENDINGS = (".safetensors", ".pth", ".pth.tar", ".pt", ".bin", ".ckpt")  # of files of weights
# Where people and trainers put the weights inside a checkpoint; with use_ema the averaged ones come first.
EMA_CONTAINERS = ("state_dict_ema", "model_ema", "ema_state_dict", "ema")
CONTAINERS = ("state_dict", "model", "model_state_dict", "model_state", "module", "net", "weights")
# What wrappers put before the names: DataParallel and DDP, torch.compile, detectors and segmentors, feature getters,
# Lightning, DeepSpeed, transformers.
PREFIXES = ("module.", "backbone.model.", "backbone.", "model.", "net.", "timm_model.", "_forward_module.")


@dataclass
class LoadReport:
    """What became of a checkpoint's tensors."""

    names: str  # whose names the checkpoint had: "visionzoo" or a key of the model's CHECKPOINT_KEYS
    loaded: list[str] = field(default_factory=list)
    missing: list[str] = field(default_factory=list)  # in the model, not in the checkpoint
    unexpected: list[str] = field(default_factory=list)  # in the checkpoint, not in the model
    adapted: list[str] = field(default_factory=list)  # loaded after a change, or left at initial values: which and why
    dropped: list[str] = field(default_factory=list)  # of parts that the model was built without (head, late stages)
    unused: list[str] = field(default_factory=list)  # for which no such model has a use (its authors' buffers, norms)
    beside: list[str] = field(default_factory=list)  # of others beside the wrapped model (a detector's neck, a loss)

    def __str__(self) -> str:
        lines = [f"{count_of(len(self.loaded), 'tensor')} loaded ({self.names} names)"]
        for title in ("missing", "unexpected", "adapted", "dropped", "unused", "beside"):
            if entries := getattr(self, title):
                lines.append(f"{len(entries)} {title}: {some(entries)}")
        return "; ".join(lines)


class WeightsError(ValueError):
    """Weights that do not fit a model.

    Attributes:
        fact: the message without its advice, which is for callers of `load_weights`.
    """

    def __init__(self, fact: str, advice: str) -> None:
        super().__init__(f"{fact} {advice}")
        self.fact = fact


class Composite(nn.Module):
    """A network of several parts, each with tensors named by others: a segmentor of backbone and decoder."""

    def load_parts(
        self, tensors: Mapping[str, Tensor], where: str, *, strict: bool, allow_partial: bool, **new: bool
    ) -> LoadReport:
        """Load a checkpoint's tensors, by whoever's names, into the parts, for `load_weights`.

        Args:
            tensors: of the checkpoint, with whatever prefixes.
            where: its origin, for messages.
            strict: see `load_weights`, as all that follows.
            allow_partial: accept that less than 90 % are found.
            new: `new_gates` and so on, for a part that is a model of the zoo.

        Raises:
            ValueError: if they do not fit; nothing is loaded then.
        """
        raise NotImplementedError


def load_weights(
    model: nn.Module,
    source: Mapping[str, Any] | str | Path,
    *,
    strict: bool = True,
    allow_partial: bool = False,
    new_gates: bool = False,
    new_reducers: bool = False,
    new_head: bool = False,
    new_memory: bool = False,
    use_ema: bool = True,
) -> LoadReport:
    """Load weights into a model of the zoo, whoever's names they have.

    Recognizes our names, the authors' and timm's (the model's `CHECKPOINT_KEYS`), the wrappers and containers people
    meet, and linear weights kept as 1×1 convolutions. The first convolution is adapted to the model's input channels
    as timm does, from any number to any. Tensors of parts that the model was built without (`num_classes=0`,
    `features_only=True`) and those beside the model in its wrapper (a detector's neck, a loss) are left out and
    reported.

    Args:
        model: a model of the zoo, also inside timm's feature getter, DDP or torch.compile, or a segmentor
            (`visionzoo.create_segmentor`).
        source: a state_dict or checkpoint, or the path of one: safetensors, a torch file, or a folder with
            model.safetensors.
        strict: raise if a tensor is missing or unexpected, or the numbers of classes differ. Without it the model
            keeps its own values there; other differences of shape raise all the same.
        allow_partial: accept that less than 90 % of the model's tensors are found.
        new_gates: accept a checkpoint of the model without gates (`gates=` of timm.create_model), which keep their
            initial values; the report has them as missing.
        new_reducers: the same of a checkpoint of the model without reducers (`reduce=`), and of one of DeiT for a
            Sparsifiner, whose predictors of attention are new.
        new_head: the same of a checkpoint with another head than the one put onto the model (`head=`); the tensors of
            the checkpoint's head are left out.
        new_memory: the same of a checkpoint of the model without memory (`memory=`).
        use_ema: take averaged weights where the checkpoint has them.

    Raises:
        ValueError: if the source cannot be read, is unsafe, or does not fit as above, or the model is on the meta
            device; nothing is loaded then.
    """
    where = "the given state_dict" if isinstance(source, Mapping) else str(source)
    whole = unwrap(model, (Contract, Composite))
    if isinstance(whole, Composite):
        checkpoint = source if isinstance(source, Mapping) else read_checkpoint(source)
        new = {"new_gates": new_gates, "new_reducers": new_reducers, "new_head": new_head, "new_memory": new_memory}
        tensors = checkpoint_tensors(checkpoint, use_ema=use_ema)
        return whole.load_parts(tensors, where, strict=strict, allow_partial=allow_partial, **new)
    backbone: Contract = whole
    own = backbone.state_dict()
    if on_meta := [name for name, tensor in own.items() if tensor.is_meta]:
        raise ValueError(
            f"{len(on_meta)} of the {len(own)} tensors of {type(backbone).__name__} are on the meta device, where "
            f"nothing can be loaded ({some(on_meta, 2)}): call model.to_empty(device='cpu') first, or load before "
            f"the weights are offloaded"
        )
    checkpoint = source if isinstance(source, Mapping) else read_checkpoint(source)
    tensors, beside = _unwrap_tensors(checkpoint, use_ema)
    state, names = rename(tensors, backbone)
    if part := unfused_part(backbone, state):
        raise ValueError(
            f"the model was fused for inference ({part} is folded), {where} is of an unfused one: load it into an "
            f"unfused model and fuse that (visionzoo.fuse)"
        )
    report = LoadReport(names, dropped=drop_other_head(state, backbone), beside=beside)
    report.unused = left_out(tensors, backbone, names)
    report.adapted += fit_tables(state, backbone)
    _drop_absent_parts(state, backbone, report)
    kept = _adapt(state, backbone, own, report, strict, where)
    report.loaded = [name for name in own if name in state]
    # batch norms count their updates, but old checkpoints do not hold the count and nothing here uses it
    optional = {name for name in own if name.endswith(".num_batches_tracked")} | kept
    report.missing = [name for name in own if name not in state and name not in optional]
    report.unexpected = [name for name in state if name not in own]
    fusible = report.unexpected and not has_quantized_layers(backbone)
    if fusible and (folded := set(report.unexpected) & fuse(backbone).state_dict().keys()):
        raise ValueError(
            f"{where} is of a model that was fused for inference ({some(sorted(folded), 2)} are of folding), which "
            f"cannot be undone: give the weights of the model that was fused, or load these into visionzoo.fuse(model)"
        )
    accepted = {"gates": new_gates, "reducers": new_reducers, "memory": new_memory, "head": new_head}
    accepted["predictors"] = new_reducers  # of which attention is left out
    parts = {kind: gate_tensors(backbone, place) for kind, place in PUT_IN.items()}
    parts |= {"memory": memory_tensors(backbone), "head": head_tensors(backbone)}
    untrained = {kind: names for kind, names in parts.items() if names and not any(name in state for name in names)}
    put_in = {name for names in untrained.values() for name in names}
    missing = [name for name in report.missing if name not in put_in]
    count = len(own) - len(put_in)
    found = count - len(missing)
    if found < 0.9 * count and not allow_partial:
        raise WeightsError(
            f"{where} fits only {found} of the {count} tensors of {type(backbone).__name__} (less than 90 %), so it "
            f"is probably a checkpoint of another model. {report}.",
            "Pass allow_partial=True to load it all the same.",
        )
    refused = [kind for kind in untrained if not accepted[kind]]
    if strict and (missing or report.unexpected or refused):
        what, advice = "", "Pass strict=False to load what fits."
        if refused and not missing and not report.unexpected:
            flags = dict.fromkeys("reducers" if kind == "predictors" else kind for kind in refused)
            permission = ", ".join(f"new_{kind}=True" for kind in flags)
            verb = "are" if len(refused) > 1 or refused[0].endswith("s") else "is"
            advice = (
                f"Only the {' and the '.join(refused)} {verb} missing: pass {permission} to keep their initial "
                "values, and train them."
            )
        elif any(f".{PLACE}." in name for name in report.unexpected):
            what = " The checkpoint is of a model with gates: build it with the same gates=."
        elif any(name.endswith("quantize_input.scale") for name in report.unexpected):
            what = " The checkpoint is of a quantized model: quantize this one alike (visionzoo.quantization.quantize)."
        elif not head_tensors(backbone) and any(
            re.match(r"head\.(\d\.)?pooling\.", name) for name in report.unexpected
        ):
            what = " The checkpoint is of a model with another head: build it with the same head=."
        raise WeightsError(f"{where} does not fit {type(backbone).__name__}. {report}.{what}", advice)
    if unreadable := [name for name in report.loaded if not _is_plain(state[name])]:
        raise ValueError(
            f"{where} has tensors without values that could be copied (on the meta device, sparse, quantized or "
            f"complex): {some(unreadable)}. Convert them to plain ones first."
        )
    backbone.load_state_dict(state, strict=False)
    for module in backbone.modules():  # where it was built on the meta device
        if callable(compute := getattr(module, "init_non_persistent_buffers", None)):
            compute()
    _logger.info("%s: %s", where, report)
    return report


def unwrap(model: nn.Module, kinds: Any = Contract) -> Any:
    """Return the backbone inside DDP, torch.compile and timm's feature getter, or what else is of these kinds.

    Raises:
        ValueError: if there is none.
    """
    while not isinstance(model, kinds):
        for attribute in ("module", "_orig_mod", "model"):
            inner = getattr(model, attribute, None)
            if isinstance(inner, nn.Module):
                model = inner
                break
        else:
            raise ValueError(f"expected a model of the zoo (timm.create_model('zoo_...')), got {type(model).__name__}")
    return model


def read_checkpoint(path: str | Path) -> Mapping[str, Any]:
    """Read safetensors, a torch file, or a folder's model.safetensors, without running any code from it.

    The checksums of a torch file are compared with its content, which torch itself does not do.

    Raises:
        ValueError: if there is no such file, or it is damaged, unsafe or no checkpoint.
    """
    path = Path(path)
    if path.is_dir():
        files = sorted(file.name for file in path.iterdir() if file.name.endswith(ENDINGS))
        if files and "model.safetensors" not in files:
            raise ValueError(f"{path} is a folder without model.safetensors; name one of its files, {some(files)}")
        path = path / "model.safetensors"
    if not path.is_file():
        raise ValueError(f"no checkpoint at {path}: expected a .safetensors or torch file, or a folder with one")
    if not path.stat().st_size:
        raise ValueError(_damaged(path, "it is empty"))
    try:
        if path.suffix == ".safetensors":
            return load_file(path)
        if zipfile.is_zipfile(path):
            with zipfile.ZipFile(path) as archive:
                if (record := archive.testzip()) is not None:
                    raise ValueError(_damaged(path, f"the checksum of {record} does not fit its content"))
        else:
            with path.open("rb") as file:
                start = file.read(20)
            if start[:1] != pickle.PROTO:  # with which torch files begin that are no zip archives
                raise ValueError(_damaged(path, f"it is not an archive of tensors, and begins with {start!r}"))
        # Authors store their command line beside the weights; a Namespace holds values and runs nothing.
        with torch.serialization.safe_globals([argparse.Namespace]):
            checkpoint = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        if "Unsupported" in str(error) or "GLOBAL" in str(error) or "global" in str(error):
            refused = f"{path} is refused: it holds more than tensors, and reading that would run code from the file"
            if re.search(r"GLOBAL mmengine\.logging\.history_buffer\.HistoryBuffer was not", str(error)):
                raise ValueError(
                    f"{refused}: logs of OpenMMLab's. If it is of a detector or segmentor, name its config too, by "
                    "which they are read safely: visionzoo predict|eval|view CONFIG ... --checkpoint FILE"
                ) from error
            raise ValueError(
                f"{refused} ({_first_line(error)}). If you trust its origin, open it once elsewhere with "
                f"torch.load(..., weights_only=False) and save its state_dict with safetensors."
            ) from error
        raise ValueError(_damaged(path, str(error))) from error
    except (
        RuntimeError,
        EOFError,
        OSError,
        SafetensorError,
        KeyError,
        UnicodeDecodeError,
        zipfile.BadZipFile,
        zlib.error,
    ) as error:
        raise ValueError(_damaged(path, str(error) or type(error).__name__)) from error
    if not isinstance(checkpoint, Mapping):
        raise ValueError(f"{path} holds a {type(checkpoint).__name__}, expected a state_dict or a checkpoint with one")
    return checkpoint


def unwrap_state_dict(checkpoint: Mapping[str, Any], *, use_ema: bool = True) -> dict[str, Tensor]:
    """Take the tensors out of a checkpoint's containers and their names out of wrappers' prefixes.

    What lies beside the wrapped model, such as a loss's weights, is left out with a warning.

    Raises:
        ValueError: if there are no tensors.
    """
    tensors, beside = _unwrap_tensors(checkpoint, use_ema)
    if beside:
        _logger.warning("%d tensors beside the model are left out: %s", len(beside), some(beside))
    return tensors


def checkpoint_tensors(checkpoint: Mapping[str, Any], *, use_ema: bool) -> dict[str, Tensor]:
    """Take the tensors out of a checkpoint's containers; their names keep wrappers' prefixes.

    Raises:
        ValueError: if there are no tensors.
    """
    state: Mapping[str, Any] = checkpoint
    for _ in range(3):  # containers in containers
        for key in (*EMA_CONTAINERS, *CONTAINERS) if use_ema else CONTAINERS:
            inner = state.get(key)
            if isinstance(inner, Mapping) and inner:
                state = inner
                break
    tensors = {
        name.replace("_orig_mod.", ""): value
        for name, value in state.items()
        if isinstance(name, str) and isinstance(value, Tensor)
    }
    if not tensors:
        raise ValueError(f"the checkpoint holds no tensors; its entries are {some(checkpoint)}")
    return tensors


def _unwrap_tensors(checkpoint: Mapping[str, Any], use_ema: bool) -> tuple[dict[str, Tensor], list[str]]:
    """Return the wrapped model's tensors, and the names of those beside it."""
    tensors = checkpoint_tensors(checkpoint, use_ema=use_ema)
    beside: list[str] = []
    stripped = True
    while stripped:
        stripped = False
        for prefix in PREFIXES:
            inside = {name[len(prefix) :]: value for name, value in tensors.items() if name.startswith(prefix)}
            # A detector's backbone may be its smaller part; in other wrappers the model is the largest.
            parts = Counter(name.partition(".")[0] for name in tensors if not name.startswith(prefix))
            if any(name[:1].isdigit() for name in inside):  # the blocks of a model that calls them so, not a model
                continue
            if inside and (prefix.startswith("backbone.") or len(inside) >= max(parts.values(), default=0)):
                beside += [name for name in tensors if not name.startswith(prefix)]
                tensors, stripped = inside, True
    return tensors, beside


def rename(state: Mapping[str, Tensor], model: nn.Module) -> tuple[dict[str, Tensor], str]:
    """Give the tensors our names, by the table of the model that fits most of them; return them and whose they were."""
    own = model.state_dict()
    best, best_names, best_count = dict(state), "visionzoo", -1
    tables: Mapping[str, Sequence[tuple[str, Any]]] = getattr(model, "CHECKPOINT_KEYS", {})
    for names, table in {"visionzoo": FORMER_KEYS, **tables}.items():
        renamed: dict[str, Tensor] = {}
        try:
            for name, value in state.items():
                renamed.update(_rename_tensor(name, value, table))
            renamed = _join_parts(renamed)
        except (RuntimeError, ValueError):  # parts that cannot be cut or joined as the table says: others' names
            continue
        count = sum(name in own and own[name].numel() == value.numel() for name, value in renamed.items())
        if count > best_count:
            best, best_names, best_count = renamed, names, count
    for name, value in best.items():  # a 1×1 convolution is a linear layer, a [C, 1, 1] scale is a [C] one
        if name in own and value.shape != own[name].shape and _squeezed(value) == _squeezed(own[name]):
            best[name] = value.reshape(own[name].shape)
    as_host(best, model)
    return best, best_names


def left_out(state: Mapping[str, Tensor], model: nn.Module, names: str) -> list[str]:
    """Return the tensors that the model has no use for, by its table of the `names` that `rename` returned."""
    table = {"visionzoo": FORMER_KEYS, **getattr(model, "CHECKPOINT_KEYS", {})}[names]
    return [name for name, value in state.items() if not _rename_tensor(name, value, table)]


def filter_for_timm(checkpoint: Mapping[str, Any], model: Contract) -> dict[str, Tensor]:
    """Rename a checkpoint for timm's own loader (its `pretrained_filter_fn`)."""
    state = rename(unwrap_state_dict(checkpoint), model)[0]
    fit_tables(state, model)
    for name in [f"{layer}.weight" for layer in model.CLASS_INPUTS]:
        if name in state and state[name].shape != model.state_dict()[name].shape:
            del state[name]  # of other classes, as the classifiers that timm leaves out
    keep_gates(state, model)
    keep_head(state, model)
    keep_memory(state, model)
    return state


def fit_tables(state: dict[str, Tensor], model: Contract) -> list[str]:
    """Let modules with a `fit_weight` (tables of positions) resize their weights in `state`; return which and how."""
    own, fitted = model.state_dict(), []
    for name in [name for name in state if name in own and state[name].shape != own[name].shape]:
        path, _, parameter = name.rpartition(".")
        above, _, child = path.rpartition(".")
        fit = getattr(model.get_submodule(path), "fit_weight", None)
        if fit is None and hasattr(parent := model.get_submodule(above), "fit_child_weight"):
            fit, parameter = parent.fit_child_weight, f"{child}.{parameter}"
        if fit is None:
            continue
        try:
            weight: Any = fit(parameter, state[name])
        except (IndexError, RuntimeError, ValueError) as error:
            raise ValueError(
                f"{name} {tuple(state[name].shape)} cannot be brought to {tuple(own[name].shape)}: {error}"
            ) from error
        if weight.shape == own[name].shape:  # else it is of another variant
            if state[name].numel() != own[name].numel():
                fitted.append(f"{name} {tuple(state[name].shape)} resized to {tuple(own[name].shape)}")
            state[name] = weight
    return fitted


def _rename_tensor(name: str, value: Tensor, table: Sequence[tuple[str, Any]]) -> dict[str, Tensor]:
    """Give one tensor its names: none where the table leaves it out, several where the table cuts it."""
    for i, (pattern, replacement) in enumerate(table):
        if isinstance(replacement, tuple) and re.search(pattern, name):
            parts = zip(replacement, value.chunk(len(replacement)), strict=True)
            named = [_rename_tensor(re.sub(pattern, new, name), part, table[i + 1 :]) for new, part in parts]
            return {name: part for parts_of_one in named for name, part in parts_of_one.items()}
        if replacement is None and re.search(pattern, name):
            return {}
        if isinstance(replacement, str) or callable(replacement):
            name = re.sub(pattern, replacement, name)
    return {name: value}


def _join_parts(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Join the tensors whose names differ only by a last "#0", "#1", ..., along their first axis."""
    joined: dict[str, Tensor] = {}
    parts: dict[str, dict[str, Tensor]] = {}
    for name, value in state.items():
        base, _, part = name.partition("#")
        if part:
            parts.setdefault(base, {})[part] = value
        else:
            joined[name] = value
    return joined | {name: torch.cat([values[i] for i in sorted(values)]) for name, values in parts.items()}


def _drop_absent_parts(state: dict[str, Tensor], model: Contract, report: LoadReport) -> None:
    """Take out the tensors of parts that the model was built without."""
    absent = model.absent()
    for name in [name for name in state if name.startswith(absent)]:
        del state[name]
        report.dropped.append(name)


def _adapt(
    state: dict[str, Tensor], model: Contract, own: dict[str, Tensor], report: LoadReport, strict: bool, where: str
) -> set[str]:
    """Fit first convolutions to the input channels and refuse other shapes; return what the model keeps as it is."""
    first_convs, classifiers = (
        tuple(f"{name}." for name in ([names] if isinstance(names, str) else names))
        for names in (model.pretrained_cfg["first_conv"], model.pretrained_cfg["classifier"])
    )
    wrong, kept = [], set()
    for name in [name for name in state if name in own and state[name].shape != own[name].shape]:
        have, want = tuple(state[name].shape), tuple(own[name].shape)
        other_classes = name.startswith(classifiers) and have[0] != want[0] and have[1:] == want[1:]
        if name.removesuffix(".weight") in model.CLASS_INPUTS:
            other_classes, have, want = have[0] == want[0], have[::-1], want[::-1]
        if name.startswith(first_convs) and have[0] == want[0] and have[2:] == want[2:]:
            state[name] = _adapt_channels(state[name], want[1])
            report.adapted.append(f"{name} ({have[1]} to {want[1]} input channels)")
        elif other_classes and not strict:
            del state[name]
            kept.add(name)
            report.adapted.append(
                f"{name} ({count_of(have[0], 'class')} in the checkpoint, left at its initial values)"
            )
        elif other_classes:
            raise WeightsError(
                f"{where} has {count_of(have[0], 'class')}, the model {want[0]}.",
                f"Build the model with num_classes={have[0]}, or pass strict=False to keep the model's own classifier.",
            )
        else:
            wrong.append(f"{name} {have} instead of {want}")
    if wrong:
        raise ValueError(
            f"{where} has tensors of other shapes than {type(model).__name__}: {some(wrong)}. "
            f"It is probably a checkpoint of another variant."
        )
    return kept


def _adapt_channels(weight: Tensor, channels: int) -> Tensor:
    """Bring a convolution [C, have, h, w] to other input channels: their sum, or repeated and scaled, as timm does."""
    have = weight.shape[1]
    wide = weight.to(torch.promote_types(weight.dtype, torch.float32))
    if channels == 1:
        wide = wide.sum(1, keepdim=True)
    else:
        wide = wide.repeat(1, -(-channels // have), 1, 1)[:, :channels] * (have / channels)
    return wide.to(weight.dtype)


def _is_plain(tensor: Tensor) -> bool:
    return tensor.layout == torch.strided and not (tensor.is_meta or tensor.is_quantized or tensor.is_complex())


def _squeezed(tensor: Tensor) -> list[int]:
    return [size for size in tensor.shape if size != 1]


def _first_line(error: Exception) -> str:
    return next((line.strip() for line in str(error).splitlines() if "GLOBAL" in line or "global" in line), str(error))


def _damaged(path: Path, why: str) -> str:
    return (
        f"{path} ({path.stat().st_size} bytes) cannot be read as a checkpoint, it is damaged or cut short: "
        f"{why.splitlines()[0]}. Copy or download it again."
    )
