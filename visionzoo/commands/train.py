"""Train a classifier, detector or segmentor: visionzoo train CONFIG [flags], or torchrun on several GPUs.

A .yaml config (configs/classification) trains a classifier by visionzoo's engine, a .py config (configs/detection,
configs/segmentation) a detector or segmentor by OpenMMLab's.
"""

import sys

from visionzoo.engine import is_openmmlab


def main() -> None:
    """Parse, build, run."""
    if is_openmmlab(sys.argv[1:]):
        from visionzoo.openmmlab.flags import train_parser as parser
        from visionzoo.openmmlab.running import train as train_detector

        train_detector(parser().parse())
        return
    from visionzoo.engine.flags import train_parser

    config = train_parser().parse_with_config()
    from visionzoo.engine.training import train  # after parsing, so that --help and typing errors come at once

    train(config)
