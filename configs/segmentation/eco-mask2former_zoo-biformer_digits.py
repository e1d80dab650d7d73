"""Mask2Former with exits and a small BiFormer on scenes of handwritten digits; the data needs no download.

Command: python tools/train.py configs/segmentation/eco-mask2former_zoo-biformer_digits.py
Hardware: 2 CPU cores. Published: none.
"""

_base_ = "_base_/eco-mask2former_digits.py"
from visionzoo.openmmlab import feature_channels

small = dict(depths=(1, 1, 2, 1), embed_dims=(32, 64, 128, 256))
model = dict(
    backbone=dict(name="zoo_biformer_t", regions=4, out_norm=dict(type="LN2d"), **small),
    decode_head=dict(in_channels=feature_channels("zoo_biformer_t", **small)),
)
