"""Activator: GLU Activation Function as the Core Component of a Vision Transformer, https://arxiv.org/abs/2405.15953.

Facts from https://github.com/Abdullah-88/Activator at 631c38a (BSD-3-Clause); the code here is our own. As released: a
gated linear unit replaces attention, so that tokens meet only in the pooling; one norm serves both
branches of a block, one more both factors of a unit; there are no positions, no class token and no norm at the end.
`zoo_activator_geglu` leaves the MLPs out, which makes the units its only branches; token mixers asked of it with
`mixers` come before them. `activation` gives units with other activations, such as the paper's ablations have. Images
of any size and shape are taken, padded to whole patches. Trained at 32 px only, on CIFAR-10 and CIFAR-100; the
repository gives no accuracies.
"""

from __future__ import annotations

from functools import partial
from typing import Any

from visionzoo.layers.mlp import GLU_ACTIVATIONS, NormedGlu
from visionzoo.layers.tokens import OneNormTokenBlock, TokenBlock
from visionzoo.models._isotropic import Isotropic, build_blocks
from visionzoo.models._registry import Published, Variant, register_family


class Activator(Isotropic):
    """Activator.

    Args:
        depth: blocks.
        embed_dim: channels.
        mlp_ratio: hidden width of the gated units and the MLPs over the channels.
        plain_mlp: have an MLP after each gated unit.
        activation: of the gated units, "gelu", "silu" or "relu".
        mlp_drop: dropout probability inside the MLPs; without MLPs at the end of the units.
        patch_size: side of the patches in pixels.
        mixers: token mixers in place of the gated units, or before them where there are no MLPs, see
            `visionzoo.layers.mixers.resolve_mixers`.
        in_chans: image channels.
        drop_path_rate: stochastic depth of the last block.
        head: `num_classes`, `global_pool` and `drop_rate` of the head.

    Raises:
        ValueError: if the activation is another.
    """

    CHECKPOINT_KEYS = {
        "authors": [
            (r"^patcher\.", "stem.conv."),
            (r"^model\.(\d+)\.norm\.", r"blocks.\1.norm2."),
            (r"^model\.(\d+)\.actgu\.", r"blocks.\1.mixer.unit."),
            (r"^model\.(\d+)\.ffn\.net\.0\.", r"blocks.\1.mlp.fc1."),
            (r"^model\.(\d+)\.ffn\.net\.3\.", r"blocks.\1.mlp.fc2."),
            (r"\.proj_1\.", ".gate."),
            (r"\.proj_2\.", ".value."),
            (r"\.proj_3\.", ".proj."),
            (r"^classifier\.", "head.fc."),
        ],
    }
    CHECKPOINT_KEYS["authors, without MLPs"] = [
        (r"^model\.(\d+)\.actgu\.", r"blocks.\1.mlp."),
        *CHECKPOINT_KEYS["authors"],
    ]

    def __init__(
        self,
        *,
        depth: int = 4,
        embed_dim: int = 256,
        mlp_ratio: float = 2.0,
        plain_mlp: bool = True,
        activation: str = "gelu",
        mlp_drop: float = 0.0,
        patch_size: int = 4,
        mixers: Any = None,
        in_chans: int = 3,
        drop_path_rate: float = 0.0,
        **head: Any,
    ):
        if activation not in GLU_ACTIVATIONS:
            raise ValueError(f"Activator: unknown {activation=}, expected one of {tuple(GLU_ACTIVATIONS)}")
        if plain_mlp:
            own = {"type": "glu", "hidden_ratio": mlp_ratio, "activation": activation}
            block: Any = OneNormTokenBlock
        else:
            own = {"type": "none"}
            block = partial(TokenBlock, mlp_layer=NormedGlu, act_layer=GLU_ACTIVATIONS[activation])
        super().__init__(
            blocks=build_blocks(
                embed_dim,
                None,
                [own] * depth,
                mixers,
                block=partial(block, mlp_ratio=mlp_ratio, mlp_drop=mlp_drop),
                drop_path_rate=drop_path_rate,
            ),
            embed_dim=embed_dim,
            patch_size=patch_size,
            class_token=False,
            positions="none",
            in_chans=in_chans,
            **head,
        )


_CIFAR = {"input_size": (3, 32, 32), "crop_pct": 1.0, "mean": (0.5, 0.5, 0.5), "std": (0.5, 0.5, 0.5)}
_NONE = "none were published"

VARIANTS = {
    "zoo_activator_glu": Variant({}, Published(size=32), _CIFAR, no_weights=_NONE),
    "zoo_activator_geglu": Variant({"plain_mlp": False}, Published(size=32), _CIFAR, no_weights=_NONE),
}

TINY = {
    "zoo_activator_glu": {"depth": 2, "embed_dim": 16},
    "zoo_activator_geglu": {"depth": 2, "embed_dim": 16},
}

register_family(
    __name__,
    Activator,
    VARIANTS,
    tiny=TINY,
    first_conv="stem.conv",
    pool_size=None,
    paper_ids="arXiv:2405.15953",
    origin_url="https://github.com/Abdullah-88/Activator",
    license="bsd-3-clause",
)
