"""SegFormer's head, 160,000 iterations on ADE20K, AdamW: mmseg's config for MiT-B0 with a backbone of the zoo."""

_base_ = ["mmseg.py", "mmseg::segformer/segformer_mit-b0_8xb2-160k_ade20k-512x512.py"]
custom_imports = dict(imports=["visionzoo.openmmlab"], allow_failed_imports=False)

model = dict(backbone=dict(_delete_=True, type="ZooBackbone", pretrained=True))
