"""The wheel, unpacked into a folder: what it holds, and a command that runs from it, outside the checkout."""

import json
import os
import re
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
import timm
import torch
from PIL import Image

ROOT = Path(__file__).parents[1]
SOURCES = ("pyproject.toml", "setup.py", "README.md", "LICENSE", "NOTICE", "visionzoo_cli.py", "visionzoo", "configs")
BUILD = "import sys; from setuptools.build_meta import build_wheel; build_wheel(sys.argv[1])"


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    """A built wheel, unpacked as installers do it; building leaves nothing in the checkout."""
    source, out = tmp_path_factory.mktemp("source"), tmp_path_factory.mktemp("wheel")
    for name in SOURCES:
        if (ROOT / name).is_dir():
            shutil.copytree(ROOT / name, source / name, ignore=shutil.ignore_patterns("__pycache__"))
        else:
            shutil.copy(ROOT / name, source)
    done = subprocess.run([sys.executable, "-c", BUILD, str(out)], cwd=source, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    (path,) = out.glob("*.whl")
    zipfile.ZipFile(path).extractall(out / "site")
    return out / "site"


def files(folder):
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_the_wheel_holds_every_module_every_config_and_the_licenses(wheel):
    for name in ("visionzoo", "configs"):
        expected = {path: content for path, content in files(ROOT / name).items() if "__pycache__" not in path}
        found = files(wheel / "visionzoo" / ("" if name == "visionzoo" else name))
        if name == "visionzoo":
            found = {path: content for path, content in found.items() if not path.startswith("configs/")}
        assert found == expected
    (info,) = wheel.glob("*.dist-info")
    assert {path.name for path in (info / "licenses").iterdir()} == {"LICENSE", "NOTICE"}
    assert "visionzoo = visionzoo_cli:main" in (info / "entry_points.txt").read_text()
    lines = (info / "METADATA").read_text().splitlines()
    needed = [line for line in lines if line.startswith("Requires-Dist") and "extra ==" not in line]
    assert [re.split(r"\W+", line)[2] for line in needed] == ["torch", "torchvision", "timm", "safetensors"]


def test_a_command_of_the_wheel_runs_outside_the_checkout(wheel, tmp_path):
    Image.new("RGB", (40, 40), (220, 30, 30)).save(tmp_path / "photo.png")
    torch.save(timm.create_model("test_convnext").state_dict(), tmp_path / "w.pth")
    argv = ["predict", "photo.png", "--model", "test_convnext", "--checkpoint", "w.pth", "--device", "cpu"]
    code = (
        "import sys, visionzoo_cli; visionzoo_cli.main()\n"
        "import visionzoo; from visionzoo.engine.configs import find_config\n"
        "print(visionzoo.__file__, find_config('digits_biformer'), sep='\\n')"
    )
    environment = {**os.environ, "PYTHONPATH": str(wheel)}
    command = [sys.executable, "-c", code, *argv, "--output", "out", "--topk", "1"]
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    package = wheel / "visionzoo"
    assert done.stdout.splitlines()[-2:] == [
        str(package / "__init__.py"),
        str(package / "configs/classification/digits_biformer.yaml"),
    ]
    (line,) = (tmp_path / "out/predictions.jsonl").read_text().splitlines()
    assert len(json.loads(line)["classes"]) == 1


@pytest.mark.parametrize("task", ["detection", "segmentation"])
def test_a_config_of_the_wheel_finds_its_bases(wheel, task):
    pytest.importorskip("mmdet", reason='needs pip install "visionzoo[openmmlab]"')
    from visionzoo.openmmlab.running import read_config

    for name in sorted(path.name for path in (ROOT / "configs" / task).glob("*_digits.py")):
        shipped = read_config(str(wheel / "visionzoo/configs" / task / name))
        assert shipped.to_dict() == read_config(str(ROOT / "configs" / task / name)).to_dict()
