"""`import visionzoo` registers everything and brings nothing heavy along."""

import json
import subprocess
import sys
from pathlib import Path

KERNELS = Path(__file__).parents[1] / "visionzoo/kernels"
OPTIONAL = ("triton", "matplotlib", "sklearn", "tensorboard", "wandb", "pandas", "mmcv", "mmengine", "mmdet", "mmseg")


def _python(code: str):
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


def test_nothing_heavy_is_imported_beyond_timm():
    code = (
        "import json, sys, timm; before = set(sys.modules); import visionzoo\n"
        "print(json.dumps(sorted({name.split('.')[0] for name in set(sys.modules) - before})))"
    )
    assert not set(_python(code)) & set(OPTIONAL)


WITHOUT_REST = f"""
import json, pkgutil, sys
sys.modules.update(dict.fromkeys({OPTIONAL!r}))
import timm, torch, visionzoo

models = [timm.create_model(name, num_classes=3).eval() for name in ("zoo_biformer_t", "zoo_davit_t")]
shapes = [list(model(torch.zeros(1, 3, 64, 64)).shape) for model in models]
missing = {{}}
for found in pkgutil.walk_packages(visionzoo.__path__, "visionzoo."):
    try:
        __import__(found.name)
    except ModuleNotFoundError as error:
        missing[found.name] = error.name
print(json.dumps([shapes, visionzoo.backends(), missing]))
"""


def test_models_run_and_modules_import_without_triton_and_the_rest():
    shapes, backends, missing = _python(WITHOUT_REST)
    assert shapes == [[1, 3]] * 2
    assert backends and set(backends.values()) == {"reference (the package triton is not installed)"}
    missing = {name: module for name, module in missing.items() if not name.startswith("visionzoo.openmmlab")}
    assert set(missing.values()) == {"triton"}
    kernels = {f"visionzoo.kernels.{path.parent.name}.triton" for path in KERNELS.glob("*/triton.py")}
    assert set(missing) == {*kernels, "visionzoo.kernels.online_softmax", "visionzoo.benchmark.empty_kernel"}
