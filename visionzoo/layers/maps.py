"""What mixers and gates have in common: layers of maps [B, H, W, C], their checks, and their use on [B, C, H, W]."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from visionzoo.layers.part import Part, check_dtype
from visionzoo.layers.tracing import one_node


class MapLayer(Part):
    """A layer of [B, H, W, C] maps; its `forward` begins with `check_input`.

    Args:
        dim: channels C of the map.

    Raises:
        ValueError: if there are none.
    """

    ADAPTER = ""  # what puts it on [B, C, H, W], within visionzoo.layers

    def __init_subclass__(cls, **kwargs: Any) -> None:
        """Let torch.fx see each such layer as one node: shapes steer them (padding, regions)."""
        super().__init_subclass__(**kwargs)
        if "forward" in vars(cls):
            cls.forward = one_node(cls.forward)  # type: ignore[method-assign]

    def __init__(self, dim: int):
        super().__init__()
        if dim < 1:
            raise ValueError(f"{type(self).__name__}: dim must be positive, got {dim=}")
        self.dim = dim

    def check_kernels(self, **kernels: int | None) -> None:
        """Check sizes of kernels that keep a map's size; None is for no kernel.

        Raises:
            ValueError: if one is even or not positive.
        """
        for name, kernel in kernels.items():
            if kernel is not None and (kernel < 1 or kernel % 2 == 0):
                raise ValueError(f"{type(self).__name__}: {name} must be odd and positive, got {name}={kernel}")

    def check_input(self, x: Tensor) -> None:
        """Check that x is a map this layer takes: floating point [B, H, W, C], in the dtype of the weights.

        Under autocast the dtypes may differ.

        Raises:
            ValueError: if it is not.
        """
        if x.ndim != 4 or x.shape[3] != self.dim or x.shape[1] == 0 or x.shape[2] == 0:
            raise ValueError(
                f"{type(self).__name__}: expected a map [B, H, W, C] with C = {self.dim}, got {tuple(x.shape)}; "
                f"for maps [B, C, H, W] wrap it in visionzoo.layers.{self.ADAPTER}"
            )
        if torch.compiler.is_compiling():  # not every torch traces what follows, and its own error says enough
            return
        check_dtype(self, x, what="a floating point map")


class AdapterNCHW(nn.Module):
    """A layer of [B, H, W, C] maps on [B, C, H, W] ones; its child has the name `ROLE`."""

    ROLE = "layer"

    def __init__(self, layer: MapLayer):
        super().__init__()
        self.add_module(self.ROLE, layer)

    @one_node  # it looks at the shape, as the layers do
    def forward(self, x: Tensor) -> Tensor:
        """[B, C, H, W] to [B, C', H', W'], of the same size but for mixers with a stride or an `out_dim`.

        Raises:
            ValueError: if x is not such a map, or of another dtype than the weights.
        """
        layer = getattr(self, self.ROLE)
        if x.ndim != 4 or x.shape[1] != layer.dim:
            raise ValueError(
                f"{type(self).__name__}: expected a map [B, C, H, W] with C = {layer.dim}, got {tuple(x.shape)}; "
                f"for maps [B, H, W, C] use the {type(layer).__name__} itself"
            )
        return layer(x.permute(0, 2, 3, 1).contiguous()).permute(0, 3, 1, 2)
