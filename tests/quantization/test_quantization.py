"""Quantizers put into models: which layers, what is left, how scales begin, what annealing changes."""

import pytest
import timm
import torch
from torch import nn

from visionzoo.explanation import attention_weights
from visionzoo.layers.attention import attend
from visionzoo.layers.mixers import WindowMixer
from visionzoo.quantization import (
    LSQ,
    Annealing,
    QuantizedConv2d,
    QuantizedLinear,
    QuantizedProducts,
    QueryKeyProjection,
    StatsQ,
    calibrate,
    quantize,
)

MODELS = {
    "zoo_deit_t": dict(depth=2, embed_dim=16, num_heads=2, patch_size=8, img_size=32),
    "zoo_swin_t": dict(depths=[2, 1], embed_dims=[8, 16], num_heads=[1, 2], window_size=3),
    "zoo_pvtv2_b0": dict(depths=[1, 1], embed_dims=[8, 16], num_heads=[1, 2], mlp_ratios=[2, 2], reductions=[2, 1]),
    "zoo_poolformer_s12": dict(depths=[1, 1], embed_dims=[8, 16]),
    "test_vit3": dict(img_size=32),
}


def built(name, **options):
    torch.manual_seed(0)
    model = timm.create_model(name, num_classes=3, **MODELS[name])
    return model, quantize(model, 2, 2, **options)


@pytest.mark.parametrize("name", MODELS)
def test_every_layer_of_torch_is_quantized_and_learns(name):
    before = timm.create_model(name, num_classes=3, **MODELS[name])
    model, found = built(name)
    layers = [module for module in model.modules() if isinstance(module, QuantizedLinear | QuantizedConv2d)]
    plain = [module for module in before.modules() if type(module) in (nn.Linear, nn.Conv2d)]
    assert found.layers == len(layers) == len(plain) and found.ends == 2
    names = [name for name, _ in before.named_parameters()]
    assert [name for name, _ in model.named_parameters() if name in set(names)] == names
    bits = sorted({layer.quantize_input.bits for layer in layers})
    assert bits == [2, 8]
    assert calibrate(model, torch.randn(2, 3, 32, 32)) == []
    model(torch.randn(2, 3, 32, 32)).square().sum().backward()
    assert all(parameter.grad is not None for parameter in model.parameters())
    learned = {name for name, parameter in model.named_parameters() if parameter.grad.any()}
    assert {name for name in names if name.endswith("weight")} <= learned
    for layer in layers:
        values = layer.quantize_weight(layer.weight).flatten(1)
        assert max(len(row.unique()) for row in values) <= 2**layer.quantize_weight.bits
    assert f"quantized are {len(layers)} layers, 2 of them first or last with 8 bits" in str(found)


def test_what_is_left_in_float_is_counted():
    model, found = built("zoo_pvtv2_b0")
    assert found.float_layers == [f"stages.{i}.blocks.0.mlp.dwconv" for i in range(2)]
    assert (found.products, found.reparameterized, found.mixers) == (2, 0, 2)
    assert "attention in 2 of 2 mixers; 2 other modules with weights in float (stages.0.blocks.0.mlp" in str(found)
    weights = sum(p.numel() for name, p in model.named_parameters() if name.endswith(".weight") and p.ndim > 1)
    left = sum(model.get_submodule(name).weight.numel() for name in found.float_layers)
    assert found.share == (weights - left) / sum(p.numel() for p in model.parameters())


def test_a_convolution_that_pads_with_other_than_zeros_stays_in_float():
    model = nn.Sequential(nn.Conv2d(3, 4, 3, padding=1, padding_mode="reflect"), nn.Conv2d(4, 4, 3, padding=1))
    assert quantize(model, 2, 2).float_layers == ["0"] and type(model[0]) is nn.Conv2d


@pytest.mark.parametrize("name", ["zoo_deit_t", "zoo_swin_t"])
def test_reparameterized_attention_learns_queries_and_keys(name):
    model, found = built(name, reparameterize=True)
    assert found.reparameterized == found.products == found.mixers
    calibrate(model, torch.randn(2, 3, 32, 32))
    model(torch.randn(2, 3, 32, 32)).square().sum().backward()
    projections = [module for module in model.modules() if isinstance(module, QueryKeyProjection)]
    assert projections and all(part.any() for p in projections for part in p.weight.grad.chunk(3))
    float_model = timm.create_model(name, num_classes=3, **MODELS[name])
    missing = model.load_state_dict(float_model.state_dict(), strict=False)
    assert not missing.unexpected_keys and all("quantize_" in key for key in missing.missing_keys)


@pytest.mark.parametrize("options", [{}, {"relative_position_bias": True, "shift_size": 1}, {"mask_padding": True}])
def test_quantized_windows_see_what_windows_see(options):
    torch.manual_seed(0)
    mixer = WindowMixer(8, 2, window_size=3, **options)

    class Exact(nn.Module):
        def forward(self, q, k, v, bias=None):
            flat = (t.flatten(0, 1) for t in (q, k, v))
            bias = None if bias is None else bias.expand(*q.shape[:-1], q.shape[-2]).flatten(0, 1)
            return attend(*flat, bias=bias).unflatten(0, q.shape[:2])

    x = torch.randn(2, 5, 7, 8)
    expected = mixer(x)
    mixer.products = Exact()
    torch.testing.assert_close(mixer(x), expected, rtol=1e-5, atol=1e-6)


