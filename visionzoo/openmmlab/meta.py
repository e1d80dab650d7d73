"""What a checkpoint says of its training beside the weights: classes and config, compared with those of now."""

from __future__ import annotations

import ast
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from mmengine.config import Config

from visionzoo.engine.checkpoints import LONGEST
from visionzoo.engine.errors import UserError
from visionzoo.text import some

# what only training reads, or where weights came from
_NOT_COMPARED = ("train_cfg", "init_cfg", "pretrained", "loss", "_scope_", "drop", "with_cp", "frozen", "norm_eval")


def compare_classes(
    content: Mapping[str, Any], classes: Sequence[str] | None, path: str, *, learning: bool = False
) -> list[str]:
    """Compare the classes of a checkpoint with those of the config's data, name by name.

    Args:
        content: of the checkpoint.
        classes: of the config; None compares nothing.
        path: of the checkpoint, for the message.
        learning: whether a training begins with the weights, and can learn another order.

    Returns:
        A note where classes have other names, or another order that can be learned.

    Raises:
        UserError: they have the same names in other places: every result would bear a wrong one.
    """
    found = checkpoint_classes(content)
    if not found or not classes or list(found) == list(classes):
        return []
    both = f"\n  classes of the checkpoint: {some(found, 100)}\n  classes of the config: {some(list(classes), 100)}"
    moved = [name for number, name in enumerate(classes) if name in found and found.index(name) != number]
    if moved and learning:
        return [f"{path} has the classes in another order than the config's data: the head has to learn anew{both}"]
    if moved:
        raise UserError(
            f"{path} has the classes in another order than the config's data ({some(moved)}): results would have wrong "
            f"names.{both}\nGive annotations or masks in the order of the checkpoint, or, of a segmentor, --classes"
        )
    return [f"{path} was trained with classes of other names; they are taken for the same, one by one{both}"]


def checkpoint_classes(content: Mapping[str, Any]) -> list[str]:
    """Return the classes of a checkpoint; none where it does not say."""
    meta = content.get("meta")
    of_data = meta.get("dataset_meta") if isinstance(meta, Mapping) else None
    found = (of_data.get("classes") or of_data.get("CLASSES")) if isinstance(of_data, Mapping) else None
    return [str(name) for name in found] if isinstance(found, list | tuple) else []


def checkpoint_config(content: Mapping[str, Any]) -> dict[str, Any]:
    """Return the config that mmengine wrote into a checkpoint, without running it: only literals and `dict(...)`."""
    meta = content.get("meta")
    text = meta.get("cfg") if isinstance(meta, Mapping) else None
    try:
        body = ast.parse(text).body if isinstance(text, str) else []
    except (SyntaxError, ValueError, RecursionError):
        return {}
    found = {}
    for line in body:
        if isinstance(line, ast.Assign) and isinstance(line.targets[0], ast.Name):
            try:
                found[line.targets[0].id] = _value(line.value)
            except (ValueError, RecursionError):
                continue
    return found


def _value(node: ast.expr) -> Any:
    if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "dict" and not node.args:
        return {str(pair.arg): _value(pair.value) for pair in node.keywords}
    if isinstance(node, ast.Dict):
        return {ast.literal_eval(key): _value(value) for key, value in zip(node.keys, node.values, strict=True) if key}
    if isinstance(node, ast.List | ast.Tuple):
        return [_value(entry) for entry in node.elts]
    return ast.literal_eval(node)


def compare_model(content: Mapping[str, Any], cfg: Config, path: str) -> list[str]:
    """Say where the config's model differs from that of a checkpoint in what no tensor shows, such as anchors."""
    then = checkpoint_config(content).get("model")
    if not isinstance(then, dict):
        return []
    places = [
        place for place in _differences(then, cfg.model.to_dict(), "model")
        if not any(part.startswith(_NOT_COMPARED) for text in [place.split("=")[0]] for part in text.split("."))
    ]  # fmt: skip
    return [f"{path} was trained with another config: {some(places)}"] if places else []


def check_resumed(content: Mapping[str, Any], cfg: Config, path: str) -> None:
    """Refuse to continue with another optimizer, schedule or batch size: mmengine would take the checkpoint's silently.

    Raises:
        UserError: the config differs there; with the places and both values. Or the steps done are no such number.
    """
    meta = content.get("meta") or {}
    for name in ("epoch", "iter"):
        if not (isinstance(number := meta.get(name, 0), int) and 0 <= number <= LONGEST):
            raise UserError(f"{path} records {name}={number!r}, expected 0 to {LONGEST:,}; its record is damaged")
    then = checkpoint_config(content)
    now = cfg.to_dict()
    places: list[str] = []
    for name in ("optimizer", "paramwise_cfg", "constructor"):
        before, after = (part.get("optim_wrapper", {}).get(name) for part in (then, now))
        if "optim_wrapper" in then:
            places += _differences(before, after, f"optim_wrapper.{name}")
    if "param_scheduler" in then:
        places += _differences(then["param_scheduler"], now.get("param_scheduler"), "param_scheduler")
    by_epoch = "max_epochs" in (now.get("train_cfg") or {})  # counting by batches, mmengine takes another size
    if "train_dataloader" in then and by_epoch:
        before, after = ((part.get("train_dataloader") or {}).get("batch_size") for part in (then, now))
        places += _differences(before, after, "train_dataloader.batch_size")
    if places:
        raise UserError(
            f"--resume continues with what {path} was trained with, and the config has changed: {some(places)}. Leave "
            f"these as they were, or begin a new training from its weights: --cfg-options load_from={path}, without "
            f"--resume"
        )


def _differences(before: Any, after: Any, place: str) -> Iterator[str]:
    if isinstance(before, Mapping) and isinstance(after, Mapping):
        for key in [*before, *(key for key in after if key not in before)]:
            yield from _differences(before.get(key), after.get(key), f"{place}.{key}")
    elif isinstance(before, list | tuple) and isinstance(after, list | tuple) and len(before) == len(after):
        for number, (one, other) in enumerate(zip(before, after, strict=True)):
            yield from _differences(one, other, f"{place}.{number}")
    elif before != after:
        yield f"{place}={_short(after)}, there {_short(before)}"


def _short(value: Any) -> str:
    return shown if len(shown := repr(value)) <= 60 else f"{shown[:57]}..."
