"""What the flags change in a model's attention while it is trained."""

from collections.abc import Callable

from torch import nn

from visionzoo.engine.errors import UserError
from visionzoo.engine.flags import FitConfig
from visionzoo.layers.mixers import MIXERS
from visionzoo.layers.reducers.base import Reducer
from visionzoo.layers.relaxation import relax_attention
from visionzoo.layers.subsampling import subsample_attention
from visionzoo.text import count_of


def regularize_attention(fit: FitConfig, model: nn.Module, name: str, say: Callable[[str], object]) -> None:
    """Change a model's attention in training as --relaxed-attention and --subsample-attention say.

    Args:
        fit: the flags.
        model: its mixers are changed.
        name: of the model, for messages.
        say: prints how many mixers it is.

    Raises:
        UserError: the model has no mixer that can be, or has reducers, which hide tokens from subsampled attention; or
            a flag lacks the one it belongs to.
    """
    gamma, spread, share = fit.relaxed_attention, fit.relaxed_attention_std, fit.subsample_attention
    if spread and not gamma:
        raise UserError(f"--relaxed-attention-std {spread:g} is drawn around --relaxed-attention: give that too")
    if gamma:
        changed, count = relax_attention(model, gamma, spread)
        _check(changed, count, name, "--relaxed-attention", "RELAXES")
        drawn = f", drawn with a standard deviation of {spread:g}" if spread else ""
        say(f"attention relaxed by {gamma:g}{drawn} in training, in {changed} of {count_of(count, 'mixer')}")
    if share < 1:
        if any(isinstance(module, Reducer) for module in model.modules()):
            raise UserError(
                f"--subsample-attention: {name} has reducers, which hide tokens, and a subset may have none that is "
                "seen; leave one of them out"
            )
        changed, count = subsample_attention(model, share)
        _check(changed, count, name, "--subsample-attention", "SUBSAMPLES")
        say(f"attention to {share:g} of the keys in training, drawn anew, in {changed} of {count_of(count, 'mixer')}")


def _check(changed: int, count: int, name: str, flag: str, able: str) -> None:
    if not changed:
        names = ", ".join(mixer for mixer, kind in MIXERS.items() if getattr(kind, able))
        raise UserError(
            f"{flag}: {name} has {count_of(count, 'mixer')} of this package, and none that it can change; it can "
            f"change {names}. Take a zoo_* model with one of them, or put one in by --model-kwargs mixers=NAME"
        )
