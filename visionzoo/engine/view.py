"""What a classifier makes of images: `visionzoo view`, as a page or as folders of pictures."""

from __future__ import annotations

import io
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from visionzoo.engine.calling import autocast, try_images
from visionzoo.engine.charts import draw_prediction, missing_fonts
from visionzoo.engine.checkpoints import make_folder, write_atomically
from visionzoo.engine.errors import UnreadableImageError, UserError, printable, require
from visionzoo.engine.image_files import find_images
from visionzoo.engine.images import read_image, readable_images, seed_everything, skipped_images
from visionzoo.engine.options import settings
from visionzoo.engine.outputs import free_path
from visionzoo.engine.page import check_no_page, serve
from visionzoo.engine.parallel import start_process
from visionzoo.engine.prediction import choose_names
from visionzoo.engine.restoring import Trained, restore, untrained
from visionzoo.engine.trained_flags import DrawingConfig, LookConfig, ViewConfig
from visionzoo.explanation.attribution import Faithfulness
from visionzoo.explanation.image import MAPS, METHODS, OF_CLASS, OF_PLACE, Explanation, explain_image, reason
from visionzoo.explanation.pictures import TITLES, curves_figure
from visionzoo.text import count_of

SUMMARY, MEAN = "explanation.json", "faithfulness.png"


def view(config: ViewConfig) -> None:
    """Look at what the model that `config` names makes of images (`visionzoo view`).

    Raises:
        UserError: the model, its weights or an image cannot be used, none of the methods fits the model, or the page
            cannot be served.
    """
    require("matplotlib", "view")
    _check(config)
    look, drawing = config.look, config.drawing
    process = start_process(config.device.device)
    notes: list[str] = []
    paths = list(dict.fromkeys(find_images(config.images, notes)))
    for note in notes:
        print(printable(note))
    seed_everything(config.device.seed)
    build = untrained if look.random_weights else restore
    trained = build(config.model, config.input, look, settings(look.reading))
    name = config.model.name or trained.args["model"]
    if trained.multi_label:
        raise UserError(f"{name} tells several labels an image; view explains models with one label an image")
    trained.model.to(process.device).eval()
    try_images(trained.model, name, trained.data_config["input_size"])
    names = choose_names(look.class_names, trained.class_names, trained.num_classes)
    viewer = ClassifierViewer(name, trained, names, look, autocast(config.device, process.device))
    if drawing.save:
        save(viewer, paths, drawing, skip_bad_images=look.reading.skip_bad_images)
    else:
        serve(viewer, paths, config.page.host, config.page.port)


def _check(config: ViewConfig) -> None:
    """Refuse flags that would have no effect."""
    drawing = config.drawing
    if drawing.save and not config.images:
        raise UserError("--save: which images? name files, folders or patterns")
    if drawing.save:
        check_no_page(config.page)
    alone = [
        flag
        for flag, given in (
            ("--method", drawing.method),
            ("--place", drawing.place),
            ("--target", drawing.target is not None),
            ("--mask", drawing.mask),
            ("--faithfulness", drawing.faithfulness),
        )
        if given
    ]
    if alone and not drawing.save:
        raise UserError(f"{', '.join(alone)}: for pictures; give --save DIR, or choose on the page")
    if (drawing.faithfulness or drawing.mask) and drawing.method and not set(drawing.method) & set(MAPS):
        raise UserError(f"--faithfulness, --mask: they are of maps; add one of {', '.join(MAPS)} to --method")


class ClassifierViewer:
    """A classifier, its class names, how it reads pictures, and the context of its precision."""

    def __init__(
        self, name: str, trained: Trained, names: list[str], look: LookConfig, precision: torch.autocast
    ) -> None:
        self.title = f"{name}, random weights" if look.random_weights else name
        self.mode, self.upright = trained.mode, trained.upright
        self.methods: Mapping[str, str] = METHODS
        self._trained, self._names, self._topk, self._precision = trained, names, look.topk, precision

    def explain(self, picture: Image.Image, **options: Any) -> Explanation:
        """Explain a picture, see `explain_image`.

        Raises:
            ValueError: none of the methods fits the model.
        """
        with self._precision:
            return explain_image(
                self._trained.model,
                picture,
                data_config=self._trained.data_config,
                class_names=self._names,
                topk=self._topk,
                **options,
            )

    def look(self, picture: Image.Image) -> dict[str, Any]:
        """Return the likeliest classes."""
        return {"classes": self.explain(picture, methods=[]).summary()["classes"]}

    def seen(self, picture: Image.Image) -> bytes:
        """Return a PNG of the picture as the model sees it, cropped."""
        pixels = np.rint(self.explain(picture, methods=[]).image * 255).astype(np.uint8)
        file = io.BytesIO()
        Image.fromarray(pixels).save(file, "PNG")
        return file.getvalue()

    def draw(self, picture: Image.Image, method: str, place: tuple[float, float] | None) -> tuple[bytes, str]:
        """Return a PNG of a view, and words on it."""
        found = self.explain(picture, methods=[method], place=place)
        return found.pictures()[method], found.notes.get(method, "")


