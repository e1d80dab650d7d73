"""RetinaNet with SDANet's neck, from random weights on a hundred images or so."""

_base_ = "retinanet_tiny.py"

model = dict(neck=dict(type="LevelAttentionNeck"))
