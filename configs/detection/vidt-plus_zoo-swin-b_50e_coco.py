"""ViDT+, 50 epochs, Swin-B.

Paper: Swin, arXiv:2103.14030.
Settings: main.py of naver-ai/vidt at a8c48b5.
Published: box AP 53.2. Not run here.
Hardware: 8 GPUs × 2 images.
Command: torchrun --nproc-per-node 8 tools/train.py configs/detection/vidt-plus_zoo-swin-b_50e_coco.py

Made by `make configs` from configs/dense.yaml: edit that.
"""

_base_ = "_base_/vidt-plus_50e.py"
from visionzoo.openmmlab import feature_channels

backbone = "zoo_swin_b"
weights = "https://github.com/SwinTransformer/storage/releases/download/v1.0.0/swin_base_patch4_window7_224_22k.pth"
model = dict(
    backbone=dict(
        name=backbone, drop_path_rate=0.3, pretrained=False, init_cfg=dict(type="Pretrained", checkpoint=weights)
    ),
    neck=dict(in_channels=[*feature_channels(backbone, (1, 2, 3)), 256]),
)
