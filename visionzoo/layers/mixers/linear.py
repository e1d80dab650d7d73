"""Linear attention: features of queries and keys in place of the softmax, with what has been proposed for them."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from timm.layers import to_2tuple
from torch import Tensor, nn

from visionzoo.kernels import linear_attention
from visionzoo.kernels.precision import without_autocast
from visionzoo.layers.features import FEATURE_MAPS
from visionzoo.layers.fourier import irfft2, rfft2
from visionzoo.layers.mixers.base import Mixer
from visionzoo.layers.scores import OffsetTable


class LinearMixer(Mixer):
    """Every token attends to every token by products of features.

        yᵢ = φ(qᵢ)·(Σⱼ φ(kⱼ) vⱼᵀ) / φ(qᵢ)·Σⱼ φ(kⱼ)

    Time: O(N·C·F) for F features of a head; memory: O(N·(C + G·F)).

    out_i = Σ_j w_ij·v_j / Σ_j w_ij with w_ij = φ(q_i)·φ(k_j), computed as φ(q_i)·(Σ_j φ(k_j) v_jᵀ): no weight is held,
    and memory is O(N·(C + G·F)). Features, sums and states are float32 at least, whatever the input. What the
    literature calls

    - linear attention (arXiv:2006.16236) is `feature_map="elu"`, or "relu";
    - efficient attention (arXiv:1812.01243) is "softmax" with `denominator="count"`, and Latte without a causal mask
      (arXiv:2402.17512) is that with `key_dim` latents for each head and no biases;
      https://github.com/raresdolga/latte_transformer at 77d7e33 (MIT);
    - cosFormer (arXiv:2202.08791) is "cosformer", in two dimensions here;
    - Performer (arXiv:2009.14794) is "favor", its generalised attention "favor_relu"; their projections are buffers,
      which `visionzoo.layers.features.redraw_projections` draws anew;
    - linear log-normal attention (arXiv:2311.13541) is "log_normal", without the diagonal blocks that are beside it;
    - NormAttention (arXiv:2210.10340) is `denominator="rms_norm"`, here over each head;
    - kernelised attention with relative positions (arXiv:2106.12566) is `position_bias`: w_ij is multiplied by exp(b)
      with a learned b for each offset and head, by Fourier transforms of maps twice as high and wide;
      O(N·C·F·log N) and memory O(N·C·F): several tensors of 2 GiB for each image at 65,536 tokens with C = 64 and
      F = 32. Rounding is relative to the largest weight of a map.

    Args:
        dim: channels C.
        num_heads: attention heads.
        feature_map: φ, a name of `visionzoo.layers.features.FEATURE_MAPS`, which says more of each.
        qkv_bias: whether the projection to q, k, v has a bias.
        key_dim: width of queries and keys of a head; None for that of its values, C / G.
        num_features: features of "favor" and "favor_relu"; None for key_dim·log(key_dim), at least 1.
        denominator: "sum" of the weights; "count" for the number of keys N; "rms_norm" for the root mean square of
            what "count" gives over a head.
        position_bias: see above.
        map_size: side of the map that the numbers for offsets are for, or (height, width), None for 14; resized for
            others.

    Raises:
        ValueError: if a name is unknown, a number is not positive, or is given to a form that has no use for it.

    >>> LinearMixer(64, 2, feature_map="favor")(torch.randn(1, 5, 7, 64)).shape
    torch.Size([1, 5, 7, 64])
    """

    DENOMINATORS = ("sum", "count", "rms_norm")
    FUSED = ("relu", "elu", "softmax")  # feature maps that `visionzoo.kernels.linear_attention` computes
    EPS = 1e-6  # of the RMS norm
    EPS_OF_MEANS = 1e-14  # far below what `FeatureMap.denominator` adds to a mean over any number of keys

    def __init__(
        self,
        dim: int,
        num_heads: int | None = None,
        *,
        feature_map: str = "elu",
        qkv_bias: bool = True,
        key_dim: int | None = None,
        num_features: int | None = None,
        denominator: str = "sum",
        position_bias: bool = False,
        map_size: int | tuple[int, int] | None = None,
    ):
        super().__init__(dim, num_heads)
        if feature_map not in FEATURE_MAPS:
            raise ValueError(f"LinearMixer: unknown {feature_map=}, expected one of {tuple(FEATURE_MAPS)}")
        if denominator not in self.DENOMINATORS:
            raise ValueError(f"LinearMixer: unknown {denominator=}, expected one of {self.DENOMINATORS}")
        for name, number in (("key_dim", key_dim), ("num_features", num_features)):
            if number is not None and number < 1:
                raise ValueError(f"LinearMixer: {name} must be positive, got {name}={number}")
        kind = FEATURE_MAPS[feature_map]
        if num_features is not None and not kind.is_random:
            random = tuple(name for name, other in FEATURE_MAPS.items() if other.is_random)
            raise ValueError(f"LinearMixer: num_features is for feature_map of {random}, got {feature_map=}")
        if map_size is not None and not position_bias:
            raise ValueError(f"LinearMixer: map_size is for position_bias=True, got {map_size=} without")
        if map_size is not None and min(to_2tuple(map_size)) < 1:
            raise ValueError(f"LinearMixer: map_size must be positive, got {map_size=}")
        self.feature_map = feature_map
        self.denominator = denominator
        self.key_dim = self.head_dim if key_dim is None else key_dim
        count = max(1, int(self.key_dim * math.log(self.key_dim))) if num_features is None else num_features
        self.features = kind(self.key_dim, count)
        self.position_bias = OffsetTable(self.num_heads, map_size or 14, 0.0) if position_bias else None
        self.qkv = nn.Linear(dim, 2 * self.num_heads * self.key_dim + dim, bias=qkv_bias)
        self.proj = nn.Linear(dim, dim)

    @property
    def takes_prefix_tokens(self) -> bool:
        """Yes, where the tokens' places do not matter: any set of tokens will do."""
        return self.position_bias is None and not self.features.knows_places

    @property
    def takes_dropped_tokens(self) -> bool:
        """As it takes prefix tokens."""
        return self.takes_prefix_tokens

    def forward(self, x: Tensor, *, keep: Tensor | None = None) -> Tensor:
        """[B, H, W, C] to [B, H, W, C]; `keep` [B, N] is False for tokens that others do not see."""
        self.check_input(x)
        keys = self.num_heads * self.key_dim
        q, k, v = (t.unflatten(-1, (self.num_heads, -1)) for t in self.qkv(x).split([keys, keys, self.dim], -1))
        with without_autocast(x.device):
            out = self._attend(q, k, v, None if keep is None else keep[..., None, None])
        return self.proj(out.flatten(3).to(q.dtype))

    def _attend(self, q: Tensor, k: Tensor, v: Tensor, there: Tensor | None) -> Tensor:
        """[B, H, W, G, V] of queries, keys [B, H, W, G, D] and values; `there` as `FeatureMap` has it."""
        size = (q.shape[1], q.shape[2])
        tokens = size[0] * size[1]
        count: int | Tensor = tokens
        feature_map, features = self.feature_map, self.features
        if there is not None or self.position_bias is not None or feature_map not in self.FUSED:
            dtype = torch.promote_types(q.dtype, torch.float32)
            feature_map = "identity"
            q, k = features(q.flatten(1, 2).to(dtype), k.flatten(1, 2).to(dtype), size, there)
            if there is not None:
                count = there.sum(1, keepdim=True, dtype=dtype)  # [B, 1, 1, 1]
                k = k * (there * (tokens / count))  # means over N keys become those over the ones that are there
                v = v.masked_fill(~there.unflatten(1, size), 0)
            q, k = q.unflatten(1, size), k.unflatten(1, size)
        if self.position_bias is None:
            eps = self.EPS_OF_MEANS if features.added is None else features.added
            if self.denominator == "sum" and features.added is not None:
                return linear_attention(q, k, v, feature_map=feature_map, eps=eps)
            means, total = linear_attention(q, k, v, feature_map=feature_map, eps=eps, return_weights=True)
            sums = means * (total + eps)[..., None]
        else:
            sums, total = self._sums_by_offset(q, k, v)
        if self.denominator == "sum":
            return sums / features.denominator(total, count)[..., None]
        if self.denominator == "rms_norm":
            return sums * (sums.square().mean(-1, keepdim=True) + self.EPS).rsqrt()
        return sums

    def _sums_by_offset(self, q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Mean over the keys of values by weights, which are multiplied by exp of the table's numbers, and of weights.

        Of features [B, H, W, G, F] and values [B, H, W, G, V]: φ(q_i)·Σ_j c(j - i)·φ(k_j) v_jᵀ / N, and [B, H, W, G].
        """
        assert self.position_bias is not None
        height, width = size = (q.shape[1], q.shape[2])
        factors = self.position_bias.resized(size, q.dtype).exp()  # [2H - 1, 2W - 1, G]
        # offset o at o modulo twice the side
        factors = F.pad(factors, (0, 0, 0, 1, 0, 1)).roll((1 - height, 1 - width), (0, 1))
        v = v.to(q.dtype)
        terms = (
            k[..., :, None] * torch.cat([v, torch.ones_like(v[..., :1])], -1)[..., None, :]
        )  # [B, H, W, G, F, V + 1]
        spectrum = rfft2(F.pad(terms.flatten(3), (0, 0, 0, width, 0, height))).unflatten(-1, (self.num_heads, -1))
        spectrum = spectrum * rfft2(factors[None]).conj()[..., None]
        # transforms are orthonormal: a product of two lacks the root of the size, and a mean is over N
        scale = (4 * height * width) ** 0.5 / (height * width)
        state = irfft2(spectrum.flatten(3), 2 * width)[:, :height, :width] * scale
        state = state.unflatten(-1, (self.num_heads, k.shape[-1], -1))
        out, total = (q[..., None, :] @ state).squeeze(-2).split([v.shape[-1], 1], -1)
        return out, total.squeeze(-1).clamp(min=0)  # no weight is negative; rounding of transforms may be
