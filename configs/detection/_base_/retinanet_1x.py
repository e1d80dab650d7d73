"""RetinaNet, 12 epochs on COCO, AdamW: mmdet's config with a backbone of the zoo, from stride 8 on."""

_base_ = "mmdet::retinanet/retinanet_r50_fpn_1x_coco.py"
custom_imports = dict(imports=["visionzoo.openmmlab"], allow_failed_imports=False)

model = dict(
    backbone=dict(_delete_=True, type="ZooBackbone", out_indices=(1, 2, 3), pretrained=True),
    neck=dict(start_level=0),  # the map of stride 4, which mmdet's config skips, is not given here
)
optim_wrapper = dict(
    optimizer=dict(_delete_=True, type="AdamW", lr=1e-4, betas=(0.9, 0.999), weight_decay=0.05),
    constructor="ZooOptimWrapperConstructor",
)
