"""SegFormer's head, 160,000 iterations, EFT-T.

Paper: EDAFormer, arXiv:2407.17261.
Settings: local_configs/edaformer of hyunwoo137/EDAFormer at 9f98d76, but with SegFormer's head instead of EDAFormer's,
    which edaformer_zoo-eft-t_160k_ade20k-512x512 has. For inference spatial reduction add isr=(2, 2, 1, 1) to the
    backbone.
Published: with EDAFormer's head, in the paper. Not run here.
Hardware: 4 GPUs × 4 images.
Command: torchrun --nproc-per-node 4 tools/train.py configs/segmentation/segformer_zoo-eft-t_160k_ade20k-512x512.py

Made by `make configs` from configs/dense.yaml: edit that.
"""

_base_ = "_base_/segformer_160k.py"
from visionzoo.openmmlab import feature_channels

backbone = "zoo_eft_t"
model = dict(
    backbone=dict(name=backbone, drop_path_rate=0.2, pretrained=False),
    decode_head=dict(in_channels=feature_channels(backbone)),
)
train_dataloader = dict(batch_size=4)
