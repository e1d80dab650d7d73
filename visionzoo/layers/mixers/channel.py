"""Channel-group attention (DaViT, arXiv:2204.03645): channels attend to channels, over all positions."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from visionzoo.former_names import take_former_keys, with_former_names
from visionzoo.kernels import channel_attention
from visionzoo.kernels.precision import without_autocast
from visionzoo.layers.mixers.base import Mixer, zero_dropped
from visionzoo.layers.nhwc import on_nchw
from visionzoo.layers.normalizers import NORMALIZERS, build_normalizer, softmax


class ChannelMixer(Mixer):
    """Attention between the channels of each head, with whole maps as their features.

        y = (softmax(D^-½ kᵀ v) qᵀ)ᵀ, for each head

    Time: O(N·C·D); memory: O(N·C).

    With q, k, v as [N, D] matrices of one head the output is (softmax(D^-½ kᵀ v) qᵀ)ᵀ: as released, q plays the part
    that v has elsewhere, and the scale is that of the head width, not of the token count. Scores are sums over all
    positions, which on large maps outgrow float16, so from such inputs they are float32; softmax is float32 at least,
    the rest in the dtype of the input or of autocast.

    Restoration networks have it with a convolution of q, k and v, scores that are cosines times a temperature τ, and
    other normalizers: n(τ k̂ᵀ v̂) in place of the softmax. With `qkv_kernel=3, qk_norm="l2"` and no biases it is

    - MDTA (Restormer, arXiv:2111.09881) with "softmax";
    - TKSA (DRSformer, arXiv:2303.11950) with "topk_softmax"; https://github.com/cschenxiang/DRSformer at e77bbb4 (no
      license);
    - SparseGSA (DLGSANet, arXiv:2301.02031) with "relu"; https://github.com/NeonLeexiang/DLGSANet at 0974b9a
      (Apache-2.0), whose windows at test time are left out.

    The rows of their `qkv` come as values, queries, keys here. All but softmax without `qk_norm` hold the scores
    [B, G, D, D], in float32 at least.

    Facts from https://github.com/dingmyu/davit at fc79470 (MIT).

    Args:
        dim: channels C.
        num_heads: channel groups.
        qkv_bias: whether the projection to q, k, v (and its convolution) has a bias.
        qkv_kernel: side of a depthwise convolution of q, k and v, with zeros around the map; None for none.
        qk_norm: "none", or "l2": channels of unit length over all positions (1e-12 at least) and a factor per head,
            1 at the start, in place of D^-½.
        normalizer: of the scores, a name of `visionzoo.layers.normalizers.NORMALIZERS`; "keys" are the D channels.
        proj_bias: whether the output projection has a bias.

    Raises:
        ValueError: if the heads do not divide the channels, the kernel is even or not positive, or a name is unknown.

    >>> import torch
    >>> ChannelMixer(64, 2)(torch.randn(1, 5, 7, 64)).shape
    torch.Size([1, 5, 7, 64])
    """

    QK_NORMS = ("none", "l2")

    @with_former_names({"normalizer": {"standardise": "standardize"}}, normaliser="normalizer")
    def __init__(
        self,
        dim: int,
        num_heads: int | None = None,
        *,
        qkv_bias: bool = True,
        qkv_kernel: int | None = None,
        qk_norm: str = "none",
        normalizer: str = "softmax",
        proj_bias: bool = True,
    ):
        super().__init__(dim, num_heads)
        self.check_kernels(qkv_kernel=qkv_kernel)
        for name, value, names in (
            ("qk_norm", qk_norm, self.QK_NORMS),
            ("normalizer", normalizer, tuple(NORMALIZERS)),
        ):
            if value not in names:
                raise ValueError(f"ChannelMixer: unknown {name}={value!r}, expected one of {names}")
        self.qkv = nn.Linear(dim, 3 * dim, bias=qkv_bias)
        self.qkv_conv = (
            None
            if qkv_kernel is None
            else nn.Conv2d(3 * dim, 3 * dim, qkv_kernel, padding=qkv_kernel // 2, groups=3 * dim, bias=qkv_bias)
        )
        self.temperature = nn.Parameter(torch.ones(self.num_heads)) if qk_norm == "l2" else None
        self.normalizer = build_normalizer(normalizer, self.num_heads)
        self.proj = nn.Linear(dim, dim, bias=proj_bias)
        take_former_keys(self)

    @property
    def takes_prefix_tokens(self) -> bool:
        """Yes, tokens are features here, however many; but where they are convolved."""
        return self.qkv_conv is None

    @property
    def takes_dropped_tokens(self) -> bool:
        """Yes, keys of zeros add nothing; but where tokens are convolved."""
        return self.qkv_conv is None

    def forward(self, x: Tensor, *, keep: Tensor | None = None) -> Tensor:
        """[B, H, W, C] to [B, H, W, C]; `keep` [B, N] is False for tokens that others do not see."""
        self.check_input(x)
        qkv = self.qkv(x)
        if self.qkv_conv is not None:
            qkv = on_nchw(self.qkv_conv, qkv)
        q, k, v = self.split_heads(qkv)
        k = zero_dropped(k, keep)
        if self.normalizer is softmax and self.temperature is None:
            out = channel_attention(q, k, v)
        else:
            out = self._attend(q, k, zero_dropped(v, keep))
        return self.proj(out.flatten(3))

    def _attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """Return what `channel_attention` would with these scores and this normalizer, of [B, H, W, G, D]."""
        size, dtype = q.shape[1:3], q.dtype
        wide = torch.promote_types(dtype, torch.float32)
        q, k, v = (t.to(wide).flatten(1, 2).permute(0, 2, 3, 1) for t in (q, k, v))  # [B, G, D, N]
        with without_autocast(q.device):
            if self.temperature is None:
                k = k * self.head_dim**-0.5
            else:
                k, v = F.normalize(k, dim=-1, eps=1e-12), F.normalize(v, dim=-1, eps=1e-12)
                k = k * self.temperature.to(wide)[:, None, None]
            out = self.normalizer(k @ v.transpose(-2, -1)) @ q
        return out.permute(0, 3, 1, 2).unflatten(1, size).to(dtype)
