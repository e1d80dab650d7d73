"""Hash functions fitted to images, block by block in one forward pass, and the checkpoint that holds them."""

from pathlib import Path
from typing import Any

import torch
from timm.models import safe_model_name
from torch import Tensor, nn

from visionzoo.engine.calling import autocast, try_images
from visionzoo.engine.checkpoints import make_folder, write_atomically
from visionzoo.engine.errors import UserError, printable, require
from visionzoo.engine.image_files import draw_images
from visionzoo.engine.images import seed_everything
from visionzoo.engine.options import settings
from visionzoo.engine.outputs import free_path
from visionzoo.engine.parallel import start_process
from visionzoo.engine.restoring import Trained, restore
from visionzoo.engine.trained_flags import FitHashesConfig
from visionzoo.kernels.precision import without_autocast
from visionzoo.layers.hashing import KernelHash, fit_hash
from visionzoo.models._checkpoint import rename

DEFAULT = Path("output/fit_hashes")


def fit_hashes(config: FitHashesConfig) -> Path:
    """Fit the hash functions of the model that `config` names (`visionzoo fit-hashes`); return the checkpoint's path.

    A block's functions are fitted to the tokens of all images, and what the block makes of them then continues to the
    next one.

    Raises:
        UserError: the model has no hash functions, its weights or the images do not fit, or the result would replace
            another file.
    """
    drawn = config.drawn
    process = start_process(config.device.device)
    tqdm = require("tqdm").tqdm
    output = Path(config.fitting.output)
    if config.fitting.output and (output.exists() or output.is_symlink()):
        raise UserError(f"--output {output} exists already and is not replaced; name another file")
    seed_everything(config.device.seed)
    trained = restore(config.model, config.input, drawn, settings(drawn.reading), complete=_with_hashes)
    model = trained.model.to(process.device).eval()
    name = config.model.model or trained.args["model"]
    try_images(model, name, trained.data_config["input_size"])
    images = draw_images(
        config.images, drawn.num_images, trained, seed=config.device.seed, skip_bad_images=drawn.reading.skip_bad_images
    )
    images = images.to(process.device)
    errors: dict[str, tuple[float, float]] = {}

    hashes = _hashes(model)
    with tqdm(total=sum(functions.num_bits for functions in hashes.values()), unit="bit", disable=None) as bar:

        def fit(block: str, functions: KernelHash, tokens: Tensor) -> None:
            bar.set_description(block.removesuffix(".hash"), refresh=False)
            try:
                with without_autocast(tokens.device):
                    errors[block] = fit_hash(
                        functions,
                        tokens,
                        neighbors=config.fitting.neighbors,
                        steps=config.fitting.steps,
                        advance=bar.update,
                    )
            except ValueError as error:
                raise UserError(f"{block}: {error}") from error

        hooks = [
            functions.register_forward_pre_hook(lambda module, inputs, block=block: fit(block, module, *inputs))
            for block, functions in hashes.items()
        ]
        try:
            with torch.no_grad(), autocast(config.device, process.device):
                model(images)
        finally:
            for hook in hooks:
                hook.remove()
    for block, (before, after) in errors.items():
        print(f"{block}: error {before:.4f} before, {after:.4f} after")
    return _write(config, trained, name, len(images), errors)


def _with_hashes(model: Any, state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Return a checkpoint's tensors and, where it has no hash functions, the model's own.

    Raises:
        UserError: the model has none either.
    """
    hashes = _hashes(model)
    if not hashes:
        raise UserError(
            f"{model.pretrained_cfg['architecture']} as built has no hash functions to fit; give --model of a form "
            "that has: zoo_ecoformer_pvtv2_b0, not zoo_ecoformer_pvtv2_b0_msa"
        )
    found = rename(state, model)[0]
    own = {f"{name}.{key}": tensor for name, module in hashes.items() for key, tensor in module.state_dict().items()}
    return state | {name: tensor for name, tensor in own.items() if name not in found}


def _hashes(model: nn.Module) -> dict[str, KernelHash]:
    return {name: module for name, module in model.named_modules() if isinstance(module, KernelHash)}


def _write(
    config: FitHashesConfig, trained: Trained, name: str, images: int, errors: dict[str, tuple[float, float]]
) -> Path:
    """Write the checkpoint, with the record of the model and its images and of this fit."""
    path = Path(config.fitting.output) if config.fitting.output else free_path(DEFAULT / f"{safe_model_name(name)}.pth")
    make_folder(path.parent)
    given = {key: value for key in ("in_chans", "gp", "model_kwargs") if (value := getattr(config.model, key))}
    content = {
        "arch": name,
        "args": {**trained.args, **trained.reading, **given, "model": name, "num_classes": trained.num_classes},
        "data_config": trained.data_config,
        "class_names": trained.class_names,
        "state_dict": {key: value.cpu() for key, value in trained.model.state_dict().items()},
        "hashes": {
            "images": images,
            "seed": config.device.seed,
            "neighbors": config.fitting.neighbors,
            "steps": config.fitting.steps,
            "errors": errors,
        },
    }
    write_atomically(path, lambda file: torch.save(content, file))
    print(f"written to {printable(str(path))}")
    return path
