"""Train a classifier: python tools/train.py configs/classification/NAME.yaml [flags], or torchrun on several GPUs."""

import sys

from visionzoo.engine import UserError, run_tool


def main() -> None:
    """Parse, build, run."""
    if any(word.endswith(".py") for word in sys.argv[1:2]):
        raise UserError(
            f"{sys.argv[1]}: detection and segmentation configs need OpenMMLab's mmengine, which this version of "
            "visionzoo does not drive yet; classification configs are .yaml files"
        )
    from visionzoo.engine.flags import train_parser

    args = train_parser().parse_with_config()
    from visionzoo.engine.training import train  # after parsing, so that --help and typing errors come at once

    train(args)


if __name__ == "__main__":
    run_tool(main)
