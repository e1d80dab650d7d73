"""Predict images: visionzoo predict [CONFIG.py] IMAGES... --checkpoint FILE [flags].

With a .py config (configs/detection, configs/segmentation) boxes and masks are drawn, else images are classified.
"""

import sys

from visionzoo.engine import is_openmmlab


def main() -> None:
    """Parse, build, run."""
    if is_openmmlab(sys.argv[1:]):
        from visionzoo.openmmlab.flags import predict_parser as parser
        from visionzoo.openmmlab.prediction import predict as draw

        draw(parser().parse())
        return
    from visionzoo.engine.trained_flags import predict_parser

    config = predict_parser().parse()
    from visionzoo.engine.prediction import predict  # after parsing: --help and typing errors come at once

    predict(config)
