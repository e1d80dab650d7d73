"""Attention whose products are of quantized factors, and the reparameterization of queries and keys.

Facts from https://github.com/nbasyl/OFQ at 7ed37d1 (MIT), src/quantization/modules/attention.py.
"""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn

from visionzoo.layers.attention import record_weights
from visionzoo.quantization.layers import weight_quantizer
from visionzoo.quantization.quantizers import LSQ


class QuantizedProducts(nn.Module):
    """Softmax attention of quantized queries, keys, values and weights, all scores at once.

        yᵢ = Σⱼ Q(softmaxⱼ(Q(qᵢ)·Q(kⱼ) / √D + bᵢⱼ)) Q(vⱼ)

    Keys and queries share one scale each, or have one for each token as in the authors' code, which takes images of one
    size; values have one for each channel.

    Args:
        num_heads: G.
        head_dim: D, width of a value.
        bits: of all four.
        key_dim: width of keys; None for D.
        quantize_queries: whether queries are quantized here; those of `QueryKeyProjection` are so already.
        tokens: number N of tokens with scales of their own, of all images; None for shared scales.
    """

    def __init__(
        self,
        num_heads: int,
        head_dim: int,
        bits: int,
        *,
        key_dim: int | None = None,
        quantize_queries: bool = True,
        tokens: int | None = None,
    ):
        super().__init__()
        each = () if tokens is None else (tokens, 1)
        keys = (num_heads, *each) if each and not quantize_queries else each
        self.quantize_q = LSQ(bits, each, shift=(num_heads, 1, head_dim)) if quantize_queries else None
        self.quantize_k = LSQ(bits, keys, shift=(num_heads, 1, key_dim or head_dim))
        self.quantize_v = LSQ(bits, (num_heads, 1, head_dim), shift=(num_heads, 1, head_dim))
        self.quantize_weights = LSQ(bits, each, signed=False)

    def forward(self, q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None = None) -> Tensor:
        """Attend.

        Args:
            q: queries [..., G, N, D'].
            k: keys [..., G, M, D'].
            v: values [..., G, M, D].
            bias: of the scaled scores, broadcast to [..., G, N, M]; None for none.

        Returns:
            [..., G, N, D].
        """
        q = q if self.quantize_q is None else self.quantize_q(q)
        scores = q @ self.quantize_k(k).mT * v.shape[-1] ** -0.5
        if bias is not None:
            scores = scores + bias
        weights = self.quantize_weights(scores.softmax(-1))
        record_weights(weights)
        return weights @ self.quantize_v(v)


class QueryKeyProjection(nn.Module):
    """The projection to q, k and v, where the product of the two former's weights is what is quantized.

    Two quantized weights whose product counts move each other's scores where one of them oscillates between levels. So
    here, for a head, xᵢᵀ Q(W_qᵀ W_k) xⱼ takes the place of (Q(W_q) xᵢ)ᵀ Q(W_k) xⱼ: queries are the quantized input, all
    heads' alike, and keys are of its width C. Biases of queries and keys have no part. Heads then cost C/D as much.

    Args:
        qkv: projection to (q, k, v) x heads, whose tensors are taken over.
        num_heads: G.
        weights: bits of the weights.
        activations: bits of the input.
        kind: of the weights' quantizers.
        tokens: see `QuantizedProducts`.
    """

    def __init__(
        self,
        qkv: nn.Linear,
        num_heads: int,
        weights: int,
        activations: int,
        *,
        kind: str = "statsq",
        tokens: int | None = None,
    ):
        super().__init__()
        self.num_heads, self.dim = num_heads, qkv.in_features
        self.weight, self.bias = qkv.weight, qkv.bias
        like = self.weight.detach()
        self.quantize_product = weight_quantizer(kind, weights, like.new_empty(num_heads * self.dim, self.dim))
        self.quantize_weight = weight_quantizer(kind, weights, self._parts()[1])
        self.quantize_input = LSQ(activations, () if tokens is None else (tokens, 1), shift=(self.dim,))
        self.to(like.device, like.dtype)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """[..., C] to queries and keys [..., G, C] and values [..., G, D]."""
        product, value = self._parts()
        x = self.quantize_input(x)
        bias = None if self.bias is None else self.bias[-len(value) :]
        v = F.linear(x, self.quantize_weight(value), bias)
        k = F.linear(x, self.quantize_product(product))
        heads = (self.num_heads, -1)
        return x.unsqueeze(-2).expand(*x.shape[:-1], *heads), k.unflatten(-1, heads), v.unflatten(-1, heads)

    def _parts(self) -> tuple[Tensor, Tensor]:
        """Return W_qᵀ W_k [G·C, C] and W_v [G·D, C]."""
        q, k, v = self.weight.chunk(3)
        q, k = (t.unflatten(0, (self.num_heads, -1)) for t in (q, k))  # [G, D, C]
        return (q.mT @ k).flatten(0, 1), v
