"""FFNet, "fuss-free networks" of Qualcomm: small forms of each stem, block, decoder, classifier and interpolation."""

from functools import partial

import torch

from . import Recipe, Source

FFNET = Source(
    "https://github.com/Qualcomm-AI-research/FFNet", "2291ae746b83496d93a41b23361085d42317519f", "BSD-3-Clause-Clear"
)


def network(module, backbone, block, layers, strides, branch_chans, head, task, pre_down=False):
    """Build a network; in float64 from the start, for the digits of the Gaussian."""
    from models import resnet

    encoder = partial(
        getattr(resnet, backbone), getattr(resnet, block), layers, strides, branch_chans=list(branch_chans)
    )
    torch.set_default_dtype(torch.float64)
    try:
        return module.FFNet(head, 19, task, backbone=encoder, pre_downsampling=pre_down)
    finally:
        torch.set_default_dtype(torch.float32)


def segment(model, image):
    """Return the logits, what they are upsampled to, the backbone's maps and the decoder's."""
    taken = []
    hooks = [
        part.register_forward_hook(lambda module, args, out: taken.extend(map(torch.clone, out)))
        for part in (model.backbone_model, model.head.layers[1])
    ]
    logits = model(image)
    for hook in hooks:
        hook.remove()
    full = torch.nn.functional.interpolate(logits, image.shape[-2:], mode="bilinear", align_corners=False)
    return {"logits": logits, "logits_full": full, **{f"feat{i}": x for i, x in enumerate(taken)}}


def recipe(image, **kwargs):
    """Return the recipe of a small network."""
    return Recipe(
        FFNET,
        "models/ffnet_blocks.py",
        network,
        kwargs,
        image=image,
        run=segment,
        constants=("smoothing.weight",),
        notes="fewer blocks and channels in the backbone than any that was published",
    )


RECIPES = {
    "ffnet50_aaa_small": recipe(
        (1, 3, 45, 67),
        backbone="ResNet",
        block="Bottleneck",
        layers=[1, 2, 1, 1],
        strides=[1, 2, 2, 2],
        branch_chans=[4, 6, 8, 10],
        head="A",
        task="segmentation_A",
    ),
    "ffnet46n_cbb_small": recipe(
        (1, 3, 50, 71),
        backbone="ResNetNarrow",
        block="BasicBlock",
        layers=[1, 2, 1],
        strides=[2, 2, 2],
        branch_chans=[16, 16, 12, 24],
        head="B",
        task="segmentation_B",
    ),
    "ffnet40s_dbbb_mobile_small": recipe(
        (1, 3, 90, 77),
        backbone="ResNetS",
        block="BasicBlock",
        layers=[2, 1, 1, 1],
        strides=[2, 2, 2, 2],
        branch_chans=[16, 12, 16, 24],
        head="B_mobile",
        task="segmentation_B",
    ),
    "ffnet40s_bcc_mobile_pre_down_small": recipe(
        (1, 3, 91, 118),
        backbone="ResNetS",
        block="BasicBlock",
        layers=[1, 1, 1, 1],
        strides=[1, 2, 2, 2],
        branch_chans=[64, 12, 16, 24],
        head="C_mobile",
        task="segmentation_C",
        pre_down=True,
    ),
}
