"""Learnable memory (Sandler et al., CVPR 2022, arXiv:2203.15243): a token that reads others, unseen by them."""

from __future__ import annotations

import torch
from timm.layers import trunc_normal_
from torch import Tensor, nn

from visionzoo.layers.arguments import Positive
from visionzoo.layers.part import Part
from visionzoo.layers.tokens import Tokens
from visionzoo.layers.tracing import replaced


class Memory(Part):
    """The reader, which becomes the class token of a further task, and the head of the task before.

    The memory tokens that the reader sees, and no other token does, are those of the blocks
    (`visionzoo.layers.tokens.TokenBlock.memory`).

    Args:
        dim: channels C.
        norm: of the reader after the last block; None for the model's.
        head: of the task before; None where there is none.
    """

    NO_WEIGHT_DECAY = ("token",)

    def __init__(self, dim: Positive, *, norm: nn.Module | None = None, head: nn.Module | None = None):
        super().__init__()
        self.token = nn.Parameter(torch.zeros(1, 1, dim))
        trunc_normal_(self.token, std=0.02)
        self.norm = norm
        self.head = head

    def forward(self, tokens: Tokens) -> Tokens:
        """Let the reader begin."""
        self.check_inputs("B N C", tokens.x, any_dtype=True, C=self.token.shape[2])
        return replaced(tokens, reader=self.token.to(tokens.x.dtype).repeat(tokens.x.shape[0], 1, 1))

    def normalized(self, tokens: Tokens, norm: nn.Module) -> Tensor:
        """Return the reader [B, 1, C] after its norm, or after the model's."""
        return (norm if self.norm is None else self.norm)(tokens.reader)
