"""What models look at: each number against its definition, and what a model lacks by message."""

import networkx
import numpy as np
import PIL.Image
import pytest
import timm
import torch
from scipy.ndimage import gaussian_filter
from torch import nn

import visionzoo
from visionzoo.explanation import (
    attended,
    attention_flow,
    attention_rollout,
    attention_weights,
    deeplift,
    faithfulness,
    feature_colors,
    frequency_channel,
    gradient_input,
)
from visionzoo.explanation.attribution import blurred
from visionzoo.explanation.features import band_noise, octaves
from visionzoo.layers.attention import record_attention
from visionzoo.layers.mixers import MIXERS, build_mixer
from visionzoo.models._registry import TINY


def deit(**options):
    torch.manual_seed(0)
    model = timm.create_model("zoo_deit_t", depth=3, embed_dim=24, num_heads=3, num_classes=4, img_size=32, **options)
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.2)
    return model.eval()


@pytest.fixture(scope="module")
def image():
    return torch.randn(1, 3, 32, 48, generator=torch.Generator().manual_seed(1))


def random_attention(layers=3, heads=2, tokens=5):
    generator = torch.Generator().manual_seed(2)
    return [
        torch.randn(heads, tokens, tokens, generator=generator, dtype=torch.float64).mul(2).softmax(-1)
        for _ in range(layers)
    ]


def test_rollout_and_flow_are_those_of_their_definition():
    attention = random_attention()
    layers = [(weights.mean(0) + torch.eye(5)) / 2 for weights in attention]
    rollout = layers[2] @ layers[1] @ layers[0]
    torch.testing.assert_close(attention_rollout(attention), rollout, rtol=0, atol=1e-12)
    graph = networkx.DiGraph()
    for layer, weights in enumerate(layers):
        for start in range(5):
            for end in range(5):
                graph.add_edge((layer + 1, start), (layer, end), capacity=float(weights[start, end]))
    for source in (0, 3):
        flows = np.array([networkx.maximum_flow_value(graph, (3, source), (0, sink)) for sink in range(5)])
        np.testing.assert_allclose(attention_flow(attention, source).numpy(), flows / flows.sum(), rtol=0, atol=1e-12)
    with pytest.raises(ValueError, match="source must be a token from 0 to 4, got source=5"):
        attention_flow(attention, 5)
    with pytest.raises(ValueError, match="block 1 has negative weights"):
        attention_rollout([attention[0], attention[1] - 0.5])


def test_recorded_weights_are_what_the_mixer_multiplies_its_values_by(image):
    model = deit()
    seen = {}
    mixer = model.blocks[1].mixer
    hook = mixer.register_forward_hook(lambda _module, args, out: seen.update(x=args[0], out=out))
    weights = attention_weights(model, image)
    hook.remove()
    assert [each.shape for each in weights] == [(3, 7, 7)] * 3
    values = mixer.split_heads(mixer.qkv(seen["x"]))[2].flatten(1, 2).transpose(1, 2)
    out = mixer.proj((weights[1] @ values).transpose(1, 2).flatten(2)[:, None])
    torch.testing.assert_close(out, seen["out"])


@pytest.mark.parametrize("name", [name for name, kind in MIXERS.items() if kind.SCORE_MAP])
def test_mixers_with_score_maps_record_them_and_compute_the_same(name):
    torch.manual_seed(0)
    options = {"nystrom": {"num_landmarks": 0}, "levit": {"map_size": 3}}.get(name, {})
    mixer = build_mixer({"type": name, **options}, 16, 2).double().eval()
    x = torch.randn(1, 3, 4, 16, dtype=torch.float64)
    with torch.no_grad():
        plain = mixer(x)
        with record_attention() as weights:
            recorded = mixer(x)
    assert [each.shape[2:] for each in weights] == [(12, 12)]
    torch.testing.assert_close(recorded, plain, rtol=0, atol=1e-12)


def test_tokens_that_pass_by_a_mixer_keep_to_themselves(image):
    model = deit(mixers=["gated_positional", "full", "full"])
    weights = attention_weights(model, image)
    assert not weights[0][:, 0].any() and not weights[0][:, :, 0].any()
    torch.testing.assert_close(attention_rollout(weights).sum(-1), torch.ones(7, dtype=torch.float64))