def test_scales_begin_by_images_and_leave_statistics():
    model = timm.create_model("test_resnet", num_classes=3)
    quantize(model, 4, 4)
    before = {name: buffer.clone() for name, buffer in model.named_buffers() if "running" in name}
    calibrate(model, torch.randn(2, 3, 32, 32))
    assert before and all(torch.equal(model.get_buffer(name), value) for name, value in before.items())
    quantizers = [module for module in model.modules() if isinstance(module, LSQ)]
    assert all(quantizer.begun for quantizer in quantizers)
    scales = [quantizer.scale.clone() for quantizer in quantizers]
    calibrate(model, 9 * torch.randn(2, 3, 32, 32))  # they have begun
    assert all(torch.equal(a, quantizer.scale) for a, quantizer in zip(scales, quantizers, strict=True))


def test_inputs_after_an_activation_are_unsigned_unless_they_are_negative():
    model = nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Dropout(0.1), nn.Linear(4, 4), nn.GELU(), nn.Linear(4, 4))
    quantize(model, 2, 2)
    assert [model[i].quantize_input.low.item() for i in (0, 3, 5)] == [-2, 0, 0]
    model[4] = nn.Tanh()  # in the place of the activation
    calibrate(model, torch.randn(64, 4))
    assert [model[i].quantize_input.low.item() for i in (0, 3, 5)] == [-2, 0, -2]


def test_what_is_never_called_does_not_learn():
    class Reader(nn.Module):
        def __init__(self):
            super().__init__()
            self.read, self.called = nn.Linear(4, 4), nn.Linear(4, 4)

        def forward(self, x):
            return self.called(x) @ self.read.weight

    model = Reader()
    quantize(model, 2, 2)
    assert calibrate(model, torch.randn(2, 4)) == ["read.quantize_input"]
    assert not any(parameter.requires_grad for parameter in model.read.quantize_input.parameters())


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_weights_that_begin_at_zero_stay_near_it_and_learn(dtype):
    weight = torch.tensor([[0.0, 0.0], [1.0, -1.0]], dtype=dtype, requires_grad=True)
    out = StatsQ(4)(weight)
    assert (out[0].abs() < 1e-30).all() and out[1].tolist() == [1.125, -0.875]
    out.sum().backward()
    assert torch.equal(weight.grad, torch.ones_like(weight))


def test_annealing_holds_all_but_weights_near_a_boundary():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(16, 8), nn.Linear(8, 4))
    quantize(model, 3, 4)
    calibrate(model, torch.randn(4, 16))
    annealing = Annealing(model, 0.2)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01, weight_decay=0.5)
    for _ in range(3):
        model(torch.randn(4, 16)).square().sum().backward()
        frozen, total = annealing.share()
        before = [layer.weight.detach().clone() for layer in model]
        annealing.hold()
        optimizer.step()
        annealing.restore()
        stay = sum(int((b == layer.weight).sum()) for b, layer in zip(before, model, strict=True))
        assert 0 < frozen == stay < total == 16 * 8 + 8 * 4


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: StatsQ(8), "StatsQ: expected 2 to 7 bits, got 8; take LSQ"),
        (lambda: StatsQ(1), "StatsQ: expected 2 to 8 bits, got 1"),
        (lambda: LSQ(True), "LSQ: expected 2 to 8 bits, got True"),
        (lambda: quantize(nn.ReLU(), 2, 2), "ReLU has no linear layer and no convolution of torch's to quantize"),
        (lambda: quantize(built("zoo_poolformer_s12")[0], 2, 2), "the model is quantized already; build it anew"),
        (lambda: Annealing(built("zoo_poolformer_s12")[0], 0.6), "expected a margin above 0 and at most 0.5, got 0.6"),
    ],
)
def test_wrong_arguments_are_named(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def test_attention_of_many_bits_is_attention():
    torch.manual_seed(0)
    q, k, v = torch.randn(3, 2, 2, 6, 4).unbind(0)
    products = QuantizedProducts(2, 4, 8)
    for module in products.modules():
        module.calibrating = True
    products(q, k, v)
    error = (products(q, k, v) - attend(q, k, v)).abs().max()
    assert 0 < error < 0.15  # the scale of values is that of few of them


@pytest.mark.parametrize("reparameterize", [False, True])
def test_quantized_attention_is_recorded_for_rollout(reparameterize):
    torch.manual_seed(0)
    model = timm.create_model("zoo_deit_t", depth=2, embed_dim=16, num_heads=2, num_classes=3, img_size=32)
    quantize(model, 8, 8, reparameterize=reparameterize)
    image = torch.randn(1, 3, 32, 48)
    calibrate(model, image)
    plain = model.eval()(image)
    weights = attention_weights(model, image)
    assert [tuple(each.shape) for each in weights] == [(2, 7, 7)] * 2
    torch.testing.assert_close(weights[0].sum(-1), torch.ones(2, 7), rtol=0, atol=0.05)
    torch.testing.assert_close(model(image), plain, rtol=0, atol=0)
