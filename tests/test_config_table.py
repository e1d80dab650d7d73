"""The configs of detection and segmentation are those that their table makes."""

import ast

import make_configs
import yaml

BY_HAND = {
    "eco-mask2former_zoo-biformer_digits.py",
    "mask-rcnn_zoo-biformer_fpn_digits.py",
    "semantic-fpn_zoo-biformer_digits.py",
}

TABLE = yaml.safe_load(make_configs.TABLE.read_text(encoding="utf-8"))


def test_files_are_what_the_table_makes():
    """In what Python reads; their layout is ruff's, which `make check` compares."""
    made = dict(make_configs.made_configs(TABLE))
    folders = [make_configs.CONFIGS / name for name in ("detection", "segmentation")]
    there = {path.relative_to(make_configs.CONFIGS) for folder in folders for path in folder.glob("*.py")}
    assert {path for path in there if path.name not in BY_HAND} == set(made)
    for path, text in made.items():
        found = ast.parse((make_configs.CONFIGS / path).read_text(encoding="utf-8"))
        assert ast.dump(found) == ast.dump(ast.parse(text)), f"{path} differs from configs/dense.yaml: make configs"


def test_no_line_of_the_table_is_made_twice_or_left_out():
    paths = [path for path, _ in make_configs.made_configs(TABLE)]
    assert len(paths) == len(set(paths))
    used = {name for entries in TABLE["entries"].values() for entry in entries for name in entry["sizes"]}
    assert used | {*TABLE["tiny"]["backbones"]} == set(TABLE["backbones"])
    assert {*TABLE["entries"], *TABLE["tiny"]["recipes"]} == set(TABLE["recipes"])
    keys = {key for entries in TABLE["entries"].values() for entry in entries for key in entry}
    assert keys == {"settings", "backbone", "parts", "before", "after", "amp", "gpus", "sizes"}
