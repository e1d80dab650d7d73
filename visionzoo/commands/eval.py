"""Evaluate a checkpoint or a pretrained model: visionzoo eval [CONFIG.py] --checkpoint FILE [flags].

With a .py config (configs/detection, configs/segmentation) a detector or segmentor, else a classifier.
"""

import sys

from visionzoo.engine import is_openmmlab


def main() -> None:
    """Parse, build, run."""
    if is_openmmlab(sys.argv[1:]):
        from visionzoo.openmmlab.flags import eval_parser as parser
        from visionzoo.openmmlab.running import evaluate

        evaluate(parser().parse())
        return
    from visionzoo.engine.trained_flags import eval_parser

    config = eval_parser().parse()
    from visionzoo.engine.evaluation import evaluate_checkpoint  # after parsing: --help and typing errors come at once

    evaluate_checkpoint(config)
