"""Mask R-CNN, 36 epochs on COCO with DETR's multi-scale crops: mmdet's config for Swin with a backbone of the zoo."""

_base_ = "mmdet::swin/mask-rcnn_swin-t-p4-w7_fpn_ms-crop-3x_coco.py"
custom_imports = dict(imports=["visionzoo.openmmlab"], allow_failed_imports=False)

model = dict(backbone=dict(_delete_=True, type="ZooBackbone", pretrained=True))
optim_wrapper = dict(constructor="ZooOptimWrapperConstructor", paramwise_cfg=dict(position_decay_mult=0.0))
