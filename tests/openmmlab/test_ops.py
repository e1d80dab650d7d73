"""The ops that stand in for mmcv's compiled extension: mmcv's own expectations, definitions in float64, gradients."""

import importlib.util
import math
import subprocess
import sys

import numpy as np
import pytest
import torch
import torch.nn.functional as F

pytest.importorskip("mmcv", reason='needs pip install "visionzoo[openmmlab]"')

import mmcv.ops

from visionzoo.openmmlab import ops

BOXES = torch.tensor([[6.0, 3, 8, 7], [3, 6, 9, 11], [3, 7, 10, 12], [1, 4, 13, 7]])
SCORES = torch.tensor([0.6, 0.9, 0.7, 0.2])


def iou(a, b, offset=0.0):
    """By definition, one pair of boxes."""
    width = max(min(a[2], b[2]) - max(a[0], b[0]) + offset, 0)
    height = max(min(a[3], b[3]) - max(a[1], b[1]) + offset, 0)
    areas = [(c[2] - c[0] + offset) * (c[3] - c[1] + offset) for c in (a, b)]
    return width * height / (sum(areas) - width * height)


def random_boxes(n, seed=0, span=40.0):
    generator = torch.Generator().manual_seed(seed)
    corner = torch.rand(n, 2, generator=generator) * span
    return torch.cat([corner, corner + 1 + torch.rand(n, 2, generator=generator) * span / 2], 1), torch.rand(
        n, generator=generator
    )


def test_nms_gives_mmcvs_example():
    dets, kept = mmcv.ops.nms(BOXES, SCORES, iou_threshold=0.3)
    assert kept.tolist() == [1, 0, 3]
    assert torch.equal(dets, torch.cat([BOXES, SCORES[:, None]], 1)[[1, 0, 3]])
    as_numpy = mmcv.ops.nms(BOXES.numpy(), SCORES.numpy(), iou_threshold=0.3)
    assert isinstance(as_numpy[0], np.ndarray) and as_numpy[1].tolist() == [1, 0, 3]


@pytest.mark.parametrize("offset", [0, 1])
def test_nms_suppresses_by_definition(offset):
    boxes, scores = random_boxes(60)
    kept = []
    for i in scores.argsort(descending=True).tolist():
        if all(iou(boxes[i], boxes[j], offset) <= 0.4 for j in kept):
            kept.append(i)
    assert mmcv.ops.nms(boxes, scores, 0.4, offset)[1].tolist() == kept
    assert 5 < len(kept) < 60


def test_nms_takes_half_precision_and_no_boxes():
    assert mmcv.ops.nms(BOXES.bfloat16(), SCORES.bfloat16(), 0.3)[1].tolist() == [1, 0, 3]
    assert mmcv.ops.nms(torch.zeros(0, 4), torch.zeros(0), 0.3)[1].tolist() == []


@pytest.mark.parametrize(
    ("method", "scores", "kept"),
    [
        ("linear", [0.9, 0.6, 0.29024392, 0.2], [1, 0, 2, 3]),
        ("gaussian", [0.9, 0.59630775, 0.35275510, 0.18650459], [1, 0, 2, 3]),
        ("naive", [0.9, 0.6, 0.2], [1, 0, 3]),
    ],
)
def test_soft_nms_gives_mmcvs_examples(method, scores, kept):
    dets, indices = mmcv.ops.soft_nms(BOXES, SCORES, iou_threshold=0.3, sigma=0.5, min_score=0.01, method=method)
    assert indices.tolist() == kept
    torch.testing.assert_close(dets, torch.cat([BOXES[kept], torch.tensor(scores)[:, None]], 1))


def test_soft_nms_drops_what_falls_below_the_least_score():
    boxes = torch.tensor([[4.0, 3, 5, 3], [4, 3, 5, 4], [3, 1, 3, 1], [3, 1, 3, 1], [3, 1, 3, 1], [3, 1, 3, 1]])
    scores = torch.tensor([0.9, 0.9, 0.5, 0.5, 0.4, 0.0])
    dets, kept = mmcv.ops.soft_nms(boxes, scores, iou_threshold=0.6, sigma=0.5)
    assert len(kept) == len(dets) == 5 and 5 not in kept.tolist()


