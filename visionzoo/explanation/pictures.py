"""Pictures of explanations, by matplotlib: maps over images, colors, curves."""

from __future__ import annotations

import io
import warnings
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from visionzoo.explanation.attribution import Faithfulness

if TYPE_CHECKING:
    from visionzoo.explanation.image import Explanation

HEADS = 4  # whose weights are drawn by themselves
TITLES = {
    "rollout": "attention rollout",
    "flow": "attention flow",
    "gradient_input": "gradients x input",
    "deeplift": "DeepLIFT",
}


def map_figure(image: Any, rows: Sequence[Sequence[tuple[str, Any]]], *, over: bool = True, mark: Any = None) -> Any:
    """Return a figure of an image and maps of it.

    Args:
        image: [H, W, 3] from 0 to 1, drawn first in each row.
        rows: of each the maps [h, w] of the whole image, or colors [h, w, 3], with their titles; colors of maps are
            over each map's own range.
        over: draw the maps half transparent over the image, smoothly; else cell by cell, with their ranges.
        mark: shares of height and width, of a place that is marked; None for none.
    """
    from matplotlib.figure import Figure  # not pyplot: no display, no global state

    columns = 1 + max(map(len, rows))
    height, width = image.shape[:2]
    extent = (0, width, height, 0)
    figure = Figure(figsize=(2 * columns, 2.3 * len(rows)), layout="constrained")
    for line, row in zip(figure.subplots(len(rows), columns, squeeze=False), rows, strict=True):
        for axes in line:
            axes.axis("off")
        line[0].imshow(image)
        for axes, (title, values) in zip(line[1:], row, strict=False):
            axes.set_title(title[:40].replace("\n", " "), fontsize=8, parse_math=False)
            if np.ndim(values) == 3:
                axes.imshow(values, interpolation="nearest", extent=extent)
            elif over:
                axes.imshow(image, extent=extent)
                axes.imshow(values, cmap="jet", alpha=0.5, interpolation="bilinear", extent=extent)
            else:
                shown = axes.imshow(values, cmap="viridis", interpolation="nearest", extent=extent)
                figure.colorbar(shown, ax=axes, shrink=0.7)
        for axes in line[: 1 + len(row)] if mark is not None else ():
            axes.plot(mark[1] * width, mark[0] * height, "+", color="white", markersize=11, markeredgewidth=3)
            axes.plot(mark[1] * width, mark[0] * height, "+", color="red", markersize=9, markeredgewidth=1.5)
    return figure


def draw(found: Explanation) -> dict[str, bytes]:
    """Return a PNG of each part of an explanation that is there, by the name of its method; `faithfulness` too."""
    pictures: dict[str, bytes] = {}
    if found.attended:
        pictures["attended"] = _png(_attended(found))
    if found.features:
        pictures["features"] = _png(map_figure(found.image, _lines(found.features)))
    for name, values in found.maps.items():
        shown = signed_colors(values) if name in ("gradient_input", "deeplift") else values
        pictures[name] = _png(map_figure(found.image, [[(TITLES[name], shown)]]))
    if found.frequency is not None:
        pictures["frequency"] = _png(_frequency(found))
    if found.tokens:
        kept = [
            (f"{mask.mean():.0%} left before {name}", dimmed(found.image, mask)) for name, mask in found.tokens.items()
        ]
        pictures["tokens"] = _png(map_figure(found.image, _lines(kept)))
    if found.exits:
        pictures["exits"] = _png(_exits(found))
    if found.curves:
        curves = {TITLES[name]: curve for name, curve in found.curves.items()}
        pictures["faithfulness"] = _png(curves_figure(curves))
    return pictures


def signed_colors(values: Any) -> Any:
    """Return a map [h, w] as colors [h, w, 3]: red for positive numbers, blue for negative, white for 0."""
    most = max(float(np.quantile(np.abs(values), 0.995)), np.finfo(float).tiny)
    share = np.clip(values / most, -1, 1)
    faded = 1 - np.abs(share)
    return np.stack([np.where(share > 0, 1, faded), faded, np.where(share < 0, 1, faded)], -1)


