"""Focus-DETR (arXiv:2307.12612) with 4 scales, 12 epochs on COCO: DINO with a sparse encoder, without crops.

As the authors train it, but for weight decay of the backbone's norms.
"""

_base_ = "dino_1x.py"
custom_imports = dict(imports=["visionzoo.openmmlab.focus_detr"], allow_failed_imports=False)

model = dict(type="FocusDETR", positional_encoding=dict(temperature=10000, offset=-0.5))

train_pipeline = [
    dict(type="LoadImageFromFile"),
    dict(type="LoadAnnotations", with_bbox=True),
    dict(type="RandomFlip", prob=0.5),
    dict(type="RandomChoiceResize", scales=[(side, 1333) for side in range(480, 801, 32)], keep_ratio=True),
    dict(type="PackDetInputs"),
]
train_dataloader = dict(dataset=dict(filter_cfg=dict(filter_empty_gt=True), pipeline=train_pipeline))
optim_wrapper = dict(paramwise_cfg=dict(norm_decay_mult=0.0))
