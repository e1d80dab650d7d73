"""The words that CONTRIBUTING lists are not in comments, docstrings, messages and pages."""

import io
import re
import tokenize
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PLACES = ("visionzoo", "tools", "configs", "docs", "visionzoo_cli.py", "README.md", "CONTRIBUTING.md")
NAMES = r"```.*?```|`[^`]*`|\{[^{}]*\}|https?://\S+"  # code, names and addresses: what they hold stays as it is
LISTED = "## Words"


def listed():
    """Return the words of the first column of the table in CONTRIBUTING as one pattern."""
    section = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8").split(LISTED)[1].split("\n## ")[0]
    rows = [line.split("|")[1] for line in section.splitlines() if line.startswith("| ")]
    words = [word.strip() for row in rows[2:] for word in row.split(",")]
    return re.compile(
        "|".join(rf"\b{re.escape(w.rstrip('…'))}" + (r"\w*" if w.endswith("…") else r"\b") for w in words), re.I
    )


def prose(path):
    """Yield lines and texts: of Python comments and strings but doctests and names of arguments; else the whole."""
    text = path.read_text(encoding="utf-8")
    if path.suffix == ".py":
        for token in tokenize.generate_tokens(io.StringIO(text).readline):
            kind = tokenize.tok_name[token.type]
            if kind == "COMMENT" or (kind in ("STRING", "FSTRING_MIDDLE") and " " in token.string):
                yield token.start[0], re.sub(r"^ *(>>>.*$|\.\.\. .*$|[a-z_]+:)", "", token.string, flags=re.M)
    else:
        yield 1, text.split(LISTED)[0] if path.name == "CONTRIBUTING.md" else text


def found(path, words):
    for line, text in prose(path):
        without_names = re.sub(NAMES, lambda name: "\n" * name[0].count("\n"), text, flags=re.S)
        for match in words.finditer(without_names):
            yield f"{path.name}:{line + without_names[: match.start()].count(chr(10))}: {match[0]}"


@pytest.mark.parametrize("place", PLACES)
def test_no_listed_word_is_used(place):
    words, top = listed(), ROOT / place
    paths = (
        [top] if top.is_file() else [path for path in sorted(top.rglob("*")) if path.suffix in (".py", ".md", ".yaml")]
    )
    assert paths
    assert [hit for path in paths for hit in found(path, words)] == []


def test_listed_words_are_found(tmp_path):
    page, code = tmp_path / "page.md", tmp_path / "code.py"
    page.write_text("As said,\nin the place of `colour` the Colours\n```\nlicence\n```\nMIT licences\n")
    expected = ["page.md:1: said", "page.md:2: in the place of", "page.md:2: Colours", "page.md:6: licences"]
    assert list(found(page, listed())) == expected
    lines = ['colour = "licence"  # the map alone', 'f"""{said}', "    >>> mend(1)", "    told: is mended", '"""', ""]
    code.write_text("\n".join(lines))
    assert list(found(code, listed())) == ["code.py:1: alone", "code.py:4: mended"]
