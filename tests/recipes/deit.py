"""DeiT with its distillation token, on timm's ViT of today: the authors' file adds token, place and head."""

from functools import partial

from timm.models.vision_transformer import VisionTransformer
from torch import nn

from . import Recipe, Source

DEIT = Source("https://github.com/facebookresearch/deit", "7e160fe43f0252d17191b71cbb5826254114ea5b", "Apache-2.0")


class Base(VisionTransformer):
    """timm's ViT with a method of timm 0.3.2's that the authors' class calls, for weights that are filled anew."""

    def _init_weights(self, module):
        pass


def distilled(module, **kwargs):
    """Build the authors' class from the arguments of its factories."""
    norm = partial(nn.LayerNorm, eps=1e-6)
    return module.DistilledVisionTransformer(mlp_ratio=4, qkv_bias=True, norm_layer=norm, **kwargs)


def run(model, image):
    """Return the answer, and what training returns: the logits of both classifiers."""
    logits = model(image)
    model.train()  # without dropout nothing else changes
    head, head_dist = model(image)
    model.eval()
    return {"logits": logits, "logits_head": head, "logits_head_dist": head_dist}


RECIPES = {
    "deit_t_distilled": Recipe(
        DEIT,
        "models.py",
        distilled,
        {"img_size": 64, "patch_size": 16, "embed_dim": 192, "depth": 2, "num_heads": 3},
        image=(2, 3, 64, 64),
        run=run,
        stand_ins={
            "timm.models.vision_transformer": {"VisionTransformer": Base},
            "timm.models.registry": {},
            "timm.models.layers": {"trunc_normal_": nn.init.trunc_normal_},
        },
        notes="the base class is timm's of today, with an empty _init_weights",
    ),
}
