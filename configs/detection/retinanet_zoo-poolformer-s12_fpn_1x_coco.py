"""RetinaNet 1x, PoolFormer-S12.

Paper: MetaFormer, arXiv:2111.11418.
Settings: detection/configs of sail-sg/poolformer.
Published: box AP 36.2. Not run here.
Hardware: 8 GPUs × 2 images.
Command: torchrun --nproc-per-node 8 tools/train.py configs/detection/retinanet_zoo-poolformer-s12_fpn_1x_coco.py

Made by `make configs` from configs/dense.yaml: edit that.
"""

_base_ = "_base_/retinanet_1x.py"
from visionzoo.openmmlab import feature_channels

backbone = "zoo_poolformer_s12"
model = dict(
    backbone=dict(name=backbone, out_norm=dict(type="GN", num_groups=1)),
    neck=dict(in_channels=feature_channels(backbone, (1, 2, 3))),
)
optim_wrapper = dict(optimizer=dict(weight_decay=1e-4))
