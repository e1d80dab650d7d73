"""List the configs that visionzoo ships, by name: visionzoo configs [FILTER] [--paths]."""

import argparse

from visionzoo.engine import UserError
from visionzoo.engine.configs import shipped_configs
from visionzoo.engine.errors import closest


def main() -> None:
    """Parse, list."""
    parser = argparse.ArgumentParser(description="List the configs that commands find by name.")
    parser.add_argument("filter", nargs="?", default="", help="part of names, or of tasks such as `detection`")
    parser.add_argument("--paths", action="store_true", help="print their files instead, to read or to copy")
    args = parser.parse_args()
    shipped = shipped_configs()
    lines = [
        str(path) if args.paths else f"{path.parent.name}  {name}"
        for name, path in shipped.items()
        if args.filter in name or args.filter in path.parent.name
    ]
    if not lines:
        near = closest(args.filter, shipped)
        raise UserError(f"no config's name holds {args.filter!r} (of {len(shipped)}){near}")
    print("\n".join(lines))
