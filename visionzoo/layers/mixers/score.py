"""Attention of all tokens to all whose score and normalizer are options: softmax and what has been put in its place."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from timm.layers import to_2tuple
from torch import Tensor, nn

from visionzoo.former_names import take_former_keys, with_former_names
from visionzoo.kernels import score_attention
from visionzoo.kernels.dispatch import choose
from visionzoo.kernels.precision import without_autocast
from visionzoo.kernels.score_attention.api import NORMALIZERS as KERNELS
from visionzoo.layers.attention import attend, record_weights, recording, uniform_attention
from visionzoo.layers.mixers.base import Mixer
from visionzoo.layers.norm import LayerNorm
from visionzoo.layers.normalizers import NORMALIZERS, SHIFT_INVARIANT, Standardize, build_normalizer, softmax
from visionzoo.layers.outputs import recomputed
from visionzoo.layers.scores import (
    GatedRmsNorm,
    HeadMix,
    HeadRmsNorm,
    NeuralScore,
    OffsetTable,
    Rows,
    ScoreConv,
    UnitHeads,
    collisions,
    inverse_distances,
    linear,
    squared_distances,
)

MAX_SCORES = 2**26  # that are held at once; of more, queries come in portions, and again in the backward pass


class ScoreMixer(Mixer):
    """Every token weighs every token: weights are a normalizer of scores of query and key.

        yᵢ = Σⱼ normalizer(score(qᵢ, ·))ⱼ vⱼ

    Time: O(N²·C); memory: O(N·C), with about 2²⁶ scores at once.

    out_i = Σ_j w_ij·v_j, w_i = normalizer(s_i), s_ij = score(q_i, k_j). About 2²⁶ scores are held at once: of larger
    maps queries come in portions, once more in the backward pass, so that time grows with N² and memory with N. Under
    torch.compile and in exported files all are held. Plain softmax is torch's own function. Where Triton runs,
    "sigmoid", "relu", "signed_softmax", "softplus" and "taylor" of "dot" scores are left to kernels that hold none
    (`visionzoo.kernels.score_attention`), unless heads, offsets or neighbors are mixed in. Scores, weights and sums are
    float32 at least. What the literature calls

    - sigmoid attention (arXiv:2409.04431) is `normalizer="sigmoid"`, with `qk_norm="layer_norm"` where training is not
      stable; facts from https://github.com/apple/ml-sigmoid-attention at 9273b49 (Apple's sample code license);
    - sparsemax (arXiv:1602.02068), entmax-1.5 (arXiv:1905.05702), and α-entmax with an α that each head learns
      (arXiv:1909.00015) are "sparsemax", "entmax15" and "entmax"; https://github.com/deep-spin/entmax at c2bec6d (MIT);
    - ReLA (arXiv:2104.07012) is "relu", then a gated RMS norm over C; https://github.com/bzhangGo/zero at d97e2c2
      (BSD-3-Clause);
    - Cog attention (arXiv:2411.07176) is "signed_softmax"; https://github.com/trestad/CogAttn at efecf29 (none given);
    - normalized attention (NAP, arXiv:2005.09561) is "standardize", then a layer norm over C and GELU;
      https://github.com/OliverRichter/normalized-attention at 0ea196d (none given);
    - Taylor softmax as in TaylorShift (arXiv:2403.02920) is "taylor" with `qk_norm="l2"`, whose linear form
      `TaylorShiftMixer` has as well; https://github.com/tobna/TaylorShift at b290faa (MIT);
    - inverse distance weighting (arXiv:2310.18805) is `score="inverse_distance"`;
      https://github.com/calvinmccarter/idw-attention at 35aabf7 (AGPL-3.0; formula only);
    - probabilistic attention (arXiv:2106.15338) is `score="gaussian"`; with scores of "dot" it is softmax;
      https://github.com/apple/ml-probabilistic-attention at 2945e06 (Apple's sample code license);
    - YOSO (arXiv:2111.09714) in expectation over its hash functions is `score="collision"`, whose heads' outputs come
      to length 1; https://github.com/mlpen/YOSO at 6000487 (no license), `yoso_e`; without its convolution of values;
    - neural attention (arXiv:2502.17206) is `score="neural"`; O(N²·C·p) with p = `hidden_dim`;
      https://github.com/awayfromzel/neural-attention-research at f6572f5 (MIT);
    - selective attention (arXiv:2411.12892) is a `temperature`; https://github.com/umich-sota/selective_attention at
      4ea6520 (Apache-2.0), which has the one of positions;
    - multi-token attention (MTA, arXiv:2504.00927) is `query_kernel`, `key_kernel` and the like; O(N²·(C + G·k²)) with
      k² products for each score; https://github.com/facebookresearch/RAM at e6f051f (MIT);
    - URPE (arXiv:2205.13401) is `offset_factor`; https://github.com/lsj2408/URPE at 47b711f (MIT).

    Theirs are of rows of tokens; on maps the kernels of MTA are squares, the offsets of URPE have two coordinates, and
    for selective attention every query sees N keys. On a map of one row this is their layer.

    Args:
        dim: channels C.
        num_heads: attention heads.
        score: "dot" for q·k / √D, "inverse_distance" for -log(ε + |q - k|^power), "gaussian" for -|q - k|² / (2·√D),
            "collision" for τ·log(1 - arccos(0.98·cos(q, k)) / π), or "neural" for an MLP of both. Distances and
            collisions take normalizers that shifts do not change.
        normalizer: a name of `visionzoo.layers.normalizers.NORMALIZERS`.
        qkv_bias: whether the projection to q, k, v has a bias.
        kv_heads: heads of keys and values, see `Mixer`.
        qk_norm: "none", "layer_norm" over D, or "l2": q and k are divided by their lengths, and a factor that each head
            learns, 1 at the start, stands in place of 1 / √D (scores of "dot" only).
        temperature: "none"; "position" for scores times 1 + exp(-exp(β))·log N with a learned β; "query" for this plus
            tanh of a linear map of the query's token, 0 at the start.
        position_bias: add a learned number to the scores, for each offset and head.
        offset_factor: multiply the weights by a learned number for each offset and head.
        map_size: side of the map that the numbers for offsets are for, or (height, width); resized for others.
        query_kernel: side of the square of queries over which a convolution of the scores goes; None for 1.
        key_kernel: the same for the keys. No convolution where both are None.
        weight_query_kernel: the same for a convolution of the weights.
        weight_key_kernel: the same for a convolution of the weights.
        query_padding: "both" for squares around the query, of odd sides; "before" for those that end in it.
        key_padding: the same for the keys, or "after" for squares that start at the key.
        score_groups: how many heads are a group whose scores are mixed; all where there are fewer; None for none.
        weight_groups: the same for the weights.
        hidden_dim: p of neural scores, at least 2; None for max(2, D // 32).
        hash_length: τ of collisions, the bits of a hash.
        power: of inverse distances.
        eps: ε of inverse distances.
        key_steps: of "gaussian": how often keys move to the mean of the queries that look at them.
        key_precision: of "gaussian": each head learns to read from a token how precise its key is, in (0, 2) times
            1 / √D, which it is at the start.
        value_precision: of "gaussian": a key's value counts by its distance to the query's own, this times the
            precision of the key; 0 for not.
        output_norm: before the output projection: "gated_rms" or "layer_norm" (ε 1e-3) over C, "head_rms" over D (ε
            1e-5), as MTA may have it, or "gated_head_rms", which also gates each head by a number that it learns to
            read from it, "unit", which brings each head to length 1, or "none". None is what the paper has:
            "gated_rms" after "relu", "layer_norm" after "standardize", "unit" after scores of "collision". Without a
            norm, sums over N keys can pass what float16 holds.
        output_gelu: whether a GELU comes then; None for after "standardize" only.

    Raises:
        ValueError: if the heads do not divide the channels, a name is unknown, a number is out of range, or an option
            is for another score.

    >>> import torch
    >>> ScoreMixer(64, 2, normalizer="sparsemax")(torch.randn(1, 5, 7, 64)).shape
    torch.Size([1, 5, 7, 64])
    """

    SCORE_MAP = True
    SCORES = ("dot", "gaussian", "inverse_distance", "collision", "neural")
    QK_NORMS = ("none", "l2", "layer_norm")
    TEMPERATURES = ("none", "position", "query")
    OUTPUT_NORMS = ("none", "gated_rms", "layer_norm", "head_rms", "gated_head_rms", "unit")
    RELAXES = True

    @with_former_names({"normalizer": {"standardise": "standardize"}}, normaliser="normalizer")
    def __init__(
        self,
        dim: int,
        num_heads: int | None = None,
        *,
        score: str = "dot",
        normalizer: str = "softmax",
        qkv_bias: bool = True,
        qk_norm: str = "none",
        temperature: str = "none",
        position_bias: bool = False,
        offset_factor: bool = False,
        map_size: int | tuple[int, int] = 14,
        query_kernel: int | None = None,
        key_kernel: int | None = None,
        weight_query_kernel: int | None = None,
        weight_key_kernel: int | None = None,
        query_padding: str = "both",
        key_padding: str = "both",
        score_groups: int | None = None,
        weight_groups: int | None = None,
        hidden_dim: int | None = None,
        hash_length: int = 9,
        power: float = 2.0,
        eps: float = 1e-3,
        key_steps: int = 0,
        key_precision: bool = False,
        value_precision: float = 0.0,
        output_norm: str | None = None,
        output_gelu: bool | None = None,
        kv_heads: int | None = None,
    ):
        super().__init__(dim, num_heads, kv_heads=kv_heads)
        if output_norm is None:
            own = {"relu": "gated_rms", "standardize": "layer_norm"}
            output_norm = "unit" if score == "collision" else own.get(normalizer, "none")
        output_gelu = normalizer == "standardize" if output_gelu is None else output_gelu
        self._check_name(score=score, expected=self.SCORES)
        self._check_name(normalizer=normalizer, expected=tuple(NORMALIZERS))
        self._check_name(qk_norm=qk_norm, expected=self.QK_NORMS)
        self._check_name(temperature=temperature, expected=self.TEMPERATURES)
        self._check_name(query_padding=query_padding, expected=ScoreConv.PADDINGS)
        self._check_name(key_padding=key_padding, expected=ScoreConv.KEY_PADDINGS)
        self._check_name(output_norm=output_norm, expected=self.OUTPUT_NORMS)
        if score in ("collision", "gaussian", "inverse_distance") and normalizer not in SHIFT_INVARIANT:
            raise ValueError(
                f"ScoreMixer: scores of distances and collisions take a normalizer of {SHIFT_INVARIANT}, got {score=} "
                f"and {normalizer=}"
            )
        if qk_norm == "l2" and score != "dot":
            raise ValueError(f"ScoreMixer: qk_norm='l2' is for scores of 'dot', got {score=}")
        offsets = position_bias or offset_factor
        query_kernels = query_kernel is not None or weight_query_kernel is not None
        key_kernels = key_kernel is not None or weight_key_kernel is not None
        for fits, owner, name, value, default in (
            (score == "neural", "score='neural'", "hidden_dim", hidden_dim, None),
            (score == "collision", "score='collision'", "hash_length", hash_length, 9),
            (score == "inverse_distance", "score='inverse_distance'", "power", power, 2.0),
            (score == "inverse_distance", "score='inverse_distance'", "eps", eps, 1e-3),
            (score == "gaussian", "score='gaussian'", "key_steps", key_steps, 0),
            (score == "gaussian", "score='gaussian'", "key_precision", key_precision, False),
            (score == "gaussian", "score='gaussian'", "value_precision", value_precision, 0.0),
            (offsets, "position_bias or offset_factor", "map_size", map_size, 14),
            (query_kernels, "query_kernel or weight_query_kernel", "query_padding", query_padding, "both"),
            (key_kernels, "key_kernel or weight_key_kernel", "key_padding", key_padding, "both"),
        ):
            if not fits and value != default:
                raise ValueError(
                    f"ScoreMixer: {name} is for {owner}, which is not given, got {name}={value!r}; leave it out"
                )
        if min(to_2tuple(map_size)) < 1:
            raise ValueError(f"ScoreMixer: map_size must be positive, got {map_size=}")
        if hidden_dim is not None and hidden_dim < 2:
            raise ValueError(f"ScoreMixer: hidden_dim must be at least 2, got {hidden_dim=}")
        if hash_length < 1:
            raise ValueError(f"ScoreMixer: hash_length must be positive, got {hash_length=}")
        if not (0 < power < float("inf") and 0 < eps < float("inf")):
            raise ValueError(f"ScoreMixer: power and eps must be positive, got {power=} and {eps=}")
        if key_steps < 0 or not 0 <= value_precision < float("inf"):
            raise ValueError(
                f"ScoreMixer: key_steps and value_precision must not be negative, got {key_steps=} and "
                f"{value_precision=}"
            )
        self.score, self.hash_length = score, hash_length
        self.power, self.eps, self.key_steps, self.value_precision = power, eps, key_steps, value_precision

        self.qkv = nn.Linear(dim, self.qkv_dim, bias=qkv_bias)
        normed = qk_norm == "layer_norm"
        self.q_norm = LayerNorm(self.head_dim) if normed else nn.Identity()
        self.k_norm = LayerNorm(self.head_dim) if normed else nn.Identity()
        self.qk_scale = nn.Parameter(torch.ones(self.num_heads)) if qk_norm == "l2" else None
        self.beta = nn.Parameter(torch.tensor(1.5)) if temperature != "none" else None
        self.temperature = nn.Linear(dim, self.num_heads) if temperature == "query" else None
        self.precision = nn.Linear(dim, self.num_heads) if key_precision else None
        hidden_dim = max(2, self.head_dim // 32) if hidden_dim is None else hidden_dim
        self.neural = NeuralScore(self.head_dim, hidden_dim) if score == "neural" else None
        padding = {"query_padding": query_padding, "key_padding": key_padding}
        self.score_conv = self._conv("", query_kernel, key_kernel, padding)
        self.score_mix = self._head_mix(score_groups=score_groups)
        self.position_bias = OffsetTable(self.num_heads, map_size, 0.0) if position_bias else None
        self.normalizer_name = normalizer
        self.normalizer = build_normalizer(normalizer, self.num_heads)
        take_former_keys(self)
        self.weight_conv = self._conv("weight_", weight_query_kernel, weight_key_kernel, padding)
        self.weight_mix = self._head_mix(weight_groups=weight_groups)
        self.offset_factor = OffsetTable(self.num_heads, map_size, 1.0) if offset_factor else None
        self.output_norm: nn.Module = nn.Identity()
        if output_norm == "gated_rms":
            self.output_norm = GatedRmsNorm(dim)
        elif output_norm == "layer_norm":
            self.output_norm = LayerNorm(dim, eps=1e-3)
        elif output_norm in ("head_rms", "gated_head_rms"):
            self.output_norm = HeadRmsNorm(self.head_dim, gated=output_norm == "gated_head_rms")
        elif output_norm == "unit":
            self.output_norm = UnitHeads(self.num_heads)
        self.output_gelu = output_gelu
        self.proj = nn.Linear(dim, dim)
        for layer in (self.temperature, self.precision):
            if layer is not None:
                nn.init.zeros_(layer.weight)
                nn.init.zeros_(layer.bias)
        # How much more than the scores a portion holds.
        self._held = hidden_dim if score == "neural" else 2 if self.score_conv or self.weight_conv else 1

    def _check_name(self, *, expected: Sequence[str], **given: str) -> None:
        for name, value in given.items():
            if value not in expected:
                raise ValueError(f"ScoreMixer: unknown {name}={value!r}, expected one of {tuple(expected)}")

    def _conv(self, prefix: str, query: int | None, key: int | None, padding: dict[str, str]) -> ScoreConv | None:
        if query is None and key is None:
            return None
        query, key = (1 if kernel is None else kernel for kernel in (query, key))
        for name, kernel in (("query", query), ("key", key)):
            odd = padding[f"{name}_padding"] == "both"
            if kernel < 1 or (odd and kernel % 2 == 0):
                raise ValueError(
                    f"ScoreMixer: {prefix}{name}_kernel must be positive, and odd where {name}_padding='both', got "
                    f"{prefix}{name}_kernel={kernel}"
                )
        return ScoreConv(self.num_heads, query, key, **padding)

    def _head_mix(self, **given: int | None) -> HeadMix | None:
        (name, size), *_ = given.items()
        if size is None:
            return None
        group = min(size, self.num_heads)
        if size < 1 or self.num_heads % group:
            raise ValueError(
                f"ScoreMixer: {name} must divide num_heads, got {name}={size} and num_heads={self.num_heads}"
            )
        return HeadMix(self.num_heads, group)

    @property
    def takes_prefix_tokens(self) -> bool:
        """Yes, but where offsets or neighbors on the map count."""
        return not any((self.score_conv, self.weight_conv, self.position_bias, self.offset_factor))

    def forward(self, x: Tensor) -> Tensor:
        """[B, H, W, C] to [B, H, W, C]."""
        self.check_input(x)
        wide = torch.promote_types(x.dtype, torch.float32)
        q, k, v = self.split_heads(self.qkv(x))
        q, k = self.q_norm(q), self.k_norm(k)
        q, k, v = (t.flatten(1, 2).transpose(1, 2) for t in (q, k, v))  # [B, G, N, D]
        with without_autocast(x.device):
            tokens = x.flatten(1, 2).to(wide)
            if not recording() and self._has_kernels_for(self._map(q, x)):
                out = self._attend_fused(q, k, v, tokens, x)
            elif self.is_plain:
                q = q if self.beta is None else q * self._temperatures(tokens).to(q.dtype)
                out = attend(q, k, v).to(wide)
            else:
                q, k, v = (t.to(wide) for t in (q, k, v))
                out = self._attend(q, k, v, tokens, (x.shape[1], x.shape[2]))
            out = self.relax(out, lambda: uniform_attention(v).to(wide))
            out = out.transpose(1, 2).reshape(x.shape)
            out = self.output_norm(out)
            if self.output_gelu:
                out = F.gelu(out, approximate="tanh")
        return self.proj(out.to(x.dtype))

    @property
    def is_plain(self) -> bool:
        """Whether this is softmax of products of queries and keys, which torch's own function computes."""
        return self.normalizer is softmax and self.qk_scale is None and self._is_of_products

    @property
    def has_kernels(self) -> bool:
        """Whether the weights are all that `visionzoo.kernels.score_attention` computes."""
        return self.normalizer_name in KERNELS and self._is_of_products

    def _has_kernels_for(self, q: Tensor) -> bool:
        """Whether these kernels run on queries [B, H, W, G, D]; the portions here are better than their reference."""
        return self.has_kernels and choose("score_attention", "auto", q, tell=False) == "triton"

    @property
    def _is_of_products(self) -> bool:
        """Whether scores are products of queries and keys, and weights a function of a query's scores."""
        changes = (
            *(self.score_conv, self.score_mix, self.position_bias),
            *(self.weight_conv, self.weight_mix, self.offset_factor),
        )
        return self.score == "dot" and all(part is None for part in changes)

    def _temperatures(self, tokens: Tensor) -> Tensor:
        """Return what the scores of the queries are multiplied by, [B, G, N, 1] or a scalar, of tokens [B, N, C]."""
        if self.beta is None:
            return tokens.new_ones(())
        factor = 1 + (-self.beta.to(tokens.dtype).exp()).exp() * tokens.new_full((), tokens.shape[1]).log()
        if self.temperature is not None:
            factor = factor + linear(self.temperature, tokens).tanh().transpose(1, 2)[..., None]
        return factor

    @staticmethod
    def _map(t: Tensor, x: Tensor) -> Tensor:
        """[B, G, N, D] to [B, H, W, G, D], for the map x."""
        return t.transpose(1, 2).unflatten(1, x.shape[1:3])

    def _unit(self, q: Tensor, k: Tensor) -> tuple[Tensor, Tensor]:
        """Return queries and keys of length 1, the queries times the factor of their head."""
        assert self.qk_scale is not None
        q, k = F.normalize(q, dim=-1, eps=1e-12), F.normalize(k, dim=-1, eps=1e-12)
        return q * self.qk_scale.to(q.dtype)[:, None, None], k

    def _attend_fused(self, q: Tensor, k: Tensor, v: Tensor, tokens: Tensor, x: Tensor) -> Tensor:
        """As `_attend`, by kernels: products are of the dtype of v, factors of queries too."""
        scale = None
        if self.qk_scale is not None:
            q, k = (t.to(v.dtype) for t in self._unit(q.to(tokens.dtype), k.to(tokens.dtype)))
            scale = 1.0
        if self.beta is not None:
            q = q * self._temperatures(tokens).to(q.dtype)
        normed = not isinstance(self.output_norm, nn.Identity)
        out = score_attention(
            *(self._map(t, x) for t in (q, k, v)),
            normalizer=self.normalizer_name,
            scale=scale,
            dtype=tokens.dtype if normed else None,  # sums that pass what float16 holds, before a norm
        )
        return out.flatten(1, 2).transpose(1, 2).to(tokens.dtype)

    def _attend(self, q: Tensor, k: Tensor, v: Tensor, tokens: Tensor, size: tuple[int, int]) -> Tensor:
        """[B, G, N, D] of queries, keys and values of that shape, and of tokens [B, N, C] of a map of this size."""
        if self.qk_scale is not None:
            q, k = self._unit(q, k)
        elif self.score == "dot" and not isinstance(self.normalizer, Standardize):  # to which no factor matters
            q = q * self.head_dim**-0.5
        temperatures = self._temperatures(tokens)
        if self.score == "gaussian":
            precision = tokens.new_full((), self.head_dim**-0.5)
            if self.precision is not None:
                precision = precision * 2 * linear(self.precision, tokens).sigmoid().transpose(1, 2)[:, :, None]
            for _ in range(self.key_steps):
                k = self._moved(q, k, self._rows(self._scores(q, k, v, precision), temperatures, size), size)
        else:
            precision = None
        rows = self._rows(self._scores(q, k, v, precision), temperatures, size)
        if recording():
            record_weights(rows(0, q.shape[2]))
        return self._in_portions(lambda start, stop: rows(start, stop) @ v, q, size)

    def _scores(self, q: Tensor, k: Tensor, v: Tensor, precision: Tensor | None) -> Rows:
        def scores(start: int, stop: int) -> Tensor:
            queries = q[:, :, start:stop]
            if self.neural is not None:
                return self.neural(queries, k)
            if self.score == "collision":
                return collisions(queries, k, self.hash_length)
            if self.score == "inverse_distance":
                return inverse_distances(queries, k, self.power, self.eps)
            if precision is None:
                return queries @ k.transpose(-2, -1)
            distances = squared_distances(queries, k)
            if self.value_precision:
                distances = distances + self.value_precision * squared_distances(v[:, :, start:stop], v)
            return distances * (-precision / 2)

        return scores

    def _rows(self, scores: Rows, temperatures: Tensor, size: tuple[int, int]) -> Rows:
        """Return what gives the weights of queries, of what gives their scores."""

        def scaled(start: int, stop: int) -> Tensor:
            some = temperatures if temperatures.ndim == 0 else temperatures[:, :, start:stop]
            return scores(start, stop) if self.beta is None else scores(start, stop) * some

        convolved = scaled if self.score_conv is None else self.score_conv.over(scaled, size)

        def weights(start: int, stop: int) -> Tensor:
            values = convolved(start, stop)
            if self.score_mix is not None:
                values = self.score_mix(values)
            if self.position_bias is not None:
                values = values + self.position_bias(size, start, stop, values.dtype)
            return self.normalizer(values)

        mixed = weights if self.weight_conv is None else self.weight_conv.over(weights, size)

        def finished(start: int, stop: int) -> Tensor:
            values = mixed(start, stop)
            if self.weight_mix is not None:
                values = self.weight_mix(values)
            if self.offset_factor is not None:
                values = values * self.offset_factor(size, start, stop, values.dtype)
            return values

        return finished

    def _moved(self, q: Tensor, k: Tensor, rows: Rows, size: tuple[int, int]) -> Tensor:
        """Return keys, each the mean of the queries by the weights that they give it; those with hardly any stay."""

        def sums(start: int, stop: int) -> Tensor:
            queries = q[:, :, start:stop]
            return rows(start, stop).transpose(-2, -1) @ torch.cat([queries, torch.ones_like(queries[..., :1])], -1)

        total = self._in_portions(sums, q, size, add=True)
        total, count = total.split((total.shape[-1] - 1, 1), -1)
        given = count > torch.finfo(count.dtype).tiny ** 0.75  # of less, derivatives would overflow
        return torch.where(given, total / torch.where(given, count, 1), k)

    def _in_portions(self, function: Rows, q: Tensor, size: tuple[int, int], *, add: bool = False) -> Tensor:
        # The convolutions of a portion see queries around it, which are to be no more than it has itself.
        least = max([1, *(sum(conv.halo(size[1])) for conv in (self.score_conv, self.weight_conv) if conv)])
        return in_portions(function, q, held=self._held, least=least, add=add)


def in_portions(function: Rows, q: Tensor, *, held: int = 1, least: int = 1, add: bool = False) -> Tensor:
    """Call a function of queries, as many at once as `MAX_SCORES` allows, and put together or add the results.

    Args:
        function: of the first query and the one behind the last; it sees them and as many keys as there are queries.
        q: all queries [B, G, N, D].
        held: how much more than the scores a portion holds.
        least: queries of a portion, except for the last.
        add: whether results are added; otherwise they are put together along N.

    Returns:
        What the function gives for all queries; portions are computed once more in the backward pass.
    """
    batch, heads, count = q.shape[:3]
    # Compilers would unroll the portions, for only one size of maps.
    if torch.compiler.is_compiling() or batch * heads * count * count * held <= MAX_SCORES:
        return function(0, count)
    step = max(least, MAX_SCORES // (batch * heads * count * held))
    parts = [recomputed(function, start, min(start + step, count)) for start in range(0, count, step)]
    return sum(parts[1:], parts[0]) if add else torch.cat(parts, 2)
