"""Train models alike and compare them: python tools/compare.py CONFIG --models NAME NAME ... [flags]."""

import signal

if __name__ == "__main__":  # Ctrl-C during the imports, which take seconds, is no traceback; run_tool takes over
    signal.signal(signal.SIGINT, signal.SIG_DFL)

from visionzoo.engine import run_tool


def main() -> None:
    """Parse, build, run."""
    from visionzoo.engine.flags import compare_parser

    args = compare_parser().parse_with_config()
    from visionzoo.benchmark.comparison import compare  # after parsing: --help and typing errors come at once

    compare(args)


if __name__ == "__main__":
    run_tool(main)
