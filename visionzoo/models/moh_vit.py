"""MoH-ViT: Multi-Head Attention as Mixture-of-Head Attention, 2024, https://arxiv.org/abs/2410.11842.

Facts from https://github.com/SkyworkAI/MoH at 2cefd57 (Apache-2.0); the code here is our own. A TransNeXt whose tokens
weigh attention's heads and take some only; the number in a name is the share of heads that they take, in per cent.
Every head is computed for every token, as released, so that the multiply-adds are TransNeXt's. These four variants were
published; there is no tiny one. The authors' code takes images of one size only, ours of any, as TransNeXt does.

In training with `set_auxiliary` the model returns `balance`, the authors' loss, and `busiest_head`, the share of tokens
that take the most taken head, both as means over the layers that route. `head_shares` gives the shares of all heads.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from visionzoo.layers.mixers import combine_mixers
from visionzoo.layers.mixers.mixture_of_heads import HeadRouter
from visionzoo.models._registry import Published, Variant, register_family
from visionzoo.models.transnext import TransNeXt, size


class MoHViT(TransNeXt):
    """MoH-ViT.

    Args:
        depths: blocks of each stage.
        embed_dims: channels of each stage.
        num_heads: heads for each stage.
        shared_heads: heads that every token takes, for each stage.
        routed_heads: how many of the other heads a token takes, for each stage.
        mixers: other token mixers for some stages, see `visionzoo.layers.mixers.resolve_mixers`.
        others: as `TransNeXt` takes them.

    Raises:
        ValueError: if a stage has too few heads, or some that no token takes, or numbers for stages are missing.
    """

    MIXER = "mixture_of_heads"

    def __init__(
        self,
        *,
        depths: Sequence[int] = (5, 5, 22, 5),
        embed_dims: Sequence[int] = (72, 144, 288, 576),
        num_heads: Sequence[int] = (3, 6, 12, 24),
        shared_heads: Sequence[int] = (3, 6, 3, 8),
        routed_heads: Sequence[int] = (0, 0, 6, 12),
        mixers: Any = None,
        **others: Any,
    ):
        own = [
            [{"type": self.MIXER, "shared_heads": shared, "routed_heads": routed}]
            for shared, routed in zip(shared_heads, routed_heads, strict=True)
        ]
        super().__init__(
            depths=depths,
            embed_dims=embed_dims,
            num_heads=num_heads,
            mixers=combine_mixers(own, mixers),
            **others,
        )
        routing = [router for _, router in self._routers() if router.routed_heads]
        for router in routing:
            router.num_layers = len(routing)

    def _routers(self) -> list[tuple[str, HeadRouter]]:
        return [(name, module) for name, module in self.named_modules() if isinstance(module, HeadRouter)]

    @torch.no_grad()
    def head_shares(self, image: Tensor) -> dict[str, Tensor]:
        """Share of an image batch's tokens that take each head [G], by the name of the layer's router."""
        shares: dict[str, Tensor] = {}
        hooks = [
            router.register_forward_hook(
                lambda _, __, gates, name=name: shares.update({name: (gates > 0).float().mean((0, 1, 2))})
            )
            for name, router in self._routers()
        ]
        try:
            self(image)
        finally:
            for hook in hooks:
                hook.remove()
        return shares


def _published(name: str, shared: Sequence[int], routed: Sequence[int], top1: float) -> Variant:
    params = {"small": 50, "base": 90}[name]
    return Variant(
        {**size(name), "shared_heads": shared, "routed_heads": routed},
        Published(params, top1=top1, source="figures/fig4.png of SkyworkAI/MoH"),
        no_weights="the authors' are linked in https://github.com/SkyworkAI/MoH#-highlights",
    )


VARIANTS = {
    "zoo_moh_vit_s_75": _published("small", (3, 6, 3, 4), (0, 0, 6, 12), 84.6),
    "zoo_moh_vit_s_80": _published("small", (3, 6, 3, 8), (0, 0, 6, 12), 84.7),
    "zoo_moh_vit_b_50": _published("base", (2, 2, 2, 4), (2, 4, 6, 8), 84.7),
    "zoo_moh_vit_b_75": _published("base", (4, 8, 4, 5), (0, 0, 8, 16), 84.9),
}

_TINY = {
    "depths": (1, 1, 1, 1),
    "embed_dims": (8, 16, 16, 24),
    "num_heads": (1, 2, 4, 4),
    "shared_heads": (1, 2, 1, 0),
    "routed_heads": (0, 0, 2, 2),
    "reductions": (4, 2, 2, 1),
}
TINY = {"zoo_moh_vit_s_75": _TINY}

register_family(
    __name__,
    MoHViT,
    VARIANTS,
    tiny=TINY,
    first_conv="stem.conv",
    paper_ids="arXiv:2410.11842",
    origin_url="https://github.com/SkyworkAI/MoH",
    license="apache-2.0",
)
