"""Reducer that puts cluster centers in place of tokens (Token Pooling, arXiv:2110.03860)."""

from __future__ import annotations

import torch
from torch import Tensor

from visionzoo.kernels.precision import without_autocast
from visionzoo.layers.reducers.base import Reducer, check_rate, share_of
from visionzoo.layers.tokens import tokens_at
from visionzoo.layers.tracing import one_node


class TokenPoolingReducer(Reducer):
    """Puts K centers of weighted clusters in place of M tokens; O(M²·C), with K-means O(M·K·C) each round.

    A token's weight is the attention that it receives in the block before, as a mean over heads and queries. The tokens
    of the largest weights are the first centers. Each round, every token joins the nearest center, and a cluster's
    center becomes its weighted mean ("kmeans") or the token with the smallest weighted sum of squared distances to the
    others of its cluster ("kmedoids"). Places of the map read the center of their cluster: none is dropped, shapes are
    the same in training and evaluation, and the choice has no gradient, but the centers do.

    There is no code of the authors; the paper gives the problem and the two algorithms. Places, share and the number of
    rounds are our choice.

    Args:
        dim: channels C.
        keep_rate: K over M, in (0, 1]; rounded up.
        method: "kmedoids" or "kmeans".
        iterations: rounds.

    Raises:
        ValueError: if the share is none, the method unknown, or there is no round.
    """

    SCORES = "received_attention"
    MAKES_TOKENS = True
    METHODS = ("kmedoids", "kmeans")

    def __init__(self, dim: int, *, keep_rate: float = 0.7, method: str = "kmedoids", iterations: int = 5):
        super().__init__(dim)
        if method not in self.METHODS:
            raise ValueError(f"TokenPoolingReducer: method must be one of {self.METHODS}, got {method=}")
        if iterations < 1:
            raise ValueError(f"TokenPoolingReducer: iterations must be positive, got {iterations=}")
        self.keep_rate, self.method, self.iterations = check_rate(self, keep_rate), method, iterations

    @one_node
    def forward(
        self, x: Tensor, source: Tensor | None, keep: Tensor | None, scores: Tensor | None, prefix: int
    ) -> tuple[Tensor, Tensor | None, Tensor | None]:
        """Take and return x, source and keep of `visionzoo.layers.tokens.Tokens`."""
        self.check_tokens(x, scores, prefix)
        if keep is not None:
            raise ValueError(
                "TokenPoolingReducer: expected tokens that are all there, got keep; put it before what drops tokens"
            )
        assert scores is not None  # `check_tokens` has seen them
        tokens = x[:, prefix:]
        count = share_of(tokens.shape[1], self.keep_rate)
        centres, cluster = pool(tokens, scores, count, method=self.method, iterations=self.iterations)
        if source is not None:
            cluster = torch.where(source >= 0, cluster.gather(1, source.clamp(min=0)), -1)
        return torch.cat([x[:, :prefix], centres], 1), cluster, None


def pool(x: Tensor, weights: Tensor, count: int, *, method: str, iterations: int) -> tuple[Tensor, Tensor]:
    """Return the centers of weighted clusters, and to which of them each token belongs.

    Args:
        x: tokens [B, M, C].
        weights: of the tokens, positive, [B, M].
        count: clusters K.
        method: "kmedoids" or "kmeans".
        iterations: rounds.

    Returns:
        Centers [B, K, C] in x's dtype, and numbers of clusters [B, M].
    """
    first = weights.topk(count, dim=1).indices
    dtype = torch.promote_types(x.dtype, torch.float32)
    with without_autocast(x.device), torch.no_grad():
        fixed, weights = x.detach().to(dtype), weights.to(dtype)
        if method == "kmedoids":
            at, cluster = _medoids(fixed, weights, first, iterations)
        else:
            cluster = _means(fixed, weights, tokens_at(fixed, first), iterations)
    if method == "kmedoids":
        return tokens_at(x, at), cluster
    with without_autocast(x.device):
        shares, total = _shares(cluster, weights, count)
        means = shares @ x.to(dtype) / total.clamp(min=torch.finfo(dtype).tiny)
    centres = torch.where(total > 0, means.to(x.dtype), tokens_at(x, first))  # an empty cluster keeps its first one
    return centres, cluster


def _medoids(x: Tensor, weights: Tensor, at: Tensor, iterations: int) -> tuple[Tensor, Tensor]:
    """Return which tokens are the medoids, [B, K], and the clusters, [B, M]; distances are computed once."""
    distances = _distances(x, x).square()  # [B, M, M]
    nearest = distances.gather(2, at.unsqueeze(1).expand(-1, x.shape[1], -1)).argmin(2)
    for _ in range(iterations):
        member = _members(nearest, at.shape[1]).to(x.dtype)  # [B, M, K]
        cost = distances @ (weights.unsqueeze(-1) * member)  # of each token as the medoid of each cluster
        found = cost.masked_fill(member == 0, float("inf")).argmin(1)
        at = torch.where(member.any(1), found, at)
        nearest = distances.gather(2, at.unsqueeze(1).expand(-1, x.shape[1], -1)).argmin(2)
    return at, nearest


def _means(x: Tensor, weights: Tensor, centres: Tensor, iterations: int) -> Tensor:
    """Return the clusters, [B, M]."""
    nearest = _distances(x, centres).argmin(2)
    for _ in range(iterations - 1):
        shares, total = _shares(nearest, weights, centres.shape[1])
        centres = torch.where(total > 0, shares @ x / total.clamp(min=torch.finfo(x.dtype).tiny), centres)
        nearest = _distances(x, centres).argmin(2)
    return nearest


def _shares(cluster: Tensor, weights: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """Return the weights of the tokens in each cluster, [B, K, M], and their sums, [B, K, 1]."""
    shares = _members(cluster, count).to(weights.dtype).mT * weights.unsqueeze(1)
    return shares, shares.sum(2, keepdim=True)


def _distances(x: Tensor, y: Tensor) -> Tensor:
    """Return Euclidean distances, [B, M, C] and [B, K, C] to [B, M, K], in the same way whatever the sizes."""
    return torch.cdist(x, y, compute_mode="donot_use_mm_for_euclid_dist")


def _members(cluster: Tensor, count: int) -> Tensor:
    """Say of each token and each cluster whether it belongs to it: [B, M] to [B, M, K]; ONNX has no such one_hot."""
    return cluster.unsqueeze(-1) == torch.arange(count, device=cluster.device)
