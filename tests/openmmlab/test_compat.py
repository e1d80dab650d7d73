"""What is changed in OpenMMLab's libraries: everything that is listed, once, and nothing that is no longer there."""

import logging
import re
import sys
import warnings
from pathlib import Path
from types import ModuleType

import pytest

pytest.importorskip("mmdet", reason='needs pip install "visionzoo[openmmlab]"')

import mmengine.logging
import mmengine.runner.checkpoint as mmengine_checkpoint
from mmengine.config import Config

from visionzoo.openmmlab import _compat, checkpoints


def test_every_patch_is_made_and_names_its_release_and_reason():
    assert mmengine_checkpoint._safe_torch_load is checkpoints.read
    assert mmengine_checkpoint.load_url is checkpoints.download
    assert (
        Config._get_base_files
        and "mmseg" in Config._get_cfg_path("mmseg::upernet/upernet_r50_4xb4-80k_ade20k-512x512.py", "x.py")[0]
    )
    assert all(patch.library and patch.what and patch.reason for patch in _compat.PATCHES)


def test_a_second_installation_changes_nothing():
    finders = list(sys.meta_path)
    _compat.install()
    assert sys.meta_path == finders and mmengine_checkpoint.load_url is checkpoints.download


def test_a_library_without_what_a_patch_replaces_is_refused(monkeypatch):
    monkeypatch.setattr(_compat, "mmengine_checkpoint", ModuleType("mmengine.runner.checkpoint"))
    with pytest.raises(RuntimeError, match=r"replaces mmengine\.runner\.checkpoint\._safe_torch_load, which this"):
        _compat.install()


def test_without_a_logger_only_what_is_for_debugging_is_not_printed(capsys):
    mmengine.logging.print_log("a page of details", level=logging.DEBUG)
    mmengine.logging.print_log("news")
    mmengine.logging.print_log("trouble", level=logging.WARNING)
    assert capsys.readouterr().out == "news\ntrouble\n"


def test_the_documentation_lists_every_patch():
    page = (Path(__file__).parents[2] / "docs/api/openmmlab.md").read_text(encoding="utf-8")
    rows = [line for line in page.splitlines() if line.startswith("| mm")]
    assert len(rows) == len(_compat.PATCHES)
    for row, patch in zip(rows, _compat.PATCHES, strict=True):
        assert re.search(r"`([^`]+)`", patch.what)[1] in row
        assert row.startswith(f"| {' '.join(patch.library.split()[:2])} |".replace(",", ""))


def test_releases_that_were_not_checked_are_named_once(monkeypatch):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        _compat._warn_of_untested.__wrapped__()  # the installed ones
    releases = {"onedl-mmengine": "0.11.0", "onedl-mmdetection": "3.50.0"}
    real = _compat.version
    monkeypatch.setattr(_compat, "version", lambda name: releases.get(name) or real(name))
    _compat._warn_of_untested.cache_clear()
    with pytest.warns(UserWarning, match=r"mmengine 0\.11\.0 \(checked: 0\.10\), mmdet 3\.50\.0 \(checked: 3\.5\); "):
        _compat.install()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        _compat.install()
