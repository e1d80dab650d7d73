"""Evaluate a checkpoint or a pretrained model: python tools/eval.py [CONFIG.py] --checkpoint FILE [flags].

With a .py config (configs/detection, configs/segmentation) a detector or segmentor, else a classifier.
"""

import signal

if __name__ == "__main__":  # Ctrl-C during the imports, which take seconds, is no traceback; run_tool takes over
    signal.signal(signal.SIGINT, signal.SIG_DFL)

import sys

from visionzoo.engine import is_openmmlab, run_tool


def main() -> None:
    """Parse, build, run."""
    if is_openmmlab(sys.argv):
        from visionzoo.openmmlab.flags import eval_parser as parser
        from visionzoo.openmmlab.running import evaluate

        evaluate(parser().parse_args())
        return
    from visionzoo.engine.flags import eval_parser

    args = eval_parser().parse()
    from visionzoo.engine.evaluation import evaluate_checkpoint  # after parsing: --help and typing errors come at once

    evaluate_checkpoint(args)


if __name__ == "__main__":
    run_tool(main)