def test_nms_match_groups_by_the_box_that_suppresses():
    boxes = torch.tensor(
        [[49.1, 32.4, 51.0, 35.9], [49.3, 32.9, 51, 35.3], [35.3, 11.5, 39.9, 14.5], [35.2, 11.7, 39.7, 15.7]]
    )
    dets = torch.cat([boxes, torch.tensor([[0.9], [0.8], [0.4], [0.3]])], 1)
    groups = mmcv.ops.nms_match(dets, 0.6)
    assert [group.tolist() for group in groups] == [[0, 1], [2, 3]]
    assert {group[0].item() for group in groups} == set(mmcv.ops.nms(boxes, dets[:, 4].contiguous(), 0.6)[1].tolist())


def test_batched_nms_keeps_classes_apart_and_splits_large_inputs():
    boxes, scores = random_boxes(300, span=20)
    classes = torch.arange(300) % 7
    options = {"type": "nms", "iou_threshold": 0.5, "max_num": 100}
    dets, kept = mmcv.ops.batched_nms(boxes, scores, classes, dict(options))
    split_dets, split_kept = mmcv.ops.batched_nms(boxes, scores, classes, options | {"split_thr": 50})
    assert torch.equal(kept, split_kept) and torch.equal(dets, split_dets)
    each = [
        (classes == c).nonzero()[:, 0][mmcv.ops.nms(boxes[classes == c], scores[classes == c], 0.5)[1]]
        for c in range(7)
    ]
    best = torch.cat(each)[scores[torch.cat(each)].argsort(descending=True)][:100]
    assert torch.equal(kept, best)


@pytest.mark.parametrize("mode", ["iou", "iof"])
def test_overlaps_of_boxes(mode):
    first = torch.tensor([[1.0, 1, 3, 4], [2, 2, 3, 4], [7, 7, 8, 8]])
    second = torch.tensor([[0.0, 2, 2, 5], [2, 1, 3, 3]])
    found = mmcv.ops.bbox_overlaps(first, second, mode=mode, offset=1)
    expected = {"iou": [[1 / 3, 0.5], [0.2, 0.5], [0, 0]], "iof": [[0.5, 0.5], [0.5, 2 / 3], [0, 0]]}[mode]
    torch.testing.assert_close(found, torch.tensor(expected))
    aligned = mmcv.ops.bbox_overlaps(first[:2], second, mode=mode, aligned=True, offset=1)
    torch.testing.assert_close(aligned, torch.tensor([expected[0][0], expected[1][1]]))


def test_rotated_overlaps_give_mmcvs_example():
    first = torch.tensor([[1.0, 1, 3, 4, 0.5], [2, 2, 3, 4, 0.6], [7, 7, 8, 8, 0.4]])
    second = torch.tensor([[0.0, 2, 2, 5, 0.3], [2, 1, 3, 3, 0.5], [5, 5, 6, 7, 0.4]])
    expected = torch.tensor([[0.3708, 0.4351, 0.0], [0.1104, 0.4487, 0.0424], [0.0, 0.0, 0.3622]])
    for sign, clockwise in ((1, True), (-1, False)):
        turned = [torch.cat([boxes[:, :4], sign * boxes[:, 4:]], 1) for boxes in (first, second)]
        found = mmcv.ops.box_iou_rotated(*turned, clockwise=clockwise)
        torch.testing.assert_close(found, expected, atol=1e-4, rtol=0)
        found = mmcv.ops.box_iou_rotated(*turned, aligned=True, clockwise=clockwise)
        torch.testing.assert_close(found, expected.diag(), atol=1e-4, rtol=0)


def test_rotated_overlaps_of_upright_equal_and_thin_boxes():
    boxes, _ = random_boxes(20)
    sizes = boxes[:, 2:] - boxes[:, :2]
    upright = torch.cat([boxes[:, :2] + sizes / 2, sizes, torch.zeros(20, 1)], 1)
    found = mmcv.ops.box_iou_rotated(upright, upright)
    torch.testing.assert_close(found, mmcv.ops.bbox_overlaps(boxes, boxes), atol=1e-5, rtol=1e-4)
    for angle in (0.3, math.pi / 4, math.pi / 2, -2.0):
        turned = torch.cat([upright[:, :4], torch.full((20, 1), angle)], 1)
        torch.testing.assert_close(mmcv.ops.box_iou_rotated(turned, turned, aligned=True), torch.ones(20))
    cross = torch.tensor([[0.0, 0, 10, 1, 0], [0, 0, 10, 1, math.pi / 2]])
    torch.testing.assert_close(mmcv.ops.box_iou_rotated(cross, cross)[0, 1], torch.tensor(1 / 19))


