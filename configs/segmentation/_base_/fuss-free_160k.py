"""Fuss-free networks, 160,000 iterations on Cityscapes, SGD: mmseg's schedule and data with parts of the zoo."""

_base_ = [
    "mmseg.py",
    "mmseg::_base_/datasets/cityscapes_1024x1024.py",
    "mmseg::_base_/default_runtime.py",
    "mmseg::_base_/schedules/schedule_160k.py",
]
custom_imports = dict(imports=["visionzoo.openmmlab.decoders"], allow_failed_imports=False)

sync_bn = "torch"
model = dict(
    type="EncoderDecoder",
    data_preprocessor=dict(
        type="SegDataPreProcessor",
        mean=[123.675, 116.28, 103.53],
        std=[58.395, 57.12, 57.375],
        bgr_to_rgb=True,
        pad_val=0,
        seg_pad_val=255,
        size=(1024, 1024),
    ),
    backbone=dict(type="SegmentorBackbone"),
    decode_head=dict(
        type="ZooDecodeHead",
        num_classes=19,
        loss_decode=dict(type="CrossEntropyLoss", use_sigmoid=False, loss_weight=1.0),
    ),
    train_cfg=dict(),
    test_cfg=dict(mode="whole"),
)
