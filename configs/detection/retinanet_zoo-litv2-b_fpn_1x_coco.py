"""RetinaNet 1x, LITv2-B.

Paper: LITv2, arXiv:2205.13213.
Settings: detection/configs/litv2 of ziplab/LITv2 at 7501c86.
Published: box AP 46.7; 46.3 with window_sizes=(0, 0, 4, 1), which is faster. Not run here.
Hardware: 8 GPUs × 2 images.
Command: torchrun --nproc-per-node 8 tools/train.py configs/detection/retinanet_zoo-litv2-b_fpn_1x_coco.py --amp

Made by `make configs` from configs/dense.yaml: edit that.
"""

_base_ = "_base_/retinanet_1x.py"
from visionzoo.openmmlab import feature_channels

backbone = "zoo_litv2_b"
model = dict(
    backbone=dict(name=backbone, drop_path_rate=0.3, pretrained=False, out_norm=dict(type="LN2d")),
    neck=dict(in_channels=feature_channels(backbone, (1, 2, 3))),
)
optim_wrapper = dict(optimizer=dict(weight_decay=1e-4))
