"""List what models are built of, by the names that they are asked for: visionzoo parts [KIND] [FILTER]."""

import argparse
import re
from collections.abc import Mapping

from visionzoo.decoders.create import DECODERS
from visionzoo.engine import UserError
from visionzoo.engine.errors import closest
from visionzoo.layers.gates import GATES
from visionzoo.layers.mixers import MIXERS
from visionzoo.layers.reducers import REDUCERS
from visionzoo.models._heads import HEADS
from visionzoo.text import count_of

KINDS: dict[str, tuple[Mapping[str, type], str]] = {  # with how one is asked for
    "mixers": (MIXERS, "--model-kwargs mixers=NAME, or timm.create_model('zoo_...', mixers=NAME)"),
    "gates": (GATES, "--model-kwargs gates=NAME, or timm.create_model('zoo_...', gates=NAME)"),
    "reducers": (REDUCERS, "--model-kwargs reduce=NAME, or timm.create_model('zoo_...', reduce=NAME)"),
    "heads": (HEADS, "--model-kwargs head=NAME, or timm.create_model('zoo_...', head=NAME)"),
    "decoders": (DECODERS, "visionzoo.create_segmentor('zoo_...', decoder=NAME, num_classes=N)"),
}


def about(part: type) -> str:
    """Return the first sentence of a class's docstring, on one line."""
    text = " ".join((part.__doc__ or "").split("\n\n")[0].split())
    return re.split(r"(?<=\.)\s", text)[0]


def main() -> None:
    """Parse, list."""
    parser = argparse.ArgumentParser(description="List what models are built of, by the names of --model-kwargs.")
    parser.add_argument("kind", nargs="?", metavar="KIND", help=f"only these: {', '.join(KINDS)}")
    parser.add_argument("filter", nargs="?", default="", help="part of their names")
    args = parser.parse_args()
    if args.kind is not None and args.kind not in KINDS:
        raise UserError(
            f"expected one of {', '.join(KINDS)}, and then a part of a name (visionzoo parts mixers {args.kind}), got "
            f"{args.kind!r}{closest(args.kind, KINDS)}"
        )
    kinds = [args.kind] if args.kind else list(KINDS)
    found = {kind: {name: part for name, part in KINDS[kind][0].items() if args.filter in name} for kind in kinds}
    if args.kind and not found[args.kind]:
        raise UserError(
            f"no name of {count_of(len(KINDS[args.kind][0]), args.kind.removesuffix('s'))} holds {args.filter!r}"
            f"{closest(args.filter, KINDS[args.kind][0])}"
        )
    for kind, parts in found.items():
        print(f"{count_of(len(parts), kind.removesuffix('s'))}: {KINDS[kind][1]}")
        width = max(map(len, parts)) + 2
        for name in sorted(parts):
            print(f"  {name:{width}}{about(parts[name])}")
