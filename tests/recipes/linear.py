"""Linear attention by features of queries and keys, of 9 tokens of 12 channels in three heads."""

from torch import nn

from . import Projected, Recipe, Source
from .gates import gradients

COSFORMER = Source("https://github.com/OpenNLPLab/cosFormer", "8e12da111e2a683ea875711e0bf5810c6b4e8f9f", "Apache-2.0")
LOG_NORMAL = Source(
    "https://github.com/ynahshan/linear-lognormal-attention", "92505b9a19a0385764f1dabc4c27c0a8161d01c0", "MIT"
)
PERFORMER = Source("https://github.com/lucidrains/performer-pytorch", "fc8b78441b1e27eb5d9b01fc738a8772cee07127", "MIT")


class TokensFirst(nn.Module):
    """A layer of [N, B, C], on [B, N, C]."""

    def __init__(self, layer):
        super().__init__()
        self.layer = layer

    def forward(self, x):
        """Attend."""
        return self.layer(x.transpose(0, 1)).transpose(0, 1)


def cosformer(module):
    """Build the attention."""
    return TokensFirst(module.CosformerAttention(12, 3))


def performer(module, **kwargs):
    """Build the attention."""
    return Projected(module.FastAttention(4, **kwargs))


def log_normal(module):
    """Build the attention."""
    return Projected(module.LLNAttention())


def features(**kwargs):
    """Return the recipe of an attention of Performer's."""
    return Recipe(
        PERFORMER,
        "performer_pytorch/performer_pytorch.py",
        performer,
        kwargs,
        image=(2, 9, 12),
        filled=("projection_matrix",),
        run=gradients,
        gradients=True,
        stand_ins={"local_attention": {}, "axial_positional_embedding": {}, "performer_pytorch.reversible": {}},
        notes="the projections around the attention are the recipe's",
    )


RECIPES = {
    "cosformer": Recipe(COSFORMER, "cosformer.py", cosformer, image=(2, 9, 12), run=gradients, gradients=True),
    "favor": features(nb_features=6),
    "favor_relu": features(nb_features=6, generalized_attention=True),
    "log_normal": Recipe(
        LOG_NORMAL, "lln/lln_attention.py", log_normal, image=(1, 9, 12),
        run=gradients, gradients=True, stand_ins={"fast_transformers.causal_product": {}},
        notes="the projections around the attention are the recipe's; one sample, as deviations are over the batch",
    ),
    "efficient": features(nb_features=6, no_projection=True),
}  # fmt: skip