def test_rotated_nms_keeps_the_best_of_what_overlaps_within_a_label():
    boxes = torch.tensor([[0.0, 0, 10, 4, 0.1], [0, 0, 10, 4, 0.2], [30, 0, 10, 4, 0.0], [0, 0, 10, 4, 1.6]])
    scores = torch.tensor([0.5, 0.9, 0.3, 0.8])
    dets, kept = mmcv.ops.nms_rotated(boxes, scores, 0.5)
    assert kept.tolist() == [1, 3, 2] and torch.equal(dets[:, 5], scores[kept])
    assert mmcv.ops.nms_rotated(boxes, scores, 0.5, labels=torch.tensor([0.0, 1, 0, 0]))[1].tolist() == [1, 3, 0, 2]


ROI_CASES = [
    (
        [[[[1.0, 2], [3, 4]]]],
        [[0.0, 0, 0, 1, 1]],
        [[[[1.0, 1.25], [1.5, 1.75]]]],
        [[[[3.0625, 0.4375], [0.4375, 0.0625]]]],
    ),
    (
        [[[[1.0, 2, 5, 6], [3, 4, 7, 8], [9, 10, 13, 14], [11, 12, 15, 16]]]],
        [[0.0, 0, 0, 3, 3]],
        [[[[1.9375, 4.75], [7.5625, 10.375]]]],
        [
            [
                [
                    [0.47265625, 0.42968750, 0.42968750, 0.04296875],
                    [0.42968750, 0.39062500, 0.39062500, 0.03906250],
                    [0.42968750, 0.39062500, 0.39062500, 0.03906250],
                    [0.04296875, 0.03906250, 0.03906250, 0.00390625],
                ]
            ]
        ],
    ),
]


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("case", ROI_CASES)
def test_roi_align_gives_mmcvs_examples(case, dtype):
    image, rois, output, gradient = (torch.tensor(values, dtype=dtype) for values in case)
    image.requires_grad_()
    found = mmcv.ops.roi_align(image, rois, (2, 2), 1.0, 2, "avg", True)
    found.sum().backward()
    torch.testing.assert_close(found, output)
    torch.testing.assert_close(image.grad, gradient)


def test_roi_align_has_the_right_gradients():
    torch.manual_seed(0)
    image = torch.randn(2, 3, 7, 6, dtype=torch.float64, requires_grad=True)
    rois = torch.tensor([[0, 1.3, 0.2, 9.1, 11.7], [1, -3, 2, 5, 30], [1, 4, 4, 4, 4]], dtype=torch.float64)
    for sampling, aligned in ((2, True), (0, True), (2, False)):
        pool = mmcv.ops.RoIAlign((3, 2), 0.5, sampling, "avg", aligned)
        assert torch.autograd.gradcheck(lambda x, pool=pool: pool(x, rois), image)


def test_roi_align_of_maxima_is_refused_by_name():
    with pytest.raises(NotImplementedError, match="pool_mode='avg'"):
        mmcv.ops.roi_align(torch.zeros(1, 1, 4, 4), torch.zeros(1, 5), (2, 2), 1.0, 2, "max", True)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16])
def test_roi_pool_gives_mmcvs_example(dtype):
    image = torch.tensor(ROI_CASES[1][0], dtype=dtype, requires_grad=True)
    found = mmcv.ops.roi_pool(image, torch.tensor([[0.0, 0, 0, 3, 3]], dtype=dtype), (2, 2), 1.0)
    found.sum().backward()
    assert found.tolist() == [[[[4, 8], [12, 16]]]]
    assert image.grad.nonzero().tolist() == [[0, 0, 1, 1], [0, 0, 1, 3], [0, 0, 3, 1], [0, 0, 3, 3]]
    assert image.grad.sum() == 4


