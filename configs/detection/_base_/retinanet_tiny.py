"""RetinaNet from random weights on a hundred images or so: group norms, high learning rate, no augmentation.

Made to fit its training images, which shows that all of a pipeline works; to find objects elsewhere start from
pretrained weights.
"""

_base_ = "retinanet_1x.py"

norm_cfg = dict(type="GN", num_groups=32)
model = dict(
    backbone=dict(pretrained=False),
    neck=dict(norm_cfg=norm_cfg),
    bbox_head=dict(norm_cfg=norm_cfg, anchor_generator=dict(octave_base_scale=3)),
)

load = [
    dict(type="LoadImageFromFile"),
    dict(type="LoadAnnotations", with_bbox=True),
    dict(type="Resize", scale=(704, 704), keep_ratio=True),
]
meta_keys = ("img_id", "img_path", "ori_shape", "img_shape", "scale_factor")
test_pipeline = [load[0], load[2], load[1], dict(type="PackDetInputs", meta_keys=meta_keys)]
train_dataloader = dict(
    batch_size=8,
    dataset=dict(
        _delete_=True,
        type="RepeatDataset",
        times=20,
        dataset=dict(
            type="CocoDataset",
            data_root="data/coco",
            ann_file="annotations/instances_train2017.json",
            data_prefix=dict(img="train2017"),
            filter_cfg=dict(filter_empty_gt=True),
            pipeline=[*load, dict(type="PackDetInputs")],
        ),
    ),
)
val_dataloader = dict(dataset=dict(pipeline=test_pipeline))
test_dataloader = val_dataloader

max_epochs = 4  # of 20 times the images: 250 iterations each for 100 images
train_cfg = dict(max_epochs=max_epochs, val_interval=max_epochs)
optim_wrapper = dict(optimizer=dict(lr=4e-4, weight_decay=0.01), clip_grad=dict(max_norm=5.0))
param_scheduler = [
    dict(type="LinearLR", start_factor=0.01, by_epoch=False, begin=0, end=200),
    dict(type="CosineAnnealingLR", by_epoch=True, begin=0, end=max_epochs, eta_min=2e-6, convert_to_iter_based=True),
]
default_hooks = dict(checkpoint=dict(interval=max_epochs, max_keep_ckpts=1))
