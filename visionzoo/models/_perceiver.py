"""A network of convolutions beside latents that look at its maps, with classifiers that may answer before its end."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from functools import partial
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

from visionzoo.layers.latents import FirstLatents, LatentExchange, LatentReader, Perceived, PerceiverHead
from visionzoo.layers.outputs import Exit, add_term
from visionzoo.models._contract import Contract
from visionzoo.models._pyramid import Stage

STAGES = 4
WEIGHTS = {"early": 0.5, "latent": 0.5, "cnn": 1.0, "distillation": 0.5}


class _PerceivedStage(Stage):
    """A stage of convolutions, and what passes between its map and the latents after it; `forward` is of the map."""

    exchange: LatentExchange | None

    def __init__(self, blocks: Sequence[nn.Module], exchange: LatentExchange | None):
        super().__init__(nn.Identity(), blocks)
        self.exchange = exchange


class DynPerceiver(Contract):
    """Dynamic Perceiver on a network of convolutions.

    Args:
        stem: image [B, in_chans, H, W] to the first map.
        stages: blocks of each of the four stages.
        in_dims: channels of the map before each stage, which are those of the latents.
        out_dims: channels after each stage.
        reductions: image size over map size after each stage.
        num_latents: latents before the first stage; each further one has half of them.
        latent_depths: blocks of self-attention of the latents, for each stage.
        num_heads: heads of self-attention, for each stage.
        latent_mlp_ratio: hidden width of their MLPs over channels.
        hidden_features: channels of the hidden layers of the last two classifiers; None for none.
        in_chans: image channels.
        head: see `HeadOptions`.

    Raises:
        ValueError: if sequences have no four entries, or there are fewer than 8 latents.
    """

    UNITS = (
        (r"^stages\.(\d+)\.blocks\.(\d+)", None),
        (r"^stages\.(\d+)\.", (99999,)),
    )
    HEAD_INPUT = "NCHW, NLC"
    POOLS = ("", "avg", "max", "avgmax")
    EXITS: Mapping[str, int] = {"early": 1, "latent": 2, "cnn": 3}
    EXIT_FACTORS: Mapping[str, float] = {"early": 0.85, "latent": 1.0, "cnn": 0.5}
    CLASS_INPUTS = ("head.early_shortcut.fc", "head.latent_shortcut.fc")

    stem: nn.Module
    latents: FirstLatents | None
    stages: nn.ModuleList

    def __init__(
        self,
        *,
        stem: nn.Module,
        stages: Sequence[Sequence[nn.Module]],
        in_dims: Sequence[int],
        out_dims: Sequence[int],
        reductions: Sequence[int],
        num_latents: int,
        latent_depths: Sequence[int],
        num_heads: Sequence[int],
        latent_mlp_ratio: float,
        hidden_features: int | None = None,
        in_chans: int,
        **head: Any,
    ):
        name = type(self).__name__
        given = {"stages": stages, "latent_depths": latent_depths, "num_heads": num_heads}
        if wrong := [key for key, value in given.items() if len(value) != STAGES]:
            raise ValueError(
                f"{name}: {wrong[0]} must have an entry for each of {STAGES} stages, got {given[wrong[0]]}"
            )
        if min(latent_depths) < 1 or num_latents < 2 ** (STAGES - 1):
            raise ValueError(
                f"{name}: latent_depths must be 1 or more and num_latents {2 ** (STAGES - 1)} or more, got "
                f"{latent_depths=} and {num_latents=}"
            )
        readers = [
            LatentReader(dim, depth, heads, mlp_ratio=latent_mlp_ratio)
            for dim, depth, heads in zip(in_dims, latent_depths, num_heads, strict=True)
        ]
        counts = [num_latents // 2**i for i in range(STAGES)]
        exchanges = [
            LatentExchange((in_dims[i], in_dims[i + 1]), (counts[i], counts[i + 1]), readers[i + 1])
            for i in range(STAGES - 1)
        ]
        parts = [_PerceivedStage(*pair) for pair in zip(stages, (*exchanges, None), strict=True)]
        super().__init__(
            stem={"stem": stem, "latents": FirstLatents(num_latents, in_dims[0], readers[0])},
            parts=parts,
            norm=None,
            feature_info=[
                {"num_chs": dim, "reduction": reduction} for dim, reduction in zip(out_dims, reductions, strict=True)
            ],
            num_features=out_dims[-1] + in_dims[-1],  # of the map and of the last latents, which have in_dims
            head_layer=partial(
                PerceiverHead,
                latent_dims=(in_dims[-2], in_dims[-1]),
                hidden_features=hidden_features,
                weights=WEIGHTS,
            ),
            in_chans=in_chans,
            **head,
        )
        self.pruned: list[str] = []

    def begin(self, image: Tensor) -> Any:
        """Image [B, in_chans, H, W] to the first map and the latents that have looked at it."""
        x = self.stem(image)
        latents = () if self.latents is None else (self.latents(x.permute(0, 2, 3, 1)),)
        return Perceived(x, latents, x)

    def advance(self, i: int, state: Any) -> Any:
        """Take the map through stage i, then exchange with the latents."""
        stage: Any = self.stages[i]
        x = stage(state.x)
        if stage.exchange is None:
            return Perceived(x, state.latents, x)
        written, latents = stage.exchange(x.permute(0, 2, 3, 1), state.latents[-1])
        return Perceived(written.permute(0, 3, 1, 2), (*state.latents, latents), x)

    def read(self, i: int, state: Any, norm: bool = False) -> tuple[Tensor, Tensor | None]:
        """Return the map at the end of stage i; there is no norm."""
        return state.feature.permute(0, 2, 3, 1), None

    def finish(self, state: Any) -> Any:
        """Return the map [B, C, H, W], the latents before the last ones and the last ones, each [B, N, C]."""
        return (state.x, *(latents.x for latents in state.latents[-2:]))

    def classify(self, exit: str, state: Any) -> Tensor:
        """Return the logits [B, num_classes] of an exit from the state after its part."""
        head: Any = self.head
        if exit == "early":
            return head.forward_early(state.latents[-1].x)
        if exit == "latent":
            return head.forward_latent(state.latents[-2].x, state.latents[-1].x)
        return head.forward_cnn(state.x)

    def exits(self, states: Sequence[Any], logits: Any) -> Iterable[Exit]:
        """Return all exits, and add to the loss by how much what they say differs from the end's answer."""
        found = tuple(super().exits(states, logits))
        target = logits.detach().softmax(-1)
        for exit in found:
            add_term("distillation", F.kl_div(exit.logits.log_softmax(-1), target, reduction="batchmean"))
        return found

    def prune_intermediate_layers(
        self, indices: int | Sequence[int] = 1, prune_norm: bool = False, prune_head: bool = True
    ) -> list[int]:
        """Drop what the features `indices` do not need, and the head; return plain indices.

        With the head goes what the latents do after they are written onto a map for the last time.

        Raises:
            ValueError: if an index is out of range.
        """
        take = super().prune_intermediate_layers(indices, prune_norm, prune_head)
        if prune_head:
            last = len(self.stages) - 1
            self._drop(f"stages.{last}.exchange")
            self._drop(f"stages.{last - 1}.exchange.read" if last else "latents")
        return take

    def _drop(self, path: str) -> None:
        parent, _, child = path.rpartition(".")
        if getattr(self.get_submodule(parent), child) is not None:
            setattr(self.get_submodule(parent), child, None)
            self.pruned.append(f"{path}.")

    def absent(self) -> tuple[str, ...]:
        """Beginnings of the names of tensors that the whole model has and this one was built or pruned without."""
        classifiers = () if self.num_classes else ("early", "latent", "cnn", "merged")
        return (*super().absent(), *self.pruned, *(f"head.{name}" for name in classifiers))

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Recompute blocks in the backward pass instead of keeping their activations."""
        for module in self.modules():
            if isinstance(module, Stage | LatentReader):
                module.grad_checkpointing = enable

    def blocks_in_order(self) -> Iterator[nn.Module]:
        """Yield the blocks of all stages."""
        for stage in self.stages:
            yield from stage.blocks.children()  # type: ignore[union-attr, operator]
