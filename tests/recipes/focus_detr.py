"""Focus-DETR: scores of tokens, the sparse encoder and the decoder with its heads, on small maps with padding."""

from __future__ import annotations

import importlib
import sys
from copy import deepcopy
from itertools import pairwise
from pathlib import Path

import torch
from torch import nn
from torch.nn import functional as F

from . import Recipe, Source, drawn
from .gates import normal, some

NOAH = Source("https://github.com/huawei-noah/noah-research", "aa0f80c8ce4815b1f072500be6906f56fc76a91a", "Apache-2.0")
CHANNELS, CLASSES, LAYERS, QUERIES, DENOISING, DUAL = 256, 5, 2, 10, 4, 9
STRIDES, SIDE = (8, 16, 32, 64), (96, 72)  # of the levels, and height and width of the batch, in pixels
IMAGES = ((96, 72), (70, 52))  # heights and widths without padding
BOXES = ([[4.0, 6, 40, 50], [10, 2, 70, 95], [30, 30, 50, 44]], [[1.0, 1, 51, 69]])
LABELS = ([0, 3, 4], [2])
KEEP = (1.0, 0.6)


class MultiheadAttention(nn.Module):
    """What detrex makes of torch's: positions are added, and the input to the output."""

    def __init__(self, embed_dim, num_heads, attn_drop, batch_first):
        super().__init__()
        self.embed_dim = embed_dim
        self.attn = nn.MultiheadAttention(embed_dim, num_heads, attn_drop, batch_first=batch_first)

    def forward(self, query, key, value, identity, query_pos, key_pos, attn_mask=None, key_padding_mask=None, **_):
        """Attend."""
        out = self.attn(query + query_pos, key + key_pos, value, attn_mask=attn_mask, key_padding_mask=key_padding_mask)
        return query + out[0]


def deformable():
    """Return mmcv's attention, which detrex has taken over, under detrex's names of arguments."""
    importlib.import_module("visionzoo.openmmlab")  # first: it serves mmcv's ops
    from mmcv.ops import MultiScaleDeformableAttention as Attention

    class MultiScaleDeformableAttention(Attention):
        def __init__(self, embed_dim, num_heads, dropout, batch_first, num_levels):
            super().__init__(embed_dim, num_heads, num_levels, dropout=dropout, batch_first=batch_first)
            self.embed_dim = embed_dim

    return MultiScaleDeformableAttention


def ffn(embed_dim, feedforward_dim, output_dim, ffn_drop, num_fcs=2):
    """Return mmcv's, which detrex has taken over."""
    from mmcv.cnn.bricks.transformer import FFN

    return FFN(embed_dim, feedforward_dim, num_fcs, ffn_drop=ffn_drop)


class MLP(nn.Module):
    """Linear layers with ReLU between them."""

    def __init__(self, input_dim, hidden_dim, output_dim, num_layers):
        super().__init__()
        widths = [input_dim, *[hidden_dim] * (num_layers - 1), output_dim]
        self.layers = nn.ModuleList(nn.Linear(*pair) for pair in pairwise(widths))

    def forward(self, x):
        """Go through."""
        for layer in self.layers[:-1]:
            x = layer(x).relu()
        return self.layers[-1](x)


class TransformerLayerSequence(nn.Module):
    """Copies of a layer."""

    def __init__(self, transformer_layers, num_layers):
        super().__init__()
        self.num_layers = num_layers
        self.layers = nn.ModuleList(deepcopy(transformer_layers) for _ in range(num_layers))


def get_sine_pos_embed(places):
    """Return detrex's sines and cosines of (x, y, w, h), those of y first."""
    powers = torch.arange(128, dtype=torch.float32)
    powers = 10000 ** (2 * torch.div(powers, 2, rounding_mode="floor") / 128)
    angles = [x * 2 * torch.pi / powers for x in places.split(1, -1)]
    found = [torch.stack([x[..., 0::2].sin(), x[..., 1::2].cos()], -1).flatten(2) for x in angles]
    return torch.cat([found[1], found[0], *found[2:]], -1)


def inverse_sigmoid(x):
    """Return detrex's, up to 1/1000 from the ends."""
    return (x.clamp(min=1e-3) / (1 - x).clamp(min=1e-3)).log()


STAND_INS = {
    "detrex": {},
    "detrex.layers": {
        "FFN": ffn,
        "MLP": MLP,
        "MultiheadAttention": MultiheadAttention,
        "TransformerLayerSequence": TransformerLayerSequence,
        "get_sine_pos_embed": get_sine_pos_embed,
    },
    "detrex.layers.mlp": {},
    "detrex.utils": {"inverse_sigmoid": inverse_sigmoid},
    "detrex.utils.box_ops": {},
    "detectron2.modeling": {},
    "detectron2.structures": {},
}


def detector(module, keep, dual):
    """Build the detector without backbone, neck and losses."""
    layers = sys.modules["detrex.layers"]
    layers.__path__ = [str(Path(module.__file__).parents[3] / "detrex/layers")]  # the authors' own layers of detrex
    own = importlib.import_module("detrex.layers.transformer")
    parts = importlib.import_module(module.__name__ + "_transformer")
    for kind in ("BaseTransformerLayer", "Focus_DETR_BaseTransformerLayer"):
        setattr(parts, kind, getattr(own, kind))
    parts.MultiScaleDeformableAttention = deformable()
    options = {"feedforward_dim": 32, "attn_dropout": 0.0, "ffn_dropout": 0.0, "num_layers": LAYERS}
    transformer = parts.FOCUS_DETRTransformer(
        parts.FOCUS_DETRTransformerEncoder(CHANNELS, **options),
        parts.FOCUS_DETRTransformerDecoder(CHANNELS, **options),
        two_stage_num_proposals=QUERIES,
    )
    transformer.cascade_set = torch.tensor(keep)
    for layer in transformer.encoder.layers:
        layer.topk_sa = dual
    return module.FOCUS_DETR(
        *[nn.Identity()] * 3, transformer, CHANNELS, CLASSES, QUERIES, criterion=None, device="cpu"
    )


