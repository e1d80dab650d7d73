"""Cascade Mask R-CNN with SDANet's neck, 12 epochs on PIDray's X-ray images of 500 px, AdamW.

mmdet's config with a backbone of the zoo, and images, classes, batches and epochs of SDANet (arXiv:2211.10763,
lutao2021/PIDray at 2acc524), whose optimizer is SGD (lr 0.02, weight decay 1e-4) for ResNet-101.
"""

_base_ = "mmdet::cascade_rcnn/cascade-mask-rcnn_r50_fpn_1x_coco.py"
custom_imports = dict(imports=["visionzoo.openmmlab"], allow_failed_imports=False)

num_classes = 12
model = dict(
    backbone=dict(_delete_=True, type="ZooBackbone", pretrained=True),
    neck=dict(type="LevelAttentionNeck"),
    roi_head=dict(
        bbox_head=[
            dict(
                type="Shared2FCBBoxHead",
                in_channels=256,
                fc_out_channels=1024,
                roi_feat_size=7,
                num_classes=num_classes,
                bbox_coder=dict(type="DeltaXYWHBBoxCoder", target_means=[0.0] * 4, target_stds=stds),
                reg_class_agnostic=True,
                loss_cls=dict(type="CrossEntropyLoss", use_sigmoid=False, loss_weight=1.0),
                loss_bbox=dict(type="SmoothL1Loss", beta=1.0, loss_weight=1.0),
            )
            for stds in ([0.1, 0.1, 0.2, 0.2], [0.05, 0.05, 0.1, 0.1], [0.033, 0.033, 0.067, 0.067])
        ],
        mask_head=dict(num_classes=num_classes),
    ),
)

metainfo = dict(
    classes=(
        "Baton",
        "Pliers",
        "Hammer",
        "Powerbank",
        "Scissors",
        "Wrench",
        "Gun",
        "Bullet",
        "Sprayer",
        "HandCuffs",
        "Knife",
        "Lighter",
    )
)
load = dict(type="LoadImageFromFile")
labels = dict(type="LoadAnnotations", with_bbox=True, with_mask=True)
resize = dict(type="Resize", scale=(500, 500), keep_ratio=True)
meta_keys = ("img_id", "img_path", "ori_shape", "img_shape", "scale_factor")
data = dict(data_root="data/pidray/", metainfo=metainfo)
train_dataloader = dict(
    batch_size=4,
    dataset=dict(
        **data,
        ann_file="annotations/train.json",
        data_prefix=dict(img="train/"),
        pipeline=[load, labels, resize, dict(type="RandomFlip", prob=0.5), dict(type="PackDetInputs")],
    ),
)
val_dataloader = dict(
    dataset=dict(
        **data,
        ann_file="annotations/test.json",
        data_prefix=dict(img="test/"),
        pipeline=[load, resize, labels, dict(type="PackDetInputs", meta_keys=meta_keys)],
    )
)
test_dataloader = val_dataloader
val_evaluator = dict(ann_file="data/pidray/annotations/test.json")
test_evaluator = val_evaluator
optim_wrapper = dict(
    optimizer=dict(_delete_=True, type="AdamW", lr=1e-4, betas=(0.9, 0.999), weight_decay=0.05),
    constructor="ZooOptimWrapperConstructor",
)
