"""Halo attention: the tokens of a block attend to the block and a rim around it (HaloNet, arXiv:2103.12731)."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from visionzoo.kernels.checks import check_qkv
from visionzoo.kernels.dispatch import choose
from visionzoo.kernels.halo_attention import reference


def halo_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    rel_height: Tensor,
    rel_width: Tensor,
    *,
    block_size: int,
    halo_size: int,
    stride: int = 1,
    scale: float | None = None,
    mask_padding: bool = False,
    backend: str = "auto",
) -> Tensor:
    """Multi-head softmax attention of each block of tokens to the window of block_size + 2·halo_size around it.

    The map is cut into blocks from its top left corner; any height and width will do. The score of a query in row i
    and column j of its block and a key in row y and column x of the window, counted from the window's first, is

        scale·(q · k) + q · rel_height[y - i + window - 1] + q · rel_width[x - j + window - 1].

    Where a window reaches beyond the map its keys and values are zeros, and those keys take part in the softmax with
    the position terms as their scores.

    Args:
        q: queries [B, ⌈H / stride⌉, ⌈W / stride⌉, G, D].
        k: keys [B, H, W, G, D].
        v: values [B, H, W, G, V].
        rel_height: embeddings [2·window - 1, D] of vertical offsets, shared by the heads.
        rel_width: embeddings [2·window - 1, D] of horizontal offsets.
        block_size: side of the blocks, in keys.
        halo_size: width of the rim, in keys; 0 for attention inside blocks.
        stride: keys per query along each axis; must divide `block_size`. A block then has (block_size / stride)²
            queries, and i and j count these.
        scale: of the products of queries and keys; None means D^-½.
        mask_padding: leave keys beyond the map out of the softmax instead.
        backend: "auto", "reference" or "triton".

    Returns:
        [B, ⌈H / stride⌉, ⌈W / stride⌉, G, V] in q's dtype; scores, softmax and sums are float32 at least.

    Raises:
        ValueError: if shapes, dtypes, sizes or backend are not as described.
    """
    _check_sizes(block_size, halo_size, stride)
    _check_tensors(q, k, v, stride)
    rows = 2 * (block_size + 2 * halo_size) - 1
    for name, table in (("rel_height", rel_height), ("rel_width", rel_width)):
        if table.shape != (rows, q.shape[-1]) or table.dtype != q.dtype or table.device != q.device:
            raise ValueError(
                f"halo_attention: {name} must be [2·window - 1, D] = [{rows}, {q.shape[-1]}] for {block_size=} and "
                f"{halo_size=}, in {q.dtype} on {q.device} as q is; got {tuple(table.shape)} {table.dtype} on "
                f"{table.device}"
            )
    arguments: dict[str, Any] = {
        "block_size": block_size,
        "halo_size": halo_size,
        "stride": stride,
        "scale": q.shape[-1] ** -0.5 if scale is None else scale,
        "mask_padding": mask_padding,
    }
    unsupported = _unsupported(block_size + 2 * halo_size, q.shape[-1])
    if choose("halo_attention", backend, q, v, unsupported=unsupported) == "triton":
        from visionzoo.kernels.halo_attention import triton

        return triton.forward(q, k, v, rel_height, rel_width, **arguments)
    return reference.forward(q, k, v, rel_height, rel_width, **arguments)


def _unsupported(window: int, head_dim: int) -> str | None:
    """Say that the Triton kernels, which hold all embeddings at once, cannot hold those of this window, or None."""
    limit = 64 if head_dim <= 32 else 32 if head_dim <= 64 else 16
    return None if window <= limit else f"its kernels take windows up to {limit} at head width {head_dim}, got {window}"


def _check_sizes(block_size: int, halo_size: int, stride: int) -> None:
    if block_size < 1 or halo_size < 0:
        raise ValueError(
            f"halo_attention: block_size must be positive and halo_size not negative, got {block_size=}, {halo_size=}"
        )
    if stride < 1 or block_size % stride:
        raise ValueError(f"halo_attention: stride must be positive and divide block_size, got {stride=}, {block_size=}")


def _check_tensors(q: Tensor, k: Tensor, v: Tensor, stride: int) -> None:
    check_qkv("halo_attention", q, k, v, share="BG")
    batch, height, width, heads, depth = k.shape
    expected = (batch, -(-height // stride), -(-width // stride), heads, depth)
    if q.shape != expected:
        raise ValueError(
            f"halo_attention: for k {tuple(k.shape)} and {stride=} q must be {expected}, got {tuple(q.shape)}"
        )
    if v.shape[:4] != k.shape[:4]:
        raise ValueError(
            f"halo_attention: v must be like k {tuple(k.shape)} but for the last axis, got {tuple(v.shape)}"
        )
