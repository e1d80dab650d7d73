"""docs/mixers.md is what the classes say; `python -m visionzoo.benchmark.gallery --write docs/mixers.md` writes it."""

import re
from pathlib import Path

import pytest

from visionzoo.benchmark import gallery
from visionzoo.engine.reporting import insert_between
from visionzoo.layers.mixers import MIXERS

PAGE = Path(__file__).parents[2] / "docs/mixers.md"


def test_every_mixer_has_its_mathematics_and_use():
    assert sorted(gallery.ABOUT) == sorted(MIXERS)
    assert len({gallery.mathematics(mixer)[0] for mixer in MIXERS.values()}) == len(MIXERS)
    with pytest.raises(ValueError, match="int: expected a docstring with an indented line of mathematics"):
        gallery.mathematics(int)


def test_the_page_is_what_the_classes_say():
    text = PAGE.read_text(encoding="utf-8")
    assert insert_between(text, gallery.BEGIN, gallery.END, gallery.gallery()) == text
    assert "<!-- cifar10_mixers: written by tools/compare.py -->" in text


@pytest.mark.parametrize("name", MIXERS)
def test_an_entry_has_cost_paper_and_what_the_mixer_takes(name):
    entry = gallery._entry(name, [])
    assert re.search(r"\n\n    y.* = .*\n\n- Time: O\(N.*\n- Memory: O\(", entry)
    assert "- When: " in entry
    assert re.search(r"^- Papers?( of its forms)?: \[arXiv:\d{4}\.\d{5}\]\(https://arxiv.org/abs/", entry, re.MULTILINE)
