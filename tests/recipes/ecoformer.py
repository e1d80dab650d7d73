"""EcoFormer in PVTv2 and Twins: binary codes of queries and keys from hash functions that training learns once.

`*_hash` have anchors and means as training sets them (from the golden image), so that codes differ between tokens; both
are kept in the record as `state:<name>`. With the plain fill most bits of a code are the same for all tokens.
"""

from types import SimpleNamespace

import torch
from golden import fill

from . import Recipe, Source, stages, tokens, uncast

ECOFORMER = Source("https://github.com/ziplab/EcoFormer", "a277f9e8c75655814d25016f61ffba290bad68cf", "Apache-2.0")
HASH = ("ksh.anchor", "ksh.mvec")


def hashes(model):
    """Return the modules that hash, by name."""
    return {name: module for name, module in model.named_modules() if name.endswith(".ksh")}


def classify_after_setting(model, image):
    """Return the logits, and the anchors and means that are set on the way, as the first step of training does."""

    def set_hash(name):
        def hook(module, arguments):
            anchor = torch.from_numpy(fill(f"{name}.anchor", list(module.anchor.shape))).double()
            module.anchor.copy_(anchor / anchor.norm(dim=-1, keepdim=True))
            distances = (arguments[0].detach()[..., None, :] - module.anchor[..., None, :, :]).square().sum(-1)
            kernel = (-distances / (2 * distances.mean((-2, -1), keepdim=True))).exp()
            module.mvec.copy_(kernel.mean((0, 2), keepdim=True))

        return hook

    hooks = [module.register_forward_pre_hook(set_hash(name)) for name, module in hashes(model).items()]
    out = {"logits": uncast(model, image)}
    for hook in hooks:
        hook.remove()
    for name, module in hashes(model).items():
        out |= {f"state:{name}.{key}": getattr(module, key).clone() for key in ("mvec", "anchor")}
    return out


def trained(model):
    """Say that the hash functions are there: else the first run would learn them."""
    model.set_retrain_resume()


def model(host, set_hash=False, attn_type="ecoformer"):
    """Return the recipe of a model, with the arguments of configs/pvt_v2 and of the command in twins/README.md."""
    args = SimpleNamespace(attn_type=attn_type, nbits=16, m=25, k=300, topk=10)
    return Recipe(
        ECOFORMER,
        **host,
        layout=tokens,
        constants=("projection_matrix", *(HASH if set_hash else ())),
        filled=("ksh.A", *(() if set_hash else HASH)),
        run=classify_after_setting if set_hash else lambda model, image: {"logits": uncast(model, image)},
        change=trained,
        stand_ins={"params": {"args": args}, "logger": {}},
        notes="casts to float32 inside the attention are left out",
    )


def pvtv2(size):
    """Return what the recipes of a PVTv2 have of their own."""
    norms = ("norm1", "norm2", "norm3", "norm4")
    return {"file": "pvt_v2.py", "factory": f"pvt_v2_{size}", "root": "pvt", "features": norms}


def twins(factory, *depths):
    """Return what the recipes of a Twins have of their own."""
    return {"file": "gvt.py", "factory": factory, "root": "twins", "features": stages("blocks.{}.{last}", depths)}


HOSTS = {f"pvt_v2_{size}_ecoformer": pvtv2(size) for size in ("b0", "b1", "b2", "b3", "b4")} | {
    "alt_gvt_small_ecoformer": twins("alt_gvt_small_ecoformer", 2, 2, 10, 4),
    "alt_gvt_base_ecoformer": twins("alt_gvt_base_ecoformer", 2, 2, 18, 2),
    "alt_gvt_large_ecoformer": twins("alt_gvt_large_ecoformer", 2, 2, 18, 2),
    "pcpvt_small_v0_ecoformer": twins("pcpvt_small_v0_ecoformer", 3, 4, 6, 3),
}
SOFTMAX = {f"pvt_v2_{size}_msa": pvtv2(size) for size in ("b0", "b1", "b2", "b3", "b4")} | {
    "alt_gvt_small_msa": twins("alt_gvt_small", 2, 2, 10, 4)
}

RECIPES = (
    {name: model(host) for name, host in HOSTS.items()}
    | {f"{name}_hash": model(host, set_hash=True) for name, host in HOSTS.items()}
    | {name: model(host, attn_type="msa") for name, host in SOFTMAX.items()}
)
