"""Test-time registers: "Vision Transformers Don't Need Trained Registers", NeurIPS 2025, arXiv:2506.08010.

Few neurons of a trained Transformer's MLPs make tokens of large norm out of patches that say little. Their activations
are moved to a token that was not trained, and the patches keep what they say. Facts from
https://github.com/nickjiang2378/test-time-registers at 860df43 (no license given); the code here is our own. Where we
differ: a register gets the largest activation of each neuron, as the paper says, while the released code gives it the
largest one of all register neurons of a block; outliers are looked for only on the map, and without a threshold they
are found by the median.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

import torch
from timm.layers import Mlp
from torch import Tensor, nn

from visionzoo.layers.reducers import Reducer
from visionzoo.models._checkpoint import unwrap
from visionzoo.models._isotropic import Isotropic, mixers_of
from visionzoo.text import count_of

RATIO = 3.0  # norm of an outlier over the median norm, where no threshold is given
CHUNK = 16  # images that run together


@dataclass(frozen=True)
class RegisterNeurons:
    """The neurons that make a model's outliers.

    Attributes:
        neurons: numbers of the hidden neurons of MLPs, by the number of the block; the strongest first.
        scores: of them all, strongest first: block, neuron, mean absolute activation at the outliers.
        outliers: number of them on all images.
        norms: of the map's tokens after the block that was looked at, [B, H, W].
        threshold: norm above which a token is an outlier.
    """

    neurons: Mapping[int, tuple[int, ...]]
    scores: tuple[tuple[int, int, float], ...]
    outliers: int
    norms: Tensor
    threshold: float


class NoOutliersError(ValueError):
    """No token of the images has a norm far above the others."""


@torch.no_grad()
def feature_norms(model: nn.Module, images: Tensor, *, block: int = -1) -> Tensor:
    """Return the norms of the map's tokens after a block of an isotropic model, before the last norm: [B, H, W].

    Args:
        model: an isotropic model of the zoo, which runs in eval mode.
        images: [B, C, H, W].
        block: number of the block; -1 for the last.

    Raises:
        ValueError: if the model is not isotropic, or has no such block.
    """
    bare = _isotropic(model)
    _number(bare, block)
    return _norms(bare, images, [block])[0]


@torch.no_grad()
def find_register_neurons(
    model: nn.Module,
    images: Tensor,
    *,
    top_k: int = 10,
    block: int = -1,
    threshold: float | None = None,
    last_block: int | None = None,
) -> RegisterNeurons:
    """Find the neurons that are most active where outliers are.

    Args:
        model: an isotropic model of the zoo.
        images: [B, C, H, W], as the model was trained on; the more, the surer (the paper takes 500).
        top_k: number of neurons.
        block: after which outliers are looked for; -1 for the last. The paper takes the last of CLIP and the last but
            one of DINOv2.
        threshold: norm above which a token is an outlier (the paper's are 30 for CLIP ViT-B and 150 for DINOv2 ViT-L);
            None for three times the median norm of the images' tokens.
        last_block: the neurons are of this block at most; None for the first block after which half of the outliers
            are there.

    Raises:
        NoOutliersError: if there are no outliers.
        ValueError: if the model is not isotropic, registers would not meet the map in it, or there is no such block.
    """
    bare = _isotropic(model)
    first = _first_block(bare)
    at = _number(bare, block)
    if top_k < 1:
        raise ValueError(f"find_register_neurons: top_k must be 1 or more, got {top_k=}")
    every = _norms(bare, images, range(len(bare.blocks)))
    limit = RATIO * float(every[at].median()) if threshold is None else threshold
    is_outlier = (every[at] > limit).flatten(1)  # [B, N]
    if not is_outlier.any():
        largest, median = float(every[at].max()), float(every[at].median())
        raise NoOutliersError(
            f"{type(bare).__name__} has no outliers on {count_of(len(images), 'image')}: after block {at} the largest "
            "norm "
            f"is {largest:.4g}, {largest / median:.2f} times the median {median:.4g}, and {limit:.4g} would make one; "
            "there is nothing to move to a register. Give other images, another block or a lower threshold"
        )
    if last_block is None:
        medians = [float(norms.median()) for norms in every]
        limits = [RATIO * median if threshold is None else threshold for median in medians]
        shares = [float((n.flatten(1)[is_outlier] > top).float().mean()) for n, top in zip(every, limits, strict=True)]
        last_block = next((i for i, share in enumerate(shares) if share >= 0.5), at)
    last_block = max(_number(bare, last_block), first)
    scores = _scores(bare, images, is_outlier, range(first, last_block + 1))
    best = scores.flatten().topk(min(top_k, scores.numel()))
    found = [
        (first + int(i) // scores.shape[1], int(i) % scores.shape[1], float(score))
        for i, score in zip(best.indices, best.values, strict=True)
    ]
    neurons: dict[int, tuple[int, ...]] = {}
    for i, neuron, _ in found:
        neurons[i] = (*neurons.get(i, ()), neuron)
    return RegisterNeurons(neurons, tuple(found), int(is_outlier.sum()), every[at], limit)


def move_to_registers(
    model: nn.Module,
    neurons: Mapping[int, Sequence[int]],
    *,
    num_registers: int = 1,
    scale: float = 1.0,
    rest: Literal["zero", "mean", "same"] = "zero",
) -> Isotropic:
    """Return a copy of a model with tokens more, to which the activations of neurons are moved.

    The copy has the same tensors under the same names, and one more prefix token for each register; the model itself
    stays as it is.

    Args:
        model: an isotropic model of the zoo.
        neurons: of MLPs, by the number of the block (`find_register_neurons`).
        num_registers: tokens of zeros that join the others, behind the prefix tokens.
        scale: of what each of them gets: for each neuron its activation of largest magnitude among the tokens.
        rest: what the map's tokens keep of it: nothing, their mean, or all.

    Raises:
        ValueError: if the model is not isotropic, registers would not meet the map in it, it has registers of this kind
            already, or there is no such block or neuron.
    """
    bare = _isotropic(model)
    first = _first_block(bare)
    if num_registers < 1:
        raise ValueError(f"move_to_registers: num_registers must be 1 or more, got {num_registers=}")
    if rest not in ("zero", "mean", "same"):
        raise ValueError(f"move_to_registers: rest must be 'zero', 'mean' or 'same', got {rest=}")
    if bare.test_registers:
        raise ValueError(
            f"{type(bare).__name__} has {bare.test_registers} test-time registers already: give the model before"
        )
    for i, chosen in neurons.items():
        width = _mlp(bare, _number(bare, i)).fc1.out_features
        if i < first or not chosen or not all(0 <= neuron < width for neuron in chosen):
            raise ValueError(
                f"move_to_registers: expected neurons from 0 to {width - 1} of blocks from {first} to "
                f"{len(bare.blocks) - 1}, got {list(chosen)} of block {i}"
            )
    made = copy.deepcopy(bare)
    before = made.num_prefix_tokens
    for i, chosen in neurons.items():
        mlp = _mlp(made, i)
        mlp.act = MovedActivation(mlp.act, chosen, before, num_registers, scale=scale, rest=rest)
    made.test_registers, made.registers_at = num_registers, first
    made.num_prefix_tokens += num_registers
    if hasattr(made.head, "prefix_tokens"):
        made.head.prefix_tokens += num_registers
    if "prefix_tokens" in made.head_layer.keywords:  # of a head that is made anew
        made.head_layer = partial(made.head_layer, prefix_tokens=made.num_prefix_tokens)
    made.register_neurons = {i: tuple(chosen) for i, chosen in neurons.items()}
    return made


def with_test_registers(
    model: nn.Module,
    images: Tensor,
    *,
    num_registers: int = 1,
    scale: float = 1.0,
    rest: Literal["zero", "mean", "same"] = "zero",
    **options: Any,
) -> Isotropic:
    """Find the neurons that make outliers on images, and return a copy of the model in which registers have them.

    Args:
        model: an isotropic model of the zoo.
        images: [B, C, H, W].
        num_registers: see `move_to_registers`.
        scale: see `move_to_registers`.
        rest: see `move_to_registers`.
        options: of `find_register_neurons`.

    Returns:
        the copy; `move_to_registers(model, copy.register_neurons)` makes it again without the images.

    Raises:
        NoOutliersError: if there are no outliers.
        ValueError: as `find_register_neurons` and `move_to_registers`.
    """
    found = find_register_neurons(model, images, **options)
    return move_to_registers(model, found.neurons, num_registers=num_registers, scale=scale, rest=rest)


class MovedActivation(nn.Module):
    """An activation behind which some neurons speak on registers, not on the map.

    Args:
        act: the activation.
        neurons: numbers of the neurons.
        prefix: how many tokens come before the registers; they keep theirs.
        registers: number of registers, before the map's tokens.
        scale: of what a register gets.
        rest: what the map's tokens keep: "zero", "mean" or "same".
    """

    neurons: Tensor

    def __init__(self, act: nn.Module, neurons: Sequence[int], prefix: int, registers: int, *, scale: float, rest: str):
        super().__init__()
        self.act = act
        self.prefix, self.registers, self.scale, self.rest = prefix, registers, scale, rest
        self.register_buffer("neurons", torch.tensor(neurons), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        """[B, P + R + N, hidden] to the same."""
        x = self.act(x)
        at = self.neurons.to(x.device)
        own = x.index_select(2, at)
        low, high = own.amin(1, keepdim=True), own.amax(1, keepdim=True)
        largest = torch.where(high > low.abs(), high, low) * self.scale
        rest = own[:, self.prefix + self.registers :]
        if self.rest == "zero":
            rest = torch.zeros_like(rest)
        elif self.rest == "mean":
            rest = rest.mean(1, keepdim=True).expand_as(rest)
        moved = torch.cat([own[:, : self.prefix], largest.expand(-1, self.registers, -1), rest], 1)
        return x.index_copy(2, at, moved)


def _isotropic(model: nn.Module) -> Isotropic:
    bare = unwrap(model)
    if not isinstance(bare, Isotropic):
        raise ValueError(
            f"test-time registers are for isotropic models, whose tokens all meet; {type(bare).__name__} is a pyramid "
            "or has several branches. Give one such as zoo_deit_s"
        )
    return bare


def _number(model: Isotropic, block: int) -> int:
    count = len(model.blocks)
    if not -count <= block < count:
        raise ValueError(
            f"{type(model).__name__} has {count} blocks: expected from {-count} to {count - 1}, got {block}"
        )
    return block % count


def _first_block(model: Isotropic) -> int:
    """Return the first block from which on all mixers take in tokens beside the map, and MLPs have neurons to move."""
    name = type(model).__name__
    if model.memory is not None or any(isinstance(module, Reducer) for module in model.modules()):
        what = "a memory" if model.memory is not None else "reducers, which drop tokens"
        raise ValueError(f"{name} has {what}: test-time registers are for models whose tokens stay; build it without")
    first = len(model.blocks)
    for i in range(first - 1, model.prefix_at - 1, -1):
        mixers = mixers_of([model.blocks[i]])
        if not (mixers and all(mixer.takes_prefix_tokens and not _counts(mixer) for mixer in mixers)):
            break
        if not isinstance(mlp := getattr(model.blocks[i], "mlp", None), Mlp) or not isinstance(mlp.act, nn.Module):
            break
        first = i
    if first == len(model.blocks):
        raise ValueError(
            f"{name}: a register would not meet the map, for the last block's mixer has no place for more tokens "
            "beside it, or the block no MLP of the common form; give a model whose last blocks attend to all tokens, "
            "such as zoo_deit_s"
        )
    return first


def _counts(mixer: nn.Module) -> bool:
    """Whether a mixer was made for a number of prefix tokens."""
    return hasattr(mixer, "prefix_tokens")


def _mlp(model: Isotropic, i: int) -> Any:
    return model.blocks[i].mlp


def _norms(model: Isotropic, images: Tensor, blocks: Sequence[int]) -> list[Tensor]:
    """Return the norms of the map's tokens after blocks, each [B, H, W]."""
    was_training = model.training
    model.eval()
    chunks = []
    for chunk in images.split(CHUNK):
        maps = model.forward_intermediates(chunk, list(blocks), output_fmt="NHWC", intermediates_only=True)
        chunks.append([x.float().norm(dim=-1) for x in maps])
    model.train(was_training)
    return [torch.cat(each) for each in zip(*chunks, strict=True)]


def _scores(model: Isotropic, images: Tensor, is_outlier: Tensor, blocks: Sequence[int]) -> Tensor:
    """Return the mean absolute activation of each neuron at the outliers of images that have any, [blocks, hidden]."""
    was_training = model.training
    model.eval()
    sums: dict[int, Any] = dict.fromkeys(blocks, 0)
    with ExitStack() as stack:
        where: Tensor = is_outlier[:0]

        def look(i: int, out: Tensor) -> None:
            tokens = out[:, -where.shape[1] :].float().abs()  # those of the map
            weights = where / where.sum(1, keepdim=True).clamp(min=1)
            sums[i] = sums[i] + torch.einsum("bn,bnc->c", weights.to(tokens.dtype), tokens)

        for i in blocks:
            hook = _mlp(model, i).act.register_forward_hook(lambda _module, _inputs, out, i=i: look(i, out))
            stack.callback(hook.remove)
        for chunk, mask in zip(images.split(CHUNK), is_outlier.split(CHUNK), strict=True):
            where = mask
            model.forward_features(chunk)
    model.train(was_training)
    return torch.stack([sums[i] for i in blocks]) / is_outlier.any(1).sum()
