"""Which pixels speak for a class: gradients x input and DeepLIFT by captum, and how faithful such a map is.

Faithfulness is that of RISE (Petsiuk, Das and Saenko, BMVC 2018, arXiv:1806.07421): pixels are deleted from the image,
or inserted into a blurred one, the most important first, and the probability of the class is watched. Facts from
https://github.com/eclique/RISE at d91ea00 (MIT): steps of one row's width, zeros for what is deleted, a kernel of 11
pixels for the blur, the area by trapezoids.
"""

from __future__ import annotations

import contextlib
import copy
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from types import ModuleType
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from visionzoo.text import count_of

BLUR_KERNEL, BLUR_DEVIATION = 11, 5.0


def gradient_input(model: nn.Module, image: Tensor, target: int) -> Tensor:
    """Return the gradient of a class's logit times the image, summed over the channels, by captum.

    Args:
        model: any model of images to logits, in evaluation mode.
        image: [1, C, H, W], normalized.
        target: number of the class.

    Returns:
        [H, W]; positive where a pixel speaks for the class, against the mean color (zero).

    Raises:
        ValueError: if the image is a batch, or there is no such class.
        ModuleNotFoundError: if captum is not installed.
    """
    captum = _captum()
    _check(model, image, target)
    found = captum.InputXGradient(model).attribute(image.detach().clone().requires_grad_(), target=target)
    return found.detach()[0].sum(0)


@dataclass(frozen=True)
class DeepLift:
    """What DeepLIFT says of an image.

    Attributes:
        map: [H, W], summed over the channels.
        gap: by how much the sum of the map misses the difference of the logits of image and reference. It is 0 where
            all nonlinear layers are modules that captum has the rescale rule for (`RULES`); elsewhere, as with GELU and
            attention, the gradient stands for the rule.
        difference: these logits' difference.
    """

    map: Tensor
    gap: float
    difference: float


RULES = (nn.ReLU, nn.ELU, nn.LeakyReLU, nn.Sigmoid, nn.Tanh, nn.Softplus, nn.MaxPool1d, nn.MaxPool2d, nn.Softmax)


def deeplift(model: nn.Module, image: Tensor, target: int) -> DeepLift:
    """Return DeepLIFT (arXiv:1704.02685), rescale rule, of a class's logit against the mean color, by captum.

    Args:
        model: a model of images to logits, in evaluation mode, with modules of `RULES`.
        image: [1, C, H, W], normalized.
        target: number of the class.

    Raises:
        ValueError: if the model has no module that the rule is for: there it would be gradients x input; or captum does
            not take it; else as `gradient_input`.
        ModuleNotFoundError: if captum is not installed.
    """
    captum = _captum()
    _check(model, image, target)
    if not any(type(module) in RULES for module in model.modules()):
        kinds = sorted({type(each).__name__ for each in model.modules() if "elu" in type(each).__name__.lower()})
        raise ValueError(
            f"{type(model).__name__} has no layer that DeepLIFT's rescale rule is for (ReLU, ELU, sigmoid, tanh, "
            f"softplus, max pooling, softmax as modules; it has {', '.join(kinds) or 'no activations as modules'}): "
            "DeepLIFT of it is gradients x input; ask for that"
        )
    image = image.detach()
    reference = torch.zeros_like(image)
    try:
        with warnings.catch_warnings(), _called_once(model, image):
            warnings.simplefilter("ignore")  # that hooks are set and removed again
            found = captum.DeepLift(model).attribute(image.clone().requires_grad_(), reference, target=target)
    except (AssertionError, RuntimeError) as error:
        text = str(error).strip().split("\n")[0]
        raise ValueError(
            f"captum's DeepLIFT does not fit {type(model).__name__}: {text}; gradients x input needs nothing"
        ) from error
    with torch.no_grad():
        difference = float(_logits(model(image))[0, target] - _logits(model(reference))[0, target])
    found = found.detach()
    return DeepLift(found[0].sum(0), abs(float(found.double().sum()) - difference), difference)


class _Turns(nn.Module):
    """A layer of `RULES` as several, one for each of its calls, as captum asks for.

    Args:
        layer: that is called.
        sees: of each call, whether the image has a part in its input. Others, as of biases that are made from offsets,
            are no part of the explanation, and captum does not see them.
    """

    def __init__(self, layer: nn.Module, sees: list[bool]) -> None:
        super().__init__()
        self.copies = nn.ModuleList(copy.deepcopy(layer) if each else nn.Identity() for each in sees)
        self.hidden, self.sees, self.turn = (layer,), sees, 0

    def forward(self, *args: Any) -> Tensor:
        turn, self.turn = self.turn, (self.turn + 1) % len(self.sees)
        out: Tensor = (self.copies[turn] if self.sees[turn] else self.hidden[0])(*args)
        return out


