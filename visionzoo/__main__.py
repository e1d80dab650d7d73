"""The command `visionzoo`, also `python -m visionzoo`: whose code and weights a model is made of.

visionzoo licence zoo_davit_t zoo_nat_mini
visionzoo licence              # all of the zoo
"""

import argparse
import sys

from visionzoo._version import __version__


def main() -> None:
    """Parse, print."""
    parser = argparse.ArgumentParser("visionzoo", description="What visionzoo knows of its models.")
    parser.add_argument("--version", action="version", version=__version__)
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    about = "licences of code and weights"
    licence = commands.add_parser("licence", aliases=["license"], help=about, description=about)
    licence.add_argument("models", nargs="*", metavar="MODEL", help="names, of timm's models too (default: all zoo_*)")
    args = parser.parse_args()

    from visionzoo.models._licenses import describe  # after parsing, so that --help comes at once
    from visionzoo.models._registry import VARIANTS

    try:
        print("\n".join(describe(name) for name in args.models or VARIANTS))
    except ValueError as error:
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    main()
