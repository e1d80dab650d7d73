"""Mask2Former (arXiv:2112.01527), 160,000 iterations on ADE20K: mmseg's config with a backbone of the zoo."""

_base_ = ["mmseg.py", "mmseg::mask2former/mask2former_r50_8xb2-160k_ade20k-512x512.py"]
# the head is mmdet's
custom_imports = dict(imports=["visionzoo.openmmlab", "mmdet.models"], allow_failed_imports=False)

model = dict(backbone=dict(_delete_=True, type="ZooBackbone", pretrained=True))
