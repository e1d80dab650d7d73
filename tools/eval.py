"""Evaluate a checkpoint or a pretrained model: python tools/eval.py --checkpoint FILE [--data-dir DIR] [flags]."""

from visionzoo.engine import run_tool


def main() -> None:
    """Parse, build, run."""
    from visionzoo.engine.flags import eval_parser

    args = eval_parser().parse()
    from visionzoo.engine.evaluation import evaluate_checkpoint  # after parsing: --help and typing errors come at once

    evaluate_checkpoint(args)


if __name__ == "__main__":
    run_tool(main)
