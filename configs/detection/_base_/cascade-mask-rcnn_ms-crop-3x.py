"""Cascade Mask R-CNN, 36 epochs on COCO with DETR's multi-scale crops, AdamW.

mmdet's config for ConvNeXt (box heads of 4 convolutions, GIoU loss) with a backbone of the zoo and Swin's optimizer.
"""

_base_ = "mmdet::convnext/cascade-mask-rcnn_convnext-t-p4-w7_fpn_4conv1fc-giou_amp-ms-crop-3x_coco.py"
custom_imports = dict(imports=["visionzoo.openmmlab"], allow_failed_imports=False)

model = dict(backbone=dict(_delete_=True, type="ZooBackbone", pretrained=True))
optim_wrapper = dict(
    _delete_=True,
    type="OptimWrapper",
    optimizer=dict(type="AdamW", lr=1e-4, betas=(0.9, 0.999), weight_decay=0.05),
    constructor="ZooOptimWrapperConstructor",
    paramwise_cfg=dict(custom_keys=dict(norm=dict(decay_mult=0.0)), position_decay_mult=0.0),
)
