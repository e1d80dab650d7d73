"""Train models alike and compare them: visionzoo compare CONFIG --models NAME NAME ... [flags]."""


def main() -> None:
    """Parse, build, run."""
    from visionzoo.engine.flags import compare_parser

    config = compare_parser().parse_with_config()
    from visionzoo.benchmark.comparison import compare  # after parsing: --help and typing errors come at once

    compare(config)
