"""Building a model from flags, and how its images are to be prepared."""

import contextlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import timm
from huggingface_hub.errors import LocalEntryNotFoundError
from timm.data import resolve_data_config
from torch import nn

import visionzoo  # noqa: F401  registers the zoo_* models
from visionzoo.engine.errors import NotNamedError, UserError, closest
from visionzoo.engine.flags import InputConfig, ModelConfig
from visionzoo.engine.options import settings
from visionzoo.engine.quantization import quantize_model
from visionzoo.engine.recorded import per_channel
from visionzoo.engine.weights import lacking
from visionzoo.models._licenses import NonCommercialError, check
from visionzoo.models._network import check_reachable, unreachable
from visionzoo.models._registry import check_download
from visionzoo.text import count_of


def build_model(
    config: ModelConfig,
    input: InputConfig,
    *,
    pretrained_path: str | None = None,
    say: Callable[[str], object] = print,
    **more: Any,
) -> nn.Module:
    """Create a model by timm.

    Args:
        config: which one.
        input: what it sees, of which the channels count.
        pretrained_path: file of weights instead of the published ones.
        say: is called for tensors that weights lack beside the classifier's.
        more: further arguments of timm.create_model, None meaning unset.

    Raises:
        UserError: the name or an argument is unknown, or the published weights are missing, or of another model.
    """
    if not config.model:
        raise NotNamedError("which model?", "give --model, or --checkpoint of a run of `visionzoo train`")
    check_name(config.model)
    if config.gp == "":
        raise UserError("--gp '': without pooling a model has logits for each place; name a pooling, or leave it out")
    if input.input_size and config.in_chans not in (None, input.input_size[0]):
        raise UserError(
            f"--in-chans {config.in_chans} together with --input-size of {count_of(input.input_size[0], 'channel')}; "
            "give the same, or one of them"
        )
    is_local_name = ":" not in config.model
    arguments: dict[str, Any] = dict(in_chans=config.in_chans, num_classes=config.num_classes, global_pool=config.gp)
    arguments |= {**more, **config.model_kwargs}
    if input.input_size and config.in_chans is None:
        arguments["in_chans"] = input.input_size[0]
    accepted = config.non_commercial
    path = pretrained_path
    if path and not Path(path).exists():
        raise UserError(f"no checkpoint at {path} (--pretrained-path)")
    pretrained = config.pretrained or bool(path)
    if accepted and config.model.startswith("zoo_"):
        arguments["non_commercial"] = True
    try:
        _check_reachable(config.model, pretrained=pretrained and not path)
        with _loaded() as loaded:
            model: Any = timm.create_model(config.model, pretrained=pretrained, **arguments)
        if pretrained and not path:
            check(config.model, model.pretrained_cfg.get("license"), accepted=accepted)
        for module, result in loaded:
            if module is model and (said := lacking(model, result, path or config.model)):
                say(said)
        quantize_model(model, config)
        return model
    except UserError:
        raise
    except NonCommercialError as error:
        raise UserError(str(error)) from error
    except TypeError as error:  # an argument that the model does not have
        if config.model_kwargs:
            raise UserError(f"{config.model} does not take --model-kwargs {config.model_kwargs}: {error}") from error
        if "unexpected keyword argument" not in str(error) and is_local_name:
            raise
        if not is_local_name:
            raise _damaged(config.model, error) from error
        raise UserError(f"{config.model} does not take one of the flags: {error}") from error
    except LocalEntryNotFoundError as error:  # before ValueError and OSError, which it is in some releases
        raise _unreachable(config.model, error) from error
    except (ValueError, AssertionError) as error:
        raise UserError(f"cannot build {config.model}: {error}") from error
    except (RuntimeError, OSError) as error:
        if is_local_name and "Invalid pretrained tag" in str(error):
            known = ", ".join(timm.list_pretrained(f"{config.model.split('.')[0]}.*")) or "none"
            raise UserError(f"{error} Published weights: {known}") from error
        if is_local_name and not pretrained:
            raise
        raise UserError(f"no weights for {config.model}{f' from {path}' if path else ''}: {error}") from error
    except Exception as error:  # what lies in a folder or on a hub is anybody's
        if is_local_name:
            raise
        raise _damaged(config.model, error) from error


def data_config(config: ModelConfig, input: InputConfig, model: nn.Module) -> dict[str, Any]:
    """Return input size, mean, std, crop and interpolation: the flags' where given, else the model's, of each channel.

    Raises:
        UserError: means or deviations are not as many as the channels.
    """
    check_channels(input, config.in_chans or (input.input_size or [3])[0])
    return per_channel(resolve_data_config({**settings(input), "in_chans": config.in_chans}, model=model))


def check_channels(input: InputConfig, channels: int) -> None:
    """Stop where means or deviations are given that are not as many as the channels.

    Raises:
        UserError: so it is.
    """
    for name in ("mean", "std"):
        if (values := getattr(input, name)) and len(values) not in (1, channels):
            raise UserError(
                f"--{name}: expected 1 or {count_of(channels, 'number')}, one per channel, got {len(values)}"
            )


def check_name(name: str) -> None:
    """Stop where timm has no model of this name; `hf-hub:...` and `local-dir:...` are looked up elsewhere.

    Raises:
        UserError: it has none.
    """
    if ":" not in name and not timm.is_model(name):
        near = closest(name.split(".")[0], timm.list_models())
        raise UserError(
            f"unknown model {name!r}{near or '; `visionzoo models` lists those of the zoo, timm.list_models() all'}"
        )


def _check_reachable(name: str, *, pretrained: bool) -> None:
    """Look once for what timm is to fetch; the models of the zoo do so themselves."""
    scheme, _, place = name.replace("hf_hub:", "hf-hub:", 1).partition(":")
    if scheme == "hf-hub":  # what it is stands there too, so it is fetched without --pretrained
        check_reachable(name, place, ("config.json",))
    elif pretrained and not place and not name.startswith("zoo_") and (cfg := timm.get_pretrained_cfg(name)):
        check_download(name, cfg)


def _unreachable(name: str, error: Exception) -> NotNamedError:
    """Say where weights were looked for, and what to do without a network."""
    cfg = None if ":" in name else timm.get_pretrained_cfg(name)
    repository = name.partition(":")[2] if cfg is None else str(cfg.hf_hub_id)
    return NotNamedError(
        f"{unreachable(name, repository, error.__cause__ or error.__context__ or error)}. Try again with a network and "
        "without HF_HUB_OFFLINE, or",
        "give a file of them: `visionzoo train` takes --initial-checkpoint FILE, or --pretrained-path FILE for another "
        "number of classes, the other commands --checkpoint FILE",
    )


def _damaged(name: str, error: Exception) -> UserError:
    text = str(error).strip().split("\n")[0]
    return UserError(f"cannot load {name}, it is damaged or no model of timm's: {type(error).__name__}: {text}")


@contextlib.contextmanager
def _loaded() -> Iterator[list[tuple[nn.Module, Any]]]:
    """Keep what loading says within `with`: timm, which loads strictly only as many classes, does not pass it on."""
    load: Any = nn.Module.load_state_dict
    results: list[tuple[nn.Module, Any]] = []

    def kept(module: nn.Module, *args: Any, **kwargs: Any) -> Any:
        result = load(module, *args, **kwargs)
        results.append((module, result))
        return result

    nn.Module.load_state_dict = kept  # type: ignore
    try:
        yield results
    finally:
        nn.Module.load_state_dict = load  # type: ignore[method-assign]