@contextlib.contextmanager
def _called_once(model: nn.Module, image: Tensor) -> Iterator[None]:
    """Let each layer of `RULES` in a model be called once in a pass, and only on what the image has a part in."""
    calls: dict[nn.Module, list[bool]] = {}

    def keep(layer: nn.Module, args: tuple[Tensor, ...]) -> None:
        calls.setdefault(layer, []).append(args[0].requires_grad)

    learning = [each for each in model.parameters() if each.requires_grad]
    hooks = [layer.register_forward_pre_hook(keep) for layer in model.modules() if type(layer) in RULES]
    places: list[tuple[nn.Module, str, nn.Module]] = []
    model.requires_grad_(False)
    try:
        with torch.enable_grad():
            model(image.clone().requires_grad_())
        for hook in hooks:
            hook.remove()
        turns = {layer: _Turns(layer, sees) for layer, sees in calls.items() if sees != [True]}
        for path, layer in list(model.named_modules(remove_duplicate=False)):
            if layer in turns and path:
                parent, _, name = path.rpartition(".")
                places.append((model.get_submodule(parent), name, layer))
        for owner, name, layer in places:
            setattr(owner, name, turns[layer])
        yield
    finally:
        for hook in hooks:
            hook.remove()
        for owner, name, layer in places:
            setattr(owner, name, layer)
        for parameter in learning:
            parameter.requires_grad_()


@dataclass(frozen=True)
class Faithfulness:
    """How the probability of a class falls and rises with the most important pixels.

    Attributes:
        shares: [S + 1], of the pixels that are changed, from 0 to 1.
        deletion: [S + 1], probability where they are deleted; the lower the area, the more faithful the map.
        insertion: [S + 1], probability where they are inserted into the blurred image; the higher, the better.
    """

    shares: Tensor
    deletion: Tensor
    insertion: Tensor

    @property
    def areas(self) -> tuple[float, float]:
        """The areas under deletion and insertion, from 0 to 1."""
        return tuple(float(torch.trapezoid(each, self.shares)) for each in (self.deletion, self.insertion))  # type: ignore[return-value]


@torch.no_grad()
def faithfulness(
    model: nn.Module, image: Tensor, saliency: Tensor, target: int, *, steps: int | None = None, batch: int = 32
) -> Faithfulness:
    """Return deletion and insertion curves of a map.

    Args:
        model: of images to logits, in evaluation mode.
        image: [1, C, H, W], normalized, so that zero is the mean color.
        saliency: [h, w] of the whole image; resized (bilinear) where it is smaller.
        target: number of the class.
        steps: S; None for H, a row's number of pixels each.
        batch: images at once.

    Raises:
        ValueError: if the map holds NaN or is of no size, or an argument is out of its range.
    """
    _check(model, image, target)
    height, width = image.shape[2:]
    steps = height if steps is None else steps
    if steps < 1 or batch < 1:
        raise ValueError(f"faithfulness: steps and batch must be positive, got {steps=} and {batch=}")
    if saliency.ndim != 2 or not saliency.numel() or bool(saliency.isnan().any()):
        raise ValueError(
            f"faithfulness: expected a map [h, w] of numbers, got {tuple(saliency.shape)} with "
            f"{int(saliency.isnan().sum())} of them NaN"
        )
    order = resize_map(saliency, (height, width)).flatten().argsort(descending=True, stable=True)
    rank = torch.empty_like(order).scatter(0, order, torch.arange(len(order), device=order.device)).to(image.device)
    counts = torch.linspace(0, height * width, steps + 1).round().long()
    curves = []
    for start, finish in ((image, torch.zeros_like(image)), (blurred(image), image)):
        said = []
        for some in counts.split(batch):
            changed = (rank < some.to(rank)[:, None]).view(-1, 1, height, width)
            logits = _logits(model(torch.where(changed, finish, start)))
            said.append(logits.double().softmax(-1)[:, target].cpu())
        curves.append(torch.cat(said))
    return Faithfulness(counts.double() / (height * width), *curves)


def blurred(image: Tensor) -> Tensor:
    """Blur an image [1, C, H, W] as RISE does; zeros beyond the border.

    The kernel is a Gaussian of deviation 5 whose tails are folded back at the ends of its 11 pixels, so nearly flat.
    """
    reach = round(4 * BLUR_DEVIATION)
    offsets = torch.arange(-reach, reach + 1)
    weights = (-0.5 * (offsets.double() / BLUR_DEVIATION) ** 2).exp()
    at = (torch.arange(BLUR_KERNEL)[:, None] + offsets) % (2 * BLUR_KERNEL)
    at = torch.minimum(at, 2 * BLUR_KERNEL - 1 - at)  # mirrored at the ends, which count twice
    row = ((at == BLUR_KERNEL // 2) * weights / weights.sum()).sum(1)
    kernel = torch.outer(row, row).to(image).expand(image.shape[1], 1, -1, -1)
    return F.conv2d(image, kernel, padding=BLUR_KERNEL // 2, groups=image.shape[1])


def resize_map(values: Tensor, size: tuple[int, int]) -> Tensor:
    """Resize a map [h, w] to [H, W], bilinear; where it shrinks, over all of it."""
    if tuple(values.shape) == size:
        return values
    return F.interpolate(values[None, None].double(), size=size, mode="bilinear", antialias=True)[0, 0]


def _captum() -> ModuleType:
    import captum.attr

    return captum.attr


def _logits(out: Any) -> Tensor:
    return out if isinstance(out, Tensor) else out[0]


def _check(model: nn.Module, image: Tensor, target: int) -> None:
    if image.ndim != 4 or len(image) != 1:
        raise ValueError(f"expected one image [1, C, H, W], got {tuple(image.shape)}")
    classes = getattr(model, "num_classes", None)
    if classes is None:
        with torch.no_grad():
            classes = _logits(model(image)).shape[1]
    if not 0 <= target < classes:
        raise ValueError(
            f"{type(model).__name__} has {count_of(classes, 'class')}, got {target=}; expected one of them by number"
        )