def dimmed(image: Any, kept: Any) -> Any:
    """Return the image [H, W, 3], dark where a map [h, w] is 0."""
    height, width = image.shape[:2]
    side = -(-height // kept.shape[0]), -(-width // kept.shape[1])
    mask = np.repeat(np.repeat(kept, side[0], 0), side[1], 1)[:height, :width, None]
    return np.where(mask > 0, image, 0.2 * image)


def curves_figure(curves: Mapping[str, Faithfulness]) -> Any:
    """Return a figure of deletion and insertion curves, by what they are of."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 3.6), layout="constrained")
    axes = figure.subplots(1, 2, sharey=True)
    for place, (axis, title) in enumerate(zip(axes, ("deleted", "inserted into the blurred image"), strict=True)):
        for name, curve in curves.items():
            values = (curve.deletion, curve.insertion)[place]
            axis.plot(curve.shares.numpy(), values.numpy(), label=f"{name}: {curve.areas[place]:.3f}")
        axis.set_xlabel(f"share of the pixels {title}")
        axis.set_ylim(0, 1.02)
        axis.grid(alpha=0.3)
        axis.legend(title="area under the curve", fontsize=8)
    axes[0].set_ylabel("probability of the class")
    return figure


def _lines(panels: Sequence[tuple[str, Any]], columns: int = 6) -> list[list[tuple[str, Any]]]:
    return [list(panels[i : i + columns]) for i in range(0, len(panels), columns)]


def _attended(found: Explanation) -> Any:
    rows: list[list[tuple[str, Any]]] = []
    for each in found.attended:
        row = [(f"{each.name.removesuffix('.mixer')} {each.kind.removesuffix('Mixer')}", each.reach.numpy())]
        if each.weights is not None:
            row.append(("weights, mean of heads", each.weights.mean(0).numpy()))
            row += [(f"head {i}", weights.numpy()) for i, weights in enumerate(each.weights[:HEADS])]
        rows.append(row)
    figure = map_figure(found.image, [[*row, ("", found.image)] for row in rows], mark=found.place)
    columns = len(figure.axes) // len(rows)
    for i, (row, each) in enumerate(zip(rows, found.attended, strict=True)):
        last = figure.axes[i * columns + 1 + len(row)]
        last.clear()
        last.axis("on")
        last.set_aspect("auto")
        last.set_box_aspect(found.image.shape[0] / found.image.shape[1])
        last.fill_between(np.arange(len(each.channels)), each.channels.numpy(), step="mid")
        last.set_title("by channel of the input", fontsize=8)
        last.set_yticks([])
        last.tick_params(labelsize=6)
    return figure


def _frequency(found: Explanation) -> Any:
    from matplotlib.figure import Figure

    channel: Any = found.frequency
    figure = Figure(figsize=(5.5, 3.2), layout="constrained")
    axes = figure.subplots()
    shown = axes.imshow(
        channel.probability.numpy(), cmap="viridis", vmin=0, vmax=max(channel.clean, 1e-9), aspect="auto"
    )
    axes.set_xticks(range(len(channel.bands)), [f"{band:g}" for band in channel.bands.tolist()])
    axes.set_yticks(range(len(channel.deviations)), [f"{each:g}" for each in channel.deviations.tolist()])
    axes.set_xlabel("noise of the octave around, cycles per image width")
    axes.set_ylabel("its deviation")
    figure.colorbar(shown, label=f"probability; {channel.clean:.3f} without noise")
    return figure


def _exits(found: Explanation) -> Any:
    from matplotlib.figure import Figure

    answers = [*found.exits.items(), ("end", found.classes[0])]
    figure = Figure(figsize=(5.5, 0.6 + 0.4 * len(answers)), layout="constrained")
    axes = figure.subplots()
    bars = axes.barh(range(len(answers)), [answer.probability for _, answer in answers])
    axes.bar_label(bars, [f"{answer.index}: {answer.probability:.1%}" for _, answer in answers], padding=3)
    axes.set_yticks(range(len(answers)), [name for name, _ in answers], parse_math=False)
    axes.invert_yaxis()
    axes.set_xlim(0, 1.25)
    axes.set_xlabel("class by its number, and its probability")
    return figure


def _png(figure: Any) -> bytes:
    file = io.BytesIO()
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Glyph .* missing from")
        figure.savefig(file, format="png", dpi=120)
    return file.getvalue()
