"""Raw outputs of detectors and segmentors as ONNX, and the JSON that says how to read them."""

import json

import numpy as np
import pytest
import torch
from engine.helpers import ROOT, run_tool

pytest.importorskip("mmdet", reason='needs pip install "visionzoo[openmmlab]"')
onnxruntime = pytest.importorskip("onnxruntime", reason='needs pip install "visionzoo[export]"')

RETINANET = ROOT / "configs/detection/retinanet_zoo-biformer-t_fpn_tiny.py"
SEMANTIC_FPN = ROOT / "configs/segmentation/semantic-fpn_zoo-biformer_digits.py"
SMALL = ["model.backbone.depths=[1,1,1,1]", "model.backbone.embed_dims=[16,16,32,32]", "model.neck.out_channels=32"]
SMALL += ["model.neck.in_channels=[16,32,32]", "model.bbox_head.in_channels=32", "model.bbox_head.feat_channels=32"]
SMALL += ["model.bbox_head.stacked_convs=1", "model.bbox_head.num_classes=3"]


def network_of(config, options, path, loss=None):
    """Build what a config describes, a segmentor with another loss, with random weights that are saved."""
    from mmengine.config import Config, DictAction
    from mmengine.registry import MODELS, init_default_scope

    cfg = Config.fromfile(str(config))
    cfg.merge_from_dict({key: DictAction._parse_iterable(value) for key, value in (o.split("=") for o in options)})
    cfg.model.backbone.pretrained = False
    if loss:
        cfg.model.decode_head.loss_decode = loss
    init_default_scope(cfg.default_scope)
    torch.manual_seed(0)
    network = MODELS.build(cfg.model).eval()
    meta = {"dataset_meta": {"classes": ["cat", "dog", "cow"]}}
    torch.save({"state_dict": network.state_dict(), "meta": meta}, path)
    return network


@torch.no_grad()
def test_a_retinanet_is_exported_before_nms_with_what_decoding_needs(tmp_path):
    network = network_of(RETINANET, SMALL, tmp_path / "x.pth")
    flags = ["--checkpoint", str(tmp_path / "x.pth"), "--input-size", "3", "64", "160", "--output", str(tmp_path)]
    assert run_tool("export", str(RETINANET), *flags, "--cfg-options", *SMALL) == 0
    content = json.loads((tmp_path / f"{RETINANET.stem}.json").read_text())
    assert content["class_names"] == ["cat", "dog", "cow"] and content["preprocessing"]["channels"] == "RGB"
    session = onnxruntime.InferenceSession(str(tmp_path / f"{RETINANET.stem}.onnx"))
    image = torch.randn(2, 3, 64, 160)
    names = [output["name"] for output in content["outputs"]]
    found = dict(zip(names, session.run(names, {"image": image.numpy()}), strict=True))
    scores, deltas = network._forward(image)
    for level, (own_scores, own_deltas) in enumerate(zip(scores, deltas, strict=True)):
        np.testing.assert_allclose(found[f"scores_{level}"], own_scores.numpy(), atol=1e-4)
        np.testing.assert_allclose(found[f"deltas_{level}"], own_deltas.numpy(), atol=1e-4)

    head = network.bbox_head
    sizes = [tuple(score.shape[2:]) for score in scores]
    for level, priors in enumerate(head.prior_generator.grid_priors(sizes, device="cpu")):
        expected = head.bbox_coder.decode(priors, 3 * deltas[level][0].permute(1, 2, 0).reshape(-1, 4)).numpy()
        own = decode(3 * found[f"deltas_{level}"][0], content["levels"][level], content["box_coder"])
        np.testing.assert_allclose(own, expected, rtol=1e-3, atol=1e-2)


def decode(deltas, level, coder):
    """Boxes [h·w·A, 4] of one level, by nothing but the description."""
    anchors, (down, right) = np.array(level["anchors"]), level["stride"]
    height, width = deltas.shape[1:]
    y, x = np.meshgrid(np.arange(height) * down, np.arange(width) * right, indexing="ij")
    boxes = (anchors + np.stack([x, y, x, y], -1)[:, :, None]).reshape(-1, 4)
    d = deltas.reshape(len(anchors), 4, height, width).transpose(2, 3, 0, 1).reshape(-1, 4)
    d = d * coder["stds"] + coder["means"]
    size, centre = boxes[:, 2:] - boxes[:, :2], (boxes[:, 2:] + boxes[:, :2]) / 2
    limit = abs(np.log(coder["wh_ratio_clip"]))
    centre, size = centre + d[:, :2] * size, size * np.exp(d[:, 2:].clip(-limit, limit))
    return np.concatenate([centre - size / 2, centre + size / 2], 1)


