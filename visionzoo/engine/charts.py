"""The picture of a prediction: the image beside bars of its likeliest classes, in any script and at any size."""

import functools
import warnings
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from visionzoo.engine.checkpoints import write_atomically
from visionzoo.engine.errors import printable
from visionzoo.engine.images import UNREADABLE
from visionzoo.explanation.pictures import map_figure

DRAWN_BY = "visionzoo tools/predict.py"  # and by the others that draw images
SIDE = 1000  # pixels of the drawn image's longer side at most: the picture has fewer


def draw_prediction(
    image: Image.Image, classes: list[dict[str, Any]], path: Path, views: Sequence[tuple[str, Any]] = ()
) -> set[str]:
    """Write a picture of an image beside bars of its likeliest classes.

    Args:
        image: of any size and mode; what is drawn is a smaller copy.
        classes: of each `name`, `index` and `probability`.
        path: of the picture, a PNG.
        views: further forms of the image, between it and the bars: title and [H, W, 1 or 3] in 0 to 1.

    Returns:
        the characters of the names that no installed font has; such a name is drawn as `class INDEX`.
    """
    from matplotlib import rc_context
    from matplotlib.figure import Figure  # not pyplot: no display, no global state

    labels = [printable(entry["name"][:40]).replace("\n", " ").replace("\t", " ") for entry in classes]
    families, missing = fonts_for("".join(labels))
    labels = [
        f"class {e['index']}" if set(label) & missing else label for e, label in zip(classes, labels, strict=True)
    ]
    with rc_context({"font.family": families}), warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Glyph .* missing from")  # of fonts before the one that has it
        figure = Figure(figsize=(8 + 3.5 * len(views), 3.5), layout="constrained")
        left, *middle, right = figure.subplots(1, 2 + len(views), width_ratios=(*[1] * (1 + len(views)), 1.2))
        for panel, (title, view) in zip(middle, views, strict=True):
            panel.imshow(view, cmap="gray", vmin=0, vmax=1)
            panel.set_title(title, fontsize=8)
            panel.axis("off")
        left.imshow(_small(image), cmap="gray", interpolation="nearest" if max(image.size) < 100 else "antialiased")
        left.axis("off")
        bars = right.barh(range(len(classes)), [entry["probability"] for entry in classes])
        right.bar_label(bars, [f"{entry['probability']:.1%}" for entry in classes], padding=3)
        right.set_yticks(range(len(classes)), labels, parse_math=False)
        right.invert_yaxis()  # the likeliest on top
        right.set_xlim(0, 1.2)
        right.set_xticks([])
        right.spines[["top", "right", "bottom"]].set_visible(False)
        _save(figure, path)
    return missing


def draw_maps(image: Any, rows: Sequence[Sequence[tuple[str, Any]]], path: Path, *, over: bool = True) -> set[str]:
    """Write a picture of an image and maps of it.

    Args:
        image: [H, W, 3] from 0 to 1, drawn first in each row.
        rows: of each the maps [h, w] of the whole image, with their titles; colors are over each map's own range.
        path: of the picture, a PNG.
        over: draw the maps half transparent over the image, smoothly; else cell by cell, with their ranges.

    Returns:
        the characters of the titles that no installed font has.
    """
    from matplotlib import rc_context

    families, missing = fonts_for("".join(title for row in rows for title, _ in row))
    with rc_context({"font.family": families}), warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Glyph .* missing from")
        titled = [[(printable(title), values) for title, values in row] for row in rows]
        figure = map_figure(image, titled, over=over)
        _save(figure, path)
    return missing


def _save(figure: Any, path: Path) -> None:
    metadata = {"Software": DRAWN_BY}
    write_atomically(path, lambda file: figure.savefig(file, format="png", dpi=120, metadata=metadata))


def is_picture(path: Path) -> bool:
    """Whether a file was drawn by `draw_prediction` or `draw_maps`."""
    if path.suffix != ".png":
        return False
    try:
        with Image.open(path) as image:
            return image.info.get("Software") == DRAWN_BY
    except UNREADABLE:
        return False


def fonts_for(text: str) -> tuple[list[str], set[str]]:
    """Return the font families that draw a text, the usual one first, and the characters that none of them has."""
    from matplotlib import font_manager, rcParams

    usual = font_manager.findfont(font_manager.FontProperties())
    missing = {character for character in text if ord(character) not in _characters(usual)}
    families = list(rcParams["font.family"])
    if not missing:
        return families, missing
    known = {entry.fname for entry in font_manager.fontManager.ttflist}
    for path in set(font_manager.findSystemFonts()) - known:  # installed since matplotlib looked for fonts
        try:
            font_manager.fontManager.addfont(path)
        except (OSError, RuntimeError):
            continue
    names = dict.fromkeys(entry.name for entry in font_manager.fontManager.ttflist)
    for name in names:  # "Last Resort" has boxes for everything
        own = set() if name.startswith("Last Resort") else _characters(font_manager.findfont(name))
        if found := {character for character in missing if ord(character) in own}:
            families.append(name)
            missing -= found
        if not missing:
            break
    return families, missing


def missing_fonts(characters: Iterable[str]) -> str:
    """Say in a sentence which characters no font has, and what to do."""
    listed = " ".join(sorted(characters)[:20])
    return (
        f"no installed font has {listed}: the pictures show `class NUMBER` instead of such names, the lines have "
        "them; for Chinese, Japanese and Korean the package fonts-noto-cjk has them"
    )


@functools.lru_cache(maxsize=256)
def _characters(path: str) -> frozenset[int]:
    from matplotlib.font_manager import get_font

    try:
        return frozenset(get_font(path).get_charmap())
    except (OSError, RuntimeError):
        return frozenset()


def _small(image: Image.Image) -> Any:
    if image.mode[0] in "IF":  # whose range is matplotlib's to find
        return np.asarray(image)
    scale = SIDE / max(image.size)
    if scale < 1:
        size = (max(1, round(image.width * scale)), max(1, round(image.height * scale)))
        hues = image.mode == "HSV"  # the mean of two is no hue between them
        image = image.resize(size, Image.Resampling.NEAREST if hues else Image.Resampling.BOX, reducing_gap=2.0)
    return image if image.mode == "L" else image.convert("RGB")
