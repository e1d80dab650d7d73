"""FFNet (fuss-free network), 160,000 iterations, FFNet-86-S B-B-B.

Paper: FFNet, arXiv:2206.08236.
Settings: the authors published no code for training; these are mmseg's schedule and data for Cityscapes. They start
    from weights of ImageNet: init_cfg of the backbone.
Published: mIoU 82.6. Not run here.
Hardware: 4 GPUs × 2 images.
Command: torchrun --nproc-per-node 4 tools/train.py
    configs/segmentation/fuss-free_zoo-ffnet86s-bbb_160k_cityscapes-1024x1024.py

Made by `make configs` from configs/dense.yaml: edit that.
"""

_base_ = "_base_/fuss-free_160k.py"

backbone = "ffnet86s_bbb"
model = dict(
    backbone=dict(name=backbone),
    decode_head=dict(in_channels=[64, 128, 192, 320], decoder=dict(type="fuss_free", up="b", head="b")),
)