@torch.no_grad()
@pytest.mark.parametrize(
    ("classes", "channels", "loss"),
    [pytest.param(11, 11, {}, marks=pytest.mark.full), (2, 2, {}), (2, 1, {"use_sigmoid": True})],
)
def test_a_segmentor_is_exported_to_logits_that_give_its_classes(tmp_path, classes, channels, loss):
    backbone = {"type": "ZooBackbone", "name": "zoo_poolformer_s12", "depths": (1,) * 4, "embed_dims": [8] * 4}
    head = {"num_classes": classes, "out_channels": channels, "threshold": 0.4 if channels == 1 else None}
    loss = {"_delete_": True, "type": "CrossEntropyLoss", **loss}
    (tmp_path / "small.py").write_text(
        f"_base_ = {str(SEMANTIC_FPN)!r}\n"
        f"model = dict(backbone={ {'_delete_': True, **backbone} }, neck=dict(in_channels=[8] * 4, out_channels=8), "
        f"decode_head=dict(in_channels=[8] * 4, channels=8, **{head}, loss_decode={loss}))\n"
    )
    network = network_of(tmp_path / "small.py", [], tmp_path / "x.pth")
    image = torch.randn(3, 3, 64, 64)
    middles = network._forward(image).transpose(0, 1).flatten(1).median(1).values
    network.decode_head.conv_seg.bias -= middles  # so that each class has its pixels
    torch.save({"state_dict": network.state_dict()}, tmp_path / "x.pth")
    flags = ["--checkpoint", str(tmp_path / "x.pth"), "--img-size", "64", "--output", str(tmp_path)]
    assert run_tool("export", str(tmp_path / "small.py"), *flags) == 0
    content = json.loads((tmp_path / "small.json").read_text())
    assert content["outputs"] == [{"name": "logits", "shape": ["batch", channels, 16, 16]}]
    session = onnxruntime.InferenceSession(str(tmp_path / "small.onnx"))
    (logits,) = session.run(None, {"image": image.numpy()})
    np.testing.assert_allclose(logits, network._forward(image), atol=1e-4)
    samples = network.postprocess_result(network.inference(image, [{"img_shape": (64, 64), "ori_shape": (64, 64)}] * 3))
    expected = torch.stack([sample.pred_sem_seg.data[0] for sample in samples])
    resized = torch.nn.functional.interpolate(torch.from_numpy(logits), (64, 64), mode="bilinear")
    if channels == 1:  # by nothing but the description
        assert content["activation"] == "sigmoid of one channel"
        found = (resized[:, 0].sigmoid() > content["threshold"]).long()
    else:
        assert content["activation"] == "softmax over the channels" and "threshold" not in content
        found = resized.argmax(1)
    assert (found == expected).float().mean() > 0.999  # a pixel at a border may round to either side
    shares = torch.bincount(found.flatten(), minlength=classes) / found.numel()
    assert shares.min() > 0.001


@pytest.mark.parametrize(
    ("config", "flags", "message"),
    [
        (RETINANET, [], "which weights? give --checkpoint, or --random-weights"),
        (RETINANET, ["--checkpoint", "nowhere"], "no checkpoint at nowhere"),
        (RETINANET, ["--checkpoint", str(ROOT / "README.md")], "README.md"),
        (RETINANET.with_name("nothing.py"), ["--random-weights"], "no config at"),
        (
            RETINANET.with_name("mask-rcnn_zoo-biformer-t_fpn_tiny.py"),
            ["--random-weights"],
            "MaskRCNN has no raw outputs to export",
        ),
        (
            SEMANTIC_FPN.with_name("eco-mask2former_zoo-davit-t_160k_ade20k-512x512.py"),
            ["--random-weights"],
            "EncoderDecoder with ExitMask2FormerHead has no raw outputs to export",
        ),
    ],
)
def test_what_a_user_can_mend_is_one_message_and_exit_code_1(config, flags, message, capsys):
    assert run_tool("export", str(config), *flags) == 1
    said = capsys.readouterr().err
    assert message in said and "Traceback" not in said
