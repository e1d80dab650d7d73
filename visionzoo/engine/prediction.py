"""The likeliest classes of single images, as pictures and as lines of JSON."""

import json
import os
from pathlib import Path
from typing import Any

import torch
from timm.data import ImageNetInfo, create_transform

from visionzoo.engine.calling import autocast, try_images
from visionzoo.engine.charts import draw_prediction, is_picture, missing_fonts
from visionzoo.engine.checkpoints import new_folder, write_atomically
from visionzoo.engine.errors import UserError, printable, require
from visionzoo.engine.exits import early_exit_model
from visionzoo.engine.image_files import find_images
from visionzoo.engine.images import readable_images, seed_everything, skipped_images
from visionzoo.engine.names import read_names
from visionzoo.engine.options import settings
from visionzoo.engine.outputs import free_path
from visionzoo.engine.parallel import start_process
from visionzoo.engine.restoring import restore
from visionzoo.engine.trained_flags import PredictConfig
from visionzoo.explanation.image import as_seen
from visionzoo.explanation.pictures import dimmed
from visionzoo.models._reducing import kept_places
from visionzoo.text import count_of

LINES = "predictions.jsonl"
DEFAULT = Path("output/predict")


def predict(config: PredictConfig) -> list[dict[str, Any]]:
    """Classify the images that `config` names (`visionzoo predict`); write and return the likeliest classes of each.

    Raises:
        UserError: there are no such images, one cannot be read, or the model or its weights do not fit.
    """
    process = start_process(config.device.device)
    tqdm = require("tqdm").tqdm
    require("matplotlib")
    notes: list[str] = []
    paths = list(dict.fromkeys(find_images(config.images, notes)))
    _say(*notes)
    seed_everything(config.device.seed)
    trained = restore(config.model, config.input, config.picture, settings(config.picture.reading))
    model = trained.model.to(process.device).eval()
    name = config.model.model or trained.args["model"]
    try_images(model, name, trained.data_config["input_size"])
    early = early_exit_model(config.exits, model, name)
    if early and trained.multi_label:
        raise UserError("--exits, --thresholds: exits are for models with one label per image")
    names = choose_names(config.picture.class_names, trained.class_names, trained.num_classes)
    transform = create_transform(**trained.data_config, is_training=False)
    if config.picture.show_tokens and not any(
        getattr(module, "reducer", None) is not None for module in model.modules()
    ):
        raise UserError(
            f"--show-tokens: {type(model).__name__} as built has no reducers; give it some, such as "
            f"--model-kwargs reduce=representation_shift for an isotropic model"
        )
    folder = Path(
        config.picture.output or free_path(DEFAULT)
    )  # as given, earlier predictions of other images stay in it
    results: list[dict[str, Any]] = []
    skipped: list[str] | None = [] if config.picture.reading.skip_bad_images else None
    undrawn: set[str] = set()
    with new_folder(folder), Predictions(folder) as table:
        shown = tqdm(paths, unit="image", disable=None)
        for path, image in readable_images(shown, trained.mode, upright=trained.upright, skipped=skipped):
            seen = transform(image)
            with torch.inference_mode(), autocast(config.device, process.device):
                pixels = seen[None].to(process.device)
                logits, exits = early.answer(pixels) if early else (model(pixels), None)
                kept = kept_places(model, pixels) if config.picture.show_tokens else {}
            scores = logits.float().sigmoid() if trained.multi_label else logits.float().softmax(-1)
            top = scores[0].topk(min(config.picture.topk, len(names)))
            classes = [
                {"index": index, "name": names[index], "probability": round(probability, 6)}
                for probability, index in zip(top.values.tolist(), top.indices.tolist(), strict=True)
            ]
            picture = table.picture_of(path)
            views = [
                (
                    f"{mask.float().mean():.0%} left before {name}",
                    dimmed(as_seen(seen, trained.data_config), mask[0].cpu().numpy()),
                )
                for name, mask in kept.items()
            ]
            undrawn |= draw_prediction(image, classes, picture, views)
            by = {} if early is None or exits is None else {"exit": early.names[int(exits[0])]}
            results.append({"image": str(path), "picture": str(picture), "classes": classes, **by})
            table.add(results[-1])
    for result in results[:10]:
        best = result["classes"][0]
        _say(f"{result['image']}: {best['name']} ({best['probability']:.1%}), {result['picture']}")
    _say(f"{count_of(len(results), 'image')} classified, {folder / LINES}")
    if undrawn:
        _say(missing_fonts(undrawn))
    if skipped:
        _say(f"{skipped_images(skipped)}:", *skipped)
    return results


