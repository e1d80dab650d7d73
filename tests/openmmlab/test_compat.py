"""What is changed in OpenMMLab's libraries: everything that is listed, once, and nothing that is no longer there."""

import sys
from types import ModuleType

import pytest

pytest.importorskip("mmdet", reason='needs pip install "visionzoo[openmmlab]"')

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
