"""Decoders of the zoo as mmseg's heads: checkpoints go both ways between plain torch and mmseg."""

import pytest
import torch
from golden import Record, relative_error
from test_decoders import RECORDS

pytest.importorskip("mmseg", reason='needs pip install "visionzoo[openmmlab]"')

from mmengine.registry import MODELS, init_default_scope
from mmseg.utils import register_all_modules

import visionzoo
from visionzoo.decoders import DECODERS
from visionzoo.engine.errors import UserError
from visionzoo.openmmlab.decoders import SegmentorBackbone, ZooDecodeHead

SMALL = {"depths": (1, 1, 1, 1)}
CHANNELS = [32, 64, 160, 256]


def build(backbone, head):
    register_all_modules(init_default_scope=False)
    init_default_scope("mmseg")
    model = MODELS.build(
        {"type": "EncoderDecoder", "backbone": backbone, "decode_head": {"type": "ZooDecodeHead", **head}}
    )
    model.init_weights()
    return model.eval()


@pytest.mark.parametrize("decoder", DECODERS)
def test_checkpoints_go_both_ways(tmp_path, decoder):
    plain = visionzoo.create_segmentor("zoo_pvtv2_b0", decoder, num_classes=3, upsample=False, **SMALL).eval()
    torch.save({"state_dict": plain.state_dict()}, tmp_path / "plain.pth")
    start = {"type": "Pretrained", "checkpoint": str(tmp_path / "plain.pth")}
    model = build(
        {"type": "ZooBackbone", "name": "zoo_pvtv2_b0", "init_cfg": start, **SMALL},
        {"decoder": decoder, "in_channels": CHANNELS, "num_classes": 3, "init_cfg": start},
    )
    image = torch.randn(1, 3, 45, 67)
    with torch.no_grad():
        expected = plain(image)
        torch.testing.assert_close(model(image), expected)
        other = visionzoo.create_segmentor("zoo_pvtv2_b0", decoder, num_classes=3, upsample=False, **SMALL).eval()
        report = visionzoo.load_weights(other, {"state_dict": model.state_dict()})
        torch.testing.assert_close(other(image), expected)
    assert not report.beside and not report.missing


def test_a_published_network_starts_from_its_authors_weights(tmp_path):
    name = "fuss_free/ffnet40s_bcc_mobile_pre_down_small"
    record, options = Record(name), dict(RECORDS[name])
    torch.save(record.state_dict(), tmp_path / "authors.pth")
    start = {"type": "Pretrained", "checkpoint": str(tmp_path / "authors.pth")}
    model = build(
        {"type": "SegmentorBackbone", "name": options.pop("backbone"), "init_cfg": start, **options},
        {
            "decoder": {"type": "fuss_free", "up": "c", "head": "c", "mode": "nearest"},
            "in_channels": [64, 12, 16, 24],
            "num_classes": 19,
            "init_cfg": start,
        },
    ).double()
    with torch.no_grad():
        assert relative_error(model(record.image()), record.arrays["logits"]) <= record.tolerance()
    plain = visionzoo.create_segmentor(**RECORDS[name])
    assert not visionzoo.load_weights(plain, model.state_dict()).missing
    assert torch.equal(plain.backbone.stem.conv0.weight.double(), model.backbone.model.stem.conv0.weight)


@pytest.mark.parametrize("decoder", DECODERS)
def test_all_that_a_decoder_learns_from_is_in_the_loss(decoder):
    from mmengine.structures import PixelData
    from mmseg.structures import SegDataSample

    head = ZooDecodeHead(decoder, [4, 6, 8, 8], num_classes=3)
    maps = [torch.randn(2, c, side, side) for c, side in zip([4, 6, 8, 8], [8, 4, 2, 1], strict=True)]
    labels = [SegDataSample(gt_sem_seg=PixelData(data=torch.randint(3, (1, 32, 32)))) for _ in range(2)]
    losses = head.loss(maps, labels, None)
    learned = {key: value for key, value in losses.items() if "loss" in key}
    names = {key.removeprefix("loss_").partition(".")[0] for key in learned} - {"ce"}
    assert names == {*head.decoder.AUXILIARY}
    sum(learned.values()).backward()
    assert not [name for name, p in head.named_parameters() if p.grad is None]


def test_classifiers_of_other_classes_stay(tmp_path):
    plain = visionzoo.create_segmentor("zoo_pvtv2_b0", "edaformer", num_classes=3, **SMALL)
    torch.save(plain.state_dict(), tmp_path / "plain.pth")
    start = {"type": "Pretrained", "checkpoint": str(tmp_path / "plain.pth")}
    head = ZooDecodeHead("edaformer", CHANNELS, num_classes=2, out_channels=1, threshold=0.5, init_cfg=start)
    head.init_weights()
    assert head.decoder.classifier.weight.shape[0] == 1
    assert torch.equal(head.decoder.fuse.conv.weight, plain.decoder.fuse.conv.weight)
    other = ZooDecodeHead("fuss_free", CHANNELS, num_classes=3, init_cfg=start)
    with pytest.raises(UserError, match=r"ZooDecodeHead: .* has tensors of other shapes than FussFreeDecoder: class"):
        other.init_weights()
    for tensors, message in (
        ({"neck.weight": torch.zeros(1)}, r"has no tensors of a decoder, it has neck\.weight"),
        ({"decoder.weight": torch.zeros(1)}, r"fits only 0 of the \d+ tensors of the decoder FussFreeDecoder"),
    ):
        torch.save(tensors, tmp_path / "plain.pth")
        with pytest.raises(UserError, match=message):
            other.init_weights()


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: ZooDecodeHead("edaforme", CHANNELS, num_classes=3), "unknown decoder 'edaforme'"),
        (lambda: ZooDecodeHead("edaformer", CHANNELS, num_classes=3, norm_cfg={"type": "GN"}), "no layers .* norm_cfg"),
        (lambda: ZooDecodeHead("edaformer", CHANNELS, num_classes=3, init_cfg={"type": "Xavier"}), "ZooDecodeHead: in"),
        (lambda: SegmentorBackbone("ffnet18_dac"), "'ffnet18_dac' is not a published segmentor.*ffnet18_daac"),
        (lambda: SegmentorBackbone("edaformer_t_ade"), "is dict.type='ZooBackbone', name='zoo_eft_t'"),
        (lambda: SegmentorBackbone("ffnet18_daac", pretrained=True), "the hub has no weights for ffnet18_daac"),
    ],
)
def test_wrong_settings_are_named(call, message):
    with pytest.raises(ValueError, match=message):
        call()