def test_roi_pool_has_the_right_gradients():
    torch.manual_seed(0)
    image = torch.randn(2, 3, 8, 8, dtype=torch.float64, requires_grad=True)
    rois = torch.tensor([[0, 0, 0, 7, 7], [1, 2, 1, 6, 30], [1, 90, 90, 95, 95]], dtype=torch.float64)
    assert torch.autograd.gradcheck(lambda x: mmcv.ops.roi_pool(x, rois, (2, 2), 1.0), image)


LOGITS = [[[1.0, 0], [0, 1]], [[1.0, 0, -1], [0, 1, 2]], [[1e-6, 2e-6, 3e-6], [4e-6, 5e-5, 6e-4], [7e-3, 8e-2, 9e-1]]]
TARGETS = [[0, 1], [2, 1], [1, 2, 0]]


@pytest.mark.parametrize(
    ("function", "losses"),
    [
        (mmcv.ops.sigmoid_focal_loss, [0.13562961, 1.10251057, 0.42287254]),
        (mmcv.ops.softmax_focal_loss, [0.00566451, 0.34956908, 0.15754992]),
    ],
    ids=["sigmoid", "softmax"],
)
def test_focal_losses_give_mmcvs_examples(function, losses):
    for logits, targets, loss in zip(LOGITS, TARGETS, losses, strict=True):
        found = function(torch.tensor(logits), torch.tensor(targets), 2.0, 0.25, None, "mean")
        torch.testing.assert_close(found, torch.tensor(loss))


def focal_by_definition(logits, targets, weight, gamma, alpha, softmax):
    losses = torch.zeros(logits.shape[:1] if softmax else logits.shape, dtype=logits.dtype)
    for n, target in enumerate(targets.tolist()):
        scale = 1.0 if weight is None or target == logits.shape[1] else weight[target]
        if softmax:
            p = logits[n].softmax(0)[target]
            losses[n] = -scale * alpha * (1 - p) ** gamma * p.log()
            continue
        for c in range(logits.shape[1]):
            p = logits[n, c].sigmoid()
            positive = -alpha * (1 - p) ** gamma * p.log()
            negative = -(1 - alpha) * p**gamma * (1 - p).log()
            losses[n, c] = scale * (positive if c == target else negative)
    return losses


@pytest.mark.parametrize("softmax", [False, True], ids=["sigmoid", "softmax"])
@pytest.mark.parametrize("weighted", [False, True])
def test_focal_losses_are_the_definition_and_have_its_gradients(softmax, weighted):
    torch.manual_seed(0)
    logits = 3 * torch.randn(6, 4, dtype=torch.float64)
    targets = torch.tensor([0, 3, 1, 2, 2, 0] if softmax else [0, 3, 4, 2, 4, 1])  # 4 is background
    weight = torch.rand(4, dtype=torch.float64) if weighted else None
    function = mmcv.ops.softmax_focal_loss if softmax else mmcv.ops.sigmoid_focal_loss
    one, two = logits.clone().requires_grad_(), logits.clone().requires_grad_()
    found = function(one, targets, 1.5, 0.3, weight, "sum")
    expected = focal_by_definition(two, targets, weight, 1.5, 0.3, softmax).sum()
    found.backward()
    expected.backward()
    torch.testing.assert_close(found, expected)
    torch.testing.assert_close(one.grad, two.grad)


