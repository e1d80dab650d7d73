"""A small Mask2Former with exits in its encoder on scenes of handwritten digits: minutes on a CPU."""

_base_ = "eco-mask2former_160k.py"
from mmengine.config import Config

from visionzoo.data.scenes import CLASSES

width = 64
heads = dict(embed_dims=width, num_heads=4)
classes = len(CLASSES)
model = dict(
    data_preprocessor=dict(size=(128, 128)),
    backbone=dict(pretrained=False),
    decode_head=dict(
        feat_channels=width,
        out_channels=width,
        num_classes=classes,
        num_queries=16,
        pixel_decoder=dict(
            encoder=dict(layer_cfg=dict(self_attn_cfg=heads, ffn_cfg=dict(embed_dims=width, feedforward_channels=128))),
            norm_cfg=dict(num_groups=8),
            positional_encoding=dict(num_feats=width // 2),
        ),
        positional_encoding=dict(num_feats=width // 2),
        transformer_decoder=dict(
            num_layers=3,
            layer_cfg=dict(
                self_attn_cfg=heads, cross_attn_cfg=heads, ffn_cfg=dict(embed_dims=width, feedforward_channels=128)
            ),
        ),
        loss_cls=dict(class_weight=[1.0] * classes + [0.1]),
        train_cfg=dict(num_points=512),
    ),
)

digits = Config.fromfile("{{ fileDirname }}/semantic-fpn_digits.py")  # the same scenes
loaders = ("train_dataloader", "val_dataloader", "test_dataloader")
train_dataloader, val_dataloader, test_dataloader = (dict(_delete_=True, **digits[name]) for name in loaders)
train_dataloader["batch_size"] = 4
default_hooks = digits.default_hooks
del Config, digits

max_iters = 1200
train_cfg = dict(max_iters=max_iters, val_interval=400)
optim_wrapper = dict(
    optimizer=dict(lr=1e-3, weight_decay=0.01),
    clip_grad=dict(max_norm=1.0),
    paramwise_cfg=dict(custom_keys=dict(backbone=dict(lr_mult=1.0))),
)
param_scheduler = [
    dict(type="LinearLR", start_factor=0.01, by_epoch=False, begin=0, end=100),
    dict(type="CosineAnnealingLR", by_epoch=False, begin=100, end=max_iters, eta_min=1e-5),
]
