"""What commits, releases and the forge are held to."""

import re
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

import visionzoo

ROOT = Path(__file__).parents[1]
CHECK = ROOT / "tests/check_subject.py"


@pytest.mark.parametrize(
    ("message", "code"),
    [
        ("Windows of odd maps are padded\n\nA body of any length: " + "x" * 100, 0),
        ("é" * 72, 0),  # characters, not bytes
        ("# a comment of git's that is longer than 72 characters, which do not count here\nShort", 0),
        ("x" * 73, 1),
        ("", 1),
    ],
)
def test_subjects_of_commits_have_at_most_72_characters(tmp_path, message, code):
    (tmp_path / "message").write_text(message, encoding="utf-8")
    done = subprocess.run([sys.executable, CHECK, tmp_path / "message"], capture_output=True, text=True)
    assert done.returncode == code and ("expected 1 to 72" in done.stdout) == bool(code)


def test_version_citation_and_changelog_agree():
    version = visionzoo.__version__.removesuffix(".dev0")
    assert yaml.safe_load((ROOT / "CITATION.cff").read_text())["version"] == version
    sections = re.findall(r"^## (.*)$", (ROOT / "CHANGELOG.md").read_text(encoding="utf-8"), re.M)
    assert sections[0] == "Unreleased"
    assert visionzoo.__version__.endswith(".dev0") or sections[1].startswith(f"{version} (")


def test_files_of_the_forge_are_yaml_and_run_what_the_makefile_runs():
    for path in (ROOT / ".github").rglob("*.yml"):
        assert yaml.safe_load(path.read_text(encoding="utf-8"))
    jobs = yaml.safe_load((ROOT / ".github/workflows/ci.yml").read_text())["jobs"]
    assert jobs.keys() == {"lint", "types", "tests", "docs", "wheel"}
    commands = "\n".join(step.get("run", "") for job in jobs.values() for step in job["steps"])
    for command in ("ruff check", "ruff format --check", "mypy", "mkdocs build", "pytest -n auto", "python -m build"):
        assert command in commands


def test_makefile_targets_are_documented():
    text = (ROOT / "Makefile").read_text(encoding="utf-8")
    (targets,) = re.findall(r"^\.PHONY: (.*)$", text, re.M)
    guide = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
    for target in targets.split():
        assert re.search(rf"^{target}[: ].*|^demo-detection demo-segmentation:", text, re.M)
        assert re.search(rf"`(make )?{target}`|make {target}\b", guide), target
