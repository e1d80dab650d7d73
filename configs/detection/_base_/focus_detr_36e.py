"""Focus-DETR (arXiv:2307.12612) with 4 scales, 36 epochs on COCO."""

_base_ = "focus_detr_12e.py"

max_epochs = 36
train_cfg = dict(max_epochs=max_epochs)
param_scheduler = [dict(type="MultiStepLR", begin=0, end=max_epochs, by_epoch=True, milestones=[30], gamma=0.1)]
