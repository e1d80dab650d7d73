"""Conditional positions (CPVT, arXiv:2102.10882) in any model: position generators after blocks that the caller names.

`visionzoo.layers.block.Block` offers the place as a child `peg`, an `nn.Identity` without one, and says its width in an
attribute `dim`. Prefix tokens pass by the generator.
"""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

from visionzoo.layers.position import PositionGenerator
from visionzoo.models._contract import Contract


def add_position_generators(model: Contract, *, after: Collection[int] = (0,), kernel_size: int = 3) -> None:
    """Put position generators into a model: every stage of a pyramid, or the blocks of an isotropic backbone.

    Args:
        model: its blocks have a place `peg`.
        after: numbers of the blocks, counted in each stage, that a generator follows. Only the first is the papers'.
        kernel_size: side of the generators' kernels, odd.

    Raises:
        ValueError: if a stage has no such block, or the block has no place for a generator.

    >>> import timm, visionzoo
    >>> model = timm.create_model("zoo_swin_t", depths=(1, 1, 1, 1))
    >>> add_position_generators(model)
    >>> [name for name, _ in model.named_parameters() if "stages.3.blocks.0.peg" in name]
    ['stages.3.blocks.0.peg.weight', 'stages.3.blocks.0.peg.bias']
    """
    rows: Any = model.parts
    parts = [list(part.blocks) for part in rows] if hasattr(rows[0], "blocks") else [list(rows)]
    chosen: list[Any] = []
    for blocks in parts:
        for i in after:
            if not 0 <= i < len(blocks) or not hasattr(blocks[i], "peg"):
                raise ValueError(
                    f"add_position_generators: expected numbers of blocks with a place for one, of {len(blocks)} in a "
                    f"row of {type(model).__name__}, got after={tuple(after)}"
                )
            chosen.append(blocks[i])
    for block in chosen:
        block.peg = PositionGenerator(block.dim, kernel_size)
