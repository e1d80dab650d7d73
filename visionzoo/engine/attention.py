"""What the queries of a model's head see of images, as pictures: those of the true and the predicted class, by head."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from timm.data import create_transform
from torch import Tensor

from visionzoo.engine.calling import autocast, try_images
from visionzoo.engine.charts import draw_maps, missing_fonts
from visionzoo.engine.checkpoints import make_folder
from visionzoo.engine.errors import UserError, closest, printable, require
from visionzoo.engine.image_files import find_images
from visionzoo.engine.images import readable_images, seed_everything, skipped_images
from visionzoo.engine.options import settings
from visionzoo.engine.outputs import free_path
from visionzoo.engine.parallel import start_process
from visionzoo.engine.prediction import choose_names
from visionzoo.engine.restoring import restore
from visionzoo.engine.trained_flags import AttentionConfig
from visionzoo.explanation.image import as_seen
from visionzoo.layers.class_queries import ClassQueryHead
from visionzoo.models._heads import head_attention

DEFAULT = Path("output/attention")
COLUMNS = 9  # maps in a row


def show_attention(config: AttentionConfig) -> list[Path]:
    """Draw what the queries of the model that `config` names see (`visionzoo attention`); return the pictures' paths.

    Raises:
        UserError: the model's head has no queries, there is no such class or layer, or an image cannot be read.
    """
    process = start_process(config.device.device)
    require("matplotlib")
    notes: list[str] = []
    paths = list(dict.fromkeys(find_images(config.images, notes)))
    seed_everything(config.device.seed)
    trained = restore(config.model, config.input, config.query, settings(config.query.reading))
    model = trained.model.to(process.device).eval()
    try_images(model, config.model.model or trained.args["model"], trained.data_config["input_size"])
    names = choose_names(config.query.class_names, trained.class_names, trained.num_classes)
    label = _label(config.query.label, names)
    of_classes = any(isinstance(module, ClassQueryHead) for module in model.modules())
    transform: Any = create_transform(**trained.data_config, is_training=False)
    pictures: list[Path] = []
    skipped: list[str] | None = [] if config.query.reading.skip_bad_images else None
    undrawn: set[str] = set()
    folder = Path(config.query.output or free_path(DEFAULT))
    for path, image in readable_images(paths, trained.mode, upright=trained.upright, skipped=skipped):
        batch = transform(image)[None].to(process.device)
        try:
            with torch.inference_mode(), autocast(config.device, process.device):
                seen = head_attention(model, batch, layer=config.query.layer)
                predicted = int(model(batch)[0].argmax())
        except ValueError as error:
            raise UserError(str(error)) from error
        true = names.index(path.parent.name) if label is None and path.parent.name in names else label
        make_folder(folder)
        pictures.append(free_path(folder / f"{path.stem}.png", pictures))
        rows: list[list[tuple[str, Any]]] = []
        for maps in (each[0].float().cpu() for each in seen):
            rows += _of_classes(maps, names, predicted, true) if of_classes else _of_queries(maps)
        undrawn |= draw_maps(as_seen(batch[0], trained.data_config), rows, pictures[-1])
        said = f", true class {names[true]}" if true is not None else ""
        print(printable(f"{path}: predicted {names[predicted]}{said}, {pictures[-1]}"))
    notes += [missing_fonts(undrawn)] if undrawn else []
    notes += [f"{skipped_images(skipped)}: {'; '.join(skipped)}"] if skipped else []
    for note in notes:
        print(printable(note))
    return pictures


def _label(text: str, names: list[str]) -> int | None:
    """Return the number of a class that --label names; None where it is empty."""
    if not text or text in names:
        return names.index(text) if text else None
    if text.isdecimal() and int(text) < len(names):
        return int(text)
    near = closest(text, names)
    raise UserError(f"--label: expected a class name or a number below {len(names)}, got {text!r}{near}")


def _of_queries(seen: Tensor) -> list[list[tuple[str, Any]]]:
    """Lay out what each query sees, of [1, K, h, w]."""
    maps = [("mean of the queries", seen[0].mean(0)), *((f"query {i}", each) for i, each in enumerate(seen[0]))]
    return _lines(maps)


def _of_classes(seen: Tensor, names: Sequence[str], predicted: int, true: int | None) -> list[list[tuple[str, Any]]]:
    """Lay out what the heads see for the predicted and the true class, of [G, K, h, w]."""
    titles = {predicted: "predicted"} | ({} if true is None else {true: "true"})
    if predicted == true:
        titles = {predicted: "predicted, true"}
    rows: list[list[tuple[str, Any]]] = []
    for number, title in titles.items():
        heads = [(f"head {i}", each[number]) for i, each in enumerate(seen)]
        rows += _lines([(f"{names[number]} ({title})", seen[:, number].mean(0)), *heads])
    return rows


def _lines(maps: list[tuple[str, Tensor]]) -> list[list[tuple[str, Any]]]:
    arrays = [(title, values.numpy()) for title, values in maps]
    return [arrays[i : i + COLUMNS] for i in range(0, len(arrays), COLUMNS)]
