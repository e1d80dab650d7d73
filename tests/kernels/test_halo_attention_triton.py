"""Triton's halo attention is the reference's, in every dtype, for every kind of block, rim and map."""

import pytest
import torch
from kernels.triton_checks import DEVICE, check_against_float64, check_repeats

from visionzoo.kernels import halo_attention
from visionzoo.kernels.dispatch import explain

CASES = {  # (height, width), block, rim, stride, heads, head width, width of values, padding masked
    "blocks divide the map": ((4, 8), 4, 1, 1, 2, 16, 16, False),
    "masked padding": ((5, 7), 4, 1, 1, 2, 16, 24, True),
    "several blocks of queries and keys": ((9, 10), 8, 3, 1, 1, 16, 32, False),
    "no rim": ((5, 6), 3, 0, 1, 2, 24, 8, False),
    "rim wider than a block": ((5, 4), 2, 3, 1, 1, 16, 16, False),
    "stride on an odd map": ((7, 5), 4, 1, 2, 1, 16, 16, False),
    "stride of a whole block": ((7, 4), 3, 1, 3, 1, 16, 16, True),
    "map smaller than a block": ((1, 2), 4, 1, 1, 2, 16, 16, False),
    "wide heads": ((4, 6), 4, 1, 1, 1, 80, 96, False),
}


def _case(name):
    size, block_size, halo_size, stride, heads, depth, values, mask_padding = CASES[name]
    generator = torch.Generator().manual_seed(0)

    def draw(*shape, std=1.0):
        return (std * torch.randn(*shape, generator=generator, dtype=torch.float64)).requires_grad_()

    batch = 16 if size == (1, 2) else 2  # of few numbers the error is too much a matter of luck
    queries, rows = [-(-side // stride) for side in size], 2 * (block_size + 2 * halo_size) - 1
    tensors = {
        "q": draw(batch, *queries, heads, depth),
        "k": draw(batch, *size, heads, depth),
        "v": draw(batch, *size, heads, values),
        "rel_height": draw(rows, depth, std=depth**-0.5),  # as HaloMixer draws them
        "rel_width": draw(rows, depth, std=depth**-0.5),
    }
    options = {
        "block_size": block_size,
        "halo_size": halo_size,
        "stride": stride,
        "mask_padding": mask_padding,
    }
    return tensors, options


@pytest.mark.parametrize("name", CASES)
def test_is_as_exact_as_plain_torch(name):
    tensors, options = _case(name)
    check_against_float64(halo_attention, tensors, **options)


def test_embeddings_learn_from_all_blocks_also_where_a_program_takes_several(monkeypatch):
    from visionzoo.kernels.halo_attention import triton as kernels

    monkeypatch.setattr(kernels, "_GROUPS", 3)
    tensors, options = _case("blocks divide the map")
    check_against_float64(halo_attention, tensors, **options)


def test_runs_repeat_bit_for_bit():
    tensors, options = _case("masked padding")
    check_repeats(halo_attention, tensors, **options)


def test_takes_parts_of_one_projection_without_copying_and_other_strides():
    from visionzoo.kernels.launch import head_rows

    tensors, options = _case("masked padding")
    q, k, v, *tables = (t.detach().float().to(DEVICE) for t in tensors.values())
    expected = halo_attention(q, k, v, *tables, **options, backend="reference")
    parts = torch.cat((k, v), -1).split((k.shape[-1], v.shape[-1]), -1)
    assert all(head_rows(part)[0] is part for part in parts)
    other = [t.transpose(1, 3).contiguous().transpose(1, 3) for t in (q, k, v)]
    for views in ((q, *parts, *tables), (*other, *(t.T.contiguous().T for t in tables))):
        out = halo_attention(*views, **options, backend="triton")
        torch.testing.assert_close(out, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("block_size", "halo_size", "width", "message"),
    [
        (8, 3, 136, "its kernels take head widths up to 128, got 136"),
        (8, 29, 32, "its kernels take windows up to 64 at head width 32, got 66"),
        (8, 13, 48, "its kernels take windows up to 32 at head width 48, got 34"),
        (8, 5, 80, "its kernels take windows up to 16 at head width 80, got 18"),
    ],
)
def test_what_kernels_cannot_hold_is_refused_by_name_and_falls_back_else(block_size, halo_size, width, message):
    q = torch.randn(1, 4, 4, 1, width, device=DEVICE)
    table = torch.randn(2 * (block_size + 2 * halo_size) - 1, width, device=DEVICE)
    options = {"block_size": block_size, "halo_size": halo_size}
    with pytest.raises(ValueError, match=f"cannot run: {message}"):
        halo_attention(q, q, q, table, table, **options, backend="triton")
    with explain() as decisions:
        halo_attention(q, q, q, table, table, **options)
    assert decisions[0].backend == "reference"
