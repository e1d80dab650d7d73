"""Reducers: tokens are dropped or merged between the blocks of an isotropic model.

Every reducer is called as `XReducer(dim, **options)` and stands before a block, as `visionzoo.models._reducing` says:
`timm.create_model("zoo_convit_t", mixers="full", reduce={"type": "representation_shift", "keep_rate": 0.5})`.
"""

from __future__ import annotations

from visionzoo.layers.reducers.base import Reducer
from visionzoo.layers.reducers.interpreter import InterpreterReducer
from visionzoo.layers.reducers.pooling import TokenPoolingReducer
from visionzoo.layers.reducers.scored import ClassAttentionReducer, RepresentationShiftReducer
from visionzoo.layers.reducers.selector import SelectorReducer
from visionzoo.layers.specs import Spec, build_spec

__all__ = [
    "REDUCERS",
    "ClassAttentionReducer",
    "InterpreterReducer",
    "Reducer",
    "RepresentationShiftReducer",
    "SelectorReducer",
    "TokenPoolingReducer",
    "build_reducer",
]

REDUCERS: dict[str, type[Reducer]] = {
    "class_attention": ClassAttentionReducer,
    "interpreter": InterpreterReducer,
    "representation_shift": RepresentationShiftReducer,
    "selector": SelectorReducer,
    "token_pooling": TokenPoolingReducer,
}


def build_reducer(spec: Spec, dim: int) -> Reducer:
    """Build the reducer that `spec` names: a name of `REDUCERS` or `dict(type=name, **options)`.

    Raises:
        ValueError: if the name is unknown, an option is not one of the reducer's or not of its type or range.
    """
    reducer: Reducer = build_spec("reducer", spec, REDUCERS, dim)
    return reducer
