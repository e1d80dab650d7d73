"""`import visionzoo` registers everything and brings nothing heavy along."""

import json
import subprocess
import sys

import pytest

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


@pytest.mark.parametrize("name", ["zoo_biformer_t", "zoo_davit_t"])
def test_models_run_without_triton_and_the_rest(name):
    code = (
        f"import sys; sys.modules.update(dict.fromkeys({OPTIONAL!r}))\n"
        "import json, timm, torch, visionzoo\n"
        f"model = timm.create_model({name!r}, num_classes=3).eval()\n"
        "print(json.dumps([list(model(torch.zeros(1, 3, 64, 64)).shape), visionzoo.backends()]))"
    )
    shape, backends = _python(code)
    assert shape == [1, 3]
    assert backends and all(value.startswith("reference (") for value in backends.values())
