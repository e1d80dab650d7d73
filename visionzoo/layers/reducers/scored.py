"""Reducers that keep the tokens which the block before says most of, without parameters."""

from __future__ import annotations

from visionzoo.layers.reducers.base import BestTokens


class ClassAttentionReducer(BestTokens):
    """Keeps the tokens that the class token attends to most, as a mean over the heads of the block before.

    Sparsifiner (arXiv:2303.13755) drops tokens so, by shares of the map (`of_map`); facts from
    https://github.com/lim142857/Sparsifiner at 9a11e26 (MIT).

    Args:
        dim: channels C.
        keep_rate: share of the tokens that stay, in (0, 1]; their number is rounded up.
        of_map: take the share of the map's tokens, not of those that earlier reducers left.

    >>> import torch
    >>> x, scores = torch.randn(2, 1 + 4, 8), torch.tensor([[1.0, 4, 2, 3], [4, 3, 2, 1]])
    >>> _, source, _ = ClassAttentionReducer(8, keep_rate=0.5).eval()(x, None, None, scores, 1)
    >>> source
    tensor([[-1,  0, -1,  1],
            [ 0,  1, -1, -1]])
    """

    SCORES = "class_attention"
    NEEDS_CLASS_TOKEN = True


class RepresentationShiftReducer(BestTokens):
    """Keeps the tokens that the MLP of the block before moved furthest (Representation Shift, arXiv:2508.00367).

    It needs neither training nor attention's weights. The authors' code could not be had: this is the measure that the
    paper describes, the Euclidean distance of a token before and after the MLP with its residual. Places and shares are
    our own choice.

    Args:
        dim: channels C.
        keep_rate: share of the tokens that stay, in (0, 1]; their number is rounded up.
        of_map: take the share of the map's tokens, not of those that earlier reducers left.
    """

    SCORES = "shift"
