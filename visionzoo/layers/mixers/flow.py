"""Flow attention: linear attention whose flows between tokens are conserved (Flowformer, arXiv:2202.06258)."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from visionzoo.kernels.precision import without_autocast
from visionzoo.layers.mixers.base import Mixer


class FlowMixer(Mixer):
    """Every token attends to every token.

        yᵢ = σ(Îᵢ) · σ(qᵢ)·(Σⱼ σ(kⱼ) (N·softmax(Ô)ⱼ vⱼ)ᵀ) / Iᵢ, I incoming flow, Î and Ô conserved flows

    Time: O(N·C·D); memory: O(N·C).

    With q and k after a sigmoid, a query's incoming flow is its product with the sum of the keys, a key's outgoing flow
    its product with the sum of the queries. When each outgoing flow is held at 1, keys reach a query by its conserved
    incoming flow, whose sigmoid scales what the query gets (allocation). When each incoming flow is held at 1, a key
    has its conserved outgoing flow, whose softmax over the keys scales its value (competition), N times. The output is
    q·(Σ k vᵀ) / incoming flow. The conserved outgoing flows are clamped to [-1, 1], as released, although their mean is
    1. Flows, sums and states are float32 at least, whatever the input.

    Facts from https://github.com/thuml/Flowformer at 61f5d8c (MIT).

    Args:
        dim: channels C.
        num_heads: attention heads.
        qkv_bias: whether the projection to q, k, v has a bias.
        eps_of_flows: add 1e-6 to each flow too, as the authors' code for images does and their general one does not
            (https://github.com/thuml/Flowformer at 61f5d8c, MIT).

    Raises:
        ValueError: if the heads do not divide the channels.

    >>> import torch
    >>> FlowMixer(64, 2)(torch.randn(1, 5, 7, 64)).shape
    torch.Size([1, 5, 7, 64])
    """

    EPS = 1e-6  # added to one factor of each flow, to the sum that is the other, and where wanted to the flow

    def __init__(self, dim: int, num_heads: int | None = None, *, qkv_bias: bool = True, eps_of_flows: bool = True):
        super().__init__(dim, num_heads)
        self.eps_of_flows = eps_of_flows
        self.qkv = nn.Linear(dim, 3 * dim, bias=qkv_bias)
        self.proj = nn.Linear(dim, dim)

    @property
    def takes_prefix_tokens(self) -> bool:
        """Yes: any set of tokens will do."""
        return True

    @property
    def takes_dropped_tokens(self) -> bool:
        """Yes: without flows they change no sum."""
        return True

    def forward(self, x: Tensor, *, keep: Tensor | None = None) -> Tensor:
        """[B, H, W, C] to [B, H, W, C]; `keep` [B, N] is False for tokens that others do not see."""
        self.check_input(x)
        qkv = self.qkv(x)
        dtype = torch.promote_types(qkv.dtype, torch.float32)
        with without_autocast(x.device):
            # [B, H, W, G, D] -> [B, G, N, D]
            q, k, v = (t.flatten(1, 2).transpose(1, 2).to(dtype) for t in self.split_heads(qkv))
            q, k = q.sigmoid(), k.sigmoid()
            count: int | Tensor = k.shape[2]
            if keep is not None:
                there = keep[:, None, :, None]  # [B, 1, N, 1]
                q, k, count = q * there, k * there, there.sum(2, keepdim=True, dtype=dtype)
            incoming, outgoing = self._flow(q, k), self._flow(k, q)  # [B, G, N, 1]
            allocation = self._flow(q, k / outgoing).sigmoid()
            competition = self._flow(k, q / incoming).clamp(-1, 1)
            if keep is not None:
                competition = competition.masked_fill(~there, float("-inf"))
            competition = competition.softmax(2) * count
            out = q @ (k.mT @ (v * competition)) * (allocation / incoming)
        return self.proj(out.transpose(1, 2).reshape(x.shape).to(qkv.dtype))

    def _flow(self, at: Tensor, others: Tensor) -> Tensor:
        """Products of the features at each token with the sum of the others': [B, G, N, D] twice to [B, G, N, 1]."""
        flow = (at + self.EPS) @ (others.sum(2) + self.EPS).unsqueeze(-1)
        return flow + self.EPS if self.eps_of_flows else flow
