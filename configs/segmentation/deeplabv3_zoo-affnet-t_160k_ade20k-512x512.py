"""DeepLabV3's head, 160,000 iterations, AFFNet-T.

Paper: AFFNet, arXiv:2307.14008.
Settings: mmseg's for ResNet-50, as the authors' are not in their repository; images are not normalized, as theirs. The
    head sees a 32nd of the image, where the authors' code has dilated convolutions in the last stages.
Published: mIoU 36.9 (AFFNet-ET 33.0, AFFNet 38.4). Not run here.
Hardware: 4 GPUs × 4 images.
Command: torchrun --nproc-per-node 4 tools/train.py configs/segmentation/deeplabv3_zoo-affnet-t_160k_ade20k-512x512.py

Made by `make configs` from configs/dense.yaml: edit that.
"""

_base_ = "_base_/deeplabv3_160k.py"
from visionzoo.openmmlab import feature_channels

backbone = "zoo_affnet_t"
channels = feature_channels(backbone)
model = dict(
    backbone=dict(name=backbone, pretrained=False),
    data_preprocessor=dict(mean=[0.0, 0.0, 0.0], std=[255.0, 255.0, 255.0]),
    decode_head=dict(in_channels=channels[-1], in_index=len(channels) - 1),
    auxiliary_head=dict(in_channels=channels[-2], in_index=len(channels) - 2),
)
