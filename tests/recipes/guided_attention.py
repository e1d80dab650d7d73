"""Multi-scale self-guided attention: everything behind the backbone, on drawn maps, with its loss and gradients.

The image is not read: in place of the backbone stand maps drawn from the seeds 1 to 4, for strides 4 to 32 of it. The
record holds, beside the output of eval mode, what a training step computes by src/main.py: the cross-entropies of the
eight predictions, the terms with their weights, and gradients of the sum, for maps and parameters. Running statistics
are kept from changing, so that runs are alike.
"""

import re

import torch
from torch import nn
from torch.nn import functional as F

from . import Recipe, Source, drawn

SOURCE = Source(
    "https://github.com/sinAshish/Multi-Scale-Attention", "96d76f2794ee1b16e847f38a16d397d137c774f6", "none given"
)
CHANNELS = (256, 512, 1024, 2048)


def maps(image):
    """Draw the backbone's maps, finest first."""
    batch, _, height, width = image.shape
    sides = [4 * 2**i for i in range(4)]
    return [
        drawn(i + 1, (batch, dim, -(-height // side), -(-width // side)))
        for i, (dim, side) in enumerate(zip(CHANNELS, sides, strict=True))
    ]


def without_unused(model):
    """Take out what the network never calls."""
    for name in [name for name, _ in model.named_children() if re.match(r"conv[67]_|attention\d|refine\d", name)]:
        delattr(model, name)


def labels(image):
    """Return a class for each pixel."""
    return (drawn(5, (image.shape[0], *image.shape[2:])).abs() * 2).long().clamp(max=4)


class Drawn(nn.Module):
    """In place of the backbone: its layers 1 to 4 give the drawn maps."""

    def __init__(self):
        super().__init__()
        self.maps = []

    def layer0(self, image):
        self.maps = [x.requires_grad_() for x in maps(image)]

    def __getattr__(self, name):
        if name in ("layer1", "layer2", "layer3", "layer4"):
            return lambda x: self.maps[int(name[-1]) - 1]
        return super().__getattr__(name)


def train(model, image):
    """Return what evaluation gives, and the loss of a training step, its parts and gradients."""
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.momentum = 0.0
    out = {"logits_full": model.eval()(image)}
    values = model.train()(image)
    codes, inputs, again, predictions = values[:8], values[8:16], values[16:24], values[24:]
    exits = [F.cross_entropy(x, labels(image)) for x in predictions]
    guidance = sum(F.mse_loss(a, b) for a, b in zip(codes[::2], codes[1::2], strict=True))
    reconstruction = sum(F.mse_loss(a, b) for a, b in zip(inputs, again, strict=True))
    loss = sum(exits) + 0.25 * guidance + 0.1 * reconstruction
    parameters = {name: p for name, p in model.named_parameters() if p.requires_grad}
    found = torch.autograd.grad(loss, [*model.resnext.maps, *parameters.values()], allow_unused=True)
    model.eval()
    out |= {"exits": torch.stack(exits), "terms": torch.stack([guidance, reconstruction])}
    out |= {f"grad_map{i}": grad.flatten()[:512] for i, grad in enumerate(found[:4])}
    grads = zip(parameters, found[4:], strict=True)
    return out | {f"grad/{name}": grad.flatten()[:16] for name, grad in grads if grad is not None}


RECIPES = {
    "guided_attention": Recipe(
        SOURCE,
        "src/models/my_stacked_danet.py",
        "DAF_stack",
        image=(2, 1, 24, 40),  # maps of 6x10: the autoencoders' inner ones are odd
        run=train,
        gradients=True,
        change=without_unused,
        stand_ins={"src.models.resnext101_regular": {"ResNeXt101": Drawn}},
        notes="what is never called (conv6_*, conv7_*, attention*, refine*) is left out; the backbone is replaced by "
        "maps drawn from the seeds 1 to 4; gradients are of the authors' whole loss",
    )
}
