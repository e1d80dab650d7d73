"""RetinaNet whose features look at corners and centers, from random weights on a hundred images or so."""

_base_ = "retinanet_tiny.py"

norm_cfg = dict(type="GN", num_groups=32)
model = dict(
    bbox_head=dict(
        _delete_=True,
        type="BVRHead",
        bbox_head_cfg=dict(
            type="RetinaHead",
            num_classes=80,
            in_channels=256,
            anchor_generator=dict(
                type="AnchorGenerator",
                octave_base_scale=3,
                scales_per_octave=3,
                ratios=[0.5, 1.0, 2.0],
                strides=[8, 16, 32, 64, 128],
            ),
            loss_cls=dict(type="FocalLoss", use_sigmoid=True, gamma=2.0, alpha=0.25, loss_weight=1.0),
            loss_bbox=dict(type="L1Loss", loss_weight=1.0),
            norm_cfg=norm_cfg,
        ),
        keypoint_head_cfg=dict(
            type="BVRKeypointHead", num_classes=80, in_channels=256, logits_convs=1, norm_cfg=norm_cfg
        ),
    )
)
