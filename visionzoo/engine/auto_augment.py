"""timm's RandAugment and AutoAugment for whole batches on a device, by torchvision's functions of tensors.

Each image gets the operations that timm would draw for it. Their strength and side are drawn once for all images of the
batch that get the same operation in the same place, where timm draws them for each image.
"""

import copy
import math
import random
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from timm.data import create_transform
from timm.data.auto_augment import AugmentOp, AutoAugment, RandAugment
from torch import Tensor
from torchvision.transforms import InterpolationMode
from torchvision.transforms.v2 import functional

from visionzoo.engine._compat import timm_patched
from visionzoo.engine.errors import UserError

NONE = -1  # the number of no operation


def _affine(
    images: Tensor, fill: Any, *, angle: float = 0.0, shear: Any = (0.0, 0.0), move: Any = (0.0, 0.0)
) -> Tensor:
    center = [0.0, 0.0] if any(shear) else None  # else the middle
    bilinear = InterpolationMode.BILINEAR
    return functional.affine(images, -angle, list(move), 1.0, list(shear), bilinear, list(fill), center)


def _degrees(slope: float) -> float:
    return math.degrees(math.atan(slope))


def _desaturate(images: Tensor, amount: float, **_: Any) -> Tensor:
    return functional.adjust_saturation(images, 1.0 - amount)


def _solarize_add(images: Tensor, added: int, thresh: int = 128, **_: Any) -> Tensor:
    return torch.where(images < thresh, (images.short() + added).clamp(0, 255).byte(), images)


def _gaussian_blur(images: Tensor, sigma: float, **_: Any) -> Tensor:
    height, width = images.shape[-2:]
    reach = [min(math.ceil(3 * sigma), side - 1) for side in (width, height)]  # images are mirrored once at the border
    return functional.gaussian_blur(images, [2 * pixels + 1 for pixels in reach], [sigma])


def _gaussian_blur_rand(images: Tensor, amount: float, **_: Any) -> Tensor:
    return _gaussian_blur(images, random.uniform(0.1, 2.0 * amount))


# timm's functions of one PIL image by name -> the same of 8-bit images [B, C, H, W], with timm's arguments
FUNCTIONS: dict[str, Callable[..., Tensor]] = {
    "auto_contrast": lambda images, **_: functional.autocontrast(images),
    "equalize": lambda images, **_: functional.equalize(images),
    "invert": lambda images, **_: functional.invert(images),
    "posterize": lambda images, bits, **_: functional.posterize(images, bits) if bits < 8 else images,
    "solarize": lambda images, threshold, **_: functional.solarize(images, threshold) if threshold < 256 else images,
    "solarize_add": _solarize_add,
    "color": lambda images, factor, **_: functional.adjust_saturation(images, factor),
    "contrast": lambda images, factor, **_: functional.adjust_contrast(images, factor),
    "brightness": lambda images, factor, **_: functional.adjust_brightness(images, factor),
    "sharpness": lambda images, factor, **_: functional.adjust_sharpness(images, factor),
    "desaturate": _desaturate,
    "gaussian_blur": _gaussian_blur,
    "gaussian_blur_rand": _gaussian_blur_rand,
    "rotate": lambda images, angle, fillcolor, **_: _affine(images, fillcolor, angle=angle),
    "shear_x": lambda images, slope, fillcolor, **_: _affine(images, fillcolor, shear=(_degrees(slope), 0.0)),
    "shear_y": lambda images, slope, fillcolor, **_: _affine(images, fillcolor, shear=(0.0, _degrees(slope))),
    "translate_x_rel": lambda x, share, fillcolor, **_: _affine(x, fillcolor, move=(-share * x.shape[-1], 0.0)),
    "translate_y_rel": lambda x, share, fillcolor, **_: _affine(x, fillcolor, move=(0.0, -share * x.shape[-2])),
    "translate_x_abs": lambda images, pixels, fillcolor, **_: _affine(images, fillcolor, move=(-pixels, 0.0)),
    "translate_y_abs": lambda images, pixels, fillcolor, **_: _affine(images, fillcolor, move=(0.0, -pixels)),
}


class BatchAutoAugment:
    """A policy of `--aa` for batches; it draws from `random` and `numpy.random`, as timm's do.

    Args:
        policy: as timm names it, e.g. `rand-m9-mstd0.5-inc1`, `original`, `3a`.
        data_config: input size, mean.

    Raises:
        UserError: timm does not know the policy, or it is AugMix, which mixes several results for each image.
    """

    def __init__(self, policy: str, data_config: dict[str, Any]) -> None:
        how = {"is_training": True, "interpolation": "bilinear", "mean": data_config["mean"], "auto_augment": policy}
        try:
            with timm_patched():
                transforms = create_transform(data_config["input_size"], **how).transforms  # type: ignore[union-attr]
        except (AssertionError, KeyError, ValueError) as error:
            raise UserError(f"--aa {policy}: timm cannot make it: {type(error).__name__}: {error}") from error
        found = [transform for transform in transforms if isinstance(transform, (RandAugment, AutoAugment))]
        if not found:
            raise UserError(f"--cache-images does not go with --aa {policy} (expected rand-..., original, v0 or 3a)")
        self.policy = found[0]
        chains = self.policy.policy if isinstance(self.policy, AutoAugment) else [self.policy.ops]
        self.operations = [_on_batches(operation) for chain in chains for operation in chain]
        self.probabilities = np.array([operation.prob for chain in chains for operation in chain])
        numbers = iter(range(len(self.operations)))
        length = max(map(len, chains))
        self.chains = np.array([[*(next(numbers) for _ in chain), *[NONE] * (length - len(chain))] for chain in chains])

    def draw(self, count: int) -> np.ndarray:
        """Return the operations of `count` images, [count, length], in their order: numbers or `NONE`."""
        if isinstance(self.policy, AutoAugment):
            drawn = self.chains[np.random.randint(len(self.chains), size=count)]
        elif (weights := self.policy.choice_weights) is None:
            drawn = np.random.randint(len(self.operations), size=(count, self.policy.num_layers))
        else:  # by their weights without repetition: the largest of log-weights with Gumbel noise
            noisy = np.log(weights) + np.random.gumbel(size=(count, len(weights)))
            drawn = np.argsort(-noisy, 1)[:, : self.policy.num_layers]
        return np.where(np.random.random(drawn.shape) < self.probabilities[drawn], drawn, NONE)

    def __call__(self, images: Tensor) -> Tensor:
        """Return the images, 8 bits, [B, C, H, W], augmented."""
        for drawn in self.draw(len(images)).T:
            order = torch.from_numpy(np.argsort(drawn, kind="stable")).to(images.device)
            counts = np.bincount(drawn - NONE, minlength=len(self.operations) + 1).tolist()
            same, *parts = images[order].split(counts)
            done = [operation(part) for operation, part in zip(self.operations, parts, strict=True) if len(part)]
            images = torch.empty_like(images).index_copy_(0, order, torch.cat([same, *done]))
        return images


def _on_batches(operation: AugmentOp) -> AugmentOp:
    """Return timm's operation, which draws its strength, with a function of batches, done always."""
    operation = copy.copy(operation)
    operation.aug_fn, operation.prob = FUNCTIONS[operation.aug_fn.__name__], 1.0
    return operation
