"""A light Mask R-CNN on scenes of handwritten digits, which visionzoo.data composes: minutes on a CPU."""

_base_ = "mask-rcnn_1x.py"
from visionzoo.data import scenes_folder

root = str(scenes_folder())
channels = 64
anchors = dict(scales=[6], ratios=[0.7, 1.2, 2.0], strides=[4, 8, 16, 32])
norm_cfg = dict(type="GN", num_groups=8)
model = dict(
    backbone=dict(pretrained=False),
    neck=dict(out_channels=channels, num_outs=4, norm_cfg=norm_cfg),
    rpn_head=dict(in_channels=channels, feat_channels=channels, anchor_generator=anchors),
    roi_head=dict(
        bbox_roi_extractor=dict(out_channels=channels, featmap_strides=[4, 8, 16]),
        bbox_head=dict(in_channels=channels, fc_out_channels=256, num_classes=10),
        mask_roi_extractor=dict(out_channels=channels, featmap_strides=[4, 8, 16]),
        mask_head=dict(num_convs=1, in_channels=channels, conv_out_channels=channels, num_classes=10),
    ),
    train_cfg=dict(
        rpn=dict(sampler=dict(num=64)),
        rpn_proposal=dict(nms_pre=200, max_per_img=50),
        rcnn=dict(sampler=dict(num=32)),
    ),
    test_cfg=dict(rpn=dict(nms_pre=200, max_per_img=50), rcnn=dict(max_per_img=20)),
)

load = [dict(type="LoadImageFromFile"), dict(type="LoadAnnotations", with_bbox=True, with_mask=True)]
meta_keys = ("img_id", "img_path", "ori_shape", "img_shape", "scale_factor")
test_pipeline = [
    load[0],
    dict(type="Resize", scale_factor=1.0),
    load[1],
    dict(type="PackDetInputs", meta_keys=meta_keys),
]
classes = dict(classes=tuple("0123456789"))


def digits(split, pipeline):
    """Return changes of mmdet's COCO data set."""
    return dict(
        data_root=root,
        ann_file=f"detection/{split}.json",
        data_prefix=dict(img=f"images/{split}"),
        metainfo=classes,
        pipeline=pipeline,
    )


train_dataloader = dict(batch_size=8, dataset=digits("train", [*load, dict(type="PackDetInputs")]))
val_dataloader = dict(dataset=digits("validation", test_pipeline))
test_dataloader = val_dataloader
val_evaluator = dict(ann_file=f"{root}/detection/validation.json")
test_evaluator = val_evaluator

max_epochs = 12
train_cfg = dict(max_epochs=max_epochs, val_interval=4)
optim_wrapper = dict(optimizer=dict(lr=1e-3), clip_grad=dict(max_norm=10))
param_scheduler = [
    dict(type="LinearLR", start_factor=0.01, by_epoch=False, begin=0, end=50),
    dict(type="CosineAnnealingLR", by_epoch=True, begin=0, end=max_epochs, eta_min=1e-5, convert_to_iter_based=True),
]
default_hooks = dict(
    logger=dict(interval=10), checkpoint=dict(interval=4, max_keep_ckpts=1, save_best="coco/bbox_mAP_50")
)
