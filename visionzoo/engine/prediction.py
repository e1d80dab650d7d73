"""The likeliest classes of single images, as pictures and as lines of JSON."""

import argparse
import glob
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from timm.data import ImageNetInfo, create_transform
from timm.data.readers.img_extensions import get_img_extensions

from visionzoo.engine.checkpoints import make_folder, write_atomically
from visionzoo.engine.errors import UnreadableImageError, UserError, require
from visionzoo.engine.images import UNREADABLE, to_mode
from visionzoo.engine.models import autocast, restore, try_images
from visionzoo.engine.parallel import start_process

LINES = "predictions.jsonl"


def predict(args: argparse.Namespace) -> list[dict[str, Any]]:
    """Classify the images that `args` name (tools/predict.py); write and return the likeliest classes of each.

    Raises:
        UserError: there are no such images, one cannot be read, or the model or its weights do not fit.
    """
    process = start_process(args)
    tqdm = require("tqdm").tqdm
    require("matplotlib")
    paths = list(find_images(args.images))
    trained = restore(args)
    model = trained.model.to(process.device).eval()
    try_images(model, args.model or trained.args["model"], trained.data_config["input_size"])
    names = _names(args.class_names, trained.class_names, trained.num_classes)
    transform = create_transform(**trained.data_config, is_training=False)
    upright = args.apply_exif_orientation or bool(trained.args.get("apply_exif_orientation"))
    mode = "RGB" if trained.data_config["input_size"][0] == 3 else "L"
    folder = Path(args.output)
    make_folder(folder)

    results: list[dict[str, Any]] = []
    skipped: list[str] = []
    with (folder / LINES).open("w", encoding="utf-8") as lines:
        for path in tqdm(paths, unit="image", disable=None):
            try:
                image = _read(path, mode, upright)
            except UnreadableImageError as error:
                if not args.skip_bad_images:
                    raise
                skipped.append(str(error))
                continue
            with torch.inference_mode(), autocast(args, process.device):
                logits = model(transform(image)[None].to(process.device))
            scores = logits.float().sigmoid() if trained.args.get("multi_label") else logits.float().softmax(-1)
            top = scores[0].topk(min(args.topk, len(names)))
            classes = [
                {"index": index, "name": names[index], "probability": round(probability, 6)}
                for probability, index in zip(top.values.tolist(), top.indices.tolist(), strict=True)
            ]
            picture = _free_name(folder, path, taken={result["picture"] for result in results})
            draw_prediction(image, classes, picture)
            results.append({"image": str(path), "picture": str(picture), "classes": classes})
            lines.write(json.dumps(results[-1], ensure_ascii=False) + "\n")
            lines.flush()
    for result in results[:10]:
        best = result["classes"][0]
        print(f"{result['image']}: {best['name']} ({best['probability']:.1%}), {result['picture']}")
    print(f"{len(results)} images classified, {folder / LINES}")
    if skipped:
        print(f"{len(skipped)} unreadable images were passed over:", *skipped, sep="\n  ")
    return results


def find_images(sources: list[str]) -> Iterator[Path]:
    """Yield the image files of files, folders (searched to the bottom) and glob patterns, sorted within each.

    Raises:
        UserError: one of them stands for no image.
    """
    endings = get_img_extensions(as_set=True)
    for source in sources:
        path = Path(source)
        if path.is_file():
            yield path
            continue
        found = path.rglob("*") if path.is_dir() else map(Path, glob.glob(source, recursive=True))
        files = sorted(file for file in found if file.suffix.lower() in endings and file.is_file())
        if not files:
            raise UserError(f"no images at {source}; known endings are {', '.join(sorted(endings))}")
        yield from files


def draw_prediction(image: Image.Image, classes: list[dict[str, Any]], path: Path) -> None:
    """Write a picture of the image beside bars of its likeliest classes."""
    from matplotlib.figure import Figure  # not pyplot: no display, no global state

    figure = Figure(figsize=(8, 3.5), layout="constrained")
    left, right = figure.subplots(1, 2, width_ratios=(1, 1.2))
    left.imshow(image, cmap="gray", interpolation="nearest" if max(image.size) < 100 else "antialiased")
    left.axis("off")
    labels = [f"{entry['name'][:40]}" for entry in classes]
    bars = right.barh(range(len(classes)), [entry["probability"] for entry in classes])
    right.bar_label(bars, [f"{entry['probability']:.1%}" for entry in classes], padding=3)
    right.set_yticks(range(len(classes)), labels)
    right.invert_yaxis()  # the likeliest on top
    right.set_xlim(0, 1.2)
    right.set_xticks([])
    right.spines[["top", "right", "bottom"]].set_visible(False)
    write_atomically(path, lambda file: figure.savefig(file, format="png", dpi=120))


def _read(path: Path, mode: str, upright: bool) -> Image.Image:
    try:
        with Image.open(path) as image:
            return to_mode(image, mode, upright=upright)
    except UNREADABLE as error:
        raise UnreadableImageError(
            f"cannot use the image {path}: {error}; mend or leave it out, or pass --skip-bad-images"
        ) from error


def _free_name(folder: Path, image: Path, taken: set[str]) -> Path:
    """Return where the picture of an image goes: its own name, numbered where another image has the same."""
    path, number = folder / f"{image.stem}.png", 1
    while str(path) in taken:
        path, number = folder / f"{image.stem}-{number}.png", number + 1
    return path


def _names(given: str, recorded: list[str] | None, num_classes: int) -> list[str]:
    if given and given != "imagenet":
        try:
            names = Path(given).read_text(encoding="utf-8").splitlines()
        except (OSError, UnicodeDecodeError) as error:
            raise UserError(f"cannot read the class names {given}: {error}") from error
    elif recorded and not given:
        names = recorded
    elif num_classes == 1000 or given:
        info = ImageNetInfo()
        names = [info.index_to_description(index) for index in range(info.num_classes())]
    else:
        names = [f"class {index}" for index in range(num_classes)]
    if len(names) != num_classes:
        raise UserError(f"the model has {num_classes} classes, {given or 'the checkpoint'} names {len(names)}")
    return names
