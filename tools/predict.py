"""Predict images: python tools/predict.py [CONFIG.py] IMAGES... --checkpoint FILE [flags].

With a .py config (configs/detection, configs/segmentation) boxes and masks are drawn, else images are classified.
"""

import signal

if __name__ == "__main__":  # Ctrl-C during the imports, which take seconds, is no traceback; run_tool takes over
    signal.signal(signal.SIGINT, signal.SIG_DFL)

import sys

from visionzoo.engine import is_openmmlab, run_tool


def main() -> None:
    """Parse, build, run."""
    if is_openmmlab(sys.argv):
        from visionzoo.openmmlab.flags import predict_parser as parser
        from visionzoo.openmmlab.prediction import predict as draw

        draw(parser().parse_args())
        return
    from visionzoo.engine.flags import predict_parser

    args = predict_parser().parse()
    from visionzoo.engine.prediction import predict  # after parsing: --help and typing errors come at once

    predict(args)


if __name__ == "__main__":
    run_tool(main)