def test_a_place_attends_to_its_neighborhood_alone():
    torch.manual_seed(0)
    model = timm.create_model(
        "zoo_deit_t", depth=1, embed_dim=8, num_heads=2, img_size=96, patch_size=8,
        mixers={"type": "neighborhood", "kernel_size": 3}, num_classes=2,
    ).eval()  # fmt: skip
    (seen,) = attended(model, torch.randn(1, 3, 96, 96), (0.5, 0.25))
    assert (seen.place, seen.kind, seen.weights) == ((6, 3), "NeighborhoodMixer", None)
    expected = torch.zeros(12, 12, dtype=torch.bool)
    expected[5:8, 2:5] = True
    assert torch.equal(seen.reach > 0, expected)


@pytest.mark.parametrize("mixer", ["full", "pool"])
def test_reach_is_the_norm_of_the_derivative(image, mixer):
    model = deit(mixers=mixer).double()
    (seen,) = attended(model, image.double(), (0.9, 0.1), mixers=["blocks.2.mixer"])
    inputs = {}
    hook = model.blocks[2].mixer.register_forward_pre_hook(lambda _module, args: inputs.update(x=args[0].detach()))
    model(image.double())
    hook.remove()
    at, count = ((0, 4), 1) if mixer == "full" else ((1, 0), 0)
    whole = torch.autograd.functional.jacobian(lambda x: model.blocks[2].mixer(x)[0, at[0], at[1]], inputs["x"])
    norms = whole.square().sum((0, 1, 4)).sqrt().flatten()
    torch.testing.assert_close(seen.reach.flatten(), norms[count:])
    torch.testing.assert_close(seen.prefix, norms[:count])
    torch.testing.assert_close(seen.channels, whole.square().sum((0, 1, 2, 3)).sqrt())
    rough = attended(model, image.double(), (0.9, 0.1), mixers=["blocks.2.mixer"], probes=8)[0].reach
    assert 0.5 < float(rough.square().sum() / seen.reach.square().sum()) < 2


def test_deeplift_and_gradients_add_up_where_they_must():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(4 * 36, 3)).double().eval()
    image = torch.randn(1, 3, 8, 8, dtype=torch.float64)
    lift = deeplift(model, image, 2)
    zero = torch.zeros_like(image)
    assert lift.gap < 1e-9
    torch.testing.assert_close(lift.map.sum(), (model(image) - model(zero))[0, 2].detach())
    x = image.clone().requires_grad_()
    model(x)[0, 1].backward()
    torch.testing.assert_close(gradient_input(model, image, 1), (x.grad * image)[0].sum(0))
    with pytest.raises(ValueError, match=r"no layer that DeepLIFT's rescale rule is for .* it has GELU"):
        deeplift(deit(), torch.zeros(1, 3, 32, 32), 0)


class Reused(nn.Module):
    """One ReLU on two maps and on a bias that is made from offsets; all else is linear."""

    def __init__(self):
        super().__init__()
        self.convs = nn.ModuleList([nn.Conv2d(3, 4, 3), nn.Conv2d(4, 5, 3)])
        self.act = nn.ReLU()
        self.bias = nn.Linear(1, 5)
        self.head = nn.Linear(5, 3)

    def forward(self, x):
        bias = self.act(self.bias(torch.arange(3.0, dtype=x.dtype)[:, None])).sum(0)
        x = self.act(self.convs[1](self.act(self.convs[0](x))))
        return self.head(x.mean((2, 3)) + bias)


@pytest.mark.parametrize("learning", [True, False])
def test_deeplift_takes_a_layer_that_is_called_several_times(learning):
    torch.manual_seed(0)
    model = Reused().double().eval().requires_grad_(learning)
    image = torch.randn(1, 3, 8, 9, dtype=torch.float64)
    lift = deeplift(model, image, 1)
    assert lift.gap < 1e-9 < abs(lift.difference)
    assert type(model.act) is nn.ReLU and {each.requires_grad for each in model.parameters()} == {learning}
    halonet = timm.create_model("zoo_halonet_h0", **TINY["zoo_halonet_h0"], num_classes=3)
    found = visionzoo.explain_image(halonet, torch.randn(1, 3, 64, 64), methods=["deeplift"])
    assert found.maps["deeplift"].any() and "misses the difference of the logits" in found.notes["deeplift"]


