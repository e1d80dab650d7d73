"""Authors' code in JAX and TensorFlow as modules of torch, with outputs and gradients of their own."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import nn


class _Bridge(torch.autograd.Function):
    """What another framework computes, and how it goes back."""

    @staticmethod
    def forward(ctx, call, *values):
        out, ctx.pull = call(*(value.detach().numpy() for value in values))
        return torch.from_numpy(np.array(out))

    @staticmethod
    def backward(ctx, grad):
        return None, *(torch.from_numpy(np.array(value)) for value in ctx.pull(grad.numpy()))


class Bridge(nn.Module):
    """A layer of another framework.

    Args:
        call: from arrays, the input and the parameters, to the output and to a function that takes the output's
            gradient to theirs.
        shapes: of the parameters, by their names.
    """

    def __init__(self, call: Callable[..., tuple[Any, Callable]], shapes: Mapping[str, Sequence[int]]):
        super().__init__()
        self.call = call
        for name, shape in shapes.items():
            self.register_parameter(name, nn.Parameter(torch.zeros(*shape)))

    def forward(self, x):
        """Run it."""
        return _Bridge.apply(self.call, x, *self.parameters())


def flax_layer(layer: Any, shapes: Mapping[str, Sequence[int]], **kwargs: Any) -> Bridge:
    """Return a layer of flax, called with the input and `kwargs`; its parameters have these shapes."""
    import jax

    jax.config.update("jax_enable_x64", True)

    def run(x, *values):
        return layer.apply({"params": dict(zip(shapes, values, strict=True))}, x, **kwargs)

    return Bridge(lambda *values: jax.vjp(run, *values), shapes)


def keras_layer(run: Callable[[Any], Any], variables: Callable[[], Mapping[str, Any]], like: Sequence[int]) -> Bridge:
    """Return what `run` makes of an input, of this shape, with the variables that it then has, by their names."""
    import tensorflow as tf

    run(tf.zeros(like, tf.float64))  # which makes the variables
    named = variables()

    def call(x, *values):
        for variable, value in zip(named.values(), values, strict=True):
            variable.assign(value)
        x = tf.constant(x)
        with tf.GradientTape() as tape:
            tape.watch(x)
            out = run(x)
        wanted = [x, *(getattr(variable, "value", variable) for variable in named.values())]
        return out, lambda grad: tape.gradient(out, wanted, output_gradients=tf.constant(grad))

    return Bridge(call, {name: variable.shape for name, variable in named.items()})


def graph_layer(build: Callable[[Any], Any], like: Sequence[int]) -> Bridge:
    """Return what `build` makes of a placeholder of this shape in a graph of TensorFlow 1."""
    import tensorflow.compat.v1 as tf

    with tf.Graph().as_default() as graph:
        x = tf.placeholder(tf.float64, like)
        out = build(x)
        variables, above = tf.trainable_variables(), tf.placeholder(tf.float64, out.shape)
        gradients = tf.gradients(out, [x, *variables], grad_ys=above)
        session = tf.Session(graph=graph)

    def call(given, *values):
        with graph.as_default():
            for variable, value in zip(variables, values, strict=True):
                variable.load(value, session)
        return session.run(out, {x: given}), lambda grad: session.run(gradients, {x: given, above: grad})

    return Bridge(call, {variable.op.name.replace("/", "_"): variable.shape for variable in variables})
