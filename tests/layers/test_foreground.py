"""Scores of a pyramid's tokens, their targets and their loss are what the definitions say."""

import re

import pytest
import torch
import torch.nn.functional as F

from visionzoo.layers.foreground import (
    BestTokensAttention,
    ForegroundScores,
    foreground_loss,
    foreground_targets,
)

SIZES, STRIDES = [(6, 5), (3, 3), (2, 2)], (8, 16, 32)
RANGES = ((-1, 20), (20, 30), (30, float("inf")))


def test_targets_are_boxes_of_the_levels_size_around_the_token():
    boxes = torch.tensor([[1.0, 2, 19, 30], [4, 4, 40, 44], [12, 12, 13, 13], [-60, -60, 90, 90]])
    expected = []
    for (height, width), stride, (above, most) in zip(SIZES, STRIDES, RANGES, strict=True):
        for row in range(height):
            for column in range(width):
                x, y = column * stride + stride // 2, row * stride + stride // 2
                sides = [(x - x1, y - y1, x2 - x, y2 - y) for x1, y1, x2, y2 in boxes.tolist()]
                expected.append(any(min(each) > 0 and above < max(each) <= most for each in sides))
    found = foreground_targets(boxes, SIZES, STRIDES, RANGES)
    assert found.tolist() == expected and 0 < found.sum() < len(found)
    assert not foreground_targets(torch.zeros(0, 4), SIZES, STRIDES, RANGES).any()


def test_the_loss_is_focal_over_each_images_objects():
    torch.manual_seed(0)
    logits, targets = torch.randn(2, 9).double(), torch.rand(2, 9) < 0.4
    targets[1] = False
    expected = 0.0
    for row, wanted in zip(logits, targets, strict=True):
        p = row.sigmoid()
        each = torch.where(wanted, -0.25 * (1 - p) ** 2 * p.log(), -0.75 * p**2 * (1 - p).log())
        expected += each.sum() / max(int(wanted.sum()), 1) / 2
    assert torch.allclose(foreground_loss(logits, targets), expected, rtol=1e-12, atol=0)
    assert foreground_loss(torch.full((1, 2), 60.0), torch.tensor([[True, False]])).isfinite()  # where p.log() is not
    with torch.autocast("cpu", torch.bfloat16):
        assert foreground_loss(logits.bfloat16(), targets).dtype == torch.float32


def test_finer_levels_see_the_scores_of_coarser_ones():
    torch.manual_seed(0)
    layer = ForegroundScores(8, 3).double()
    x = torch.randn(1, sum(h * w for h, w in SIZES), 8).double()
    fine, middle, coarse = x.split([h * w for h, w in SIZES], 1)
    alone = ForegroundScores(8, 1).double()
    alone.load_state_dict({**layer.state_dict(), "factors": layer.factors[:0]})
    logits = [alone(coarse, SIZES[2:])]
    for i, (level, size) in enumerate([(middle, SIZES[1]), (fine, SIZES[0])]):
        above = logits[0].view(1, 1, *SIZES[2 - i])
        scale = F.interpolate(above, size, mode="bilinear", align_corners=True).flatten(2).mT * layer.factors[i]
        logits.insert(0, alone(level * (1 + scale), [size]))
    assert torch.allclose(layer(x, SIZES), torch.cat(logits, 1), rtol=0, atol=1e-12)


def test_the_best_tokens_attend_and_the_others_stay():
    torch.manual_seed(0)
    layer = BestTokensAttention(8, 2, num_tokens=3)
    x, positions, scores = torch.randn(2, 6, 8), torch.randn(2, 6, 8), torch.rand(2, 6)
    out = layer(x, positions, scores)
    for image in range(2):
        best = scores[image].topk(3).indices
        q = (x[image] + positions[image])[best][None]
        own = x[image, best][None]
        expected = layer.norm(own + layer.attention(q, q, own)[0])[0]
        assert torch.allclose(out[image, best], expected, atol=1e-6)
        rest = [i for i in range(6) if i not in best.tolist()]
        assert torch.equal(out[image, rest], x[image, rest])
    every = BestTokensAttention(8, 2, num_tokens=99)
    assert (every(x, positions, scores) != x).any(-1).all()


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: ForegroundScores(6, 2), "dim must be a positive multiple of 4, got dim=6"),
        (lambda: ForegroundScores(8, 0), "expected one level or more, got num_levels=0"),
        (lambda: BestTokensAttention(8, 3), "num_heads must divide dim, got dim=8 and num_heads=3"),
        (lambda: BestTokensAttention(8, 2, num_tokens=0), "num_tokens must be 1 or more, got num_tokens=0"),
        (lambda: ForegroundScores(8, 2)(torch.zeros(1, 4, 8), [(2, 2)]), "expected 2 levels with 4 tokens in all"),
        (lambda: ForegroundScores(8, 1)(torch.zeros(1, 5, 8), [(2, 2)]), "1 level with 5 tokens in all, got sizes=[(2"),
    ],
)
def test_wrong_options_and_sizes_are_named(build, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        build()
