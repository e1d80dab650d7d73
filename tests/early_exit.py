"""A tiny family with what no shipped one needs: a mixer with a balance term, and classifiers inside the model.

It is registered under a name that does not begin with `zoo_`, so that the tests of all models leave it alone.
"""

from functools import partial

import torch
from timm.layers import ClassifierHead
from timm.models import build_model_with_cfg, generate_default_cfgs, register_model
from torch import nn

from visionzoo.layers.block import Block
from visionzoo.layers.conv_norm import ConvNorm
from visionzoo.layers.mixers.base import Mixer
from visionzoo.layers.outputs import add_term
from visionzoo.layers.stem import ConvNormStem
from visionzoo.models._pyramid import Pyramid, Stage

NAME = "early_exit_test"
WEIGHTS = {"early": 0.5, "taught": 0.25, "balance": 0.1}


class BalancedMixer(Mixer):
    """Experts that a softmax chooses among; `balance` is 1 where all are chosen alike, and their number at most."""

    AUXILIARY = {"balance": 0.1}

    def __init__(self, dim, experts=4):
        super().__init__(dim, 1)
        self.choose = nn.Linear(dim, experts)
        self.experts = nn.Linear(dim, experts * dim)

    def forward(self, x):
        self.check_input(x)
        choice = self.choose(x).softmax(-1)
        if self.training:
            shares = choice.flatten(0, -2).mean(0)
            add_term("balance", len(shares) * shares.square().sum())
        return (self.experts(x).unflatten(-1, (-1, self.dim)) * choice[..., None]).sum(-2)


class EarlyExit(Pyramid):
    """Two stages; `early` learns the labels after the first one, `taught` what the end of the model says."""

    AUXILIARY = {"early": 0.5, "taught": 0.25}
    EXITS = {"early": 0, "taught": 0}
    CHECKPOINT_KEYS = {}

    def __init__(self, *, embed_dims=(8, 16), in_chans=3, drop_path_rate=0.0, **head):
        super().__init__(
            stem=ConvNormStem(in_chans, embed_dims[0], 7, 4, 2),
            stages=[
                Stage(
                    ConvNorm(embed_dims[0], dim, kernel_size=3, stride=2, padding=1) if i else nn.Identity(),
                    [Block(dim, BalancedMixer(dim), drop_path=drop_path_rate) for _ in range(2)],
                )
                for i, dim in enumerate(embed_dims)
            ],
            embed_dims=embed_dims,
            in_chans=in_chans,
            **head,
        )
        make = partial(ClassifierHead, embed_dims[0], self.num_classes)
        self.early, self.taught = make(), make()

    def exits(self, states, logits):
        """Return both."""
        early, taught = super().exits(states, logits)
        return early, taught._replace(target=logits.detach().softmax(-1))

    def classify(self, exit, state):
        """Return the logits of either."""
        return getattr(self, exit)(state)


default_cfgs = generate_default_cfgs(
    {
        NAME: {
            "input_size": (3, 32, 32),
            "mean": (0.5, 0.5, 0.5),
            "std": (0.5, 0.5, 0.5),
            "num_classes": 1000,
            "classifier": "head.fc",
            "first_conv": "stem.conv",
        }
    }
)


@register_model
def early_exit_test(pretrained=False, **kwargs):
    """The family's only variant."""
    return build_model_with_cfg(
        EarlyExit, NAME, pretrained, feature_cfg={"feature_cls": "getter", "out_indices": (0, 1)}, **kwargs
    )


def balance_of(model, images):
    """The term, from the definition, by the maps that the mixers see."""
    seen = []
    handles = [
        module.register_forward_pre_hook(lambda module, args: seen.append((module, args[0])))
        for module in model.modules()
        if isinstance(module, BalancedMixer)
    ]
    with torch.no_grad():
        model.forward_features(images)
    for handle in handles:
        handle.remove()
    total = 0.0
    for mixer, x in seen:
        shares = torch.softmax(x.reshape(-1, x.shape[-1]) @ mixer.choose.weight.T + mixer.choose.bias, 1).mean(0)
        total += float(sum(share * share for share in shares) * len(shares))
    return total
