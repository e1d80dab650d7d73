"""A checkpoint's weights in a model: what fitted, and what is refused."""

import re
from collections.abc import Mapping
from typing import Any

from torch import nn

from visionzoo.engine.errors import UserError
from visionzoo.engine.quantization import check_quantizers
from visionzoo.engine.recorded import command_of, recorded_args
from visionzoo.models._checkpoint import WeightsError, load_weights, unwrap_state_dict
from visionzoo.quantization import holds_quantizers, is_quantized
from visionzoo.text import count_of, some


def load(
    model: nn.Module,
    source: Mapping[str, Any],
    where: str,
    *,
    use_ema: bool = True,
    new_parts: bool = False,
    advice: str = "",
) -> None:
    """Load a checkpoint's weights; models that are timm's own are loaded by name.

    With `new_parts` a model with gates, reducers, memory or another head also takes the checkpoint of one without, as
    `load_weights` says. `advice` is what a user of the command may do where the weights do not fit.

    Raises:
        UserError: the weights do not fit; it names `where` they come from and what does not fit.
    """
    if command_of(recorded_args(source)) == "multi-task":
        raise _of_tasks(where)
    try:
        if is_quantized(model) or holds_quantizers(source):
            tensors = unwrap_state_dict(source, use_ema=use_ema)
            check_quantizers(model, tensors, where, recorded_args(source).get("quantize"), new_parts=new_parts)
        if hasattr(model, "CHECKPOINT_KEYS"):
            new = dict.fromkeys(("new_gates", "new_reducers", "new_memory", "new_head"), new_parts)
            report = load_weights(model, source, use_ema=use_ema, **new)
            if report.missing:
                print(f"{where}: {report}")
        else:
            model.load_state_dict(unwrap_state_dict(source, use_ema=use_ema))
    except (ValueError, RuntimeError) as error:
        text = shortened((error.fact if isinstance(error, WeightsError) else str(error)) + advice)
        raise UserError(f"cannot load {where} into {type(model).__name__}: {text}") from error


def lacking(model: Any, result: Any, where: str) -> str | None:
    """Return words on the tensors beside the classifier's that weights lacked.

    Raises:
        UserError: they lacked more than a tenth, so they are of another model, or of a part of it; or they have
            quantizers, which the model gets later, or decoders.
    """
    classifier = model.pretrained_cfg.get("classifier") or ()
    classifiers = tuple(f"{name}." for name in ([classifier] if isinstance(classifier, str) else classifier))
    if any(name.endswith("quantize_input.scale") for name in result.unexpected_keys):
        raise UserError(
            f"{where} is of a quantized model, whose quantizers would be left out; start from it by "
            "--initial-checkpoint, with --quantize as it was"
        )
    if "label_classes" in result.unexpected_keys:  # of MultiTaskNetwork
        raise _of_tasks(where)
    names = [name for name in model.state_dict() if not name.endswith(".num_batches_tracked")]
    names = [name for name in names if not (classifiers and name.startswith(classifiers))]
    missing = sorted(set(names) & set(result.missing_keys))
    if len(missing) > 0.1 * len(names):
        raise UserError(
            f"{where} fits only {len(names) - len(missing)} of the {count_of(len(names), 'tensor')} of the model "
            "beside its "
            f"classifier; {some(missing, 3)} are not in it. It is of another model or a part of one: from it, training "
            "would begin at random weights"
        )
    if not missing:
        return None
    lacking = count_of(len(missing), "tensor is not", "tensors are not")
    return f"{lacking} in {where}, so random at first: {some(missing)}"


def _of_tasks(where: str) -> UserError:
    """Say what takes a checkpoint of several tasks, and what to take instead."""
    return UserError(
        f"{where} is of a run of `visionzoo multi-task`, of a network with decoders: `visionzoo multi-task "
        f"--checkpoint {where}` evaluates it, `visionzoo export` writes it as files; here take a checkpoint of "
        "`visionzoo train`, or other weights of a classifier"
    )


def shortened(text: str) -> str:
    """Return torch's message, which names every tensor that is missing, with the first few, and not all sizes."""
    text = re.sub(r'"[^"\n]+"(?:, "[^"\n]+")+', lambda names: some(names[0].split(", "), 3), text)
    return text if len(text) < 1500 else f"{text[:800]} ... {text[-500:]}"
