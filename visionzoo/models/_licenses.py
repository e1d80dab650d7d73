"""Whose weights may be used for what: each model's licenses, and a stop before non-commercial ones."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any

import timm

CODE = "apache-2.0"  # of all code in this project; the authors' own code is not part of it


@dataclass(frozen=True)
class Weights:
    """One set of published weights of a model."""

    name: str  # as timm.create_model takes it
    license: str
    origin: str  # where they are from

    @property
    def non_commercial(self) -> bool:
        """Whether the license forbids commercial use."""
        return is_non_commercial(self.license)


def is_non_commercial(license: str | None) -> bool:
    """Whether a license's name says that it forbids commercial use.

    >>> is_non_commercial("cc-by-nc-4.0"), is_non_commercial("mit")
    (True, False)
    """
    return bool(re.search(r"(^|[-_ ])nc([-_ ]|$)|non-?commercial|research-only", (license or "").lower()))


def weights_of(model: str) -> list[Weights]:
    """Return all published weights of a model of timm's registry, zoo_* included, the default ones first.

    Raises:
        ValueError: there is no such model.
    """
    name = model.split(".")[0]
    if not timm.is_model(name):
        raise ValueError(f"unknown model {model!r}; `visionzoo models` lists those of the zoo")
    tagged = [full for full in timm.list_pretrained(f"{name}*") if full.split(".")[0] == name]
    found = []
    for full in [model] if model != name else sorted(tagged, key=lambda full: full != _default(name)):
        cfg: Any = timm.get_pretrained_cfg(full)
        if cfg is not None and cfg.has_weights:
            hub = f"https://huggingface.co/{cfg.hf_hub_id}" if cfg.hf_hub_id else ""
            found.append(Weights(full, cfg.license or "unknown", hub or cfg.url or cfg.file or ""))
    return found


def _default(name: str) -> str:
    cfg: Any = timm.get_pretrained_cfg(name)
    return f"{name}.{cfg.tag}" if cfg and cfg.tag else name


def describe(model: str) -> str:
    """Return the licenses of a model's code and weights in a few lines.

    Raises:
        ValueError: there is no such model.
    """
    weights = weights_of(model)
    cfg: Any = timm.get_pretrained_cfg(model)
    lines = [model]
    if model.startswith("zoo_"):
        lines.append(f"  code: {CODE}, visionzoo's own; the authors' is at {cfg.origin_url} ({cfg.license})")
    else:
        lines.append("  code: apache-2.0, timm's")
    for one in weights:
        use = "; non-commercial use only: asks for --non-commercial" if one.non_commercial else ""
        lines.append(f"  weights {one.name}: {one.license}, from {one.origin}{use}")
    if not weights:
        lines.append("  weights: none are published")
    return "\n".join(lines)


class NonCommercialError(RuntimeError):
    """Weights that forbid commercial use were asked for without saying that it is none."""


def check(model: str, license: str | None, *, accepted: bool) -> None:
    """Stop before weights that forbid commercial use, unless that is `accepted`.

    Raises:
        NonCommercialError: it is not.
    """
    if is_non_commercial(license) and not accepted:
        raise NonCommercialError(
            f"the weights of {model} are licensed {license}, which forbids commercial use; for other use pass "
            f"--non-commercial on the command line, non_commercial=True to timm.create_model"
        )
