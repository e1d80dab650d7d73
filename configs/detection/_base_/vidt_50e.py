"""ViDT, 50 epochs on COCO (arXiv:2110.03921): mmdet's decoder and head of Deformable DETR on a Swin with tokens.

Settings are those of main.py, arguments.py and datasets of naver-ai/vidt at a8c48b5, but that the learning rate begins
to fall after the first epoch, not after the second.
"""

_base_ = "mmdet::deformable_detr/deformable-detr-refine_r50_16xb2-50e_coco.py"
from mmengine.hub import get_config

custom_imports = dict(imports=["visionzoo.openmmlab.vidt"], allow_failed_imports=False)

host = get_config("mmdet::deformable_detr/deformable-detr-refine_r50_16xb2-50e_coco.py").model
kept = {key: host[key] for key in ("data_preprocessor", "neck", "decoder", "bbox_head", "train_cfg", "test_cfg")}
model = dict(_delete_=True, type="ViDT", backbone=dict(type="DetectionTokenBackbone", pretrained=True), **kept)
model["neck"].bias = True

sides = [dict(type="RandomChoiceResize", scales=[(n, 1333) for n in range(480, 801, 16)], keep_ratio=True)]
cropped = [
    dict(type="RandomChoiceResize", scales=[(400, 4200), (500, 4200), (600, 4200)], keep_ratio=True),
    dict(type="RandomCrop", crop_type="absolute_range", crop_size=(384, 600), allow_negative_crop=True),
]
train_pipeline = [
    dict(type="LoadImageFromFile"),
    dict(type="LoadAnnotations", with_bbox=True),
    dict(type="RandomFlip", prob=0.5),
    dict(type="RandomChoice", transforms=[sides, cropped + sides]),
    dict(type="PackDetInputs"),
]
train_dataloader = dict(batch_size=2, dataset=dict(pipeline=train_pipeline))

optim_wrapper = dict(
    optimizer=dict(lr=1e-4, weight_decay=1e-4),
    constructor="ZooOptimWrapperConstructor",
    paramwise_cfg=dict(
        _delete_=True,
        vector_decay_mult=0.0,
        custom_keys={"tokens.token": dict(decay_mult=0.0), "tokens.position": dict(decay_mult=0.0)},
    ),
)
param_scheduler = [dict(type="CosineAnnealingLR", by_epoch=True, begin=0, end=50, eta_min=1e-7)]
auto_scale_lr = dict(base_batch_size=16)
