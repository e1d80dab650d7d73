"""Measure how far models and mixers are from records of the authors' code: python tests/parity_table.py [--again].

Writes docs/parity.csv, a row a record: the largest relative error in float64 of a model's logits and features, of a
mixer's outputs and gradients, or of a segmentor's logits, maps and gradients. tests/models/test_parity.py,
tests/layers/test_mixer_records.py and tests/test_decoders.py bound them by `allowed`. Records with a row are left alone
unless --again is given; records that are gone lose their row.
"""

import argparse
import csv
import os
import sys
from pathlib import Path

import test_decoders as segmentors
import torch
from golden import Record, relative_error
from layers import test_mixer_records as mixers
from models import test_parity as models

from visionzoo.engine.errors import run_tool

TABLE = Path(__file__).parents[1] / "docs/parity.csv"
COLUMNS = ("record", "model", "source", "commit", "precision", "arrays", "error", "allowed", "torch")
KINDS = {name: kind for kind in (models, mixers, segmentors) for name in kind.MODELS}  # by record
MODELS = models.MODELS | mixers.MODELS | segmentors.MODELS  # record -> model


def measure(name: str) -> dict[str, str]:
    """Return the row of one record."""
    record, errors = Record(name), []
    for _, value, array in KINDS[name].compared(name):
        errors.append((relative_error(value, array), record.tolerance(array.dtype == "float32")))
    error, allowed = max(errors, key=lambda pair: pair[0] / pair[1])
    meta = record.meta
    return {
        "record": name,
        "model": MODELS[name],
        "source": meta["repository"],
        "commit": meta["commit"][:12],
        "precision": meta["dtype"],
        "arrays": str(len(errors)),
        "error": f"{error:.1e}",
        "allowed": f"{allowed:.1e}",
        "torch": torch.__version__,
    }


def read() -> dict[str, dict[str, str]]:
    """Return the rows that are there, by the record."""
    if not TABLE.exists():
        return {}
    with TABLE.open(newline="") as file:
        return {row["record"]: row for row in csv.DictReader(file)}


def main() -> None:
    """Measure what is missing, write after each."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--again", action="store_true", help="measure the records that have a row, too")
    again = parser.parse_args().again
    rows = {} if again else read()
    for name in sorted(MODELS):
        if name not in rows:
            rows[name] = measure(name)
            print(name, rows[name]["error"], file=sys.stderr)
        temporary = TABLE.with_suffix(".tmp")
        with temporary.open("w", newline="") as file:
            writer = csv.DictWriter(file, COLUMNS, lineterminator="\n")
            writer.writeheader()
            writer.writerows(rows[key] for key in sorted(rows) if key in MODELS)
        os.replace(temporary, TABLE)


if __name__ == "__main__":
    run_tool(main)
