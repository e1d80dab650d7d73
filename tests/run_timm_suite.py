"""Run timm's own model tests, those of the installed release, over every zoo_* model.

    python tests/run_timm_suite.py [--archive timm-VERSION.tar.gz] [pytest arguments]

The release's source archive holds the tests and is downloaded by pip unless it is given. TorchScript and downloads are
left out. With pytest-xdist: `-n 16`.
"""

import argparse
import re
import subprocess
import sys
import tarfile
import tempfile
from pathlib import Path

import timm
from quick import meta_model

import visionzoo
from visionzoo.models._registry import FAMILIES

LEFT_OUT = "zoo_ and not torchscript and not pretrained"


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
    others = "".join(f"{name!r}, " for name in timm.list_models("zoo_*") if meta_model(name).HEAD_INPUT != "NCHW")
    text, put = re.subn(r"^NON_STD_FILTERS = \[", f"NON_STD_FILTERS = [{others}", text, count=1, flags=re.M)
    if not imported or not listed or not put:
        raise SystemExit(f"the tests of {source} have changed: this script no longer knows where to put our models")
    (folder / "test_models.py").write_text(text)
    (folder / "pytest.ini").write_text("[pytest]\naddopts = -p no:cacheprovider\n")
    print(f"{source}, visionzoo {visionzoo.__version__}: {folder}")
    return subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "test_models.py", "-k", LEFT_OUT, *for_pytest], cwd=folder, check=False
    ).returncode


if __name__ == "__main__":
    sys.exit(main())
