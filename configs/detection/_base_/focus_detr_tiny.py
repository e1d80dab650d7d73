"""Focus-DETR with half of the layers and a third of the queries, from random weights on a hundred images or so."""

_base_ = "detr_tiny.py"
from mmengine.hub import get_config

custom_imports = dict(imports=["visionzoo.openmmlab.focus_detr"], allow_failed_imports=False)

model = get_config("mmdet::dino/dino-4scale_r50_8xb2-12e_coco.py").model
model.update(_delete_=True, type="FocusDETR", num_queries=300, keep_ratios=[1.0, 0.6, 0.2])
model.backbone = dict(type="ZooBackbone", out_indices=(1, 2, 3), pretrained=False)
model.encoder.num_layers = model.decoder.num_layers = 3
