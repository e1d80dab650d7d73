"""FFNet (fuss-free network), 160,000 iterations, FFNet-46-NS C-C-C for mobile devices.

Paper: FFNet, arXiv:2206.08236.
Settings: the authors published no code for training; these are mmseg's schedule and data for Cityscapes. They start
    from weights of ImageNet: init_cfg of the backbone. Images are halved first.
Published: mIoU 76.7. Not run here.
Hardware: 4 GPUs × 2 images.
Command: torchrun --nproc-per-node 4 tools/train.py
    configs/segmentation/fuss-free_zoo-ffnet46ns-ccc_160k_cityscapes-1024x1024.py

Made by `make configs` from configs/dense.yaml: edit that.
"""

_base_ = "_base_/fuss-free_160k.py"

backbone = "ffnet46ns_ccc_mobile_pre_down"
model = dict(
    backbone=dict(name=backbone),
    decode_head=dict(in_channels=[64, 64, 128, 256], decoder=dict(type="fuss_free", up="c", head="c", mode="nearest")),
)
