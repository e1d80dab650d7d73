"""ViDT with half of the decoder's layers, from random weights on a hundred images or so."""

_base_ = "retinanet_tiny.py"
from mmengine.hub import get_config

custom_imports = dict(imports=["visionzoo.openmmlab.vidt"], allow_failed_imports=False)

host = get_config("mmdet::deformable_detr/deformable-detr-refine_r50_16xb2-50e_coco.py").model
kept = {key: host[key] for key in ("data_preprocessor", "neck", "decoder", "bbox_head", "train_cfg", "test_cfg")}
model = dict(_delete_=True, type="ViDT", backbone=dict(type="DetectionTokenBackbone", pretrained=False), **kept)
model["neck"].bias = True
model["decoder"].num_layers = 3

train_dataloader = dict(dataset=dict(times=60))  # they learn more slowly: 750 iterations an epoch for 100 images
optim_wrapper = dict(optimizer=dict(lr=2e-4), clip_grad=dict(max_norm=0.1))
