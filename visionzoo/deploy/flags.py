"""The command line of `visionzoo export` for classifiers; the words are those of timm's onnx_export.py."""

from __future__ import annotations

import argparse

from visionzoo.engine.flags import add_model_flags
from visionzoo.engine.options import Parser

FORMATS = ("pt2", "onnx", "aoti")


def add_export_flags(parser: argparse.ArgumentParser, formats: tuple[str, ...] = ("onnx", "pt2")) -> None:
    """Add what is written, and for which images; `formats` are the default."""
    add = parser.add_argument_group("export").add_argument
    add(
        "--format",
        nargs="+",
        choices=FORMATS,
        default=list(formats),
        help="onnx; pt2: exported program of torch; aoti: AOTInductor package, compiled for this machine "
        f"(default: {' '.join(formats)})",
    )
    add("--output", default="output/export", metavar="DIR", help="folder for the files (default: output/export)")
    add("--overwrite", action="store_true", help="replace files of another export under the same names")
    add("-b", "--batch-size", type=int, default=1, metavar="N", help="images of a batch with --static-batch")
    add("--static-batch", action="store_true", help="take only batches of --batch-size (default: of any number)")
    add("--dynamic-size", action="store_true", help="take any height and width, where the model can be exported so")
    add("--opset", type=int, metavar="N", help="version of ONNX's operators (default: torch's choice)")
    add("--no-fuse", action="store_true", help="leave batch norms as they are (default: fold them, visionzoo.fuse)")
    add("--device", default="cpu", help="that the program runs on; ONNX runs on any (default: cpu)")


def export_parser() -> Parser:
    """Return the parser of `visionzoo export`."""
    about = "Export a classifier to files that run without visionzoo, each checked against the model."
    parser = Parser("%(prog)s [CONFIG.py] [flags]", about)
    add_export_flags(parser)
    add_model_flags(parser, model=None)
    add = parser.add_argument_group("weights").add_argument
    add("--input-img-mode", metavar="MODE", help="PIL mode of the images, for the JSON (default: as in training)")
    add("--checkpoint", default="", metavar="FILE", help="weights; of a run of `visionzoo train`, the model too")
    add("--no-ema", action="store_true", help="use the trained weights, not their moving average")
    add("--random-weights", action="store_true", help="export without weights, to measure how fast it runs")
    add("--exit", default="", metavar="NAME", help="export what this early exit answers, without the parts after it")
    add = parser.add_argument_group("all models").add_argument
    add("--all", nargs="*", metavar="PATTERN", help="export every zoo_* model, or those like 'zoo_swin*', to a table")
    add("--results-csv", default="", metavar="FILE", help="table to add rows to; rows that it has are not done again")
    add("--write", default="", metavar="FILE", help="put the table into this Markdown file, between its marks")
    return parser
