"""TNT: pixels see their own patch alone, and tokens see them."""

import timm
import torch
from quick import draw_weights

from visionzoo.models._registry import TINY


def _model(**kwargs):
    return draw_weights(timm.create_model("zoo_tnt_s", num_classes=5, **{**TINY["zoo_tnt_s"], **kwargs})).eval()


@torch.no_grad()
def test_pixels_see_their_own_patch_and_every_token_sees_them():
    model, image = _model(), torch.randn(1, 3, 48, 64)
    other = image.clone()
    other[..., 16:32, 32:48] += 1  # the patch in row 1, column 2
    before, after = [], []
    for x, states in ((image, before), (other, after)):
        model.forward_features(x, states)
    changed = (before[-1].pixels - after[-1].pixels).flatten(1).norm(dim=1)
    assert (changed > 1e-3).nonzero().flatten().tolist() == [1 * 4 + 2]
    assert ((before[-1].tokens.x - after[-1].tokens.x)[0].norm(dim=1) > 1e-5).all()


@torch.no_grad()
def test_tables_of_both_kinds_are_fitted():
    source, target = _model(), _model(img_size=(64, 96), inner_stride=2)
    table = torch.randn(1, 8, 4, 4)
    positions = target.stem.positions
    assert positions.table.shape == (1, 8, 8, 8)
    own = source.stem.positions.fit_weight("table", table)
    assert torch.equal(own, table.permute(0, 2, 3, 1))
    assert torch.equal(source.stem.positions.fit_weight("table", table.flatten(2).transpose(1, 2)), own)
    assert positions.fit_weight("table", table).shape == (1, 8, 8, 8)