def test_the_sigmoid_focal_loss_of_extreme_logits_is_finite_in_half_precision():
    logits = torch.tensor([[40.0, -40.0], [-40.0, 40.0]], dtype=torch.float16, requires_grad=True)
    loss = mmcv.ops.sigmoid_focal_loss(logits, torch.tensor([0, 0]), 2.0, 0.25, None, "none")
    loss.sum().backward()
    torch.testing.assert_close(loss.detach(), torch.tensor([[0, 0], [10, 30]], dtype=torch.float16))
    assert logits.grad.isfinite().all()


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16])
def test_deformable_convolution_gives_mmcvs_example(dtype):
    offset_weight = [
        *([0.1, 0.4, 0.6, 0.1], [0.3, 0.2, 0.1, 0.3], [0.5, 0.5, 0.2, 0.8], [0.8, 0.3, 0.9, 0.1]),
        *([0.3, 0.1, 0.2, 0.5], [0.3, 0.7, 0.5, 0.3], [0.6, 0.2, 0.5, 0.3], [0.4, 0.1, 0.8, 0.4]),
    ]
    conv = mmcv.ops.DeformConv2dPack(1, 1, 2, im2col_step=2)
    conv.conv_offset.weight.data = torch.tensor(offset_weight).reshape(8, 1, 2, 2)
    conv.conv_offset.bias.data = torch.tensor([0.7, 0.1, 0.8, 0.5, 0.6, 0.5, 0.4, 0.7])
    conv.weight.data = torch.tensor([0.4, 0.2, 0.1, 0.9]).reshape(1, 1, 2, 2)
    conv.to(dtype)
    image = torch.tensor([[1.0, 2, 3], [0, 1, 2], [3, 5, 2]], dtype=dtype).expand(4, 1, 3, 3).clone().requires_grad_()
    output = conv(image)
    output.sum().backward()

    def check(found, expected):
        tolerance = 2e-2 if dtype == torch.float16 else 2e-3
        torch.testing.assert_close(found.float(), torch.tensor(expected), atol=tolerance, rtol=tolerance)

    check(output[3, 0], [[1.65, 0.0], [0.0, 0.0]])
    check(image.grad[3, 0], [[-0.666, 0.204, 0.0], [0.03, -0.416, 0.012], [0.0, 0.252, 0.129]])
    check(conv.weight.grad.flatten() / 4, [3.62, 0.0, 0.4, 0.18])
    check(conv.conv_offset.bias.grad / 4, [1.44, -0.72, 0.0, 0.0, -0.1, -0.08, -0.54, -0.54])


def test_modulated_deformable_convolution_gives_mmcvs_example():
    conv = mmcv.ops.ModulatedDeformConv2dPack(1, 1, (2, 2), stride=1, padding=1, bias=False)
    conv.weight.data.fill_(1.0)
    image = torch.tensor([[[[1.0, 2, 3]] * 3]]).requires_grad_()
    output = conv(image)
    output.sum().backward()
    middle = [1.0, 3.0, 5.0, 3.0]
    torch.testing.assert_close(output[0, 0], torch.tensor([[0.5, 1.5, 2.5, 1.5], middle, middle, [0.5, 1.5, 2.5, 1.5]]))
    torch.testing.assert_close(image.grad, torch.full((1, 1, 3, 3), 2.0))
    torch.testing.assert_close(conv.weight.grad, torch.full((1, 1, 2, 2), 9.0))
    # the gradients of offsets differ for samples just one pixel outside, see visionzoo/openmmlab/ops/deformable.py
    torch.testing.assert_close(conv.conv_offset.bias.grad[8:], torch.full((4,), 4.5))


