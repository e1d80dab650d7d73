"""ViDT+, 50 epochs on COCO with masks (arXiv:2204.07962): ViDT with fused maps, 300 tokens and four more losses."""

_base_ = "vidt_50e.py"

custom_imports = dict(imports=["visionzoo.openmmlab.vidt", "visionzoo.openmmlab.vidt_plus"])

model = dict(
    backbone=dict(num_tokens=300),
    neck=dict(_delete_=True, type="EPFF"),
    bbox_head=dict(type="ViDTPlusHead"),
)

load_masks = dict(type="LoadAnnotations", with_bbox=True, with_mask=True)
first, _, *others = _base_.train_pipeline
train_dataloader = dict(dataset=dict(pipeline=[first, load_masks, *others]))
test_pipeline = [load_masks if step["type"] == "LoadAnnotations" else step for step in _base_.test_pipeline]
val_dataloader = dict(dataset=dict(pipeline=test_pipeline))
test_dataloader = val_dataloader
val_evaluator = dict(metric=["bbox", "segm"])
test_evaluator = val_evaluator
