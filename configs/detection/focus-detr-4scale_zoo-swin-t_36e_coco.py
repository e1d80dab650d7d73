"""Focus-DETR with 4 scales, 36 epochs, Swin-T.

Paper: Swin, arXiv:2103.14030.
Settings: Focus-DETR/projects/focus_detr/configs of huawei-noah/noah-research at aa0f80c, but for weight decay of the
    backbone's norms.
Published: box AP 52.5. Not run here.
Hardware: 8 GPUs × 2 images.
Command: torchrun --nproc-per-node 8 tools/train.py configs/detection/focus-detr-4scale_zoo-swin-t_36e_coco.py

Made by `make configs` from configs/dense.yaml: edit that.
"""

_base_ = "_base_/focus_detr_36e.py"
from visionzoo.openmmlab import feature_channels

backbone = "zoo_swin_t"
model = dict(
    backbone=dict(name=backbone, drop_path_rate=0.1, out_norm=dict(type="LN2d")),
    neck=dict(in_channels=feature_channels(backbone, (1, 2, 3))),
)
