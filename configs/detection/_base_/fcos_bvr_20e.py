"""FCOS whose features look at corners and centers, 20 epochs on COCO, AdamW: RelationNet++ (arXiv:2010.15831).

Heads, scales and epochs are those of configs/bvr/fcos_x101_dcn_fpn_relation_coco_2x.py of microsoft/RelationNet2 at
0930752, whose optimizer is SGD (lr 0.01, weight decay 1e-4), with a backbone of the zoo from stride 8 on.
"""

_base_ = "mmdet::fcos/fcos_r50-caffe_fpn_gn-head-center-normbbox-centeronreg-giou_1x_coco.py"
custom_imports = dict(imports=["visionzoo.openmmlab"], allow_failed_imports=False)

model = dict(
    data_preprocessor=dict(
        _delete_=True,
        type="DetDataPreprocessor",
        mean=[123.675, 116.28, 103.53],
        std=[58.395, 57.12, 57.375],
        bgr_to_rgb=True,
        pad_size_divisor=32,
    ),
    backbone=dict(_delete_=True, type="ZooBackbone", out_indices=(1, 2, 3), pretrained=True),
    neck=dict(start_level=0, relu_before_extra_convs=False),  # the map of stride 4 is not given here
    bbox_head=dict(
        _delete_=True,
        type="BVRHead",
        bbox_head_cfg=dict(
            type="FCOSHead",
            num_classes=80,
            in_channels=256,
            stacked_convs=4,
            feat_channels=256,
            strides=[8, 16, 32, 64, 128],
            norm_cfg=None,
            loss_cls=dict(type="FocalLoss", use_sigmoid=True, gamma=2.0, alpha=0.25, loss_weight=1.0),
            loss_bbox=dict(type="GIoULoss", loss_weight=1.0),
            loss_centerness=dict(type="CrossEntropyLoss", use_sigmoid=True, loss_weight=1.0),
            norm_on_bbox=True,
            centerness_on_reg=True,
            dcn_on_last_conv=True,
            center_sampling=True,
            center_sample_radius=1.5,
            conv_bias=True,
        ),
        keypoint_head_cfg=dict(type="BVRKeypointHead", num_classes=80, in_channels=256),
        location=dict(base_size=(300, 300), log_scale=True),
    ),
)

train_pipeline = [
    dict(type="LoadImageFromFile"),
    dict(type="LoadAnnotations", with_bbox=True),
    dict(type="RandomResize", scale=[(1333, 400), (1333, 1200)], keep_ratio=True),
    dict(type="RandomFlip", prob=0.5),
    dict(type="PackDetInputs"),
]
train_dataloader = dict(dataset=dict(pipeline=train_pipeline))
max_epochs = 20
train_cfg = dict(max_epochs=max_epochs)
param_scheduler = [
    dict(type="LinearLR", start_factor=0.001, by_epoch=False, begin=0, end=500),
    dict(type="MultiStepLR", begin=0, end=max_epochs, by_epoch=True, milestones=[16, 19], gamma=0.1),
]
optim_wrapper = dict(
    _delete_=True,
    type="OptimWrapper",
    optimizer=dict(type="AdamW", lr=1e-4, betas=(0.9, 0.999), weight_decay=0.05),
    constructor="ZooOptimWrapperConstructor",
)
