"""Counts in messages: 1 image, 2 images."""

import ast
import re
from pathlib import Path

import pytest

from visionzoo.text import count_of

ROOT = Path(__file__).parents[1]
ROOMS = ("benchmark", "commands", "data", "deploy", "engine", "explanation", "openmmlab")


@pytest.mark.parametrize(
    ("number", "words", "expected"),
    [
        (1, ("epoch",), "1 epoch"),
        (1.0, ("epoch",), "1.0 epoch"),
        (0, ("box",), "0 boxes"),
        (2, ("class",), "2 classes"),
        (15, ("epoch",), "15 epochs"),
        (1, ("image was", "images were"), "1 image was"),
        (3, ("image was", "images were"), "3 images were"),
    ],
)
def test_one_is_singular(number, words, expected):
    assert count_of(number, *words) == expected


def counts_by_hand(code):
    """Yield f-strings' parts such as `{len(images)} images`, whose noun is the same for one."""
    for node in ast.walk(ast.parse(code)):
        if isinstance(node, ast.JoinedStr):
            for value, text in zip(node.values, node.values[1:], strict=False):
                if isinstance(value, ast.FormattedValue) and isinstance(text, ast.Constant):
                    counts = isinstance(value.value, ast.Call) and getattr(value.value.func, "id", "") == "len"
                    if counts and (noun := re.match(r"(?: [a-z]+)?? [a-z]{2,}[^s\W]s\b", text.value)):
                        yield f"line {value.lineno}: {ast.unparse(value.value)}{noun[0]}"


@pytest.mark.parametrize("room", ROOMS)
def test_counts_are_made_by_count_of(room):
    paths = sorted((ROOT / "visionzoo" / room).rglob("*.py"))
    assert paths
    assert [(path.name, hit) for path in paths for hit in counts_by_hand(path.read_text(encoding="utf-8"))] == []


def test_counts_by_hand_are_found():
    code = "f'{len(a)} images; {len(b)} bad images {len(c)} of {len(d)} {what}'"
    assert list(counts_by_hand(code)) == ["line 1: len(a) images", "line 1: len(b) bad images"]
