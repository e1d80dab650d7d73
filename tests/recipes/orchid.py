"""Orchid's operator, non-causal, for sequences of 12 tokens of 6 channels; the networks around it were not released.

The records were made from a transcript of the files at this commit, without comments and branches that do not run, for
no clone of it was to be had; `tests/make_record.py orchid --check` compares them with one.
"""

import math

import numpy as np
import torch

from . import Recipe, Source, beside

ORCHID = Source("https://github.com/Karami-m/orchid", "061f6df4d875c67e932ac0a964f4f169cba4774b", "MIT")


class Config(dict):
    """Options by attribute, too, as EasyDict has them."""

    __getattr__ = dict.__getitem__


def operator(module, dxt, conditioning, nn, **kwargs):
    """Build the operator.

    Cosines and what damps the kernels, which the code keeps in float32, have float64's digits here. The buffer of the
    last kernel, which cannot hold the pair of a correlation, is taken away.
    """
    if "dct" in dxt:
        transform = beside(module, "utils/dxt.py").DCTX("dctxd", 12, norm="ortho").double()
        place = np.arange(12)
        matrix = np.cos(np.pi / 12 * place[:, None] * (place + 0.5)) / np.where(place[:, None] == 0, 12, 6) ** 0.5
        transform.dct.Pr, transform.idct.Pr = torch.from_numpy(matrix), torch.from_numpy(matrix.T.copy())
        dxt = (dxt, transform)
    config = Config(
        type=conditioning, nn=nn, conv_filter_size=3, norm="layernorm", n_layer=1, activation="gelu", actq="id",
        wd=None, lr=None, bias=True,
    )  # fmt: skip
    model = module.OrchidOperator(6, l_max=12, conv_kernel=config, dxt=dxt, causal=False, **kwargs)
    del model.kernel_adapt
    for kernel in filter(None, (model.fixed_conv, getattr(model, "fixed_conv_res", None))):
        kernel.pos_emb.t = torch.linspace(0, 1, 12, dtype=torch.float64)[None, :, None]
        slow, fast = math.log(1e-2) / 1.5, math.log(1e-2) / 0.3
        kernel.modulation.deltas = torch.linspace(slow, fast, 6, dtype=torch.float64)[None, None]
    return model


def recipe(dxt, conditioning="absfreq", nn="convtf", **kwargs):
    """Return the recipe of an operator."""
    return Recipe(
        ORCHID,
        "orchid_standalone/orchid_standalone.py",
        operator,
        {"dxt": dxt, "conditioning": conditioning, "nn": nn, "emb_dim": 5, "filter_order": 8, **kwargs},
        image=(2, 12, 6),
        constants=("pos_emb.t", "modulation.deltas"),
        run=lambda layer, tokens: {"out": layer(tokens)},
        stand_ins={"easydict": {"EasyDict": Config}, "opt_einsum": {}},
        notes="run from a transcript of the files, not a clone; the operator's last kernel is kept as an attribute; "
        "cosines and what damps the kernels have float64's digits",
    )


RECIPES = {
    "orchid_fft": recipe("fft", num_inner_mlps=1, w=10),
    "orchid_fft_ortho": recipe("fft-o", num_inner_mlps=2, w=1, short_filter_order=5, residual_long_conv=None),
    "orchid_dct": recipe("dctxd-o", num_inner_mlps=1, w=10),
    "orchid_correlation": recipe("fft-o", "corrTime", "convt", num_inner_mlps=1, w=10),
}
