"""A Mask2Former with exits is mmseg's Mask2Former of as many layers, and its gate chooses what images pay for."""

import copy
import re
from collections import Counter
from functools import cache
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

pytest.importorskip("mmdet", reason='needs pip install "visionzoo[openmmlab]"')

from mmengine.config import Config
from mmengine.registry import MODELS, init_default_scope
from mmengine.structures import PixelData
from mmseg.structures import SegDataSample

from visionzoo.openmmlab.encoder_exits import EncoderLayersHook
from visionzoo.openmmlab.gate_fitting import Derived, choose, fit

CONFIGS = Path(__file__).parents[2] / "configs/segmentation"
CHANNELS, LAYERS, SIDE = (8, 8, 16, 16), 3, 64


@cache
def config():
    return Config.fromfile(str(CONFIGS / "eco-mask2former_zoo-davit-t_160k_ade20k-512x512.py")).model.decode_head


def small_head():
    """The head of a config, with 16 channels and 5 classes."""
    cfg, width = copy.deepcopy(config()), 16
    encoder, decoder = cfg.pixel_decoder.encoder.layer_cfg, cfg.transformer_decoder.layer_cfg
    for part in (*encoder.values(), *decoder.values()):
        part.embed_dims = width
    encoder.ffn_cfg.feedforward_channels = decoder.ffn_cfg.feedforward_channels = width
    encoder.self_attn_cfg.num_heads = decoder.self_attn_cfg.num_heads = decoder.cross_attn_cfg.num_heads = 2
    cfg.pixel_decoder.positional_encoding.num_feats = cfg.positional_encoding.num_feats = width // 2
    cfg.pixel_decoder.norm_cfg.num_groups = 2
    cfg.update(feat_channels=width, out_channels=width, num_classes=5)
    cfg.loss_cls.class_weight = [1.0] * 5 + [0.1]
    return cfg


def build(layers=LAYERS, kind="Exit", **options):
    """A small head with random weights, the same for the same names."""
    init_default_scope("mmseg")
    cfg = small_head()
    cfg.update(in_channels=CHANNELS, num_queries=6, type=f"{kind}Mask2FormerHead", **options)
    cfg.pixel_decoder.type = "ExitPixelDecoder" if kind else "mmdet.MSDeformAttnPixelDecoder"
    cfg.pixel_decoder.encoder.num_layers = layers
    cfg.transformer_decoder.num_layers = 1
    cfg.train_cfg.num_points = 32
    head = MODELS.build(cfg)
    for name, parameter in head.named_parameters():
        generator = torch.Generator().manual_seed(sum(name.encode()))
        parameter.data.copy_(0.3 * torch.randn(parameter.shape, generator=generator))
    return head


