"""Doctests of visionzoo/openmmlab need its extra; where that is missing, tests/openmmlab reports it as skipped."""

from importlib.util import find_spec

collect_ignore_glob = [] if find_spec("mmengine") else ["visionzoo/openmmlab/*"]
