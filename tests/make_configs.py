"""Write the configs of detection and segmentation from their table, configs/dense.yaml: `make configs`.

The files are what users read, copy and pass to OpenMMLab's own tools; the table is what is edited. Ruff lays them out.
"""

from __future__ import annotations

import subprocess
import sys
import textwrap
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import yaml

CONFIGS = Path(__file__).parents[1] / "configs"
TABLE = CONFIGS / "dense.yaml"
MADE = "Made by `make configs` from configs/dense.yaml: edit that."


def made_configs(table: Mapping[str, Any]) -> Iterator[tuple[Path, str]]:
    """Yield the path of each config, under configs/, and its text before Ruff has laid it out.

    Raises:
        KeyError: an entry names a recipe or a backbone that the table does not have.
    """
    for recipe, entries in table["entries"].items():
        for entry in entries:
            for backbone, (rate, published) in entry["sizes"].items():
                yield _published(table, recipe, entry, backbone, rate, published)
    tiny = table["tiny"]
    for recipe in tiny["recipes"]:
        own = table["recipes"][recipe].get("tiny", tiny)
        for backbone in own["backbones"]:
            yield _tiny(table, recipe, own, backbone)


def _published(
    table: Mapping[str, Any], recipe: str, entry: Mapping[str, Any], backbone: str, rate: float | None, published: str
) -> tuple[Path, str]:
    general, (_, title, paper) = table["recipes"][recipe], table["backbones"][backbone]
    path = _path(general, backbone)
    gpus = entry.get("gpus", general["gpus"])
    command = f"torchrun --nproc-per-node {gpus.split()[0]} tools/train.py configs/{path}" + " --amp" * entry.get(
        "amp", 0
    )
    about = [
        f"Paper: {paper}.",
        f"Settings: {entry['settings']}.",
        f"Published: {published}. Not run here.",
        f"Hardware: {gpus}.",
        f"Command: {command}",
    ]
    settings = [*([] if rate is None else [f"drop_path_rate={rate}"]), *_present(entry.get("backbone"))]
    return path, _text(table, recipe, backbone, f"{general['title']}, {title}.", about, settings, entry)


def _tiny(table: Mapping[str, Any], recipe: str, tiny: Mapping[str, Any], backbone: str) -> tuple[Path, str]:
    general, (_, title, _) = table["recipes"][recipe], table["backbones"][backbone]
    path = _path(general, backbone)
    about = [
        f"Command: python tools/train.py configs/{path} --dataset FILE.yaml",
        f"Hardware: {general['gpus']}. Published: none; on 100 images of COCO see docs/overfit.md.",
    ]
    headline = f"{general['title']}, {title}, from random weights on your own data."
    return path, _text(table, recipe, backbone, headline, about, _present(tiny.get("backbone")), {})


def _path(recipe: Mapping[str, Any], backbone: str) -> Path:
    return Path(recipe["folder"], recipe["name"].format(backbone) + ".py")


def _text(
    table: Mapping[str, Any],
    recipe: str,
    backbone: str,
    headline: str,
    about: list[str],
    settings: list[str],
    entry: Mapping[str, Any],
) -> str:
    """Return the text of a config: what it says of itself, then its lines of Python."""
    wrapped = [
        line
        for part in about
        for line in textwrap.wrap(part, 120, subsequent_indent="    ", break_on_hyphens=False, break_long_words=False)
    ]
    parts = entry.get("parts", table["recipes"][recipe]["parts"])
    needs = f"{parts} {entry.get('before', '')}"
    lines = [
        f'"""{headline}',
        "",
        *wrapped,
        "",
        MADE,
        '"""',
        "",
        f'_base_ = "_base_/{recipe}.py"',
        *(["from visionzoo.openmmlab import feature_channels"] if "feature_channels" in needs else []),
        "",
        f'backbone = "{table["backbones"][backbone][0]}"',
        *_present(entry.get("before")),
        "model = dict(",
        f"backbone=dict({', '.join(['name=backbone', *settings])}),",
        f"{parts},",
        ")",
        *_present(entry.get("after")),
    ]
    return "\n".join(lines) + "\n"


def _present(line: str | None) -> list[str]:
    return [] if line is None else [line]


def main() -> None:
    """Write the files, and let Ruff lay them out."""
    paths = []
    for path, text in made_configs(yaml.safe_load(TABLE.read_text(encoding="utf-8"))):
        paths.append(CONFIGS / path)
        paths[-1].write_text(text, encoding="utf-8")
    subprocess.run([sys.executable, "-m", "ruff", "format", "--quiet", *map(str, paths)], check=True)
    print(f"{len(paths)} configs written")


if __name__ == "__main__":
    main()
