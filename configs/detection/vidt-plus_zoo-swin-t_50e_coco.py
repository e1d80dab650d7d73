"""ViDT+, 50 epochs, Swin-T.

Paper: Swin, arXiv:2103.14030.
Settings: main.py of naver-ai/vidt at a8c48b5.
Published: box AP 49.7, mask AP 39.5. Not run here.
Hardware: 8 GPUs × 2 images.
Command: torchrun --nproc-per-node 8 tools/train.py configs/detection/vidt-plus_zoo-swin-t_50e_coco.py

Made by `make configs` from configs/dense.yaml: edit that.
"""

_base_ = "_base_/vidt-plus_50e.py"
from visionzoo.openmmlab import feature_channels

backbone = "zoo_swin_t"
model = dict(
    backbone=dict(name=backbone, drop_path_rate=0.2),
    neck=dict(in_channels=[*feature_channels(backbone, (1, 2, 3)), 256]),
)
