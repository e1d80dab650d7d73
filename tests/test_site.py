"""Pages that are made at the build of the site, without building it; `make docs` builds it strictly."""

import csv
from pathlib import Path

import generate
import pytest
from parity_table import MODELS

from visionzoo.models._registry import FAMILIES, VARIANTS

DOCS = Path(__file__).parents[1] / "docs"


@pytest.mark.parametrize("family", FAMILIES)
def test_a_familys_page_has_its_source_models_recipes_and_arguments(family):
    page = generate.family_page(family)
    for name in FAMILIES[family]:
        assert f"\n| `{name}` |" in page
        assert not VARIANTS[name].no_weights or f"- `{name}`: " in page
    assert "\n## Recipes\n\n- " in page
    assert f"::: visionzoo.models.{family}." in page
    assert "github.com" in page.split("\n## Models\n")[0] or "no code" in page.lower()


def test_davits_page_has_what_was_measured():
    page = generate.family_page("davit")
    assert (
        "| `davit_tiny` | `zoo_davit_t` | [dingmyu/davit](https://github.com/dingmyu/davit) at `fc79470d99ba` |" in page
    )
    assert "\n| `zoo_davit_t` | eager | visionzoo | 256x3x224x224 | bfloat16 |" in page
    assert "\n| `zoo_davit_t` | ONNX | 224x224 | batch | " in page
    assert "`mask-rcnn_zoo-davit-t_fpn_ms-crop-3x_coco`. Mask R-CNN 3x, DaViT-T. Not run here." in page


def test_text_of_docstrings_is_no_markup_outside_of_code_and_addresses():
    text = "x[0] and `a[0]` at https://a.b/c_d_e, *as* <said>"
    assert generate._prose(text) == r"x\[0\] and `a[0]` at <https://a.b/c_d_e>, \*as\* \<said\>"


def test_measured_parity_is_of_records_and_within_bounds():
    with (DOCS / "parity.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert len(rows) > 100
    for row in rows:
        assert MODELS[row["record"]] == row["model"]
        assert 0 <= float(row["error"]) <= float(row["allowed"]) == 1e-9


def test_doctests_are_shown_as_examples():
    pytest.importorskip("griffe", reason='needs pip install "visionzoo[docs]"')
    from doctests import as_examples

    text = "Double.\n\nRaises:\n    ValueError: never.\n\n>>> double(1)\n2\n>>> double(\n...     2\n... )\n4"
    assert as_examples(text).split("\n\n")[-1] == (
        "Examples:\n    >>> double(1)\n    2\n    >>> double(\n    ...     2\n    ... )\n    4"
    )