def maps(images=2):
    generator = torch.Generator().manual_seed(0)
    sides = (SIDE // 4, SIDE // 8, SIDE // 16, SIDE // 32)
    return [torch.randn(images, c, s, s, generator=generator) for c, s in zip(CHANNELS, sides, strict=True)]


def samples(images=2):
    found = []
    for number in range(images):
        found.append(SegDataSample(metainfo={"img_shape": (SIDE, SIDE), "ori_shape": (SIDE, SIDE)}))
        found[-1].gt_sem_seg = PixelData(data=(torch.arange(SIDE * SIDE).view(1, SIDE, SIDE) // 999 + number) % 5)
    return found


def segment(head, x):
    with torch.no_grad():
        return head.eval().predict(x, [sample.metainfo for sample in samples(len(x[0]))], None)


def learn(head):
    torch.manual_seed(0)  # points are drawn
    losses = head.train().loss(maps(), samples(), None)
    sum(losses.values()).backward()
    return losses


@pytest.mark.parametrize("layers", [None, 1, 2, 3])
def test_a_fixed_number_of_layers_is_the_network_that_has_no_more_to_the_bit(layers):
    plain, head = build(layers or LAYERS, ""), build(encoder_layers=layers)
    assert torch.equal(segment(head, maps()), segment(plain, maps()))
    assert set(plain.state_dict()) <= set(head.state_dict()), "checkpoints of one fit the other"
    assert head.used == [2 * (k == (layers or LAYERS)) for k in (1, 2, 3)]


def test_a_seed_draws_the_weights_that_mmdets_pixel_decoder_begins_with():
    init_default_scope("mmseg")
    started = {}
    for kind in ("ExitPixelDecoder", "mmdet.MSDeformAttnPixelDecoder"):
        cfg = small_head().pixel_decoder
        cfg.update(type=kind, in_channels=CHANNELS, strides=(4, 8, 16, 32), feat_channels=16, out_channels=16)
        torch.manual_seed(0)
        decoder = MODELS.build(cfg)
        decoder.init_weights()
        started[kind] = decoder.state_dict()
    own, theirs = started.values()
    assert own.keys() == theirs.keys() and all(torch.equal(own[name], theirs[name]) for name in own)


def test_only_the_last_exit_learns_as_the_plain_network_to_the_bit():
    plain, head = build(kind=""), build(exit_weights=(0, 0, 1))
    expected, own = learn(plain), learn(head)
    assert own.keys() == expected.keys() and all(torch.equal(own[name], expected[name]) for name in own)
    for name, parameter in plain.named_parameters():
        assert torch.equal(head.get_parameter(name).grad, parameter.grad), name


@pytest.mark.parametrize("layers", [1, 2])
def test_an_exits_losses_and_gradients_are_those_of_the_network_that_ends_there(layers):
    weights = [0.0, 0.0, 1e-30]  # the last has no say in float32
    weights[layers - 1] = 0.5
    expected = learn(plain := build(layers, ""))
    own = learn(head := build(exit_weights=weights))
    for name, loss in expected.items():
        assert torch.equal(own[f"exit{layers}.{name}"], 0.5 * loss), name
    for name, parameter in plain.named_parameters():
        torch.testing.assert_close(head.get_parameter(name).grad, 0.5 * parameter.grad, rtol=1e-5, atol=1e-7)


def test_exits_weigh_more_with_depth_and_all_weights_learn():
    head = build(encoder_layers="gate")
    assert head.exit_weights == {1: 1 / 3, 2: 2 / 3, 3: 1}
    names = {name.split(".")[0] for name in learn(head)}
    assert names == {"exit1", "exit2", "loss_cls", "loss_mask", "loss_dice", "d0"}
    frozen = [name for name, p in head.named_parameters() if p.grad is None]
    assert frozen == [name for name, _ in head.named_parameters() if name.startswith("gate.")]
    assert not any(p.requires_grad for p in head.gate.parameters()), "or several GPUs would wait for their gradients"


def test_each_image_runs_as_many_layers_as_the_gate_chooses():
    head, x, chosen = build(encoder_layers="gate"), maps(4), [3, 1, 3, 2]
    head.gate.forward = lambda pooled: torch.nn.functional.one_hot(torch.tensor(chosen) - 1, LAYERS).float()
    ran = Counter()
    for number, layer in enumerate(head.pixel_decoder.encoder.layers, 1):
        layer.register_forward_hook(lambda _, __, out, number=number: ran.update({number: len(out)}))
    found = segment(head, x)
    assert ran == {1: 4, 2: 3, 3: 2} and head.used == [1, 1, 2]
    for image, layers in enumerate(chosen):
        alone = segment(build(encoder_layers=layers), [each[image : image + 1] for each in x])
        torch.testing.assert_close(found[image], alone[0], rtol=1e-4, atol=1e-5)


def test_the_mean_number_of_layers_is_a_metric_of_each_evaluation():
    head, hook = build(encoder_layers=2), EncoderLayersHook()
    runner = SimpleNamespace(model=torch.nn.Module())
    runner.model.decode_head = head
    for used, expected in (([3, 0, 1], 1.5), ([0, 0, 2], 3.0)):
        hook.before_test_epoch(runner)
        assert head.used == [0, 0, 0]
        head.used = used
        hook.after_test_epoch(runner, metrics := {"mIoU": 1.0})
        assert metrics == {"mIoU": 1.0, "encoder_layers": expected}


WRONG = [
    ({"exit_weights": (1, 1)}, "exit_weights must be 3 numbers, one for each layer of the encoder"),
    ({"exit_weights": (1, 1, 0)}, "the last above 0, got (1, 1, 0)"),
    ({"exit_weights": (-1, 1, 1)}, "0 or more"),
    ({"exit_weights": (float("nan"), 1, 1)}, "0 or more"),
    ({"exit_weights": (1, "a", 1)}, "exit_weights must be 3 numbers, one for each layer of the encoder"),
    ({"exit_weights": 0.5}, "above 0, got 0.5"),
    ({"encoder_layers": 4}, "encoder_layers must be 1 to 3, 'gate', or None for all, got 4"),
    ({"encoder_layers": 0}, "got 0"),
    ({"encoder_layers": "gates"}, "got 'gates'"),
    ({"encoder_layers": True}, "got True"),
]


@pytest.mark.parametrize(("options", "message"), WRONG)
def test_wrong_options_are_named(options, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        build(**options)


def test_a_pixel_decoder_without_exits_is_named():
    cfg = small_head()
    cfg.pixel_decoder.type = "mmdet.MSDeformAttnPixelDecoder"
    init_default_scope("mmseg")
    with pytest.raises(ValueError, match="expected pixel_decoder of type 'ExitPixelDecoder', which has exits, got"):
        MODELS.build(cfg)


def derived(images=40):
    """Images of two kinds: one is done after the first layer, the other gains by each; a class is nowhere."""
    hard = torch.arange(images) % 2
    right = torch.where(hard[:, None] == 1, torch.tensor([40, 60, 80]), torch.tensor([90, 90, 90]))
    areas = torch.zeros(images, 3, 3, 2, dtype=torch.int32)
    areas[:, :, 0, 0] = right
    areas[:, :, 1, 0] = areas[:, :, 2, 0] = 100
    pooled = torch.randn(images, 6, generator=torch.Generator().manual_seed(0))
    pooled[:, 0] += 4 * hard
    return Derived(torch.tensor([1, 2, 3]), pooled, areas), hard


def test_quality_is_iou_and_targets_pay_for_layers():
    data, hard = derived()
    quality = data.quality
    assert torch.allclose(quality[0], torch.tensor(90 / 110).double()) and quality[1, 2] == pytest.approx(80 / 120)
    assert torch.equal(data.targets(0.0), 2 * hard), "an equal exit with fewer layers is better"
    assert torch.equal(data.targets(0.1), 2 * hard) and not data.targets(0.3).any()
    everywhere = data.measure(torch.full((40,), 2))
    assert everywhere["miou"] == pytest.approx(100 * 170 / 230) and everywhere["layers"] == 3
    assert everywhere["image_iou"] == pytest.approx(100 * (90 / 110 + 80 / 120) / 2)


def test_a_gate_learns_which_images_need_layers_and_never_chooses_what_is_no_exit():
    data, hard = derived()
    assert torch.equal(choose(fit(data, 0.1, 3), data), 2 * hard)
    assert not choose(fit(data, 0.3, 3), data).any()
    fewer = Derived(torch.tensor([2, 4]), data.pooled, data.areas[:, ::2])
    gate = fit(fewer, 0.0, 4)
    assert torch.equal(choose(gate, fewer), hard)
    scores = gate(1e3 * torch.randn(500, 6))
    assert set((scores.argmax(1) + 1).tolist()) == {2, 4}
