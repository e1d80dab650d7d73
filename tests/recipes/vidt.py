"""ViDT: the backbone with detection tokens, and whole detectors, narrow, shallow and on small padded images."""

from __future__ import annotations

import importlib
from types import SimpleNamespace

import torch
import torchvision
from torch import nn

from . import Recipe, Source
from .gates import normal, some

VIDT = Source("https://github.com/naver-ai/vidt", "a8c48b56ccf2d7cfe7ea51a3e7f6def6a61007a6", "Apache-2.0")
IMAGE = (2, 3, 100, 132)
CROPPED = (75, 97)  # of the second image, which is padded to the size of the first
TOKENS, WIDTH = 7, 256
SWIN = {"embed_dim": 16, "depths": [2, 2, 2, 2], "num_heads": [1, 2, 2, 4], "window_size": 3}


class _Exact:
    """torch, whose float32 is float64: the authors' sines are computed in float32."""

    float32 = torch.float64

    def __getattr__(self, name: str):
        return getattr(torch, name)


def padding() -> torch.Tensor:
    """Return where the images are padded."""
    padded = torch.zeros(IMAGE[0], *IMAGE[2:], dtype=torch.bool)
    padded[1, CROPPED[0] :] = padded[1, :, CROPPED[1] :] = True
    return padded


def body(module, **options) -> nn.Module:
    """Build the backbone."""
    module.torch = _Exact()
    model = module.SwinTransformer(drop_path_rate=0.0, **SWIN)
    model.finetune_det("vidt", TOKENS, WIDTH, **options)
    return model


def gradients(model: nn.Module, image: torch.Tensor, found: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Return samples of outputs, and gradients of their sum with drawn factors for image and parameters."""
    total = sum((out * normal(4 + i, out.shape)).sum() for i, out in enumerate(found.values()))
    names = {p: name for name, p in model.named_parameters(remove_duplicate=False)}  # the last of several
    used = {"grad_image": image} | {f"grad/{name}": p for p, name in names.items()}
    grads = torch.autograd.grad(total, list(used.values()), allow_unused=True)
    kept = {name: some(grad, 64) for name, grad in zip(used, grads, strict=True) if grad is not None}
    return {name: some(out) for name, out in found.items()} | kept


def walked(model: nn.Module, image: torch.Tensor) -> dict[str, torch.Tensor]:
    """Return maps and tokens with their gradients."""
    maps, tokens, _ = model(image.requires_grad_(), padding())
    found = {f"map{i}": x for i, x in enumerate(maps)} | {"tokens": tokens.transpose(1, 2)}
    return gradients(model, image, found)


def detector(module, **options) -> nn.Module:
    """Build the detector, whose attention to sampled places is the authors' own in plain torch."""
    attention = importlib.import_module("ops.modules.ms_deform_attn")
    core = importlib.import_module("ops.functions.ms_deform_attn_func").ms_deform_attn_core_pytorch
    attention.MSDeformAttnFunction = SimpleNamespace(
        apply=lambda value, sizes, _, places, weights, __: core(value, sizes, places, weights)
    )
    backbone = body(importlib.import_module("methods.swin_w_ram"))
    decoder = importlib.import_module("methods.vidt.deformable_transformer")
    decoder.torch = _Exact()
    transformer = decoder.DeformableTransformer(
        d_model=WIDTH, num_decoder_layers=2, dim_feedforward=32, token_label=options.get("token_label", False)
    )
    plus = options.pop("plus", False)
    if plus:
        fusion = importlib.import_module("methods.vidt.fpn_fusion").FPNFusionModule(backbone.num_channels)
        options |= {"epff": fusion, "with_vector": True, "processor_dct": SimpleNamespace(n_keep=12), "iou_aware": True}
    return module.Detector(backbone, transformer, 91, TOKENS, aux_loss=True, with_box_refine=True, **options)


def detected(model: nn.Module, image: torch.Tensor) -> dict[str, torch.Tensor]:
    """Return what all layers predict, with the gradients."""
    samples = SimpleNamespace(tensors=image.requires_grad_(), mask=padding())
    out = model(samples)
    layers = [*out["aux_outputs"], out]
    found = {
        kind: torch.stack([layer[f"pred_{kind}"] for layer in layers])
        for kind in ("logits", "boxes", "vectors", "ious")
        if f"pred_{kind}" in out
    }
    if "enc_tokens" in out:
        found |= {f"label{i}": x for i, x in enumerate(out["enc_tokens"]["pred_logits"])}
    return gradients(model, image, found)


def recipe(file, factory, run, **options):
    """Return the recipe of a model."""
    return Recipe(
        VIDT,
        file,
        factory,
        options,
        image=IMAGE,
        run=run,
        gradients=True,
        constants=("relative_position_index",),
        stand_ins={
            "MultiScaleDeformableAttention": {},
            "torchvision": {**vars(torchvision), "__version__": "0.9"},  # of which three characters are read
            "methods.coat_w_ram": {},
            "methods.vidt.criterion": {},
            "methods.vidt.dct": {},
            "methods.vidt.matcher": {},
            "methods.vidt.postprocessor": {},
        },
        notes="the second image is padded from recipes.vidt.CROPPED on; sines are computed in float64; gradients are "
        "of the sum of the i-th output times RandomState(4 + i).standard_normal(its shape)",
    )


RECIPES = {
    "body": recipe("methods/swin_w_ram.py", body, walked),
    "body_cross": recipe("methods/swin_w_ram.py", body, walked, cross_indices=[2, 3]),
    "vidt": recipe("methods/vidt/detector.py", detector, detected),
    "vidt_plus": recipe("methods/vidt/detector.py", detector, detected, plus=True, token_label=True),
}
