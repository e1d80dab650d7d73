"""Look at what a model makes of images: visionzoo view [CONFIG.py] [IMAGES...] [--save DIR] [flags].

Without --save a page for this machine only. With a .py config (configs/detection, configs/segmentation) boxes and masks
are shown.
"""

import sys

from visionzoo.engine import is_openmmlab


def main() -> None:
    """Parse, build, look."""
    if is_openmmlab(sys.argv[1:]):
        from visionzoo.openmmlab.flags import view_parser as parser
        from visionzoo.openmmlab.prediction import view as look

        look(parser().parse())
        return
    from visionzoo.engine.trained_flags import view_parser

    config = view_parser().parse()
    from visionzoo.engine.view import view  # after parsing: --help and typing errors come at once

    view(config)
