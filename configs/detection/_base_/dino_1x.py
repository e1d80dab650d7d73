"""DINO (arXiv:2203.03605) with 4 scales, 12 epochs on COCO: mmdet's config with a backbone of the zoo."""

_base_ = "mmdet::dino/dino-4scale_r50_8xb2-12e_coco.py"
custom_imports = dict(imports=["visionzoo.openmmlab"], allow_failed_imports=False)

model = dict(backbone=dict(_delete_=True, type="ZooBackbone", out_indices=(1, 2, 3), pretrained=True))
