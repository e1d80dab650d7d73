"""Train a classifier, detector or segmentor: python tools/train.py CONFIG [flags], or torchrun on several GPUs.

A .yaml config (configs/classification) trains a classifier by visionzoo's engine, a .py config (configs/detection,
configs/segmentation) a detector or segmentor by OpenMMLab's.
"""

import signal

if __name__ == "__main__":  # Ctrl-C during the imports, which take seconds, is no traceback; run_tool takes over
    signal.signal(signal.SIGINT, signal.SIG_DFL)

import sys

from visionzoo.engine import is_openmmlab, run_tool


def main() -> None:
    """Parse, build, run."""
    if is_openmmlab(sys.argv):
        from visionzoo.openmmlab.flags import train_parser as parser
        from visionzoo.openmmlab.running import train as train_detector

        train_detector(parser().parse_args())
        return
    from visionzoo.engine.flags import train_parser

    args = train_parser().parse_with_config()
    from visionzoo.engine.training import train  # after parsing, so that --help and typing errors come at once

    train(args)


if __name__ == "__main__":
    run_tool(main)
