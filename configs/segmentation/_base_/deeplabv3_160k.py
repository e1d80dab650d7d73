"""DeepLabV3's head, 160,000 iterations on ADE20K, SGD: mmseg's config for ResNet-50 with a backbone of the zoo."""

_base_ = ["mmseg.py", "mmseg::deeplabv3/deeplabv3_r50-d8_4xb4-160k_ade20k-512x512.py"]
custom_imports = dict(imports=["visionzoo.openmmlab"], allow_failed_imports=False)

model = dict(pretrained=None, backbone=dict(_delete_=True, type="ZooBackbone", pretrained=True))
