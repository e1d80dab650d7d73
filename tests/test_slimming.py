"""A slimmed model is the one whose last layers ignore the other units, and a plain smaller network."""

import pytest
import torch
from timm.layers import Mlp

import visionzoo
from visionzoo.decoders import EDAFormerDecoder, MultiTaskNetwork
from visionzoo.layers.mixers.full import FullMixer
from visionzoo.layers.mixers.gmm import GmmMixer
from visionzoo.layers.mixers.spatial_reduction import SpatialReductionMixer
from visionzoo.layers.mixers.window import WindowMixer
from visionzoo.layers.mlp import ConvMlp
from visionzoo.slimming import WIDTHS, slim, slimmable, slimmed_call

MAP, MAPS = (2, 6, 5, 16), [(2, 8, 6, 5), (2, 16, 3, 3)]
# layer, the tensor by which its output depends on the units, of which half are to stay, and the shape of its input
LAYERS = {
    "mlp": (lambda: Mlp(16, 24), "fc2.weight", MAP),
    "conv_mlp": (lambda: ConvMlp(16, 24), "fc2.weight", MAP),
    "gated_conv_mlp": (lambda: ConvMlp(16, 36, gated=True), "fc2.weight", MAP),
    "full": (lambda: FullMixer(16, 4, qkv_bias=True), "proj.weight", MAP),
    "spatial_reduction": (lambda: SpatialReductionMixer(16, 4, reduction=2), "proj.weight", MAP),
    "pooled": (lambda: SpatialReductionMixer(16, 4, pool_size=2), "proj.weight", MAP),
    "window": (lambda: WindowMixer(16, 4, window_size=3, shift_size=1), "proj.weight", MAP),
    "position_bias": (lambda: WindowMixer(16, 4, window_size=3, relative_position_bias=True), "proj.weight", MAP),
    "edaformer": (lambda: EDAFormerDecoder([8, 16], 3, embed_dim=12), "classifier.weight", MAPS),
}


def inputs(shape):
    return (
        [torch.randn(one, dtype=torch.float64) for one in shape]
        if isinstance(shape, list)
        else torch.randn(shape, dtype=torch.float64)
    )


def built(name):
    torch.manual_seed(0)
    make, last, shape = LAYERS[name]
    layer = make().double().eval()
    for parameter in layer.parameters():  # biases are zero at first
        torch.nn.init.normal_(parameter, std=0.3)
    return layer, last, inputs(shape)


