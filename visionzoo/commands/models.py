"""List the models with what is published of them: visionzoo models [FILTER] [--weights] [--write FILE]."""

import argparse
import fnmatch
from pathlib import Path

import timm
import torch

import visionzoo
from visionzoo.engine import UserError
from visionzoo.engine.errors import closest
from visionzoo.engine.reporting import write_between
from visionzoo.models import _registry
from visionzoo.text import count_of, markdown_table

BEGIN = "<!-- table of models: written by `make table`, from the registry -->"
END = "<!-- end of the table of models -->"
HEADER = ("Model", "Params (M)", "GMACs", "Input", "Top-1 (%)", "Weights", "License", "Source of the numbers")


def rows(pattern: str = "*", only_weights: bool = False) -> list[tuple[str, ...]]:
    """One row a model: parameters as counted, the rest as published (— where nothing is)."""
    table: list[tuple[str, ...]] = []
    for name in sorted(_registry.VARIANTS, key=list(_registry.VARIANTS).index):
        cfg, published = timm.get_pretrained_cfg(name, allow_unregistered=False), _registry.VARIANTS[name].published
        assert cfg is not None
        if not fnmatch.fnmatch(name, pattern) or (only_weights and not cfg.has_weights):
            continue
        with torch.device("meta"):
            parameters = sum(p.numel() for p in timm.create_model(name).parameters())
        table.append(
            (
                f"`{name}`",
                f"{parameters / 1e6:.1f}",
                _number(published.gmacs),
                f"{published.size}²",
                _number(published.top1),
                f"`{cfg.tag}`" if cfg.has_weights else "—",
                str(cfg.license),
                published.source or "—",
            )
        )
    return table


def markdown(table: list[tuple[str, ...]]) -> str:
    """Lay the rows out as a Markdown table."""
    return markdown_table(HEADER, table)


def _number(value: float | None) -> str:
    return "—" if value is None else f"{value:g}"


def main() -> None:
    """Parse, list."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("filter", nargs="?", default="*", help="part of names, or a pattern such as 'zoo_davit_*'")
    parser.add_argument("--weights", action="store_true", help="only models with public weights")
    parser.add_argument("--write", type=Path, metavar="FILE", help="put the whole table into this Markdown file")
    args = parser.parse_args()
    if args.write and not args.write.is_file():
        raise UserError(f"no file at {args.write}: expected a Markdown file with the two lines that hold the table")
    if args.write and (args.weights or args.filter != "*"):
        raise UserError("--write puts the whole table into the file: leave the filter and --weights out")
    whole = args.filter in _registry.VARIANTS or any(sign in args.filter for sign in "*?[")
    table = rows(args.filter if whole else f"*{args.filter}*", args.weights)
    if not table:
        raise UserError(
            f"no model matches {args.filter!r}{' with weights' if args.weights else ''} (of {len(_registry.VARIANTS)})"
            f"{closest(args.filter, _registry.VARIANTS)}"
        )
    if args.write:
        write_between(args.write, BEGIN, END, markdown(table))
    else:
        print(markdown(table))
        print(f"\n{count_of(len(table), 'model')}, visionzoo {visionzoo.__version__}")
