"""Norms of a model's features before and after its outliers are moved to test-time registers, as pictures."""

import json
from pathlib import Path
from typing import Any

from visionzoo.engine.calling import autocast, try_images
from visionzoo.engine.charts import draw_maps
from visionzoo.engine.checkpoints import make_folder, write_atomically
from visionzoo.engine.errors import UserError, printable, require
from visionzoo.engine.image_files import draw_images
from visionzoo.engine.images import seed_everything
from visionzoo.engine.options import settings
from visionzoo.engine.outputs import free_path
from visionzoo.engine.parallel import start_process
from visionzoo.engine.restoring import restore
from visionzoo.engine.trained_flags import RegistersConfig
from visionzoo.explanation.image import as_seen
from visionzoo.models._registers import NoOutliersError, feature_norms, find_register_neurons, move_to_registers
from visionzoo.text import count_of

DEFAULT = Path("output/registers")
FOUND = "registers.json"


def show_registers(config: RegistersConfig) -> Path:
    """Look for outliers of the model that `config` names (`visionzoo registers`), move them, and draw the norms.

    Returns:
        the folder of the pictures; with the neurons as a JSON file, where there are outliers.

    Raises:
        UserError: the model takes no registers, or the images or its weights do not fit.
    """
    own = config.outliers
    process = start_process(config.device.device)
    require("matplotlib")
    seed_everything(config.device.seed)
    trained = restore(config.model, config.input, own, settings(own.reading))
    model = trained.model.to(process.device).eval()
    name = config.model.model or trained.args["model"]
    try_images(model, name, trained.data_config["input_size"])
    images = draw_images(
        config.images, own.num_images, trained, seed=config.device.seed, skip_bad_images=own.reading.skip_bad_images
    )
    images = images.to(process.device)
    shown = images[: config.outliers.num_pictures]
    folder = Path(config.outliers.output or free_path(DEFAULT))
    found = None
    try:
        with autocast(config.device, process.device):
            try:
                found = find_register_neurons(
                    model,
                    images,
                    top_k=config.outliers.top_k,
                    block=config.outliers.block,
                    last_block=config.outliers.last_block,
                    threshold=config.outliers.threshold,
                )
                said = (
                    f"{count_of(found.outliers, 'outlier')} above a norm of {found.threshold:.4g} on "
                    f"{count_of(len(images), 'image')}"
                )
            except NoOutliersError as error:
                said = str(error)
            norms = [("before", feature_norms(model, images, block=config.outliers.block))]
            if found:
                moved = move_to_registers(model, found.neurons, num_registers=config.outliers.num_registers)
                norms.append(("after", feature_norms(moved, images, block=config.outliers.block)))
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
        said = f"moved to {count_of(config.outliers.num_registers, 'register')}"
        print(printable(f"{said}: neurons {blocks}; written to {path}"))
    print(printable(f"{count_of(len(pictures), 'picture')} in {folder}"))
    return folder
