"""CrossViT: two views of an image, whose class tokens look at each other's maps."""

import pytest
import timm
import torch
from quick import draw_weights

import visionzoo
from visionzoo.layers.branches import resize_view, view_size
from visionzoo.models._registry import TINY

SMALL = TINY["zoo_crossvit_t"]
IMAGE = torch.randn(1, 3, 61, 75, generator=torch.Generator().manual_seed(0))


def _model(**kwargs):
    return draw_weights(timm.create_model("zoo_crossvit_t", num_classes=5, **{**SMALL, **kwargs})).eval()


def test_the_second_view_has_the_authors_sizes_and_the_images_shape():
    assert view_size((240, 240), (14, 15)) == (224, 224) and view_size((408, 408), (16, 17)) == (384, 384)
    assert view_size((1, 480), (14, 15)) == (1, 448) and view_size((333, 251), (14, 15)) == (311, 234)
    image = torch.randn(1, 3, 30, 60)
    assert resize_view(image, (14, 15)).shape == (1, 3, 28, 56) and resize_view(image, (1, 1)) is image
    half = resize_view(image.half(), (14, 15))
    assert half.dtype == torch.float16 and torch.equal(half, resize_view(image.half().float(), (14, 15)).half())


@torch.no_grad()
def test_fusion_changes_class_tokens_alone_by_the_other_branchs_map():
    model = _model()
    part, state = model.blocks[0], model.begin(IMAGE)
    alone = [branch(tokens) for branch, tokens in zip(part.branches, state, strict=True)]
    fused = part(state)
    for own, after in zip(alone, fused, strict=True):
        assert torch.equal(own.x[:, 1:], after.x[:, 1:]) and (own.x[:, 0] - after.x[:, 0]).norm() > 1e-3
    for i, fuse in enumerate(part.fusion):
        other = alone[1 - i]
        moved = other._replace(x=torch.cat([other.x[:, :1] + 1, other.x[:, 1:].flip(1)], 1))
        torch.testing.assert_close(fuse(alone[i], moved).x, fused[i].x)  # not its class token, nor its order
        changed = fuse(alone[i], other._replace(x=other.x + torch.randn(other.x.shape)))
        assert (changed.x[:, 0] - fused[i].x[:, 0]).norm() > 1e-3


@torch.no_grad()
def test_logits_are_the_mean_of_both_branches_and_features_are_joined():
    model = _model()
    small, large = last = model.forward_features(IMAGE)
    a, b = model.head[0].fc(small[:, 0]), model.head[1].fc(large[:, 0])
    torch.testing.assert_close(model(IMAGE), (a + b) / 2)
    assert torch.equal(model.forward_head(last, pre_logits=True), torch.cat([small[:, 0], large[:, 0]], 1))
    assert model.get_classifier() == (model.head[0].fc, model.head[1].fc)
    with pytest.raises(ValueError, match="a classifier needs pooling; got num_classes=5 and global_pool=''"):
        _model(global_pool="")(IMAGE)


@torch.no_grad()
def test_positions_of_both_branches_are_fitted_and_channels_adapted():
    source, target = _model(img_size=60), _model(img_size=(60, 120), in_chans=1)
    report = visionzoo.load_weights(target, source.state_dict())
    assert report.adapted == [
        "positions.0.table (1, 26, 16) resized to (1, 51, 16)",
        "positions.1.table (1, 17, 24) resized to (1, 29, 24)",
        "stem.0.conv.weight (3 to 1 input channels)",
        "stem.1.conv.weight (3 to 1 input channels)",
    ]
    image = torch.randn(1, 3, 60, 120)
    before = source(image)
    source.set_input_size((60, 120))
    assert [positions.size for positions in source.positions] == [(5, 10), (4, 7)]
    torch.testing.assert_close(source(image), before)


@pytest.mark.parametrize("mixers", [None, "window", ("pool", "full", ["window", "full"])])
@pytest.mark.parametrize("indices", [(0,), (3,), (1,), (5,), (2, 5), (0, 4), (2, 3)])
def test_pruned_models_have_what_their_features_need_and_no_more(mixers, indices):
    whole = _model(mixers=mixers)
    pruned = timm.create_model("zoo_crossvit_t", features_only=True, out_indices=indices, mixers=mixers, **SMALL).eval()
    report = visionzoo.load_weights(pruned, whole.state_dict())
    assert report.dropped and not report.missing
    maps = pruned(IMAGE)
    for own, expected in zip(maps, whole.forward_intermediates(IMAGE, indices, intermediates_only=True), strict=True):
        assert torch.equal(own, expected)
    sum(m.square().mean() for m in maps).backward()
    assert not [name for name, parameter in pruned.named_parameters() if parameter.grad is None]


def test_drop_path_rises_by_block_in_both_branches():
    rates = [getattr(block.drop_path, "drop_prob", 0.0) for block in _model(drop_path_rate=0.3).blocks_in_order()]
    assert rates == pytest.approx([0, 0, 0.1, 0.2, 0.2, 0.3, 0.3])  # 1 and 2, 1 and 1, 1 and 1 blocks


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"embed_dims": (16,)}, r"embed_dims must be a positive number for each of 2 branches, got \(16,\)"),
        ({"depths": ((1, 1), (0, 1))}, r"depths\[1\] must be a positive number for each of 2 branches, got \(0, 1\)"),
        ({"view_ratio": (0, 15)}, r"view_ratio must be a fraction, such as \(14, 15\), got view_ratio=\(0, 15\)"),
        ({"drop_path_rate": 1.0}, "drop_path_rate must be from 0 to below 1, got drop_path_rate=1.0"),
        ({"conv_stem": True, "patch_sizes": (12, 8)}, r"conv_stem=True needs patch_sizes of \[12, 16\], got 8"),
        ({"img_size": 0}, "img_size must be pixels or"),
    ],
)
def test_what_is_not_for_two_branches_is_refused(wrong, message):
    with pytest.raises(ValueError, match=message):
        _model(**wrong)