class Share(nn.Module):
    """Two classes: the first gets the sum of the image's first channel as its logit."""

    num_classes = 2

    def forward(self, x):
        return torch.stack([x[:, 0].sum((1, 2)), torch.zeros(len(x), dtype=x.dtype)], 1)


def test_faithful_maps_delete_early_and_insert_early():
    image = torch.zeros(1, 3, 12, 12, dtype=torch.float64)
    image[0, 0, :6] = torch.rand(6, 12, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    curve = faithfulness(Share(), image, image[0, 0], 0)
    order = image[0, 0].flatten().sort(descending=True).values
    left = torch.stack([order[12 * i :].sum() for i in range(13)]).sigmoid()
    torch.testing.assert_close(curve.deletion, left)
    assert curve.insertion[0] == pytest.approx(float(blurred(image)[0, 0].sum().sigmoid()))
    assert curve.insertion[-1] == pytest.approx(float(image.sum().sigmoid()))
    trapezoids = (left.sum() - left[0] / 2 - left[-1] / 2) / 12
    assert curve.areas[0] == pytest.approx(float(trapezoids))
    worst = faithfulness(Share(), image, -image[0, 0], 0)
    assert worst.areas[0] > curve.areas[0] and worst.areas[1] < curve.areas[1]
    with pytest.raises(ValueError, match="3 of them NaN"):
        faithfulness(Share(), image, torch.tensor([[float("nan")] * 3]), 0)


def test_blur_is_rise_s():
    delta = np.zeros((11, 11))
    delta[5, 5] = 1
    image = torch.zeros(1, 1, 21, 21, dtype=torch.float64)
    image[0, 0, 10, 10] = 1
    np.testing.assert_allclose(blurred(image)[0, 0, 5:16, 5:16].numpy(), gaussian_filter(delta, 5), rtol=0, atol=1e-12)


def test_attention_iou_is_its_definition():
    generator = torch.Generator().manual_seed(3)
    maps, masks = torch.rand(2, 4, 5, 6, generator=generator, dtype=torch.float64)
    for one, other, score in zip(maps, masks, visionzoo.attention_iou(maps, masks), strict=True):
        one, other = one / one.sum(), other / other.sum()
        products = sum(float(a) * float(b) for a, b in zip(one.flatten(), other.flatten(), strict=True))
        squares = sum((float(a + b) / 2) ** 2 for a, b in zip(one.flatten(), other.flatten(), strict=True))
        assert float(score) == pytest.approx(products / squares, rel=1e-12)
    torch.testing.assert_close(visionzoo.attention_iou(maps, 3 * maps), torch.ones(4, dtype=torch.float64))
    with pytest.raises(ValueError, match="masks must hold no negative numbers"):
        visionzoo.attention_iou(maps, -masks)


def test_noise_is_of_its_octave_and_hides_what_stands_on_it():
    noise = torch.randn(1, 16, 16, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    assert octaves(16).tolist() == [1, 2, 4, 8]
    kept = band_noise(noise, 4)
    spectrum = torch.fft.fft2(kept[0]).abs()
    at = torch.fft.fftfreq(16, 1 / 16)
    square = at[:, None].square() + at.square()
    outside = (square < 8) | (square >= 32)
    assert float(kept.std(unbiased=False)) == pytest.approx(1)
    assert spectrum[outside].max() < 1e-9 < spectrum[~outside].min()

    class Grating(nn.Module):  # the sure class is that of a grating of 4 cycles
        def forward(self, x):
            power = torch.fft.fft2(x[:, 0])[:, 0, 4].abs()
            return torch.stack([10 - power, torch.zeros_like(power)], 1)

    table = frequency_channel(Grating(), torch.zeros(1, 3, 16, 16), 0, std=torch.ones(3), deviations=(0.5,))
    assert int(table.probability[0].argmin()) == 2 and table.clean > 0.99


def test_test_time_registers_are_tokens_beside_the_map(image):
    model = deit()
    model.test_registers, model.registers_at = 2, 1
    weights = attention_weights(model, image)
    assert [tuple(each.shape) for each in weights] == [(3, 9, 9)] * 3
    assert not weights[0][:, 1:3].any() and not weights[0][:, :, 1:3].any()
    torch.testing.assert_close(weights[0][:, [0, *range(3, 9)]][:, :, [0, *range(3, 9)]].sum(-1), torch.ones(3, 7))
    torch.testing.assert_close(weights[1].sum(-1), torch.ones(3, 9))
    found = visionzoo.explain_image(model, image, methods=["rollout", "flow", "attended"])
    np.testing.assert_allclose(found.maps["rollout"].ravel(), attention_rollout(weights)[0, 3:].numpy(), atol=1e-6)
    np.testing.assert_allclose(found.maps["flow"].ravel(), attention_flow(weights, 0)[3:].numpy(), atol=1e-6)
    assert [tuple(each.reach.shape) for each in found.attended] == [(2, 3)] * 3
    assert [len(each.prefix) for each in found.attended] == [1, 3, 3]


def test_masks_are_read_whole_and_maps_without_evidence_overlap_with_none(image):
    small = np.zeros((200, 200))
    small[3, 3] = 1  # lost where every hundredth pixel is read
    found = visionzoo.explain_image(deit(), image[:, :, :2, :2], methods=["rollout"], mask=small)
    assert found.overlaps["rollout"] > 0

    class Against(Share):
        def forward(self, x):
            return -super().forward(x)

    against = Against()
    found = visionzoo.explain_image(against, image.abs(), methods=["gradient_input"], target=0, mask=np.eye(4))
    assert found.overlaps == {"gradient_input": 0.0}
    for mask in (np.zeros((4, 4)), -np.eye(4), np.ones(4), np.full((2, 2), np.nan)):
        with pytest.raises(ValueError, match=r"mask is .* numbers from 0, not all of them 0; got"):
            visionzoo.explain_image(against, image, methods=["gradient_input"], mask=mask)


def test_explanations_have_what_the_model_has_and_say_what_it_lacks(tmp_path, image):
    model = deit().train()
    model.blocks[0].requires_grad_(False)
    model.blocks[1].eval()
    before = [parameter.requires_grad for parameter in model.parameters()]
    modes = [module.training for module in model.modules()]
    found = visionzoo.explain_image(model, image, mask=np.eye(8), with_faithfulness=True)
    assert [module.training for module in model.modules()] == modes
    assert [parameter.requires_grad for parameter in model.parameters()] == before
    assert set(found.maps) == {"rollout", "gradient_input"} == set(found.curves) == set(found.overlaps)
    assert found.maps["rollout"].shape == (2, 3) and found.notes["rollout"] == "of the class token"
    rollout = attention_rollout(attention_weights(deit(), image))
    np.testing.assert_allclose(found.maps["rollout"].ravel(), rollout[0, 1:].numpy(), atol=1e-6)
    assert found.left_out["exits"] == "DeiT has no early exits; zoo_dynperceiver_* have some"
    assert set(found.left_out) == {"flow", "deeplift", "frequency", "tokens", "exits"}
    found.features, found.attended, found.maps = [], found.attended[:1], {}
    assert {path.name for path in found.save(tmp_path)} == {"attended.png", "faithfulness.png"}
    some = visionzoo.explain_image(model, image, methods=["exits", "rollout"])
    assert set(some.maps) == {"rollout"} and set(some.left_out) == {"exits"}
    flow = visionzoo.explain_image(model, image, methods=["flow"], place=(0.9, 0.9)).maps["flow"]
    np.testing.assert_allclose(flow.ravel(), attention_flow(attention_weights(deit(), image), 6)[1:].numpy(), atol=1e-6)


def test_pictures_are_read_in_the_model_s_mode(tmp_path):
    pixels = np.random.default_rng(0).integers(0, 256, (32, 48, 3), dtype=np.uint8)
    picture = PIL.Image.fromarray(pixels).quantize(16)
    expected = visionzoo.explain_image(deit(), picture.convert("RGB"), methods=[]).classes
    picture.save(tmp_path / "palette.png")
    for given in (picture, picture.convert("RGBA"), tmp_path / "palette.png"):
        assert visionzoo.explain_image(deit(), given, methods=[]).classes == expected
    for deep in (PIL.Image.new("I;16", (32, 32)), PIL.Image.new("F", (32, 32))):
        with pytest.raises(ValueError, match=r"pixels of 16 or 32 bits .* give one of 8 bits"):
            visionzoo.explain_image(deit(), deep)


def test_mixers_of_parts_of_the_image_have_no_places_on_it():
    torch.manual_seed(0)
    image = torch.randn(1, 3, 32, 48)
    model = timm.create_model("zoo_tnt_s", depth=2, num_classes=2).eval()
    assert [(seen.name, seen.place) for seen in attended(model, image, (0.2, 0.9))] == [
        ("blocks.0.mixer", (0, 2)),
        ("blocks.1.mixer", (0, 2)),
    ]
    with pytest.raises(ValueError, match=r"blocks.0.inner.mixer run on 6 maps of an image, each a part of it"):
        attended(model, image, mixers=["blocks.0.inner.mixer"])


def test_colors_are_principal_components(image):
    name, colors = feature_colors(deit(), image)[-1]
    assert name == "blocks.2" and colors.shape == (2, 3, 3)
    assert colors.amin((0, 1)).tolist() == [0, 0, 0] and colors.amax((0, 1)).tolist() == [1, 1, 1]
    flat = deit().forward_intermediates(image, intermediates_only=True)[-1][0].detach().flatten(1).double()  # [C, N]
    _, vectors = torch.linalg.eigh((flat - flat.mean(1, keepdim=True)).T @ (flat - flat.mean(1, keepdim=True)))
    first = colors[..., 0].flatten() - colors[..., 0].mean()
    assert abs(float(first @ vectors[:, -1])) == pytest.approx(float(first.norm()))


def test_what_cannot_be_is_said(image):
    pyramid = timm.create_model("zoo_poolformer_s12", num_classes=2).eval()
    reduced = deit(reduce="representation_shift")
    cases = [
        (lambda: visionzoo.explain_image(deit(), image, methods=["rolout"]), "unknown method 'rolout'"),
        (lambda: visionzoo.explain_image(deit(), image, place=(0, 2)), "place is two shares from 0 to 1"),
        (lambda: visionzoo.explain_image(deit(), image, target=4), "target must be a class from 0 to 3, got target=4"),
        (
            lambda: visionzoo.explain_image(deit(in_chans=4), image[:, [0, 1, 2, 2]]),
            r"4 channels, mean 3 numbers; .*0.5",
        ),
        (lambda: visionzoo.explain_image(deit(), image[0, 0]), "expected a picture, its path, or one image"),
        (
            lambda: visionzoo.explain_image(pyramid, image, methods=["rollout"]),
            "PoolFormer is not an isotropic model.*; of this model attended, features, gradient_input can be made",
        ),
        (
            lambda: attention_weights(timm.create_model("zoo_activator_geglu", depth=2, embed_dim=16), image),
            "Activator as built has no mixers in its blocks, so no token sees another",
        ),
        (lambda: gradient_input(nn.Flatten(), image[..., :1, :1], 3), "Flatten has 3 classes, got target=3"),
        (lambda: visionzoo.explain_image(deit(), image / 0), "DeiT makes NaN or infinite logits of the image"),
        (lambda: attention_weights(deit(mixers="pool"), image), "its mixers are PoolMixer; models that have them"),
        (lambda: attention_weights(reduced, image), "DeiT has reducers"),
        (lambda: attended(reduced, image, mixers=["blocks.2.mixer"]), "see 5 tokens that have no fixed places"),
        (lambda: attended(deit(), image, mixers=["blocks.9"]), "DeiT has no mixers blocks.9; it has blocks.0.mixer"),
        (lambda: attended(timm.create_model("resnet18"), image), "ResNet has no token mixers of the zoo"),
    ]
    for call, words in cases:
        with pytest.raises(ValueError, match=words):
            call()
