"""Attention along fixed patterns, against the patterns' definitions token by token."""

import math

import pytest
import torch
from torch.autograd import gradcheck

from visionzoo.layers.mixers import PatternMixer

SIZE, WIDTH = (4, 5), 3
TOKENS = {  # whether a query at (y, x) sees the token at (r, c)
    "row": lambda y, x, r, c: y == r,
    "column": lambda y, x, r, c: x == c,
    "band": lambda y, x, r, c: abs((y * SIZE[1] + x) - (r * SIZE[1] + c)) < SIZE[1],
    "last_columns": lambda y, x, r, c: c >= SIZE[1] - 2,
    "disc": lambda y, x, r, c: math.dist((y, x), (r, c)) < 3,
}
UNIONS = [
    (("band", "column"), True),
    (("last_columns", "row"), True),
    (("disc", "cells"), True),
    (("row", "row_summaries"), True),
    (("row", "column", "above", "below", "left", "right"), False),
    (("disc", "left", "column"), True),
    (("disc", "band"), False),
]


def _mixer(parts, count_once=True):
    torch.manual_seed(0)
    mixer = PatternMixer(WIDTH, 1, parts=parts, count_once=count_once, radius=3, cell_size=2, summary_columns=2)
    for parameter in mixer.parameters():
        torch.nn.init.normal_(parameter)
    return mixer.double()


def _seen(q, keys, values):
    weights = torch.stack([(q * key).sum() for key in keys]).softmax(0)
    return sum(weight * value for weight, value in zip(weights, values, strict=True))


def _summed(q, k, v, before, everywhere):
    """Key and value of the tokens at the places `before`; of all of the line with a key of 0 where there are none."""
    if not before:
        return torch.zeros(WIDTH, dtype=q.dtype), sum(v[at] for at in everywhere) / len(everywhere)
    asks = sum(q[at] for at in before)
    return sum(k[at] for at in before), _seen(asks, [k[at] for at in before], [v[at] for at in before])


def _shown(part, mixer, q, k, v, y, x):
    """Keys and values that a part which is no set of tokens shows to (y, x)."""
    height, width = SIZE
    if part == "cells":
        cells = []
        for top, left in ((top, left) for top in range(0, height, 2) for left in range(0, width, 2)):
            at = [(top + a, left + b, mixer.cell_weight[a, b]) for a in range(2) for b in range(2)]
            at = [place for place in at if place[0] < height and place[1] < width]
            cells.append([sum(w * t[r, c] for r, c, w in at) for t in (k, v)])
        return cells
    if part == "row_summaries":
        return [(k[r].max(0).values, _seen(q[r].max(0).values, k[r], v[r])) for r in range(height)]
    out = []
    if part in ("above", "below"):
        rows = range(y) if part == "above" else range(y + 1, height)
        for c in range(width):
            out.append(_summed(q, k, v, [(r, c) for r in rows], [(r, c) for r in range(height)]))
    else:
        columns = range(x) if part == "left" else range(x + 1, width)
        for r in range(height):
            out.append(_summed(q, k, v, [(r, c) for c in columns], [(r, c) for c in range(width)]))
    return out


@pytest.mark.parametrize(("parts", "count_once"), [*(((part,), True) for part in TOKENS), *UNIONS])
@torch.no_grad()
def test_each_token_sees_what_its_pattern_shows(parts, count_once):
    mixer = _mixer(parts, count_once)
    x = torch.randn(1, *SIZE, WIDTH, dtype=torch.float64)
    q, k, v = mixer.qkv(x[0]).chunk(3, -1)
    q = q / math.sqrt(WIDTH)
    expected = torch.zeros_like(x[0])
    for y, z in ((y, z) for y in range(SIZE[0]) for z in range(SIZE[1])):
        keys, values, places = [], [], set()
        for part in parts:
            if part in TOKENS:
                for place in ((r, c) for r in range(SIZE[0]) for c in range(SIZE[1])):
                    if TOKENS[part](y, z, *place) and not (count_once and place in places):
                        places.add(place)
                        keys.append(k[place])
                        values.append(v[place])
            else:
                for key, value in _shown(part, mixer, q, k, v, y, z):
                    keys.append(key)
                    values.append(value)
        expected[y, z] = _seen(q[y, z], keys, values)
    torch.testing.assert_close(mixer(x)[0], mixer.proj(expected), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(("parts", "count_once"), UNIONS)
def test_gradients_are_those_of_differences(parts, count_once):
    mixer = _mixer(parts, count_once)
    x = torch.randn(1, 3, 2, WIDTH, dtype=torch.float64, requires_grad=True)
    names, values = zip(*mixer.named_parameters(), strict=True)

    def of(x, *values):
        return torch.func.functional_call(mixer, dict(zip(names, values, strict=True)), x)

    gradcheck(of, (x, *values), fast_mode=True)


@pytest.mark.parametrize(
    "parts",
    [
        ("disc", "cells"),
        *(
            pytest.param(parts, marks=pytest.mark.full)
            for parts in (("row", "row_summaries"), ("column", "band"), ("row", "above", "right"))
        ),
    ],
)
@torch.no_grad()
def test_65536_large_tokens_in_half_precision_stay_finite(parts):
    mixer = PatternMixer(2, 1, parts=parts, radius=2, cell_size=32).half()
    out = mixer((torch.randn(1, 256, 256, 2) * 10).half())
    assert out.isfinite().all() and out.std() > 0
