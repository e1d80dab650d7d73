"""UPerNet, 160,000 iterations on ADE20K, AdamW: mmseg's config for Swin with a backbone of the zoo."""

_base_ = ["mmseg.py", "mmseg::swin/swin-tiny-patch4-window7-in1k-pre_upernet_8xb2-160k_ade20k-512x512.py"]
custom_imports = dict(imports=["visionzoo.openmmlab"], allow_failed_imports=False)

model = dict(backbone=dict(_delete_=True, type="ZooBackbone", pretrained=True))
optim_wrapper = dict(constructor="ZooOptimWrapperConstructor", paramwise_cfg=dict(position_decay_mult=0.0))
