"""Turn a checkpoint of the authors' (or timm's, or our own) into a folder that timm loads.

python tools/convert.py MODEL CHECKPOINT FOLDER, then timm.create_model("local-dir:FOLDER", pretrained=True).
"""

import argparse
import sys
from pathlib import Path

import timm
from timm.models import save_for_hf

import visionzoo


def convert(name: str, checkpoint: Path, folder: Path, num_classes: int, use_ema: bool = True) -> str:
    """Write config.json and model.safetensors of a model with the checkpoint's weights; return what was loaded.

    Raises:
        ValueError: if the checkpoint cannot be read or does not fit the model, or the folder holds files already.
    """
    if folder.exists() and any(folder.iterdir()):
        raise ValueError(f"{folder} is not empty; name a new folder")
    if not timm.is_model(name):
        raise ValueError(f"unknown model {name!r}; python tools/list_models.py lists them")
    model = timm.create_model(name, num_classes=num_classes)
    report = visionzoo.load_weights(model, checkpoint, use_ema=use_ema)
    save_for_hf(model, str(folder), safe_serialization=True)
    return str(report)


def main() -> None:
    """Parse, convert."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", help="a zoo_* model")
    parser.add_argument("checkpoint", type=Path, help="safetensors or torch file")
    parser.add_argument("folder", type=Path, help="new folder for config.json and model.safetensors")
    parser.add_argument("--num-classes", type=int, default=1000, help="classes of the checkpoint")
    parser.add_argument("--no-ema", action="store_true", help="take the last weights, not the averaged ones")
    args = parser.parse_args()
    try:
        report = convert(args.model, args.checkpoint, args.folder, args.num_classes, not args.no_ema)
    except ValueError as error:
        sys.exit(f"error: {error}")
    print(f"{args.folder}: {report}")
    print(f"load it with timm.create_model('local-dir:{args.folder}', pretrained=True) after import visionzoo")


if __name__ == "__main__":
    main()
