"""Detection and segmentation on OpenMMLab; the only part of visionzoo that imports mm*.

`custom_imports = dict(imports=['visionzoo.openmmlab'])` in a config is all that is needed. Importing this package
registers `ZooBackbone`, the necks and the optimizer constructor in mmengine's root registry, where mmdet and mmseg find
them, and calls `_compat.install()`: mmcv's ops are served where mmcv has no compiled extension, and no checkpoint runs
code. `_compat.PATCHES` lists every change of a library, with releases and reasons; other releases bring one warning.

`decoders`, with mmseg's decode heads, `encoder_exits`, with Mask2Former's, and `vidt`, `vidt_plus` and `focus_detr`,
detectors, are imported by the configs that name them, as mmseg and mmdet take seconds to import. `gate_fitting` (with
`gate_report`) is a command on `encoder_exits`. `ops` stands in mmcv's place, `checkpoints` reads for mmengine;
`backbone`, `necks`, `bridging` (a dense head) and `optim` are what configs name; `flags`, `running`, `prediction` and
`export` are the commands with a .py config. `description` reads --dataset's file, `configuring` puts data and classes
into a config; `data` (with `coco` and `masks`), `meta` (what a checkpoint says of its training) and `trial` (one batch
of validation) check before the first step, `checked_runner` in each; `config_errors` says which part of a config cannot
be built, and which setting nothing reads.
"""

from visionzoo.openmmlab import _compat, ops

_compat.install()  # before anything that imports mmcv.ops

from visionzoo.openmmlab.backbone import ZooBackbone, feature_channels, feature_strides  # noqa: E402
from visionzoo.openmmlab.bridging import BVRHead, BVRKeypointHead  # noqa: E402
from visionzoo.openmmlab.necks import LevelAttentionNeck, SimplePyramid, UpsamplingFPN  # noqa: E402
from visionzoo.openmmlab.optim import ZooOptimWrapperConstructor  # noqa: E402

__all__ = [
    "BVRHead",
    "BVRKeypointHead",
    "LevelAttentionNeck",
    "SimplePyramid",
    "UpsamplingFPN",
    "ZooBackbone",
    "ZooOptimWrapperConstructor",
    "feature_channels",
    "feature_strides",
    "ops",
]
