"""Classify images: python tools/predict.py IMAGES... --checkpoint FILE [flags]."""

from visionzoo.engine import run_tool


def main() -> None:
    """Parse, build, run."""
    from visionzoo.engine.flags import predict_parser

    args = predict_parser().parse()
    from visionzoo.engine.prediction import predict  # after parsing: --help and typing errors come at once

    predict(args)


if __name__ == "__main__":
    run_tool(main)