@pytest.mark.parametrize("with_bias", [False, True])
def test_deformable_convolutions_with_offsets_of_0_are_convolutions_with_right_gradients(with_bias):
    torch.manual_seed(0)
    geometry = {"stride": 2, "padding": 1, "dilation": 1, "groups": 2, "deform_groups": 2}
    image = torch.randn(2, 4, 7, 6, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(6, 2, 3, 3, dtype=torch.float64, requires_grad=True)
    bias = torch.randn(6, dtype=torch.float64, requires_grad=True) if with_bias else None
    offset = torch.zeros(2, 36, 4, 3, dtype=torch.float64)
    mask = torch.ones(2, 18, 4, 3, dtype=torch.float64)
    expected = F.conv2d(image, weight, bias, 2, 1, 1, 2)
    found = mmcv.ops.modulated_deform_conv2d(image, offset, mask, weight, bias, *geometry.values())
    torch.testing.assert_close(found, expected)
    moved = 0.3 + 0.2 * torch.rand_like(offset)
    moved.requires_grad_()
    inputs = (image, moved, (0.5 * mask).requires_grad_(), weight, *([bias] if with_bias else []))
    assert torch.autograd.gradcheck(
        lambda x, o, m, w, b=None: mmcv.ops.modulated_deform_conv2d(x, o, m, w, b, *geometry.values()),
        inputs,
        fast_mode=True,
    )
    if not with_bias:
        torch.testing.assert_close(mmcv.ops.deform_conv2d(image, offset, weight, *geometry.values()), expected)
        assert torch.autograd.gradcheck(
            lambda x, o, w: mmcv.ops.deform_conv2d(x, o, w, *geometry.values()), (image, moved, weight), fast_mode=True
        )


def attention_by_definition(value, shapes, locations, weights):
    """Loops over everything; bilinear samples with zeros outside."""
    batch, _, heads, dim = value.shape
    output = torch.zeros(batch, locations.shape[1], heads, dim, dtype=value.dtype)
    for b, q, g in np.ndindex(batch, locations.shape[1], heads):
        start = 0
        for level, (height, width) in enumerate(shapes.tolist()):
            for point in range(locations.shape[4]):
                x = locations[b, q, g, level, point, 0].item() * width - 0.5
                y = locations[b, q, g, level, point, 1].item() * height - 0.5
                for row in (math.floor(y), math.floor(y) + 1):
                    for column in (math.floor(x), math.floor(x) + 1):
                        if 0 <= row < height and 0 <= column < width:
                            share = (1 - abs(y - row)) * (1 - abs(x - column)) * weights[b, q, g, level, point]
                            output[b, q, g] += share * value[b, start + row * width + column, g]
            start += height * width
    return output.flatten(2)


def test_deformable_attention_is_the_definition_and_has_right_gradients():
    torch.manual_seed(0)
    shapes = torch.tensor([[4, 3], [2, 2]])
    starts = torch.tensor([0, 12])
    value = torch.randn(2, 16, 2, 3, dtype=torch.float64, requires_grad=True)
    locations = (torch.rand(2, 5, 2, 2, 3, 2, dtype=torch.float64) * 1.4 - 0.2).requires_grad_()
    weights = torch.rand(2, 5, 2, 2, 3, dtype=torch.float64, requires_grad=True)
    function = mmcv.ops.multi_scale_deform_attn.MultiScaleDeformableAttnFunction.apply
    found = function(value, shapes, starts, locations, weights, 64)
    torch.testing.assert_close(found, attention_by_definition(value, shapes, locations, weights))
    assert torch.autograd.gradcheck(lambda v, p, w: function(v, shapes, starts, p, w, 64), (value, locations, weights))
    half = function(value.detach().half(), shapes, starts, locations.detach(), weights.detach(), 64)
    assert half.dtype == torch.float16
    torch.testing.assert_close(half.double(), found.detach(), atol=1e-2, rtol=1e-2)


def test_masked_convolution_convolves_where_the_mask_is():
    torch.manual_seed(0)
    conv = mmcv.ops.MaskedConv2d(3, 5, 3, padding=1)
    image = torch.randn(1, 3, 6, 7)
    mask = torch.rand(1, 6, 7) > 0.5
    torch.testing.assert_close(conv(image, mask), F.conv2d(image, conv.weight, conv.bias, padding=1) * mask[:, None])


def test_points_are_sampled_bilinearly():
    image = torch.arange(12.0).reshape(1, 1, 3, 4)
    points = torch.tensor([[[0.5 / 4, 0.5 / 3], [1.0 / 4, 1.0 / 3], [3.5 / 4, 2.5 / 3]]])
    torch.testing.assert_close(mmcv.ops.point_sample(image, points), torch.tensor([[[0.0, 2.5, 11.0]]]))


def test_an_op_that_is_not_served_says_so_when_it_is_called():
    with pytest.raises(
        NotImplementedError, match=r"'psamask_forward' is in mmcv's compiled extension only.*build mmcv"
    ):
        mmcv.ops.PSAMask("collect", (3, 3))(torch.zeros(1, 9, 4, 4))


def test_the_extension_looks_like_a_module_to_mmengine():
    spec = importlib.util.find_spec("mmcv._ext")
    assert spec is not None and spec.name == "mmcv._ext" and spec.origin.endswith("ops/__init__.py")
    assert set(ops.SERVED) <= set(vars(sys.modules["mmcv._ext"]))
    from mmengine.utils.dl_utils import collect_env

    assert "PyTorch" in collect_env()


def test_a_compiled_extension_stays_in_charge(tmp_path):
    """A module `_ext` in a folder of the mmcv package is found as a compiled one would be."""
    (tmp_path / "_ext.py").write_text("compiled = True\n")
    code = (
        f"import mmcv; mmcv.__path__.append({str(tmp_path)!r})\n"
        "import visionzoo.openmmlab; import mmcv._ext; print(mmcv._ext.compiled)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.stdout.split() == ["True"], done.stderr


def test_ops_reach_what_was_imported_without_them():
    """mmseg imports parts of mmdet, which continue without ops; both are used after that."""
    code = """
import mmseg.apis
from mmdet.models.dense_heads import rpn_head
from mmdet.models.layers import msdeformattn_pixel_decoder
from mmseg.models.utils import point_sample

before = rpn_head.batched_nms
import visionzoo.openmmlab
import mmcv.ops

assert before is not rpn_head.batched_nms is mmcv.ops.batched_nms
assert msdeformattn_pixel_decoder.MultiScaleDeformableAttention is mmcv.ops.MultiScaleDeformableAttention
assert point_sample.point_sample is mmcv.ops.point_sample

from mmdet.models.losses.focal_loss import sigmoid_focal_loss, _sigmoid_focal_loss

assert sigmoid_focal_loss.__module__ == "mmdet.models.losses.focal_loss"  # not a stand-in, but mmdet's own
assert _sigmoid_focal_loss is mmcv.ops.sigmoid_focal_loss
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert not done.returncode, done.stderr


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_on_a_gpu_the_ops_give_what_they_give_on_the_cpu(dtype):
    """Forward and backward, from the same inputs; float64 on the CPU."""
    torch.manual_seed(0)
    image = torch.randn(2, 8, 16, 20)
    rois = torch.tensor([[0, 1.0, 2, 30, 28], [1, 4.0, 4, 9, 40], [1, 0.0, 0, 60, 50]])
    logits, targets = 4 * torch.randn(64, 7), torch.randint(0, 8, (64,))
    offset, weight = torch.randn(2, 18, 16, 20), torch.randn(4, 8, 3, 3)
    mask = torch.rand(2, 9, 16, 20)
    shapes, starts = torch.tensor([[8, 6], [4, 3]]), torch.tensor([0, 48])
    value, places, weights = torch.randn(2, 60, 2, 16), torch.rand(2, 5, 2, 2, 4, 2), torch.rand(2, 5, 2, 2, 4)
    attention = mmcv.ops.multi_scale_deform_attn.MultiScaleDeformableAttnFunction.apply
    cases = {
        "roi_align": (lambda x, r: mmcv.ops.roi_align(x, r, (7, 7), 0.25, 0, "avg", True), [image], [rois]),
        "roi_pool": (lambda x, r: mmcv.ops.roi_pool(x, r, (7, 7), 0.25), [image], [rois]),
        "sigmoid_focal": (lambda x, t: mmcv.ops.sigmoid_focal_loss(x, t, 2.0, 0.25, None, "none"), [logits], [targets]),
        "softmax_focal": (
            lambda x, t: mmcv.ops.softmax_focal_loss(x, t, 2.0, 0.25, None, "sum"), [logits], [targets.clamp(max=6)]
        ),
        "deform_conv": (lambda x, o, w: mmcv.ops.deform_conv2d(x, o, w, 1, 1), [image, offset, weight], []),
        "modulated_deform_conv": (
            lambda x, o, m, w: mmcv.ops.modulated_deform_conv2d(x, o, m, w, None, 1, 1),
            [image, offset, mask, weight],
            [],
        ),
        "attention": (
            lambda v, p, w, s, i: attention(v, s, i, p, w, 64), [value, places, weights], [shapes, starts]
        ),
    }  # fmt: skip
    tolerance = {torch.float32: 2e-4, torch.float16: 2e-2, torch.bfloat16: 1e-1}[dtype]
    for name, (function, inputs, rest) in cases.items():
        results = []
        for device, kind in (("cpu", torch.float64), ("cuda", dtype)):
            # the inputs that low precision can hold, on both sides
            leaves = [x.to(dtype).to(device, kind).requires_grad_() for x in inputs]
            others = [x.to(dtype).to(device, kind) if x.is_floating_point() else x.to(device) for x in rest]
            output = function(*leaves, *others)
            output.sum().backward()
            results.append([output, *(leaf.grad for leaf in leaves)])
        for expected, found in zip(*results, strict=True):
            error = (found.double().cpu() - expected).norm() / expected.norm()
            assert error < tolerance, (name, dtype, error)
    boxes, scores = random_boxes(300)
    assert mmcv.ops.nms(boxes.cuda(), scores.cuda(), 0.4)[1].tolist() == mmcv.ops.nms(boxes, scores, 0.4)[1].tolist()
