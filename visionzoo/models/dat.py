"""Dual attention transformer: Disentangling and Integrating Relational and Sensory Information in Transformers.

ICML 2025, https://arxiv.org/abs/2405.16727. Facts from https://github.com/Awni00/dual-attention at a6ef87c (MIT); the
code here is our own. A ViT with heads of self-attention and of relational attention side by side. Before every block,
one retriever that all share makes symbols of the tokens, which are not normalized for it. As released, there is no norm
before the classifier. `zoo_dat_s` is the README's model; nothing is published for images of ImageNet.

Where we differ: images of any size and shape are taken, with positions interpolated (but for "positional" symbols, of
which there is one for each token); the pooling "avg" is that of only the map, without the class token. Norms after the
sums, RMS norms, the older relational cross-attention (`ra_type`), and what language models need (causal masks, shared
keys and values, rotary positions) are not here.
"""

from __future__ import annotations

from functools import partial
from typing import Any

from timm.layers import Mlp, SwiGLU
from torch import Tensor, nn

from visionzoo.layers.mixers.dual_attention import DualAttentionMixer
from visionzoo.layers.specs import build_spec
from visionzoo.layers.stem import NormedPatchStem
from visionzoo.layers.symbols import SYMBOLS
from visionzoo.layers.tokens import TokenBlock, Tokens
from visionzoo.layers.tracing import replaced
from visionzoo.models._isotropic import Isotropic, build_blocks
from visionzoo.models._registry import Variant, register_family

_MLPS: dict[str, dict[str, Any]] = {
    "swiglu": {"mlp_layer": SwiGLU, "act_layer": nn.SiLU},
    "gelu": {"mlp_layer": Mlp, "act_layer": partial(nn.GELU, approximate="tanh")},
    "relu": {"mlp_layer": Mlp, "act_layer": nn.ReLU},
}


class DualAttentionBlock(TokenBlock):
    """`TokenBlock` whose mixer gets symbols that were made before the block."""

    takes_memory = False  # there are no symbols for it

    @property
    def takes_symbols(self) -> bool:
        """Whether the mixer has none of its own."""
        return isinstance(self.mixer, DualAttentionMixer) and self.mixer.symbols is None

    def forward(self, state: tuple[Tokens, Tensor | None]) -> Tokens:  # type: ignore[override]
        """Take the tokens through the block, given symbols [B, P + N, C] or [2·(P + N) - 1, C], or None."""
        tokens, symbols = state
        if symbols is None or self.mixer is None:
            return super().forward(tokens)
        mixed = self.mixer(self.norm1(tokens.x).unsqueeze(1), symbols=symbols).squeeze(1)
        return self.mix_channels(replaced(tokens, x=self._add(tokens.x, mixed, self.ls1)))


