"""Semantic FPN from random weights on a hundred images or so: high learning rate, no augmentation.

Made to fit its training images, which shows that all of a pipeline works; to segment others start from pretrained
weights.
"""

_base_ = "semantic-fpn_40k.py"

model = dict(backbone=dict(pretrained=False), decode_head=dict(dropout_ratio=0.0))

load = [
    dict(type="LoadImageFromFile"),
    dict(type="LoadAnnotations", reduce_zero_label=True),
    dict(type="Resize", scale=(512, 512), keep_ratio=False),
    dict(type="PackSegInputs"),
]
test_pipeline = [load[0], load[2], load[1], load[3]]
train_dataloader = dict(batch_size=16, dataset=dict(times=20, dataset=dict(pipeline=load)))
val_dataloader = dict(dataset=dict(pipeline=test_pipeline))
test_dataloader = val_dataloader

max_iters = 1500
train_cfg = dict(max_iters=max_iters, val_interval=max_iters)
optim_wrapper = dict(optimizer=dict(lr=5e-4, weight_decay=0.01), clip_grad=dict(max_norm=1.0))
param_scheduler = [
    dict(type="LinearLR", start_factor=0.01, by_epoch=False, begin=0, end=100),
    dict(type="CosineAnnealingLR", by_epoch=False, begin=100, end=max_iters, eta_min=1e-6),
]
default_hooks = dict(checkpoint=dict(interval=max_iters, max_keep_ckpts=1))
