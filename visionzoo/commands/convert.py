"""Make a folder that timm loads, or a repository of Hugging Face's hub, of a checkpoint: the authors', timm's or ours.

visionzoo convert MODEL CHECKPOINT FOLDER, then timm.create_model("local-dir:FOLDER", pretrained=True).
"""

import argparse
import json
from pathlib import Path
from typing import Any

import timm
from safetensors import SafetensorError

import visionzoo
from visionzoo.engine import UserError
from visionzoo.engine.checkpoints import read_checkpoint
from visionzoo.engine.flags import COUNT
from visionzoo.engine.recorded import read_recorded, recorded_beside


def convert(args: argparse.Namespace) -> str:
    """Write config.json, model.safetensors and a model card; return what was loaded.

    Raises:
        ValueError: if the checkpoint cannot be read or does not fit the model, or the folder holds files already.
    """
    if args.folder.exists() and (not args.folder.is_dir() or any(args.folder.iterdir())):
        raise ValueError(f"{args.folder} is not an empty folder; name a new one")
    if not timm.is_model(args.model):
        raise ValueError(f"unknown model {args.model!r}; visionzoo models lists them")
    state = read_checkpoint(args.checkpoint)
    found = recorded_beside(args.checkpoint) or read_recorded(state, str(args.checkpoint))
    run = found.model if found.model.get("model") == args.model else {}
    model_args = {name: value for name in ("in_chans", "gp") if (value := run.get(name)) is not None}
    if "gp" in model_args:
        model_args["global_pool"] = model_args.pop("gp")
    model_args |= run.get("model_kwargs", {})
    classes = args.num_classes or run.get("num_classes") or 1000
    model: Any = timm.create_model(args.model, num_classes=classes, **model_args)
    report = visionzoo.load_weights(model, state, use_ema=not args.no_ema)
    card: dict[str, Any] = {
        "license": args.license or ("" if run else model.pretrained_cfg["license"]),
        "source": args.source,
        "measured": _measured(args.measured),
        "class_names": found.class_names if run else None,
        "data_config": {**found.data_config, **found.images} if run else None,
        "model_args": model_args,
    }
    if args.push:  # first, so that a second try finds the folder as this one did
        print(_push(model, args, card))
    try:
        visionzoo.save_pretrained(model, args.folder, **card)
    except (OSError, SafetensorError) as error:  # the latter wraps what the system says of a full disk
        raise UserError(f"cannot write {args.folder}: {getattr(error, 'strerror', None) or error}") from error
    left_out = f"; not taken from its record: {', '.join(found.left_out)}" if run and found.left_out else ""
    return f"{report}{left_out}"


def _push(model: Any, args: argparse.Namespace, card: dict[str, Any]) -> str:
    """Upload the model and return its address; whatever libraries for the network raise becomes one message."""
    try:
        return visionzoo.push_to_hub(model, args.push, private=args.private, **card)
    except Exception as error:
        if isinstance(error, ValueError) and not type(error).__module__.startswith("huggingface_hub"):
            raise  # of the model or its license
        text = " ".join(str(error).split())[:300]
        raise UserError(
            f"cannot push to {args.push}: {type(error).__name__}: {text}; {args.folder} was not written. "
            "`hf auth login` gives a token; without --push, only the folder is written"
        ) from error


def _measured(path: Path | None) -> dict[str, Any]:
    if path is None:
        return {}
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"--measured: expected what visionzoo eval writes, {path}: {error}") from error
    wanted = ("top1", "top5", "map", "loss", "img_size", "images", "crop_pct", "interpolation")
    return {name: found[name] for name in wanted if name in found}


def main() -> None:
    """Parse, convert."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", help="a zoo_* model")
    parser.add_argument("checkpoint", type=Path, help="safetensors or torch file")
    parser.add_argument("folder", type=Path, help="new folder for config.json, model.safetensors and the model card")
    parser.add_argument(
        "--num-classes", type=COUNT, metavar="N", help="classes of the checkpoint (default: the run's, else 1000)"
    )
    parser.add_argument("--no-ema", action="store_true", help="take the last weights, not the averaged ones")
    parser.add_argument("--license", "--licence", help="of the weights (default: the authors'; required for your own)")
    parser.add_argument("--source", default="", help="where the weights are from, for the model card")
    parser.add_argument("--measured", type=Path, metavar="JSON", help="what visionzoo eval wrote, for the model card")
    parser.add_argument("--push", metavar="USER/NAME", help="upload it to Hugging Face's hub too")
    parser.add_argument("--private", action="store_true", help="as a private repository")
    args = parser.parse_args()
    if args.private and not args.push:
        raise UserError("--private is of --push; give that too, or leave it out")
    try:
        report = convert(args)
    except ValueError as error:
        raise UserError(str(error)) from error
    print(f"{args.folder}: {report}")
    print(f"load it with timm.create_model('local-dir:{args.folder}', pretrained=True) after import visionzoo")
