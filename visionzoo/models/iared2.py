"""IA-RED²: Interpretability-Aware Redundancy Reduction for Vision Transformers, https://arxiv.org/abs/2106.12620.

NeurIPS 2021. The authors' repository could not be had; facts from a copy of their model for evaluation in
https://github.com/joon-stack/ltrp at ba04d7f (no license), so details are likely, not certain. The code here is our
own. DeiT whose blocks are in groups; before each an agent decides which tokens stay (`InterpreterReducer`, which also
says how training differs). As released dropped tokens are hidden and their share is counted; here evaluation leaves
them out. A third of each agent's projection, which nothing reads, is not here: 22.9 M parameters, 23.4 M in that code.
Images of any size and shape are taken, with positions interpolated.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from visionzoo.models._reducing import add_reducers
from visionzoo.models._registry import Published, Variant, register_family
from visionzoo.models.deit import DeiT


class InterpretableTransformer(DeiT):
    """IA-RED² on DeiT.

    Args:
        group_sizes: blocks of each group; an agent stands before each.
        agent_heads: heads of the agents.
        threshold: probability above which a token stays, in [0, 1).
        rest: see `visionzoo.models.deit.DeiT`; its `depth` is the sum of `group_sizes`.

    Raises:
        ValueError: if a group has no blocks.
    """

    def __init__(
        self, *, group_sizes: Sequence[int] = (4, 4, 4), agent_heads: int = 6, threshold: float = 0.5, **rest: Any
    ):
        if not group_sizes or min(group_sizes) < 1:
            raise ValueError(f"InterpretableTransformer: every group needs a block, got {group_sizes=}")
        super().__init__(depth=sum(group_sizes), **rest)
        starts = [sum(group_sizes[:i]) for i in range(len(group_sizes))]
        self.CHECKPOINT_KEYS = {
            "authors": [
                *(
                    (rf"^groups\.{group}\.block_list\.{i}\.", f"blocks.{starts[group] + i}.")
                    for group, size in enumerate(group_sizes)
                    for i in range(size)
                ),
                *((rf"^groups\.{i}\.agent\.qk\.", f"blocks.{start}.reducer.qk.") for i, start in enumerate(starts)),
                (r"\.reducer\.qk\.(weight|bias)$", (r".reducer.qk.\1#0", r".reducer.qk.\1#1", "unread")),
                (r"^blocks\..*unread$", None),
                *DeiT.CHECKPOINT_KEYS["authors"],
            ]
        }
        agent = {"type": "interpreter", "num_heads": agent_heads, "threshold": threshold}
        add_reducers(self, [agent if i in starts else None for i in range(sum(group_sizes))])


VARIANTS = {
    "zoo_iared2_deit_s": Variant(
        {"embed_dim": 384, "num_heads": 6},
        Published(top1=79.1, source="paper, not checked against its text"),
        no_weights="no checkpoint of the authors' could be had",
    ),
}

TINY = {"zoo_iared2_deit_s": {"group_sizes": (1, 2), "embed_dim": 16, "num_heads": 2, "agent_heads": 4}}

register_family(
    __name__,
    InterpretableTransformer,
    VARIANTS,
    tiny=TINY,
    first_conv="stem.conv",
    pool_size=None,
    crop_pct=0.9,
    paper_ids="arXiv:2106.12620",
    origin_url="http://people.csail.mit.edu/bpan/ia-red/",
    license="unknown",
)
