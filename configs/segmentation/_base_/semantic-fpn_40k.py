"""Semantic FPN, 40,000 iterations on ADE20K, AdamW: mmseg's config for PoolFormer with a backbone of the zoo."""

_base_ = ["mmseg.py", "mmseg::poolformer/fpn_poolformer_s12_8xb4-40k_ade20k-512x512.py"]
custom_imports = dict(imports=["visionzoo.openmmlab"], allow_failed_imports=False)

model = dict(backbone=dict(_delete_=True, type="ZooBackbone", pretrained=True))
optim_wrapper = dict(type="OptimWrapper")  # --amp asks for mixed precision