class DualAttentionTransformer(Isotropic):
    """ViT with dual attention (ViDAT).

    Args:
        depth: blocks.
        embed_dim: channels.
        num_heads: heads of both kinds.
        relational_heads: how many of them are relational.
        num_relations: relations; None for as many as relational heads.
        symmetric_relations: one projection for both tokens of a relation.
        relation_activation: of the relations, see `visionzoo.layers.mixers.DualAttentionMixer`.
        symbols: a name of `visionzoo.layers.symbols.SYMBOLS` or `dict(type=name, **options)`.
        mlp: "swiglu", "gelu" (its tanh form) or "relu".
        mlp_ratio: hidden width of the MLPs over the channels.
        mlp_bias: whether their layers have a bias.
        patch_size: side of the patches in pixels.
        img_size: image size in pixels, or (height, width), for which the table of positions is made.
        class_token: have a class token.
        reg_tokens: number of register tokens beside it.
        mixers: other token mixers for some blocks, see `visionzoo.layers.mixers.resolve_mixers`.
        in_chans: image channels.
        drop_path_rate: stochastic depth of the last block.
        head: `num_classes`, `global_pool` and `drop_rate` of the head.

    Raises:
        ValueError: if the MLP is unknown.
    """

    def __init__(
        self,
        *,
        depth: int = 6,
        embed_dim: int = 512,
        num_heads: int = 8,
        relational_heads: int = 4,
        num_relations: int | None = None,
        symmetric_relations: bool = True,
        relation_activation: str = "identity",
        symbols: Any = "position_relative",
        mlp: str = "swiglu",
        mlp_ratio: float = 4.0,
        mlp_bias: bool = True,
        patch_size: int = 16,
        img_size: int | tuple[int, int] = 224,
        class_token: bool = True,
        reg_tokens: int = 0,
        mixers: Any = None,
        in_chans: int = 3,
        drop_path_rate: float = 0.0,
        **head: Any,
    ):
        if mlp not in _MLPS:
            raise ValueError(f"DualAttentionTransformer: unknown {mlp=}, expected one of {tuple(_MLPS)}")
        own = {
            "type": "dual_attention",
            "relational_heads": relational_heads,
            "num_relations": num_relations,
            "symmetric_relations": symmetric_relations,
            "relation_activation": relation_activation,
            "symbols": "given",
        }
        options = {**_MLPS[mlp], "mlp_layer": partial(_MLPS[mlp]["mlp_layer"], bias=mlp_bias)}
        blocks: list[Any] = build_blocks(
            embed_dim,
            num_heads,
            [own] * depth,
            mixers,
            block=partial(DualAttentionBlock, mlp_ratio=mlp_ratio, **options),
            drop_path_rate=drop_path_rate,
        )
        super().__init__(
            blocks=blocks,
            embed_dim=embed_dim,
            patch_size=patch_size,
            img_size=img_size,
            stem=NormedPatchStem(in_chans, embed_dim, patch_size),
            class_token=class_token,
            reg_tokens=reg_tokens,
            in_chans=in_chans,
            **head,
        )
        if any(block.takes_symbols for block in blocks):
            self.symbols = build_spec("symbols", symbols, SYMBOLS, embed_dim)
            self.stem_names += ("symbols",)
        gate, hidden = ("fc1_g", "fc1_x") if mlp == "swiglu" else ("fc1", "")
        shared = [(r"\.wq_rel\.", None), (r"\.wk_rel\.", ".relation_qk.")] if symmetric_relations else []
        self.CHECKPOINT_KEYS = {
            "authors": [
                (r"^symbol_retriever\.(symbolic_attention)\.", "symbols.symbolic."),
                (r"^symbol_retriever\.rel_pos_enc\.rel_pos_embeddings$", "symbols.table"),
                (r"^symbol_retriever\.symbol_library\.weight$", "symbols.library"),
                (r"^symbol_retriever\.model_dim_proj\.", "symbols.proj."),
                (r"^symbol_retriever\.", "symbols."),
                (r"^(symbols.*)\.template_features$", r"\1.templates"),
                (r"^(symbols.*)\.symbol_library$", r"\1.library"),
                (r"^(symbols.*)\.([qk])_proj\.", r"\1.\2."),
                (r"^to_patch_embedding\.1\.", "stem.norm1."),
                (r"^to_patch_embedding\.2\.", "stem.proj."),
                (r"^to_patch_embedding\.3\.", "stem.norm2."),
                (r"^pos_embedding$", "positions.table"),
                (r"^cls_token$", "prefix.cls_token"),
                (r"^encoder_blocks\.", "blocks."),
                *((rf"\.self_attention\.w{part}\.weight$", f".self.qkv.weight#{i}") for i, part in enumerate("qkv")),
                (r"\.self_attention\.wo\.", ".self.proj."),
                *shared,
                *((rf"\.w{part}_rel\.weight$", f".relation_qk.weight#{i}") for i, part in enumerate("qk")),
                *((rf"\.w{part}_attn\.weight$", f".relational_qk.weight#{i}") for i, part in enumerate("qk")),
                (r"\.relational_attention\.wv\.", ".relational_attention.symbol_v."),
                (r"\.relational_attention\.wr$", ".relational_attention.relation_v"),
                (r"\.relational_attention\.wo\.", ".relational_attention.relational_proj."),
                (r"\.dual_attn\.(self|relational_attention)\.", ".mixer."),
                (r"\.ff_block\.linear1\.", f".mlp.{gate}."),
                (r"\.ff_block\.linear2\.", ".mlp.fc2."),
                (r"\.ff_block\.linear3\.", f".mlp.{hidden}."),
                (r"^final_out\.", "head.fc."),
            ],
        }

    def advance(self, i: int, state: Any) -> Any:
        """Make symbols of the tokens, where block i takes any, and take the tokens through it."""
        block: Any = self.blocks[i]
        return super().advance(i, (state, self.symbols(state.x) if block.takes_symbols else None))

    def prune_intermediate_layers(self, *args: Any, **kwargs: Any) -> list[int]:
        """Drop the blocks that the features do not need, and the norm and head; return plain indices."""
        take = super().prune_intermediate_layers(*args, **kwargs)
        if hasattr(self, "symbols") and not any(block.takes_symbols for block in self.blocks):  # type: ignore[union-attr]
            del self.symbols
            self.stem_names = tuple(name for name in self.stem_names if name != "symbols")
        return take


VARIANTS = {"zoo_dat_s": Variant({}, no_weights="the authors published none for images")}

_SMALL: dict[str, Any] = {"depth": 2, "embed_dim": 16, "num_heads": 4, "relational_heads": 2}
TINY = {"zoo_dat_s": _SMALL}

register_family(
    __name__,
    DualAttentionTransformer,
    VARIANTS,
    tiny=TINY,
    first_conv=(),
    pool_size=None,
    paper_ids="arXiv:2405.16727",
    origin_url="https://github.com/Awni00/dual-attention",
    license="mit",
)
