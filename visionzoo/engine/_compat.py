"""What visionzoo changes in timm, and why; nothing happens at import, and `timm_patched` undoes it.

timm 1.0.29 to 1.0.31 with Pillow 13: at its strongest, `posterize` of the automatic augmentations asks Pillow for
0 bits a channel, a black image, which Pillow refuses since 13.0: training would end at such an image. It can go when
timm returns the black image itself.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from PIL import Image, ImageOps
from timm.data.auto_augment import NAME_TO_OP

POSTERIZING = ("Posterize", "PosterizeIncreasing", "PosterizeOriginal")


@contextmanager
def timm_patched() -> Iterator[None]:
    """Build timm's transforms with what is changed here: they keep it, timm has its own again afterwards."""
    own = {name: NAME_TO_OP[name] for name in POSTERIZING}  # a KeyError here means that timm renamed them
    NAME_TO_OP.update(dict.fromkeys(POSTERIZING, posterize))
    try:
        yield
    finally:
        NAME_TO_OP.update(own)


def posterize(image: Image.Image, bits_to_keep: int, **_: Any) -> Image.Image:
    """Do as timm's augmentation of that name; with 0 bits the image is black."""
    if bits_to_keep >= 8:
        return image
    return ImageOps.posterize(image, bits_to_keep) if bits_to_keep else Image.new(image.mode, image.size)
