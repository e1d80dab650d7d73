"""ViDT, 50 epochs, Swin-nano.

Paper: ViDT, arXiv:2110.03921.
Settings: main.py of naver-ai/vidt at a8c48b5.
Published: box AP 40.4. Not run here.
Hardware: 8 GPUs × 2 images.
Command: torchrun --nproc-per-node 8 tools/train.py configs/detection/vidt_zoo-swin-n_50e_coco.py

Made by `make configs` from configs/dense.yaml: edit that.
"""

_base_ = "_base_/vidt_50e.py"
from visionzoo.openmmlab import feature_channels

backbone = "zoo_swin_n"
weights = "https://github.com/naver-ai/vidt/releases/download/v0.1-swin/swin_nano_patch4_window7_224.pth"
model = dict(
    backbone=dict(
        name=backbone, drop_path_rate=0.0, pretrained=False, init_cfg=dict(type="Pretrained", checkpoint=weights)
    ),
    neck=dict(in_channels=[*feature_channels(backbone, (1, 2, 3)), 256]),
)
