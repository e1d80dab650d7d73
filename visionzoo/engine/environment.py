"""Where a run takes place: versions, hardware and git state, for its record."""

import contextlib
import platform
import subprocess
import sys
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

from visionzoo._version import __version__

PACKAGES = ("torchvision", "timm", "triton", "numpy", "pillow")


def environment(device: torch.device) -> dict[str, Any]:
    """Return command, versions, device and the state of the source, for the run folder."""
    versions = {"python": platform.python_version(), "visionzoo": __version__, "torch": str(torch.__version__)}
    for name in PACKAGES:
        with contextlib.suppress(PackageNotFoundError):
            versions[name] = version(name)
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else platform.processor() or platform.machine()
    return {
        "command": sys.argv,
        "device": name,
        "versions": versions,
        "cuda": torch.version.cuda,
        "git": git_state(Path(__file__).parent),
    }


def git_state(folder: Path) -> dict[str, Any] | None:
    """Return commit and changed files of the checkout that a folder belongs to; None where it belongs to none."""

    def ask(*words: str) -> str:
        command = ["git", "-C", str(folder), *words]
        return subprocess.run(command, capture_output=True, text=True, check=True, timeout=30).stdout

    try:
        if not ask("ls-files", "."):  # an environment within a checkout, say, is no part of it
            return None
        return {"commit": ask("rev-parse", "HEAD").strip(), "changed": ask("status", "--porcelain").splitlines()[:50]}
    except (OSError, subprocess.SubprocessError):
        return None
