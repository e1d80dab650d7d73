"""What the flags change in a model's attention while it is trained."""

from collections.abc import Callable

from torch import nn

from visionzoo.engine.errors import UserError
from visionzoo.engine.flags import FitConfig
from visionzoo.layers.mixers import MIXERS
from visionzoo.layers.relaxation import relax_attention


def regularize_attention(fit: FitConfig, model: nn.Module, name: str, say: Callable[[str], object]) -> None:
    """Relax a model's attention in training as --relaxed-attention says.

    Args:
        fit: the flags.
        model: its mixers are changed.
        name: of the model, for messages.
        say: prints how many mixers it is.

    Raises:
        UserError: the model has no mixer that can be, or a flag lacks the one it belongs to.
    """
    gamma, spread = fit.relaxed_attention, fit.relaxed_attention_std
    if spread and not gamma:
        raise UserError(f"--relaxed-attention-std {spread:g} is drawn around --relaxed-attention: give that too")
    if not gamma:
        return
    changed, count = relax_attention(model, gamma, spread)
    if not changed:
        able = ", ".join(mixer for mixer, kind in MIXERS.items() if kind.RELAXES)
        raise UserError(
            f"--relaxed-attention: {name} has {count} mixers of this package, and none whose attention can be relaxed; "
            f"those that can: {able}. Give one by --model-kwargs mixers=..., or leave the flag out"
        )
    drawn = f", drawn with a standard deviation of {spread:g}" if spread else ""
    say(f"attention relaxed by {gamma:g}{drawn} in training, in {changed} of {count} mixers")
