"""Mask R-CNN, 12 epochs on COCO, AdamW: mmdet's config with a backbone of the zoo."""

_base_ = "mmdet::mask_rcnn/mask-rcnn_r50_fpn_1x_coco.py"
custom_imports = dict(imports=["visionzoo.openmmlab"], allow_failed_imports=False)

model = dict(backbone=dict(_delete_=True, type="ZooBackbone", pretrained=True))
optim_wrapper = dict(
    optimizer=dict(_delete_=True, type="AdamW", lr=1e-4, betas=(0.9, 0.999), weight_decay=0.05),
    constructor="ZooOptimWrapperConstructor",
)