class Predictions:
    """The pictures and lines of a folder, to which those of earlier calls belong too.

    An image that is predicted again gets its picture and its line anew. Whatever else lies there stays.

    Raises:
        UserError: there is another file where `LINES` goes.
    """

    def __init__(self, folder: Path) -> None:
        self.path = folder / LINES
        self.lines = {} if not self.path.exists() else _read_lines(self.path)  # by the image
        self._pictures = {self._place(line): image for image, line in self.lines.items()}
        self._drawn: set[Path] = set()

    def __enter__(self) -> "Predictions":
        """Open the file, to which lines are added as they come."""
        try:
            self._file = self.path.open("a", encoding="utf-8", errors="backslashreplace")
        except OSError as error:
            raise UserError(f"cannot write {self.path}: {error.strerror}") from error
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        """Close it; leave out what is no longer so."""
        self._file.close()
        if not self.lines:
            self.path.unlink()
        elif kind is None:
            text = "".join(map(_line, self.lines.values())).encode(errors="backslashreplace")
            write_atomically(self.path, lambda file: file.write(text))

    def picture_of(self, image: Path) -> Path:
        """Return where the picture of an image goes: its own name, with a number where something else lies there."""
        path = self.path.with_name(f"{image.stem}.png")
        known = self._pictures.items()
        own = [place for place, of in known if of == _key(image) and is_picture(place)]
        picture = free_path(path, self._drawn, own=own)
        self._drawn.add(picture)
        return picture

    def add(self, line: dict[str, Any]) -> None:
        """Add the line of an image.

        Raises:
            UserError: it cannot be written.
        """
        self.lines.pop(_key(line["image"]), None)
        self.lines[_key(line["image"])] = line
        try:
            self._file.write(_line(line))
            self._file.flush()
        except OSError as error:
            raise UserError(f"cannot write {self.path}: {error.strerror}") from error

    def _place(self, line: dict[str, Any]) -> Path:
        return self.path.with_name(Path(line["picture"]).name)


def _read_lines(path: Path) -> dict[str, dict[str, Any]]:
    try:
        lines = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
        return {_key(line["image"]): line for line in lines if Path(line["picture"]).name}
    except (OSError, ValueError, TypeError, KeyError) as error:
        raise UserError(
            f"{path} is there and holds other than predictions ({type(error).__name__}: {error}); move it, or name "
            "another --output"
        ) from error


def _line(content: dict[str, Any]) -> str:
    return json.dumps(content, ensure_ascii=False) + "\n"


def _key(image: str | Path) -> str:
    return os.path.abspath(image)


def _say(*lines: str) -> None:
    if lines:
        print(*(printable(line) for line in lines), sep="\n  ")


def choose_names(given: str, recorded: list[str] | None, num_classes: int) -> list[str]:
    """Return what the classes are called: as --class-names says, as recorded, as ImageNet's, or by their numbers.

    Raises:
        UserError: there are not as many names as classes.
    """
    if given and given != "imagenet":
        names = read_names(Path(given), "class names")
    elif recorded and not given:
        names = recorded
    elif num_classes == 1000 or given:
        info = ImageNetInfo()
        if not given:
            _say("the classes are called as ImageNet's, since there are a thousand and nothing names them")
        names = [info.index_to_description(index) for index in range(info.num_classes())]
    else:
        names = [f"class {index}" for index in range(num_classes)]
    if len(names) != num_classes:
        raise UserError(
            f"the model has {count_of(num_classes, 'class')}, {given or 'the checkpoint'} names {len(names)}"
        )
    return names
