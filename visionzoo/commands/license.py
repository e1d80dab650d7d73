"""Show whose code and weights a model is made of: visionzoo license [MODEL...]."""

import argparse

from visionzoo.engine import UserError


def main() -> None:
    """Parse, print."""
    parser = argparse.ArgumentParser(description="Licenses of a model's code and weights.")
    parser.add_argument("models", nargs="*", metavar="MODEL", help="names, of timm's models too (default: all zoo_*)")
    args = parser.parse_args()
    from visionzoo.models._licenses import describe
    from visionzoo.models._registry import VARIANTS

    try:
        print("\n".join(describe(name) for name in args.models or VARIANTS))
    except ValueError as error:
        raise UserError(str(error)) from error
