"""The 1,797 handwritten digits of scikit-learn as an image folder.

Source: E. Alpaydin, C. Kaynak, "Optical Recognition of Handwritten Digits", UCI Machine Learning Repository, CC BY 4.0;
the 8x8 grey images that scikit-learn ships.
"""

import os
import shutil
import tempfile
from pathlib import Path

from PIL import Image

COUNT = 1797
HELD_OUT = 5  # every fifth image of each digit, in the order of the data set, is for validation


def digits_folder() -> Path:
    """Return the folder with `train/<digit>/*.png` (1,442 images) and `validation/<digit>/*.png` (355).

    It is written on first use, to $VISIONZOO_CACHE or ~/.cache/visionzoo; processes at once do not disturb each other.

    Raises:
        ModuleNotFoundError: scikit-learn is not installed.
        ValueError: the folder is there, but not complete.
    """
    cache = Path(os.environ.get("VISIONZOO_CACHE") or Path.home() / ".cache" / "visionzoo")
    folder = cache / "digits"
    if not folder.exists():
        cache.mkdir(parents=True, exist_ok=True)
        temporary = Path(tempfile.mkdtemp(prefix=".digits-", dir=cache))
        try:
            _write_digits(temporary)
            temporary.chmod(0o755)
            temporary.rename(folder)
        except OSError:
            if not folder.exists():  # else another process was first
                raise
        finally:
            shutil.rmtree(temporary, ignore_errors=True)
    found = sum(1 for _ in folder.glob("*/*/*.png"))
    if found != COUNT:
        raise ValueError(f"expected {COUNT} images in {folder}, {found=}; delete the folder and it is written again")
    return folder


def _write_digits(folder: Path) -> None:
    from sklearn.datasets import load_digits

    digits = load_digits()
    seen = [0] * 10
    for number, (pixels, digit) in enumerate(zip(digits.images, digits.target, strict=True)):
        seen[digit] += 1
        split = "validation" if seen[digit] % HELD_OUT == 0 else "train"
        path = folder / split / str(digit) / f"{number:04d}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray((pixels * (255 / 16)).round().astype("uint8")).save(path)  # grey levels 0...16
