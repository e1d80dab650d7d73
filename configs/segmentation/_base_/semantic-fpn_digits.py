"""A light Semantic FPN on scenes of handwritten digits, which visionzoo.data composes: minutes on a CPU."""

_base_ = "semantic-fpn_40k.py"
from visionzoo.data import scenes_folder
from visionzoo.data.scenes import CLASSES

root = str(scenes_folder())
size = (128, 128)
channels = 64
norm_cfg = dict(type="BN", requires_grad=True)
model = dict(
    data_preprocessor=dict(size=size),
    backbone=dict(pretrained=False),
    neck=dict(out_channels=channels),
    decode_head=dict(
        in_channels=[channels] * 4,
        channels=channels,
        num_classes=len(CLASSES),
        norm_cfg=norm_cfg,
        loss_decode=dict(class_weight=[0.2] + [1.0] * 10),  # most of a picture is background
    ),
)

load = [dict(type="LoadImageFromFile"), dict(type="LoadAnnotations", reduce_zero_label=True)]


def digits(split, pipeline):
    """Return a data set in ADE20K's layout."""
    return dict(
        _delete_=True,
        type="BaseSegDataset",
        data_root=root,
        data_prefix=dict(img_path=f"images/{split}", seg_map_path=f"annotations/{split}"),
        img_suffix=".png",
        reduce_zero_label=True,
        metainfo=dict(classes=tuple(CLASSES)),
        pipeline=pipeline,
    )


shift = dict(type="RandomCrop", crop_size=(112, 112))
train_dataloader = dict(
    batch_size=8, num_workers=2, dataset=digits("train", [*load, shift, dict(type="PackSegInputs")])
)
val_dataloader = dict(num_workers=2, dataset=digits("validation", [*load, dict(type="PackSegInputs")]))
test_dataloader = val_dataloader

max_iters = 1600
train_cfg = dict(max_iters=max_iters, val_interval=400)
optim_wrapper = dict(optimizer=dict(lr=1e-3, weight_decay=0.01), clip_grad=dict(max_norm=1.0))
param_scheduler = [
    dict(type="LinearLR", start_factor=0.01, by_epoch=False, begin=0, end=100),
    dict(type="CosineAnnealingLR", by_epoch=False, begin=100, end=max_iters, eta_min=1e-5),
]
default_hooks = dict(logger=dict(interval=20), checkpoint=dict(interval=400, max_keep_ckpts=1, save_best="mIoU"))
