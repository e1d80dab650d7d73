"""UPerNet, FcaFormer-L2.

Paper: FcaFormer, arXiv:2211.07198.
Settings: semantic-segmentation/configs of hkzhang-git/FcaFormer at 7dcd8e0. The 1×1 convolutions to 96, 192, 384 and
    768 channels before the norms are left out here. Their learning rates fall by 0.9 for each of 5 stages, the stem
    being one, here by 0.96 for each of 13 blocks. Images are tested whole.
Published: mIoU 47.6; single- or multi-scale is not stated. Not run here.
Hardware: 8 GPUs × 2 images.
Command: torchrun --nproc-per-node 8 tools/train.py configs/segmentation/upernet_zoo-fcaformer-l2_160k_ade20k-512x512.py
    --amp

Made by `make configs` from configs/dense.yaml: edit that.
"""

_base_ = "_base_/upernet_160k.py"
from visionzoo.openmmlab import feature_channels

backbone = "zoo_fcaformer_l2"
model = dict(
    backbone=dict(name=backbone, drop_path_rate=0.1, pretrained=False, out_norm=dict(type="LN2d", eps=1e-6)),
    decode_head=dict(in_channels=feature_channels(backbone)),
    auxiliary_head=dict(in_channels=feature_channels(backbone)[2]),
)
optim_wrapper = dict(optimizer=dict(lr=1e-4, weight_decay=0.01), paramwise_cfg=dict(layer_decay=0.96))
