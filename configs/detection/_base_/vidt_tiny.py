"""ViDT with half of the decoder's layers and no dropout, from random weights on a hundred images or so."""

_base_ = "detr_tiny.py"
from mmengine.hub import get_config

custom_imports = dict(imports=["visionzoo.openmmlab.vidt"], allow_failed_imports=False)

host = get_config("mmdet::deformable_detr/deformable-detr-refine_r50_16xb2-50e_coco.py").model
kept = {key: host[key] for key in ("data_preprocessor", "neck", "decoder", "bbox_head", "train_cfg", "test_cfg")}
model = dict(_delete_=True, type="ViDT", backbone=dict(type="DetectionTokenBackbone", pretrained=False), **kept)
model["neck"].bias = True
model["decoder"].num_layers = 3
layer = model["decoder"].layer_cfg
layer.self_attn_cfg.dropout = layer.cross_attn_cfg.dropout = layer.ffn_cfg.ffn_drop = 0.0