def name_once(model):
    """Leave the heads one name each: encoder and decoder hold them as lists."""
    del model.enhance_MCSP_layerlist
    for part, name in (("encoder", "enhance_MCSP"), ("decoder", "class_embed"), ("decoder", "bbox_embed")):
        holder = getattr(model.transformer, part)
        heads = list(getattr(holder, name))
        delattr(holder, name)
        setattr(holder, name, heads)


def levels() -> list[torch.Tensor]:
    """Draw the maps of a neck."""
    return [drawn(i, (2, CHANNELS, *(-(-n // stride) for n in SIDE))) for i, stride in enumerate(STRIDES)]


def positions() -> list[torch.Tensor]:
    """Draw the positions of the maps."""
    return [drawn(10 + i, x.shape) for i, x in enumerate(levels())]


def denoising() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Draw denoising queries, their boxes as logits, and the mask of the decoder: no other query sees them."""
    mask = torch.zeros(DENOISING + QUERIES, DENOISING + QUERIES, dtype=torch.bool)
    mask[DENOISING:, :DENOISING] = True
    return drawn(20, (2, DENOISING, CHANNELS)), drawn(21, (2, DENOISING, 4)), mask


def kept(outputs: dict[str, torch.Tensor], loss: torch.Tensor, used: dict[str, torch.Tensor]):
    """Return samples of the outputs, the loss, and the gradients of all of it for what was used."""
    total = loss + sum((out * normal(i, out.shape)).sum() for i, out in enumerate(outputs.values()))
    grads = torch.autograd.grad(total, list(used.values()), allow_unused=True)
    found = {f"grad/{name}": some(grad, 64) for name, grad in zip(used, grads, strict=True) if grad is not None}
    return {name: some(out) for name, out in outputs.items()} | {"loss_foreground": loss} | found


def detected(model: nn.Module, _: torch.Tensor) -> dict[str, torch.Tensor]:
    """Return scores and boxes of encoder and decoder, the scores of tokens and their loss, and gradients of all."""
    maps = [x.requires_grad_() for x in levels()]
    padding = torch.ones(2, *SIDE)
    for i, (height, width) in enumerate(IMAGES):
        padding[i, :height, :width] = 0
    masks = [F.interpolate(padding[None], x.shape[2:])[0].bool() for x in maps]
    queries, boxes, mask = denoising()
    states, first, references, chosen, proposals, logits = model.transformer(
        maps, masks, positions(), (queries, boxes), attn_masks=[mask, None]
    )
    heads = zip(states, [first, *references[:-1]], model.class_embed, model.bbox_embed, strict=False)
    found = [(score(x), (box(x) + inverse_sigmoid(place)).sigmoid()) for x, place, score, box in heads]
    outputs = {f"scores{i}": score for i, (score, _) in enumerate(found)}
    outputs |= {f"boxes{i}": box for i, (_, box) in enumerate(found)}
    outputs |= {"scores_enc": model.class_embed[-1](chosen), "boxes_enc": proposals, "foreground": logits[..., 0]}
    used = {f"map{i}": x for i, x in enumerate(maps)} | dict(model.named_parameters())
    return kept(outputs, supervised(model, logits, maps), used)


def supervised(model: nn.Module, logits: torch.Tensor, maps: list[torch.Tensor]) -> torch.Tensor:
    """Return the authors' loss of the scores, with their weight."""
    loss = importlib.import_module(f"{type(model).__module__.rpartition('.')[0]}.foreground_supervision")
    most = max(map(len, BOXES))
    boxes = torch.stack([F.pad(torch.tensor(each).double(), (0, 0, 0, most - len(each)), value=-1) for each in BOXES])
    classes = torch.stack([F.pad(torch.ones(len(each)), (0, most - len(each)), value=-1) for each in BOXES])
    ranges = [[-1, 64], [64, 128], [128, 256], [256, 999999]]
    targets = loss.GenTargets(list(STRIDES), ranges)(maps, boxes, classes)
    return 1.5 * loss.compute_cls_loss(logits, targets, (targets > 0)[..., 0]).mean()


RECIPES = {
    "detector": Recipe(
        NOAH,
        "projects/focus_detr/modeling/focus_detr.py",
        detector,
        {"keep": list(KEEP), "dual": DUAL},
        root="Focus-DETR",
        image=(2, CHANNELS, 12, 9),
        run=detected,
        gradients=True,
        stand_ins=STAND_INS,
        change=name_once,
        notes="maps, positions, denoising queries and boxes are those of recipes.focus_detr, in place of the image; "
        "gradients are of the loss, and of the sum of output i times RandomState(i).standard_normal(its shape). "
        "Attention and MLPs of detrex are replaced by mmcv's at 2.3.6 and by torch's; detrex's own, of "
        "IDEA-Research/detrex at e244e6c, give the same numbers, digit by digit",
    )
}
