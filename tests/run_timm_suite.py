"""Run timm's own model tests, those of the installed release, over every zoo_* model.

    python tests/run_timm_suite.py [--archive timm-VERSION.tar.gz] [pytest arguments]

The release's source archive holds the tests and is downloaded by pip unless it is given. TorchScript and downloads are
left out, and what `not_theirs` says, which is printed. With pytest-xdist: `-n 16`.
"""

import argparse
import re
import subprocess
import sys
import tarfile
import tempfile
from pathlib import Path
from typing import Any

import timm
from quick import meta_model

import visionzoo
from visionzoo.models._registry import FAMILIES
from visionzoo.text import some

LEFT_OUT = "zoo_ and not torchscript and not pretrained"


def not_theirs(model: Any) -> dict[str, tuple[str, ...]]:
    """Return the tests that ask of a model what it has not, by the reason."""
    features = "test_model_forward_intermediates[1-"
    pruned = "test_prune_intermediate_layers_contract["
    found = {
        "exits learn only where training asks for them": ("test_model_backward[2-", "test_model_backward_fx[2-")
        if model.EXITS
        else (),
        "the features before the head are several tensors": (features, pruned)
        if model.BRANCHES > 1 or "," in model.HEAD_INPUT
        else (),
        "there are fewer than three blocks": (features,) if model.num_parts < 3 else (),
        "torch.fx takes blocks as they are, and functions that they share stay outside": ("test_model_backward_fx[2-",)
        if any(getattr(module, "borrowed", ()) for module in model.modules())
        else (),
    }
    return {reason: tests for reason, tests in found.items() if tests}


def main() -> int:
    """Fetch the tests, make them import visionzoo, run them."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--archive", type=Path, help="source archive of the installed timm; downloaded by default")
    args, for_pytest = parser.parse_known_args()
    folder = Path(tempfile.mkdtemp(prefix="timm-suite-"))
    source = f"timm=={timm.__version__}"
    if args.archive is None:
        pip = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--no-binary", "timm", source]
        subprocess.run(pip, cwd=folder, check=True)
        args.archive = next(folder.glob("timm-*.tar.gz"))
    if args.archive.name != f"timm-{timm.__version__}.tar.gz":
        raise SystemExit(f"expected the source archive of the installed {source}, got {args.archive}")
    with tarfile.open(args.archive) as tar:
        member = tar.getmember(f"timm-{timm.__version__}/tests/test_models.py")
        text = tar.extractfile(member).read().decode()  # type: ignore[union-attr]
    families = ", ".join(repr(family) for family in FAMILIES)
    text, imported = re.subn(r"^import timm$", "import timm\nimport visionzoo", text, count=1, flags=re.M)
    text, listed = re.subn(r"^FEAT_INTER_FILTERS = \[", f"FEAT_INTER_FILTERS = [{families},", text, count=1, flags=re.M)
    # as timm's own models of tokens: what they give before the head is no map
    models = {name: meta_model(name) for name in timm.list_models("zoo_*")}
    others = "".join(f"{name!r}, " for name, model in models.items() if model.HEAD_INPUT != "NCHW")
    text, put = re.subn(r"^NON_STD_FILTERS = \[", f"NON_STD_FILTERS = [{others}", text, count=1, flags=re.M)
    if not imported or not listed or not put:
        raise SystemExit(f"the tests of {source} have changed: this script no longer knows where to put our models")
    (folder / "test_models.py").write_text(text)
    (folder / "pytest.ini").write_text("[pytest]\naddopts = -p no:cacheprovider\n")
    print(f"{source}, visionzoo {visionzoo.__version__}: {folder}")
    left_out: dict[str, list[str]] = {}
    for name, model in models.items():
        for reason, tests in not_theirs(model).items():
            left_out.setdefault(reason, []).extend(f"test_models.py::{test}{name}]" for test in tests)
    for reason, names in left_out.items():
        print(f"{len(names)} tests left out: {reason}: {some(names, 3)}")
    deselect = [f"--deselect={name}" for names in left_out.values() for name in names]
    run = [sys.executable, "-m", "pytest", "-q", "test_models.py", "-k", LEFT_OUT, *deselect, *for_pytest]
    return subprocess.run(run, cwd=folder, check=False).returncode


if __name__ == "__main__":
    sys.exit(main())
