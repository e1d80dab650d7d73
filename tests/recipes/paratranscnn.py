"""ParaTransCNN, with gradients of a sum with drawn factors.

The record is of a small form: a ResNet-18 stands for the authors' ResNet-34, untrained, and the transformer is narrow.
"""

from types import SimpleNamespace

import torch
import torchvision

from . import Recipe, Source, drawn

SOURCE = Source("https://github.com/HongkunSun/ParaTransCNN", "2702b8b4b360e79ae0fdcf8ccbb5e3e5f5fdbe6e", "none given")


def resnets(network):
    """Return what the file imports of torchvision: this network, untrained."""
    weights = SimpleNamespace(DEFAULT=None)
    return {"torchvision": {"models": SimpleNamespace(resnet34=network, ResNet34_Weights=weights)}}


def gradients(model, image):
    """Return the logits, and gradients for image and parameters."""
    image = image.clone().requires_grad_()
    logits = model(image)
    parameters = dict(model.named_parameters())
    loss = (logits * drawn(1, logits.shape)).sum()
    first, *rest = torch.autograd.grad(loss, [image, *parameters.values()])
    grads = zip(parameters, rest, strict=True)
    out = {"logits": logits, "grad_image": first.flatten()[:512]}
    return out | {f"grad/{name}": grad.flatten()[:16] for name, grad in grads}


RECIPES = {
    "paratranscnn_small": Recipe(
        SOURCE,
        "model/ParaTransCNN.py",
        "ParaTransCNN",
        {"num_classes": 5, "heads": 4, "dim": 16, "depth": [1, 2, 1]},
        image=(1, 3, 32, 48),
        run=gradients,
        gradients=True,
        stand_ins=resnets(torchvision.models.resnet18),
        notes="resnet18 in place of resnet34, both untrained",
    ),
    "paratranscnn": Recipe(
        SOURCE,
        "model/ParaTransCNN.py",
        "ParaTransCNN",
        image=(1, 3, 32, 48),
        stand_ins=resnets(torchvision.models.resnet34),
        notes="untrained",
    ),
}
