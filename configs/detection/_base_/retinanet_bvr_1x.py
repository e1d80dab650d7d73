"""RetinaNet whose features look at corners and centers, 12 epochs on COCO, AdamW: RelationNet++ (arXiv:2010.15831).

Heads and neck are those of configs/bvr/retinanet_r50_fpn_relation_coco_1x.py of microsoft/RelationNet2 at 0930752,
whose optimizer is SGD (lr 0.01, weight decay 1e-4), with a backbone of the zoo from stride 8 on.
"""

_base_ = "retinanet_1x.py"

norm_cfg = dict(type="GN", num_groups=32)
model = dict(
    neck=dict(norm_cfg=norm_cfg),
    bbox_head=dict(
        _delete_=True,
        type="BVRHead",
        bbox_head_cfg=dict(
            type="RetinaHead",
            num_classes=80,
            in_channels=256,
            stacked_convs=4,
            feat_channels=256,
            anchor_generator=dict(
                type="AnchorGenerator",
                octave_base_scale=4,
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
        location=dict(base_size=(400, 400), log_scale=True),
    ),
)
