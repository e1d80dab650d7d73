"""L²ViT's blocks in turn, and its options."""

import torch
from quick import meta_model, quick_model

from visionzoo.layers.nhwc import DepthwiseConvNHWC
from visionzoo.models.l2vit import LocalConcentration

TINY = {"depths": (2, 1, 3, 1), "embed_dims": (8, 16, 16, 32), "num_heads": (1, 2, 2, 4)}


def _kinds(model):
    blocks = [block for stage in model.stages for block in stage.blocks]
    return [(type(block.mixer).__name__, type(block.cpe2)) for block in blocks]


def test_blocks_take_turns_and_what_is_behind_attention_follows_the_mixer():
    local, linear = ("WindowMixer", DepthwiseConvNHWC), ("ClampedLinearMixer", LocalConcentration)
    assert _kinds(meta_model("zoo_l2vit_t", **TINY)) == [local, linear, local, local, linear, local, local]
    assert set(_kinds(meta_model("zoo_l2vit_t", **TINY, mixers="window"))) == {local}
    assert set(_kinds(meta_model("zoo_l2vit_t", **TINY, mixers="clamped_linear"))) == {linear}
    pool = _kinds(meta_model("zoo_l2vit_t", **TINY, mixers="pool"))
    assert set(pool) == {("PoolMixer", DepthwiseConvNHWC)}


@torch.no_grad()
def test_an_image_is_padded_before_the_stem():
    model = quick_model("zoo_l2vit_t", **TINY)
    image = torch.randn(1, 3, 61, 50)
    padded = torch.nn.functional.pad(image, (0, 2, 0, 3))
    assert torch.equal(model(image), model(padded))
    assert not torch.allclose(model(image), model(image[..., :48]))


def test_stochastic_depth_reaches_the_local_branch():
    model = meta_model("zoo_l2vit_t", **TINY, drop_path_rate=0.3)
    rates = [block.cpe2.drop_path.drop_prob for block in (model.stages[0].blocks[1], model.stages[2].blocks[1])]
    assert rates == [model.stages[0].blocks[1].drop_path.drop_prob, model.stages[2].blocks[1].drop_path.drop_prob]
    assert 0 < rates[0] < rates[1]


def test_the_plain_stem_is_one_convolution():
    model = meta_model("zoo_l2vit_t", **TINY, conv_stem=False)
    assert model.stem[0].conv.kernel_size == (4, 4) and len(model.stem) == 2
