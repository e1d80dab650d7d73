"""UPerNet, CSWin-T.

Paper: CSWin, arXiv:2107.00652.
Settings: segmentation/configs/cswin of microsoft/CSWin-Transformer at f111ae2.
Published: mIoU 49.3, 50.7 with test-time augmentation. Not run here.
Hardware: 8 GPUs × 2 images.
Command: torchrun --nproc-per-node 8 tools/train.py configs/segmentation/upernet_zoo-cswin-t_160k_ade20k-512x512.py

Made by `make configs` from configs/dense.yaml: edit that.
"""

_base_ = "_base_/upernet_160k.py"
from visionzoo.openmmlab import feature_channels

backbone = "zoo_cswin_t"
model = dict(
    backbone=dict(name=backbone, drop_path_rate=0.3, out_norm=dict(type="LN2d")),
    decode_head=dict(in_channels=feature_channels(backbone)),
    auxiliary_head=dict(in_channels=feature_channels(backbone)[2]),
)
