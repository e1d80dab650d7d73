"""The table and the picture of `visionzoo fit-gate`."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from visionzoo.engine.checkpoints import write_atomically
from visionzoo.text import count_of, markdown_table


def table_of(result: Mapping[str, Any]) -> str:
    """Return a result as Markdown: each exit for all images, then the gates."""
    height, width = result["input_size"]
    about = (
        f"{result['config']}: {count_of(result['images'], 'test image')}; the gates learned from "
        f"{count_of(result['learned_images'], 'training image')}. GMACs are those of an image of {height} x {width} "
        "pixels."
    )
    columns = ["layers", "mIoU", "mIoU of an image", "GMACs"]

    def cells(entry: Mapping[str, Any]) -> list[str]:
        return [f"{entry['miou']:.2f}", f"{entry['image_iou']:.2f}", f"{entry['gmacs']:.4f}"]

    exits = markdown_table(columns, [[entry["layers"], *cells(entry)] for entry in result["exits"]], numbers=True)
    after = [f"after {entry['layers']}" for entry in result["exits"]]
    gates = markdown_table(
        ["beta", *columns, *after, "layers by labels", "mIoU by labels"],
        [
            [
                f"{entry['beta']:g}",
                f"{entry['layers']:.2f}",
                *cells(entry),
                *(f"{100 * share:.0f} %" for share in entry["shares"]),
                f"{entry['target_layers']:.2f}",
                f"{entry['target_miou']:.2f}",
            ]
            for entry in result["gates"]
        ],
        numbers=True,
    )
    return f"{about}\n\nOne exit for all images:\n\n{exits}\n\nThe exit that the gate chooses:\n\n{gates}\n"


def draw(result: Mapping[str, Any], path: Path) -> None:
    """Write a picture of mIoU against layers: exits for all images, the gates, and what labels would choose."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6, 4), layout="constrained")
    axis = figure.subplots()
    exits, gates = result["exits"], sorted(result["gates"], key=lambda entry: entry["layers"])
    axis.plot([e["layers"] for e in exits], [e["miou"] for e in exits], "s-", label="one exit for all images")
    axis.plot([g["layers"] for g in gates], [g["miou"] for g in gates], "o-", label="gate")
    labels = sorted((g["target_layers"], g["target_miou"]) for g in gates)
    axis.plot(*zip(*labels, strict=True), "x:", color="gray", label="best exit by the labels")
    prices: dict[tuple[float, float], list[str]] = {}  # of gates that choose alike
    for gate in result["gates"]:
        prices.setdefault((gate["layers"], gate["miou"]), []).append(f"{gate['beta']:g}")
    for place, betas in prices.items():
        text = ", ".join(betas)
        axis.annotate(text, place, xytext=(2, -4), textcoords="offset points", rotation=-60, va="top", fontsize=8)
    axis.margins(y=0.15)
    axis.set(xlabel="layers of the encoder, mean over images", ylabel="mIoU (%)")
    axis.grid(alpha=0.3)
    axis.legend()
    write_atomically(path, lambda file: figure.savefig(file, format="png", dpi=120))
