"""Semantic FPN, 80,000 iterations on ADE20K: as with 40,000, but a longer schedule."""

_base_ = "semantic-fpn_40k.py"

train_cfg = dict(max_iters=80000, val_interval=8000)
default_hooks = dict(checkpoint=dict(interval=8000))
param_scheduler = [dict(type="PolyLR", power=0.9, begin=0, end=80000, eta_min=0.0, by_epoch=False)]
