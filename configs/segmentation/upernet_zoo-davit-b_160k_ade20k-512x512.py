"""UPerNet, DaViT-B.

Paper: DaViT, arXiv:2204.03645.
Settings: mmseg/configs/upernet_davit_512x512_160k_ade20k.py of dingmyu/davit.
Published: mIoU 49.4. Not run here.
Hardware: 8 GPUs × 2 images.
Command: torchrun --nproc-per-node 8 tools/train.py configs/segmentation/upernet_zoo-davit-b_160k_ade20k-512x512.py

Made by `make configs` from configs/dense.yaml: edit that.
"""

_base_ = "_base_/upernet_160k.py"
from visionzoo.openmmlab import feature_channels

backbone = "zoo_davit_b"
model = dict(
    backbone=dict(name=backbone, drop_path_rate=0.3, out_norm=dict(type="LN2d")),
    decode_head=dict(in_channels=feature_channels(backbone)),
    auxiliary_head=dict(in_channels=feature_channels(backbone)[2]),
)
optim_wrapper = dict(paramwise_cfg=dict(_delete_=True))
