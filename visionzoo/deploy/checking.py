"""What a file is checked on: the images that it takes, and what the model makes of them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from visionzoo._torch_private import tree_leaves

NOISE = 1e-4  # in images, a hundredth of a step between two values of a pixel
AXES = {0: "batch", 2: "height", 3: "width"}


@dataclass(frozen=True)
class Shape:
    """Of the images that an exported model takes.

    Attributes:
        batch: images of a batch; where that is dynamic, of the example that is traced.
        size: channels, height and width; likewise.
        dynamic_batch: take any number of images.
        dynamic_size: take any height and width.
    """

    batch: int
    size: tuple[int, int, int]
    dynamic_batch: bool = True
    dynamic_size: bool = False

    def example(self) -> tuple[int, ...]:
        """Return the shape to trace with, in which nothing is special that the exported program would rely on.

        A dynamic batch of 1 would be taken for a constant; maps that windows divide, for maps that they always divide.
        """
        channels, height, width = self.size
        size = (height + 37, width + 69) if self.dynamic_size else (height, width)
        return (max(self.batch, 2) if self.dynamic_batch else self.batch, channels, *size)

    def to_check(self) -> list[tuple[int, ...]]:
        """Return the shapes at which a file is compared with the model: two batches, and three more sizes."""
        channels, height, width = self.size
        batches = (1, self.example()[0] + 1) if self.dynamic_batch else (self.batch, self.batch)
        shapes: list[tuple[int, ...]] = [(batch, channels, height, width) for batch in batches]
        if self.dynamic_size:
            sizes = ((height + 64, width), (height // 2 + 5, width + 37), (height * 3 // 4, width * 3 // 4))
            shapes += [(batches[0], channels, *size) for size in sizes]
        return shapes

    def images(self) -> list[Tensor]:
        """Return random images of the shapes `to_check`, always the same."""
        generator = torch.Generator().manual_seed(0)
        return [torch.randn(shape, generator=generator) for shape in self.to_check()]

    @property
    def dynamic_axes(self) -> dict[int, str]:
        """Axes of the input [B, C, H, W] that are dynamic, and their names."""
        return {axis: name for axis, name in AXES.items() if (self.dynamic_size if axis else self.dynamic_batch)}

    def __str__(self) -> str:
        sides = "any size" if self.dynamic_size else "x".join(map(str, self.size[1:]))
        return f"{'any batch' if self.dynamic_batch else f'batches of {self.batch}'}, {sides}"


@dataclass(frozen=True)
class Reference:
    """Images of a shape and what the model made of them."""

    images: list[Tensor]
    outputs: list[list[Tensor]]

    @classmethod
    @torch.no_grad()
    def of(cls, model: nn.Module, shape: Shape) -> Reference:
        """Run a model, in eval mode and on its device."""
        device = next((parameter.device for parameter in model.parameters()), torch.device("cpu"))
        images = [image.to(device) for image in shape.images()]
        return cls(images, [tree_leaves(model(image)) for image in images])

    @property
    def scale(self) -> float:
        """The largest output."""
        return max(float(t.abs().max()) for outputs in self.outputs for t in outputs)

    @property
    def spread(self) -> float:
        """Largest difference between the outputs for two images: what an error is to be measured by."""
        first, second = ([t[0] for t in outputs] for outputs in self.outputs[:2])
        return max(float((a - b).abs().max()) for a, b in zip(first, second, strict=True))

    def error_of(self, run: Callable[[Tensor], list[Tensor]]) -> float:
        """Return the largest error of an output of `run`; NaN where one has NaNs.

        Raises:
            ValueError: if number or shape of the outputs differ.
        """
        errors = []
        for image, expected in zip(self.images, self.outputs, strict=True):
            found = run(image)
            if [tuple(t.shape) for t in found] != [tuple(t.shape) for t in expected]:
                raise ValueError(
                    f"for an input {tuple(image.shape)} the outputs are {[tuple(t.shape) for t in found]}, the model's "
                    f"{[tuple(t.shape) for t in expected]}"
                )
            errors += [
                (own.to(theirs.device) - theirs).abs().max() for own, theirs in zip(found, expected, strict=True)
            ]
        return float(torch.stack(errors).max())  # NaN if there is any

    @torch.no_grad()
    def response(self, model: nn.Module) -> float:
        """Return by how much a model changes its largest output where images change by `NOISE`, in eight draws."""
        generator = torch.Generator().manual_seed(1)

        def run(image: Tensor) -> list[Tensor]:
            return tree_leaves(model(image + NOISE * torch.randn(image.shape, generator=generator).to(image)))

        return max(self.error_of(run) for _ in range(8))
