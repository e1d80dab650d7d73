"""Super token attention: the authors' layer, and the definition in loops where they recorded nothing."""

import numpy as np
import pytest
import torch
from golden import Record, relative_error, sample

from visionzoo.layers.mixers import SuperTokenMixer
from visionzoo.layers.mixers.super_token import _gather


@torch.no_grad()
def test_the_layer_is_the_authors_also_where_the_cells_do_not_divide_the_map():
    record = Record("stvit/stoken_attention_64")
    state = {name.replace("stoken_refine.", "refine."): value for name, value in record.state_dict().items()}
    mixer = SuperTokenMixer(64, 2, token_size=4).double()
    mixer.load_state_dict({name: value.squeeze(-1).squeeze(-1) if value.ndim == 4 else value
                           for name, value in state.items()})  # fmt: skip
    for key, seed, shape in (("out", 1, (1, 64, 28, 28)), ("out_pad", 2, (1, 64, 18, 26))):
        x = np.random.RandomState(seed).standard_normal(shape).astype(np.float32)
        out = mixer(torch.from_numpy(x).double().permute(0, 2, 3, 1)).permute(0, 3, 1, 2)
        out = sample(out) if out.numel() > 16384 else out
        assert relative_error(out, record.arrays[key]) <= record.tolerance()


def test_memberships_have_no_derivative_as_released(monkeypatch):
    membership, found = SuperTokenMixer._membership, []
    monkeypatch.setattr(SuperTokenMixer, "_membership", lambda *a: found.append(membership(*a)) or found[-1])
    x = torch.randn(1, 6, 7, 8, requires_grad=True)
    SuperTokenMixer(8, 2, token_size=3, num_iterations=2)(x).square().sum().backward()
    assert len(found) == 2 and not any(m.requires_grad for m in found) and x.grad.any()


def _in_loops(x, cell, iterations):
    """One sample [H, W, C] whose sides the cell divides, without attention between super tokens."""
    height, width, channels = x.shape
    rows, columns = height // cell[0], width // cell[1]
    where = [(y, x) for y in range(rows) for x in range(columns)]
    tokens = {
        (i, j): x[i * cell[0] : (i + 1) * cell[0], j * cell[1] : (j + 1) * cell[1]].mean((0, 1)) for i, j in where
    }
    for _ in range(iterations):
        sums, shares = {at: torch.zeros(channels).double() for at in where}, dict.fromkeys(where, 0.0)
        membership = {}
        for y in range(height):
            for x_ in range(width):
                i, j = y // cell[0], x_ // cell[1]
                around = [(i + di, j + dj) for di in (-1, 0, 1) for dj in (-1, 0, 1)]
                products = [x[y, x_] @ tokens[at] if at in tokens else torch.tensor(0.0) for at in around]
                weights = (torch.stack([p.double() for p in products]) * channels**-0.5).softmax(0)
                membership[y, x_] = list(zip(around, weights, strict=True))
                for at, weight in membership[y, x_]:
                    if at in sums:
                        sums[at] += weight * x[y, x_]
                        shares[at] += weight
        tokens = {at: sums[at] / shares[at] for at in where}
    out = torch.zeros_like(x)
    for (y, x_), belongs in membership.items():
        out[y, x_] = sum(weight * tokens[at] for at, weight in belongs if at in tokens)
    return out


@pytest.mark.parametrize(("cell", "iterations"), [((2, 2), 1), ((2, 3), 2), ((3, 2), 3)])
@torch.no_grad()
def test_memberships_are_those_of_the_definition(cell, iterations):
    x = 3 * torch.randn(1, 6, 12, 8, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    mixer = SuperTokenMixer(8, token_size=cell, num_iterations=iterations, refinement=None)
    torch.testing.assert_close(mixer(x)[0], _in_loops(x[0], cell, iterations), rtol=1e-11, atol=1e-11)


@torch.no_grad()
def test_refinement_by_convolution_acts_on_the_super_tokens():
    torch.manual_seed(0)
    plain, refined = (SuperTokenMixer(8, token_size=4, refinement=name).double() for name in (None, "convolution"))
    x = torch.randn(1, 8, 12, 8, dtype=torch.float64)
    assert [tuple(p.shape) for p in refined.refine.parameters() if p.ndim > 1] == [(8, 8), (8, 1, 5, 5), (8, 8)]
    seen = []
    refined.refine.register_forward_hook(lambda module, args, out: seen.append(args[0].shape))
    assert (refined(x) - plain(x)).norm() > 0.1 * plain(x).norm()
    assert seen == [(1, 2, 3, 8)]


def test_gradients_of_tokens_that_get_next_to_nothing_stay_finite_in_half_precision():
    membership = torch.zeros(1, 1, 2, 1, 9)  # of two cells of a pixel; the first belongs to the second cell
    membership[0, 0, 0, 0, 4:6] = torch.tensor([1e-6, 1.0])
    membership[0, 0, 1, 0, 4] = 1
    pixels = torch.tensor([30.0, -20.0]).view(1, 1, 2, 1, 1).half().requires_grad_()
    tokens = _gather(pixels, membership)
    torch.testing.assert_close(tokens.flatten(), torch.tensor([30.0, 5.0]).half())
    tokens.sum().backward()
    torch.testing.assert_close(pixels.grad.flatten(), torch.tensor([1.5, 0.5]).half())
