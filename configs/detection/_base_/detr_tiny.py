"""What detectors with queries need to fit a hundred images: they learn slowly, so more updates, of smaller images."""

_base_ = "retinanet_tiny.py"

load = [
    dict(type="LoadImageFromFile"),
    dict(type="LoadAnnotations", with_bbox=True),
    dict(type="Resize", scale=(512, 512), keep_ratio=True),  # half of the others' pixels
]
meta_keys = ("img_id", "img_path", "ori_shape", "img_shape", "scale_factor")
test_pipeline = [load[0], load[2], load[1], dict(type="PackDetInputs", meta_keys=meta_keys)]
train_dataloader = dict(
    dataset=dict(times=40, dataset=dict(pipeline=[*load, dict(type="PackDetInputs")])),  # 500 iterations an epoch
)
val_dataloader = dict(dataset=dict(pipeline=test_pipeline))
test_dataloader = val_dataloader
optim_wrapper = dict(optimizer=dict(lr=2e-4), clip_grad=dict(max_norm=0.1))
