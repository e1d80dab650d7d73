"""Dynamic Perceiver: what its four classifiers say, at the authors' size and at one that 32 does not divide."""

import sys
from unittest.mock import patch

import timm.layers

from . import Recipe, Source

AUTHORS = Source("https://github.com/LeapLabTHU/Dynamic_Perceiver", "0d2a6299ded1515f31efdddb453b5d429202e806", "MIT")


def register_model(function):
    """Let `import *` find a model's function."""
    module = sys.modules[function.__module__]
    module.__all__ = [*getattr(module, "__all__", ()), function.__name__]
    return function


EXITS = ("exit_early", "exit_latent", "exit_cnn", "logits")
OWN = {  # as each package was called in timm 0.4; create_classifier has returned what it does then
    "timm.models.registry": {"register_model": register_model},
    "timm.models.helpers": {
        "build_model_with_cfg": lambda model, variant, pretrained, default_cfg, **kwargs: model(**kwargs)
    },
    "timm.models.layers": {
        name: getattr(timm.layers, name)
        for name in ("DropBlock2d", "DropPath", "create_attn", "create_classifier", "trunc_normal_", "get_attn")
    },
}


def build(module, name, depth_factor):
    """Build a model with the switches of README.md; its file of FLOPs is not written."""
    switches = ("spatial_reduction", "with_last_CA", "with_x2z", "with_dwc", "with_z2x", "with_isc")
    with patch.object(module.np, "savetxt"):
        return getattr(module, name)(
            depth_factor=list(depth_factor), SA_widening_factor=4, **dict.fromkeys(switches, True)
        )


def run(model, image):
    """Name what the four classifiers say."""
    return dict(zip(EXITS, model(image), strict=True))


def model(host, name, depth_factor, stages, image):
    """Return the recipe of a model: maps at the ends of the stages, then latents after each self-attention."""
    return Recipe(
        AUTHORS,
        f"models/dyn_perceiver_{host}.py",
        build,
        {"name": name, "depth_factor": depth_factor},
        image=image,
        features=(*stages, *(f"self_att{i}" for i in range(1, 5))),
        run=run,
        stand_ins=OWN,
    )


HOSTS = {
    "mobilenetv3_075": (
        "mobilenet_v3",
        "mobilenetV3_0x75_perceiver_t128",
        (1, 1, 1, 3),
        ("cnn_body_stage1.1", "cnn_body_stage2.2", "cnn_body_stage3.5", "cnn_body_stage4.2"),
    ),
    "regnet_400m": ("regnet", "reg400m_perceiver_t128", (1, 1, 1, 2), tuple(f"cnn_body.block{i}" for i in range(1, 5))),
    "regnet_800m": ("regnet", "reg800m_perceiver_t128", (1, 1, 1, 2), tuple(f"cnn_body.block{i}" for i in range(1, 5))),
    "resnet18": (
        "resnet",
        "resnet18_perceiver_t128",
        (1, 1, 1, 1),
        tuple(f"cnn_body_stage{i}" for i in range(1, 5)),
    ),
    "resnet50_0375": (
        "resnet",
        "resnet50_0375_perceiver_t128",
        (1, 1, 1, 1),
        tuple(f"cnn_body_stage{i}" for i in range(1, 5)),
    ),
}
RECIPES = {name: model(*host, image=(1, 3, 224, 224)) for name, host in HOSTS.items()} | {
    f"{name}_other_size": model(*host, image=(1, 3, 90, 150)) for name, host in HOSTS.items()
}
