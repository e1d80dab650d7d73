"""What CRATE's layers optimize, measured on images: coding rates of their tokens and how few values are not zero.

Sparse rate reduction (arXiv:2306.01129) is to raise the coding rate R of all tokens, to lower that inside each layer's
subspaces R^c, and to keep few values that are not zero. As the authors measure it, tokens are scaled to length 1, in
each subspace anew, so that R - R^c may be negative: what counts is how it goes from layer to layer.
"""

from collections import defaultdict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from timm.models import safe_model_name
from torch import Tensor, nn

from visionzoo.engine.calling import autocast, try_images
from visionzoo.engine.checkpoints import make_folder, write_atomically
from visionzoo.engine.errors import UserError, printable, require
from visionzoo.engine.image_files import draw_images
from visionzoo.engine.images import seed_everything
from visionzoo.engine.options import settings
from visionzoo.engine.outputs import add_rows, free_path
from visionzoo.engine.parallel import start_process
from visionzoo.engine.restoring import restore
from visionzoo.engine.trained_flags import SparseRateConfig
from visionzoo.layers.mixers.subspace import SubspaceMixer
from visionzoo.layers.tokens import Tokens
from visionzoo.text import count_of, markdown_table

DEFAULT = Path("output/sparse_rate")
MEASURES = ("rate", "subspace_rate", "rate_reduction", "nonzero")  # of each image
COLUMNS = ("layer", *(f"{measure}{kind}" for measure in MEASURES for kind in ("", "_std")))
IMAGES_AT_ONCE = 16


def coding_rate(tokens: Tensor, *, distortion: float = 0.01) -> Tensor:
    """Return ½·log det(I + D/(N·ε²)·ZᵀZ) of tokens Z scaled to length 1, in nats: [..., N, D] to [...], float64.

    Args:
        tokens: of any length; zeros stay.
        distortion: ε², positive; 0.01 in the authors' code.
    """
    z = F.normalize(tokens.detach().cpu().double(), dim=-1)
    count, dim = z.shape[-2:]
    # log det(I + ZᵀZ) = log det(I + ZZᵀ): of the smaller of the two
    gram = z.mT @ z if dim < count else z @ z.mT
    identity = torch.eye(gram.shape[-1], dtype=gram.dtype)
    return torch.linalg.slogdet(identity + dim / (count * distortion) * gram).logabsdet / 2


@torch.no_grad()
def sparse_rates(model: nn.Module, images: Tensor) -> dict[str, dict[str, Tensor]]:
    """Measure each block with attention in subspaces on images [B, in_chans, H, W].

    Returns:
        for each block's name, in order, the `MEASURES` of each image [B]: R of the normalized tokens that attention
        sees, R^c of them in its subspaces (summed over these), their difference, and the share of values after the
        block that are not zero, from 0 to 1.
    """
    found: dict[str, dict[str, Tensor]] = defaultdict(dict)

    def watch(block: str, mixer: SubspaceMixer) -> Callable[..., None]:
        def rates(linear: nn.Module, inputs: tuple[Tensor], projected: Tensor) -> None:
            heads = projected.flatten(1, -2).unflatten(-1, (mixer.num_heads, mixer.head_dim)).transpose(1, 2)
            whole, inside = coding_rate(inputs[0].flatten(1, -2)), coding_rate(heads).sum(1)
            found[block] = {"rate": whole, "subspace_rate": inside, "rate_reduction": whole - inside}

        return rates

    def count(block: str) -> Callable[..., None]:
        def nonzero(module: nn.Module, inputs: Any, out: Tokens | Tensor) -> None:
            values = out.x if isinstance(out, Tokens) else out
            found[block]["nonzero"] = (values != 0).flatten(1).double().mean(1).cpu()

        return nonzero

    hooks = []
    for name, block in _blocks(model).items():
        mixer: Any = block.mixer
        hooks.append(mixer.subspaces.register_forward_hook(watch(name, mixer)))
        hooks.append(block.register_forward_hook(count(name)))
    try:
        model(images)
    finally:
        for hook in hooks:
            hook.remove()
    return dict(found)


