"""ViDT: the backbone with detection tokens, and whole detectors, narrow, shallow and on small padded images."""

from __future__ import annotations

import importlib
from functools import partial
from types import SimpleNamespace

import numpy as np
import torch
import torchvision
from torch import nn

from . import Recipe, Source
from .gates import normal, some

VIDT = Source("https://github.com/naver-ai/vidt", "a8c48b56ccf2d7cfe7ea51a3e7f6def6a61007a6", "Apache-2.0")
IMAGE = (2, 3, 100, 132)
CROPPED = (75, 97)  # of the second image, which is padded to the size of the first
TOKENS, WIDTH = 7, 256
VECTOR, MASK = 12, 16  # frequencies, and side of the masks in pixels
SWIN = {"embed_dim": 16, "depths": [2, 2, 2, 2], "num_heads": [1, 2, 2, 4], "window_size": 3}


class _Exact:
    """torch, whose float32 is float64: the authors' sines and shares of classes are computed in float32."""

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


def gradients(
    model: nn.Module, image: torch.Tensor, found: dict[str, torch.Tensor], more: torch.Tensor | float = 0
) -> dict[str, torch.Tensor]:
    """Return samples of outputs, and gradients of their sum with drawn factors for image and parameters."""
    total = more + sum((out * normal(4 + i, out.shape)).sum() for i, out in enumerate(found.values()))
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
    if options.pop("plus", False):
        fusion = importlib.import_module("methods.vidt.fpn_fusion").FPNFusionModule(backbone.num_channels)
        transform = importlib.import_module("methods.vidt.dct").ProcessorDCT(VECTOR, MASK)
        options |= {"epff": fusion, "with_vector": True, "processor_dct": transform, "iou_aware": True}
    model = module.Detector(backbone, transformer, 91, TOKENS, aux_loss=True, with_box_refine=True, **options)
    if options.get("token_label"):
        criterion = importlib.import_module("methods.vidt.criterion")
        criterion.torch = _Exact()
        cv2 = criterion.cv2
        cosines = cv2.dct
        criterion.cv2 = SimpleNamespace(dct=lambda mask: cosines(mask.astype("float64")))
        matcher = importlib.import_module("methods.vidt.matcher").HungarianMatcher(2, 5, 2)
        losses = ["labels", "boxes", "iouaware", "masks"]
        made = partial(criterion.SetCriterion, matcher=matcher, weight_dict={}, losses=losses)
        vectors = {"with_vector": True, "processor_dct": transform, "vector_loss_coef": 3.0}
        post = importlib.import_module("methods.vidt.postprocessor")
        post.cv2 = cv2  # which it does not import
        model.others = (made(90, **vectors), made(91), post.PostProcess(transform))  # a tuple: none of its modules
    return model


def objects() -> list[dict[str, torch.Tensor]]:
    """Return boxes (corners in pixels), classes of 0 to 89 and masks of both images."""
    found = []
    for seed, (height, width), count in ((0, IMAGE[2:], 3), (1, CROPPED, 2)):
        draw = np.random.RandomState(seed)
        first = draw.uniform(0, 0.5, (count, 2)) * (width, height)
        last = first + draw.uniform(0.2, 0.5, (count, 2)) * (width, height)
        boxes = torch.from_numpy(np.concatenate([first, last], 1))
        rows, columns = np.mgrid[:height, :width]
        middle, side = (first + last) / 2, (last - first) / 2
        far = [((columns - x) / w) ** 2 + ((rows - y) / h) ** 2 for (x, y), (w, h) in zip(middle, side, strict=True)]
        masks = torch.from_numpy(np.stack(far) < 1)
        found.append({"boxes": boxes, "labels": torch.from_numpy(draw.randint(0, 90, count)), "masks": masks})
    return found


def learned(model: nn.Module, out: dict) -> dict[str, torch.Tensor]:
    """Return the authors' losses of the 90 classes that are no background, weighted as they are, and what they draw."""
    layers = [*out["aux_outputs"], out]
    for layer in layers:
        layer["pred_logits"] = layer["pred_logits"][..., 1:]
    targets = []
    for each, (height, width) in zip(objects(), (IMAGE[2:], CROPPED), strict=True):
        first, last = each["boxes"][:, :2], each["boxes"][:, 2:]
        boxes = torch.cat([(first + last) / 2, last - first], 1) / torch.tensor([width, height] * 2)
        targets.append({**each, "boxes": boxes, "xyxy_boxes": each["boxes"]})
    boxes, labels, post = model.others
    apart = {key: value for key, value in out.items() if key != "enc_tokens"}
    found = {key: loss for key, loss in boxes(apart, targets).items() if key.startswith("loss")}
    shifted = [{**each, "labels": each["labels"] + 1} for each in targets]
    found |= labels.loss_tokens(out["enc_tokens"], shifted, sum(len(each["labels"]) for each in targets))
    weights = {"ce": 2, "bbox": 5, "giou": 2, "iouaware": 2, "vector": 1, "token": 2}
    found = {key: loss * weights[key.split("_")[1]] for key, loss in found.items()}
    sizes = torch.tensor([IMAGE[2:], CROPPED])
    for i, result in enumerate(post(out, sizes)):
        masks = result["masks"][:, 0].double()
        found |= {f"scores{i}": result["scores"], f"masks{i}": (masks * normal(3, masks.shape)).sum((1, 2))}
    return found


def detected(model: nn.Module, image: torch.Tensor) -> dict[str, torch.Tensor]:
    """Return what all layers predict, with the gradients."""
    out = model(SimpleNamespace(tensors=image.requires_grad_(), mask=padding()))
    layers = [*out["aux_outputs"], out]
    found = {
        kind: torch.stack([layer[f"pred_{kind}"] for layer in layers])
        for kind in ("logits", "boxes", "vectors", "ious")
        if f"pred_{kind}" in out
    }
    if "enc_tokens" in out:
        found |= {f"label{i}": x for i, x in enumerate(out["enc_tokens"]["pred_logits"])}
        found["logits"] = found["logits"][..., 1:]
        results = learned(model, out)
        own = ("loss_iouaware", "loss_vector", "loss_token")  # of the others the gradients are mmdet's
        return results | gradients(model, image, found, sum(results[key] for key in results if key.startswith(own)))
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
        },
        notes="the second image is padded from recipes.vidt.CROPPED on; sines are computed in float64; gradients are "
        "of the sum of the i-th output times RandomState(4 + i).standard_normal(its shape), and of the losses of "
        "overlap, vectors and labels; cosines of masks are summed in float64",
    )


RECIPES = {
    "body": recipe("methods/swin_w_ram.py", body, walked),
    "body_cross": recipe("methods/swin_w_ram.py", body, walked, cross_indices=[2, 3]),
    "vidt": recipe("methods/vidt/detector.py", detector, detected),
    "vidt_plus": recipe("methods/vidt/detector.py", detector, detected, plus=True, token_label=True),
}
