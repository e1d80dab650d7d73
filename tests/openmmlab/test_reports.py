"""What users of other segmentation tools reported: is it right here?"""

import numpy as np
import pytest
import torch
from engine.helpers import run_tool
from PIL import Image

pytest.importorskip("mmdet", reason='needs pip install "visionzoo[openmmlab]"')

from openmmlab.shrink import inputs
from openmmlab.test_export import SEMANTIC_FPN, network_of

SMALL = ["model.backbone.depths=[1,1,1,1]", "model.backbone.embed_dims=[16,16,32,32]", "model.neck.out_channels=16"]
SMALL += ["model.neck.in_channels=[16,16,32,32]", "model.decode_head.in_channels=[16,16,16,16]"]
SMALL += ["model.decode_head.channels=16"]
LOADED = "dict(type='LoadImageFromFile')"
RESIZED = f"{LOADED}, dict(type='Resize', scale=(160, 96), keep_ratio=True)"
PADDED = "data_preprocessor=dict(test_cfg=dict(size_divisor=64))"


@pytest.fixture
def by_brightness(tmp_path, monkeypatch):
    """A function that predicts a picture by a segmentor whose network says 0 for bright pixels and 1 for dark ones."""

    def forward(head, image):
        brightness = torch.nn.functional.avg_pool2d(image.mean(1, keepdim=True), 4, ceil_mode=True)
        return torch.cat([brightness, -brightness], 1)

    monkeypatch.setattr("mmseg.models.EncoderDecoder.extract_feat", lambda self, image: image)
    monkeypatch.setattr("mmseg.models.decode_heads.FPNHead.forward", forward)
    options = [*SMALL, "model.decode_head.num_classes=2"]
    network_of(SEMANTIC_FPN, options, tmp_path / "x.pth")

    def predict(picture, model="", load=LOADED):
        small = ", ".join(option.removeprefix("model.backbone.") for option in SMALL[:2])
        (tmp_path / "config.py").write_text(
            f"_base_ = {str(SEMANTIC_FPN)!r}\n"
            f"model = dict(backbone=dict({small}), neck=dict(out_channels=16, in_channels=[16, 16, 32, 32]), "
            f"decode_head=dict(in_channels=[16] * 4, channels=16, num_classes=2), {model})\n"
            f"test_dataloader = dict(dataset=dict(pipeline=[{load}, dict(type='PackSegInputs')]))\n"
        )
        Image.fromarray(picture).save(tmp_path / "a.png")
        flags = ["--checkpoint", str(tmp_path / "x.pth"), "--output", str(tmp_path / "out"), "--device", "cpu"]
        code = run_tool("predict", str(tmp_path / "config.py"), str(tmp_path / "a.png"), *flags)
        return code or np.array(Image.open(tmp_path / "out/pred/a.png"))

    return predict


@pytest.mark.parametrize(
    ("size", "model", "load"),
    [
        ((75, 101), "", LOADED),
        ((75, 101), PADDED, LOADED),
        ((75, 101), PADDED, RESIZED),
        ((75, 101), "test_cfg=dict(mode='slide', crop_size=(32, 48), stride=(21, 48))", RESIZED),
        (
            (40, 24),
            "test_cfg=dict(mode='slide', crop_size=(64, 64), stride=(42, 42))",
            LOADED,
        ),
    ],
    ids=["whole", "padded", "resized", "windows", "smaller than a window"],
)
def test_a_mask_lies_where_its_picture_does(by_brightness, capsys, size, model, load):
    """ultralytics#24617: masks beside their objects; rslearn#503: pictures smaller than a window."""
    height, width = size
    picture = np.zeros((height, width, 3), np.uint8)
    rows, columns = slice(height // 3, height - 8), slice(width // 4, width // 2 + 4)
    picture[rows, columns] = 255
    mask = by_brightness(picture, model, load)
    assert mask.shape == size
    assert "x.pth does not have a color for each of its classes" in capsys.readouterr().err
    near = np.zeros(size, bool)  # where rounding may say either
    near[rows.start - 4 : rows.stop + 4, columns.start - 4 : columns.stop + 4] = True
    near[rows.start + 4 : rows.stop - 4, columns.start + 4 : columns.stop - 4] = False
    assert np.array_equal(mask[~near], (picture[..., 0] == 0)[~near]) and (~near).mean() > 0.4


@pytest.mark.parametrize(
    ("test_cfg", "message"),
    [
        ("crop_size=(32, 32), stride=(48, 32)", "steps of (48, 32) leave pixels out between windows of (32, 32)"),
        ("crop_size=(32, 32), stride=(0, 32)", "expected model.test_cfg.stride as two positive whole numbers"),
        ("crop_size=(32, 32), stride=(16.5, 32)", "expected model.test_cfg.stride as two positive whole numbers"),
        ("crop_size=32, stride=(16, 16)", "expected model.test_cfg.crop_size as two positive whole numbers"),
        ("stride=(16, 16)", "expected model.test_cfg.crop_size as two positive whole numbers"),
    ],
)
def test_windows_that_do_not_cover_a_picture_are_refused(by_brightness, capsys, test_cfg, message):
    """tiatoolbox#1071: some strides end in an error of shapes."""
    picture = np.zeros((75, 101, 3), np.uint8)
    assert np.array_equal(by_brightness(picture, f"test_cfg=dict(_delete_=True, mode='slide', {test_cfg})"), 1)
    said = capsys.readouterr().err
    assert message in said and "Traceback" not in said


@pytest.mark.parametrize("loss", [{}, {"avg_non_ignore": True}, {"use_sigmoid": True}])
def test_a_batch_without_a_labelled_pixel_spoils_nothing(tmp_path, loss):
    """ultralytics#25096: the mean over no pixels is NaN, and the training is lost."""
    from mmengine.config import Config

    from visionzoo.openmmlab.checked_runner import CheckingRunner

    options = [*SMALL, "model.decode_head.num_classes=2"]
    options += [f"model.decode_head.out_channels={1 if loss.get('use_sigmoid') else 2}"]
    network = network_of(SEMANTIC_FPN, options, tmp_path / "x.pth", {"type": "CrossEntropyLoss", **loss})
    network = CheckingRunner.build_model(object.__new__(CheckingRunner), network)
    batch = inputs(Config.fromfile(str(SEMANTIC_FPN)))
    for samples, expected in ((1, False), (2, True)):  # the first of two pictures, then both
        for sample in batch["data_samples"][:samples]:
            sample.gt_sem_seg.data[:] = 255
        for sample in batch["data_samples"][samples:]:
            sample.gt_sem_seg.data %= 2
        network.zero_grad()
        losses = network.train()(**network.data_preprocessor(batch, True), mode="loss")
        total, _ = network.parse_losses(losses)
        total.backward()
        assert bool(total == 0) == expected and torch.isfinite(total)
        assert all(torch.isfinite(p.grad).all() for p in network.parameters() if p.grad is not None)