def _blocks(model: nn.Module) -> dict[str, nn.Module]:
    return {n: m for n, m in model.named_modules() if isinstance(getattr(m, "mixer", None), SubspaceMixer)}


def measure_sparse_rate(config: SparseRateConfig) -> Path:
    """Measure the model that `config` names on images (`visionzoo sparse-rate`); return the folder with table and plot.

    Raises:
        UserError: the model has no attention in subspaces, its weights or the images do not fit, or the result would
            replace another.
    """
    drawn = config.drawn
    process = start_process(config.device.device)
    require("matplotlib")
    output = Path(config.output)
    if config.output and (output.exists() or output.is_symlink()):
        raise UserError(f"--output {output} exists already and is not replaced; name another folder")
    seed_everything(config.device.seed)
    trained = restore(config.model, config.input, drawn, settings(drawn.reading))
    model = trained.model.to(process.device).eval()
    name = config.model.model or trained.args["model"]
    if not _blocks(model):
        raise UserError(f"{name} has no attention in subspaces; give --model zoo_crate_*, or one with mixers=subspace")
    try_images(model, name, trained.data_config["input_size"])
    images = draw_images(
        config.images, drawn.num_images, trained, seed=config.device.seed, skip_bad_images=drawn.reading.skip_bad_images
    )
    parts = []
    with autocast(config.device, process.device):
        for batch in images.split(IMAGES_AT_ONCE):
            parts.append(sparse_rates(model, batch.to(process.device)))
    rows = [
        _row(layer, {measure: torch.cat([part[block][measure] for part in parts]) for measure in MEASURES})
        for layer, block in enumerate(parts[0], start=1)
    ]
    folder = output if config.output else free_path(DEFAULT / safe_model_name(name))
    make_folder(folder)
    add_rows(folder / "sparse_rate.csv", COLUMNS, rows)
    _plot(rows, f"{name}, {count_of(len(images), 'image')}", folder / "sparse_rate.png")
    cells = [[row["layer"], *(f"{row[m]:.4g} ± {row[f'{m}_std']:.2g}" for m in MEASURES)] for row in rows]
    print(markdown_table(("layer", "R", "R^c", "R - R^c", "not zero"), cells, numbers=True))
    print(f"mean and standard deviation over {count_of(len(images), 'image')}; written to {printable(str(folder))}")
    return folder


def _row(layer: int, values: dict[str, Tensor]) -> dict[str, Any]:
    row: dict[str, Any] = {"layer": layer}
    for measure, of_images in values.items():
        row[measure], row[f"{measure}_std"] = of_images.mean().item(), of_images.std(correction=0).item()
    return row


def _plot(rows: list[dict[str, Any]], title: str, path: Path) -> None:
    """Draw the paper's figure: over the layers R^c, with R beside it, and the share of values that are not zero."""
    from matplotlib.figure import Figure  # not pyplot: no display, no global state

    figure = Figure(figsize=(9, 3.6), layout="constrained")
    left, right = figure.subplots(1, 2)
    layers = [row["layer"] for row in rows]

    def curve(axes: Any, measure: str, label: str) -> None:
        values, spread = ([row[key] for row in rows] for key in (measure, f"{measure}_std"))
        axes.errorbar(layers, values, yerr=spread, marker="o", capsize=3, label=label)

    curve(left, "rate", "R, all tokens")
    curve(left, "subspace_rate", "R^c, in the layer's subspaces")
    left.set(xlabel="layer", ylabel="coding rate (nats)")
    left.legend()
    curve(right, "nonzero", "not zero")
    right.set(xlabel="layer", ylabel="share of values that are not zero", ylim=(0, None))
    figure.suptitle(title, parse_math=False)
    write_atomically(path, lambda file: figure.savefig(file, format="png", dpi=120))
