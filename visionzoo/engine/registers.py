"""Norms of a model's features before and after its outliers are moved to test-time registers, as pictures."""

import argparse
import json
from pathlib import Path
from typing import Any

from visionzoo.engine.charts import draw_maps
from visionzoo.engine.checkpoints import make_folder, write_atomically
from visionzoo.engine.errors import UserError, printable, require
from visionzoo.engine.hashing import draw_images
from visionzoo.engine.images import seed_everything
from visionzoo.engine.models import autocast, restore, try_images
from visionzoo.engine.outputs import free_path
from visionzoo.engine.parallel import start_process
from visionzoo.explanation.image import as_seen
from visionzoo.models._registers import NoOutliersError, feature_norms, find_register_neurons, move_to_registers

DEFAULT = Path("output/registers")
FOUND = "registers.json"


def show_registers(args: argparse.Namespace) -> Path:
    """Look for outliers of the model that `args` name (`visionzoo registers`), move them, and draw the norms.

    Returns:
        the folder of the pictures; with the neurons as a JSON file, where there are outliers.

    Raises:
        UserError: the model takes no registers, or the images or its weights do not fit.
    """
    process = start_process(args)
    require("matplotlib")
    seed_everything(args.seed)
    trained = restore(args)
    model = trained.model.to(process.device).eval()
    name = args.model or trained.args["model"]
    try_images(model, name, trained.data_config["input_size"])
    images = draw_images(args, trained).to(process.device)
    shown = images[: args.num_pictures]
    folder = Path(args.output or free_path(DEFAULT))
    found = None
    try:
        with autocast(args, process.device):
            try:
                found = find_register_neurons(
                    model,
                    images,
                    top_k=args.top_k,
                    block=args.block,
                    last_block=args.last_block,
                    threshold=args.threshold,
                )
                said = f"{found.outliers} outliers above a norm of {found.threshold:.4g} on {len(images)} images"
            except NoOutliersError as error:
                said = str(error)
            norms = [("before", feature_norms(model, images, block=args.block))]
            if found:
                moved = move_to_registers(model, found.neurons, num_registers=args.num_registers)
                norms.append(("after", feature_norms(moved, images, block=args.block)))
    except ValueError as error:
        raise UserError(str(error)) from error
    make_folder(folder)
    pictures: list[Path] = []
    for number, image in enumerate(shown):
        row: list[tuple[str, Any]] = []
        for title, values in norms:
            each = values[number].cpu()
            row.append((f"{title}: {float(each.max() / each.median()):.1f} x median", each.numpy()))
        pictures.append(free_path(folder / f"norms-{number}.png", pictures))
        draw_maps(as_seen(image, trained.data_config), [row], pictures[-1], over=False)
    print(printable(f"{name}: {said}"))
    for title, values in norms:
        print(
            f"largest norm {title}: {float(values.max()):.4g}, {float(values.max() / values.median()):.2f} x the median"
        )
    if found:
        neurons = {"neurons": found.neurons, "scores": found.scores, "threshold": found.threshold}
        text = json.dumps({"model": name, **neurons}, indent=2)
        path = free_path(folder / FOUND)
        write_atomically(path, lambda file: file.write(f"{text}\n".encode()))
        blocks = ", ".join(f"{len(chosen)} of block {i}" for i, chosen in sorted(found.neurons.items()))
        print(printable(f"moved to {args.num_registers} registers: neurons {blocks}; written to {path}"))
    print(printable(f"{len(pictures)} pictures in {folder}"))
    return folder