def ignoring(layer, last):
    """The layer whose output does not depend on the second half of its units."""
    weight = layer.get_parameter(last)
    with torch.no_grad():
        weight[:, weight.shape[1] // 2 :] = 0
    return layer


def test_each_kind_of_layer_is_tested():
    assert set(WIDTHS) == {type(built(name)[0]) for name in LAYERS}


@pytest.mark.parametrize("name", LAYERS)
def test_half_of_a_layer_is_the_layer_that_ignores_the_other_half(name):
    layer, last, x = built(name)
    shares = {"": 1.0, **dict.fromkeys(slimmable(layer)[0], 1.0), next(iter(slimmable(layer)[0])): 0.5}
    smaller = slim(layer, shares)
    outputs = slimmed_call(layer, shares, x)
    assert torch.equal(outputs, smaller(x))
    expected = ignoring(built(name)[0], last)(x)
    torch.testing.assert_close(outputs, expected, rtol=1e-12, atol=1e-12)
    whole = layer(x)
    assert not torch.allclose(whole, outputs) and torch.equal(whole, slimmed_call(layer, {"": 1.0}, x))
    assert sum(p.numel() for p in smaller.parameters()) < sum(p.numel() for p in layer.parameters())


@pytest.mark.parametrize("name", ["gated_conv_mlp", "position_bias"])
def test_gradients_are_those_of_the_units_that_stay(name):
    layer, last, x = built(name)
    slimmed_call(layer, {"": 0.5}, x).square().sum().backward()
    other = ignoring(built(name)[0], last)
    other(x).square().sum().backward()
    gradient = other.get_parameter(last).grad
    gradient[:, gradient.shape[1] // 2 :] = 0  # of the units that do not take part
    for path, parameter in layer.named_parameters():
        torch.testing.assert_close(parameter.grad, other.get_parameter(path).grad, rtol=1e-9, atol=1e-9, msg=path)


def network():
    torch.manual_seed(0)
    small = {
        "depths": (1, 1),
        "embed_dims": (8, 16),
        "num_heads": (2, 4),
        "mlp_ratios": (2.0, 2.0),
        "reductions": (2, 1),
    }
    decoder = {"type": "edaformer", "embed_dim": 12, "depths": (1, 1, 1)}
    segmentor = visionzoo.create_segmentor("zoo_pvtv2_b0", decoder, 3, **small)
    return MultiTaskNetwork(segmentor, [1, 2], hidden_dim=8)


SHARES = {"segmentor.backbone": 0.5, "segmentor.decoder": 0.25, "classifier": 0.3}


def test_a_slimmed_network_is_a_plain_smaller_one_and_leaves_the_full_one_as_it_was():
    model, x = network(), torch.randn(2, 3, 32, 40)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    heads = model.segmentor.backbone.model.stages[1].blocks[0].mixer
    smaller = slim(model, SHARES)
    for mode in (False, True):  # batch norms by their averages, and by the batch
        answers, plain = slimmed_call(model.train(mode), SHARES, x), smaller.train(mode)(x)
        if not mode:
            assert torch.equal(answers.labels, plain.labels) and torch.equal(answers.pixels, plain.pixels)
    assert heads.num_heads == heads.kv_heads == 4
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    block = smaller.segmentor.backbone.model.stages[1].blocks[0]
    assert (block.mixer.num_heads, block.mixer.q.out_features, block.mixer.proj.in_features) == (2, 8, 8)
    assert (block.mlp.fc1.out_features, block.mlp.dwconv.dim, block.mlp.fc2.in_features) == (16, 16, 16)
    fuse = smaller.segmentor.decoder.fuse
    assert (fuse.conv.out_channels, fuse.bn.num_features, len(fuse.bn.running_mean)) == (3, 3, 3)
    assert smaller.classifier[-1].fc1.out_features == 3  # 2.4 hidden channels, rounded up
    assert all(p.requires_grad and p.is_leaf for p in smaller.parameters())
    model.eval()
    answers, plain = slimmed_call(model, {"": 1.0}, x), model(x)
    assert torch.equal(answers.labels, plain.labels) and torch.equal(answers.pixels, plain.pixels)


def test_layers_count_their_units_again_after_an_error():
    model = network()
    with pytest.raises(ValueError, match="expected images"):
        slimmed_call(model.segmentor, {"": 0.5}, torch.zeros(3))
    assert model.segmentor.backbone.model.stages[1].blocks[0].mixer.num_heads == 4


def test_what_cannot_be_slimmed_is_named():
    layers = [FullMixer(16, 4, kv_heads=2), FullMixer(16, 4, lepe_kernel=3), GmmMixer(16, 4), Mlp(16, 8)]
    layers.append(Mlp(16, 8, norm_layer=torch.nn.LayerNorm))
    found, fixed = slimmable(torch.nn.ModuleList(layers))
    assert (list(found), fixed) == (["3"], ["0", "1", "2", "4"])


@pytest.mark.parametrize(
    ("shares", "message"),
    [
        ({"": 0.0}, r"a share is above 0 and at most 1, got 0.0 for ''"),
        ({"0": 1.5}, r"a share is above 0 and at most 1, got 1.5 for '0'"),
        ({"head": 0.5}, r"no slimmable layer's name begins with 'head'; there are 0"),
    ],
)
def test_wrong_shares_are_named(shares, message):
    with pytest.raises(ValueError, match=message):
        slim(torch.nn.Sequential(Mlp(4, 8)), shares)
