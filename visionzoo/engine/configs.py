"""Configs by path or by name: visionzoo ships its own, which every command finds without their folder.

A config says what it trains: a .yaml file a classifier, or one backbone for two tasks, by visionzoo's engine, a .py
file a detector or segmentor, by OpenMMLab's. It is the first argument of a command; a .py file may also follow flags.
"""

import os
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path

from visionzoo.engine.errors import UserError, closest

PACKAGE = Path(__file__).parents[1]
COMMANDS = {"classification": "train", "detection": "train", "segmentation": "train", "multi_task": "multi-task"}
ENDINGS = (".py", ".yaml", ".yml", ".json")


def shipped_configs() -> dict[str, Path]:
    """Return the paths of the configs that come with visionzoo by their names, those of classification first."""
    inside = PACKAGE / "configs"  # of an installed wheel; in a checkout, configs/ stands beside the package
    root = inside if inside.is_dir() else PACKAGE.with_name("configs")
    paths = [path for task in COMMANDS for path in sorted((root / task).glob("*")) if path.suffix in ENDINGS]
    return {path.stem: path for path in paths}


def task_of(path: Path) -> str | None:
    """Return the task of a config that comes with visionzoo, a key of `COMMANDS`; None of any other file."""
    return path.parent.name if path.resolve() in (found.resolve() for found in shipped_configs().values()) else None


def find_config(word: str) -> Path:
    """Return the path of a config that is named by a path, or by its name where visionzoo ships it.

    A path wins over a name, and what ends like a config or holds a separator is a path; whether there is such a file
    is up to those who read it.

    Raises:
        UserError: it is neither; the message has the nearest names.
    """
    if not is_name(word):
        return Path(word)
    shipped = shipped_configs()
    if word not in shipped:
        raise UserError(
            f"no file {word}, and visionzoo ships no config of this name{closest(word, shipped)}; "
            f"`visionzoo configs` lists the {len(shipped)} that there are"
        )
    return shipped[word]


def is_name(word: str) -> bool:
    """Whether a word names a config rather than a file: nothing is at this path, and it does not look like one."""
    return not (word.endswith(ENDINGS) or os.path.basename(word) != word or os.path.exists(word))


def is_openmmlab(words: Sequence[str]) -> bool:
    """Whether the arguments of a command name a config of OpenMMLab.

    Raises:
        UserError: if they do, and OpenMMLab is not installed.
    """
    first = words[0] if words else "-"
    named = not first.startswith("-") and is_name(first) and shipped_configs().get(first, Path()).suffix == ".py"
    config = first if named else next((word for word in words if word.endswith(".py")), None)
    if config is None:
        return False
    for module in ("mmengine", "mmcv", "mmdet", "mmseg"):
        if find_spec(module) is None:
            raise UserError(
                f"{config}: configs of detection and segmentation (.py) need {module}, which is not installed; "
                f'install it with: pip install "visionzoo[openmmlab]"'
            )
    return True