def save(viewer: ClassifierViewer, paths: list[Path], drawing: DrawingConfig, *, skip_bad_images: bool) -> list[Path]:
    """Write a folder of pictures and `explanation.json` for each image; with --faithfulness the mean of the curves too.

    Raises:
        UserError: an image cannot be read, or none of the methods fits the model; then no folder is made.
    """
    top = Path(drawing.save)
    mask = None
    if drawing.mask:
        mask = _read_mask(Path(drawing.mask))
    skipped: list[str] | None = [] if skip_bad_images else None
    folders: list[Path] = []
    curves: dict[str, list[Faithfulness]] = {}
    undrawn: set[str] = set()
    told: list[str] = []
    for path, image in readable_images(paths, viewer.mode, upright=viewer.upright, skipped=skipped):
        try:
            found = viewer.explain(
                image,
                methods=list(drawing.method) or None,
                place=(drawing.place[0], drawing.place[1]) if drawing.place else None,
                target=drawing.target,
                mask=mask,
                with_faithfulness=drawing.faithfulness,
            )
        except (ValueError, ModuleNotFoundError) as error:
            raise UserError(reason(error)) from error
        folders.append(free_path(top / path.stem))
        make_folder(folders[-1])
        for name, content in found.pictures().items():
            _write(folders[-1] / f"{name}.png", content)
        summary = found.summary()
        undrawn |= draw_prediction(image, summary["classes"], folders[-1] / "predictions.png")
        text = json.dumps({"image": str(path), **summary}, indent=2, ensure_ascii=False)
        _write(folders[-1] / SUMMARY, f"{text}\n".encode())
        for name, curve in found.curves.items():
            curves.setdefault(name, []).append(curve)
        best = found.classes[0]
        print(printable(f"{path}: {best.name} ({best.probability:.1%}), {folders[-1]}"))
        for name, overlap in found.overlaps.items():
            print(f"  Attention-IoU of {name} with the mask: {overlap:.4f}")
        if (lines := _without(found, drawing)) != told:
            told = lines
            for line in lines:
                print(printable(line))
    if curves:
        means = {TITLES[name]: mean_curve(each) for name, each in curves.items()}
        mean = free_path(top / MEAN)
        write_atomically(mean, lambda file: curves_figure(means).savefig(file, format="png", dpi=120))
        for name, each in curves.items():  # some images may lack one
            deletion, insertion = means[TITLES[name]].areas
            count = count_of(len(each), "image")
            print(f"{TITLES[name]}, mean of {count}: deletion {deletion:.4f}, insertion {insertion:.4f}")
        print(printable(f"their curves: {mean}"))
    if undrawn:
        print(printable(missing_fonts(undrawn)))
    if skipped:
        print(printable(f"{skipped_images(skipped)}: {'; '.join(skipped)}"))
    return folders


def _read_mask(path: Path) -> Any:
    """Return an image's [h, w] from 0 to 1.

    Raises:
        UserError: it cannot be read, or is black everywhere.
    """
    try:
        mask = np.asarray(read_image(path, "L"), dtype=np.float64) / 255
    except UnreadableImageError as error:
        raise UserError(f"--mask {path}: {error.__cause__}") from error
    if not mask.any():
        raise UserError(f"--mask {path} is black everywhere; it is to be white where the feature is")
    return mask


def _without(found: Explanation, drawing: DrawingConfig) -> list[str]:
    """Return lines on what is left out, and why."""
    asked = dict.fromkeys(drawing.method or METHODS)
    lines = [f"  {len(asked) - len(found.left_out)} of {count_of(len(asked), 'method')}"] if found.left_out else []
    lines += [f"  without {name}: {reason}" for name, reason in found.left_out.items()]
    flags = [flag for flag, given in (("--mask", drawing.mask), ("--faithfulness", drawing.faithfulness)) if given]
    if flags and not found.maps:
        lines.append(f"  without {', '.join(flags)}: none of the maps {', '.join(MAPS)} was made")
    made = asked.keys() - found.left_out.keys()
    if drawing.place and not made & set(OF_PLACE):
        lines.append(f"  without --place: none of {', '.join(OF_PLACE)} was made")
    if drawing.target is not None and not found.curves and not made & set(OF_CLASS):
        lines.append(f"  without --target: none of {', '.join(OF_CLASS)} was made, nor curves by --faithfulness")
    return lines


def _write(path: Path, content: bytes) -> None:
    write_atomically(path, lambda file: file.write(content))


def mean_curve(curves: list[Faithfulness]) -> Faithfulness:
    """Return the mean of curves of images of one size."""
    return Faithfulness(
        curves[0].shares,
        torch.stack([each.deletion for each in curves]).mean(0),
        torch.stack([each.insertion for each in curves]).mean(0),
    )
