"""Attention through all blocks of a model: rollout and flow (Abnar and Zuidema, ACL 2020, arXiv:2005.00928).

Facts from https://github.com/samiraabnar/attention_flow at 8044f53 (no license; nothing is taken over but definitions).
Attention of a block is the mean over its heads, to which the identity is added for the residual connection; rows then
add up to 1. Rollout is the product of these matrices, flow the maximum flow through them as a network. We differ in one
thing: tokens that pass by a mixer (a class token by a mixer of maps) have only the identity.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from visionzoo.kernels.scope import use_backend
from visionzoo.layers.attention import record_attention
from visionzoo.layers.mixers import MIXERS
from visionzoo.layers.mixers.base import Mixer
from visionzoo.models._isotropic import Isotropic
from visionzoo.text import some


def outer_mixers(module: nn.Module, path: str = "") -> Iterator[tuple[str, Mixer]]:
    """Yield the mixers inside a module with their names, in order, without those inside other mixers."""
    if isinstance(module, Mixer):
        yield path, module
        return
    for name, child in module.named_children():
        yield from outer_mixers(child, f"{path}.{name}" if path else name)


@torch.no_grad()
def attention_weights(model: nn.Module, image: Tensor) -> list[Tensor]:
    """Return what the tokens of an isotropic model give to each other in each block, as softmax and the like have it.

    Args:
        model: an isotropic model of the zoo whose mixers have score maps, in evaluation mode.
        image: [1, in_chans, H, W].

    Returns:
        for each block [G, P + N, P + N] of G heads, P prefix tokens (test-time registers are the last of them) and the
        N tokens of the map, from queries (rows) to keys. Rows and columns of tokens that pass by the mixer, or join
        later, are zeros; a block without a mixer has only zeros.

    Raises:
        ValueError: if the model is none of these; the message names its mixers.

    >>> import timm, torch, visionzoo
    >>> model = timm.create_model("zoo_deit_t", depth=2).eval()
    >>> [weights.shape for weights in attention_weights(model, torch.zeros(1, 3, 32, 48))]
    [torch.Size([3, 7, 7]), torch.Size([3, 7, 7])]
    """
    name = type(model).__name__
    if len(image) != 1:
        raise ValueError(f"attention is that of one image, got a batch of {len(image)}; call it for each")
    if not isinstance(model, Isotropic):
        raise ValueError(
            f"{name} is not an isotropic model: its tokens change from stage to stage, and attention has no path "
            f"through them; {_with_score_maps()}"
        )
    blocks = [list(outer_mixers(block)) for block in model.blocks]
    if not any(blocks):
        raise ValueError(f"{name} as built has no mixers in its blocks, so no token sees another; {_with_score_maps()}")
    kinds = {type(mixer).__name__ for block in blocks for _, mixer in block if not mixer.SCORE_MAP}
    if kinds:
        raise ValueError(
            f"{name} has no score maps of all tokens: its mixers are {some(sorted(kinds))}; {_with_score_maps()}"
        )
    if twice := [i for i, block in enumerate(blocks) if len(block) > 1]:
        raise ValueError(f"{name} has several mixers in the blocks {some(twice)}, expected one; {_with_score_maps()}")
    if any(getattr(block, "reducer", None) is not None for block in model.blocks):
        raise ValueError(f"{name} has reducers, behind which tokens have no fixed places; build it without reduce=...")
    found: list[Tensor | None] = []

    def keep(_module: nn.Module, _args: Any, _out: Any) -> None:
        new, seen[:] = list(seen), []
        found.append(new[0][0] if len(new) == 1 else None)

    hooks = [mixer.register_forward_hook(keep) for block in blocks for _, mixer in block]
    try:
        with use_backend("reference"), record_attention() as seen:
            (feature,) = model.forward_intermediates(image, indices=[0], stop_early=True, intermediates_only=True)
            seen.clear()
            found.clear()
            model(image)
    finally:
        for hook in hooks:
            hook.remove()
    places = feature.shape[2] * feature.shape[3]
    whole = []
    queue = iter(found)
    every = torch.arange(model.num_prefix_tokens + model.test_registers + places, device=image.device)
    for i, block in enumerate(blocks):
        whole.append(image.new_zeros(1, len(every), len(every)))
        if not block:
            continue
        weights = next(queue)
        here = every
        if i < model.registers_at:
            here = torch.cat([every[: model.num_prefix_tokens], every[-places:]])
        if weights is None or weights.shape[1:] not in ((places, places), (len(here), len(here))):
            kind = type(block[0][1]).__name__
            got = "none" if weights is None else " x ".join(map(str, weights.shape[1:]))
            raise ValueError(
                f"block {i} of {name}: expected scores of {len(here)} or {places} tokens to as many, got {got} "
                f"from its {kind} as built; {_with_score_maps()}"
            )
        at = here[-weights.shape[1] :]
        whole[-1] = weights.new_zeros(len(weights), len(every), len(every))
        whole[-1][:, at[:, None], at] = weights
    return whole


def _with_score_maps() -> str:
    names = [name for name, kind in MIXERS.items() if kind.SCORE_MAP]
    return f"models that have them are isotropic, such as zoo_deit_s, with mixers among {', '.join(names)}"


def attention_rollout(attention: Sequence[Tensor]) -> Tensor:
    """Return how much each token after the last block is made of each token before the first.

    Args:
        attention: for each block [G, N, N], from queries to keys; no negative numbers.

    Returns:
        [N, N] in float64; rows add up to 1.

    Raises:
        ValueError: if there are no blocks, or weights are negative.

    >>> attention_rollout([torch.tensor([[[0.0, 1.0], [0.5, 0.5]]])])
    tensor([[0.5000, 0.5000],
            [0.2500, 0.7500]], dtype=torch.float64)
    """
    first, *others = _augmented(attention)
    for weights in others:
        first = weights @ first
    return first


def attention_flow(attention: Sequence[Tensor], source: int) -> Tensor:
    """Return the maximum flow from a token after the last block to each token before the first, as shares of their sum.

    Each flow is that of scipy on capacities rounded to about 1e-9, and its value that of the minimum cut in float64.

    Args:
        attention: for each block [G, N, N], as in `attention_rollout`.
        source: number of the token, such as 0 for the class token.

    Returns:
        [N] in float64.

    Raises:
        ValueError: if there are no blocks, weights are negative, or there is no such token.
        ModuleNotFoundError: if scipy is not installed.
    """
    from scipy.sparse import coo_array, csr_array
    from scipy.sparse.csgraph import breadth_first_order, maximum_flow

    layers = [weights.numpy() for weights in _augmented(attention)]
    count = len(layers[0])
    if not 0 <= source < count:
        raise ValueError(f"source must be a token from 0 to {count - 1}, got {source=}")
    scale = 2**30  # capacities of a row add up to 1; scipy's are int32
    rows, columns = (part.ravel() for part in np.mgrid[:count, :count])
    top = len(layers) * count + source
    starts = np.concatenate([rows + count * (i + 1) for i in range(len(layers))])
    ends = np.concatenate([columns + count * i for i in range(len(layers))])
    exact = np.concatenate([weights.ravel() for weights in layers])
    used = (exact > 0) & ((starts < len(layers) * count) | (starts == top))
    starts, ends, exact = starts[used], ends[used], exact[used]
    nodes = (len(layers) + 1) * count
    whole = np.maximum(np.rint(exact * scale), 1).astype(np.int32)
    graph = csr_array(coo_array((whole, (starts, ends)), shape=(nodes, nodes)))
    flows = np.zeros(count)
    for sink in range(count):
        flow = maximum_flow(graph, top, sink).flow
        left = csr_array(graph - flow)
        left.eliminate_zeros()
        near = np.zeros(nodes, dtype=bool)
        near[breadth_first_order(left, top, return_predecessors=False)] = True
        flows[sink] = exact[near[starts] & ~near[ends]].sum()
    return torch.from_numpy(flows / flows.sum())


def _augmented(attention: Sequence[Tensor]) -> list[Tensor]:
    """Return the mean of the heads with the residual connection, [N, N] in float64, rows of sum 1."""
    if not attention:
        raise ValueError("expected attention of one block at least, got none")
    found = []
    for i, weights in enumerate(attention):
        mean = weights.double().cpu().mean(0)
        if bool((mean < 0).any()):
            raise ValueError(
                f"attention of block {i} has negative weights down to {float(mean.min()):.3g}, which are no shares of "
                "tokens; rollout and flow are for weights of 0 and more, such as softmax gives"
            )
        mean = mean + torch.eye(len(mean), dtype=mean.dtype)
        found.append(mean / mean.sum(-1, keepdim=True))
    return found
