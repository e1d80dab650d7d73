"""One image explained: predictions and every view of them that a model has, as arrays and as pictures."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NoReturn

import numpy as np
import PIL.Image
import torch
from numpy.typing import NDArray
from timm.data import create_transform, resolve_data_config
from torch import Tensor, nn

from visionzoo.explanation.attention import attention_flow, attention_rollout, attention_weights
from visionzoo.explanation.attribution import Faithfulness, deeplift, faithfulness, gradient_input, resize_map
from visionzoo.explanation.features import FrequencyChannel, attention_iou, feature_colors, frequency_channel
from visionzoo.explanation.reach import Reach, attended, last_mixers
from visionzoo.models._contract import Contract
from visionzoo.models._reducing import kept_places
from visionzoo.text import count_of, did_you_mean

Array = NDArray[np.float64]
METHODS: dict[str, str] = {  # name -> what it shows
    "attended": "what a place attends to, stage by stage",
    "features": "features of each stage, their three principal components as colors",
    "rollout": "attention rollout: what the answer, or a place, is made of",
    "flow": "attention flow: the maximum flow from the class token, or a place",
    "gradient_input": "gradients x input: which pixels speak for the class",
    "deeplift": "DeepLIFT: which pixels speak for the class, against the mean color",
    "frequency": "how the class's probability falls under noise of each octave",
    "tokens": "which tokens are left after each reducer",
    "exits": "what each early exit answers",
}
COSTLY = ("flow", "deeplift", "frequency")  # which need minutes, or a library, so that they are made where asked for
OF_PLACE = ("attended", "rollout", "flow")  # which look from a place
OF_CLASS = ("gradient_input", "deeplift", "frequency")  # which explain a class, as curves of any map do
MAPS = ("rollout", "flow", "gradient_input", "deeplift")  # one map each, which masks and curves can be compared with


@dataclass(frozen=True)
class Answer:
    """A class and its probability."""

    index: int
    name: str
    probability: float


@dataclass
class Explanation:
    """What a model makes of an image.

    Attributes:
        image: [H, W, 3] from 0 to 1, as the model sees it: resized and cropped.
        classes: the likeliest, best first.
        target: number of the class that is explained.
        place: shares of height and width, of the place that is looked from.
        attended: of the place, by mixers.
        features: name of a stage or block, and [h, w, 3] from 0 to 1.
        maps: by method of `MAPS`, [h, w] of the whole image.
        frequency: which octaves the class's probability stands on.
        tokens: name of a block, and [h, w], True where a token is left before it.
        exits: name of an exit, and its answer.
        curves: by method, deletion and insertion.
        overlaps: by method, the Attention-IoU of its map (negative values as zeros) with the mask that was given; 0
            where nothing is above zero.
        notes: what a reader of the maps should know, by method.
        left_out: methods that were not made, and why: the model lacks what they need, or a library is not installed.
    """

    image: Array
    classes: list[Answer]
    target: int
    place: tuple[float, float]
    attended: list[Reach] = field(default_factory=list)
    features: list[tuple[str, Array]] = field(default_factory=list)
    maps: dict[str, Array] = field(default_factory=dict)
    frequency: FrequencyChannel | None = None
    tokens: dict[str, Array] = field(default_factory=dict)
    exits: dict[str, Answer] = field(default_factory=dict)
    curves: dict[str, Faithfulness] = field(default_factory=dict)
    overlaps: dict[str, float] = field(default_factory=dict)
    notes: dict[str, str] = field(default_factory=dict)
    left_out: dict[str, str] = field(default_factory=dict)

    def pictures(self) -> dict[str, bytes]:
        """Return a PNG of each method that was made, by its name; needs matplotlib."""
        from visionzoo.explanation.pictures import draw

        return draw(self)

    def save(self, folder: str | Path) -> list[Path]:
        """Write the pictures into a folder, as NAME.png; return their paths. Files of these names are replaced."""
        place = Path(folder)
        place.mkdir(parents=True, exist_ok=True)
        paths = []
        for name, content in self.pictures().items():
            paths.append(place / f"{name}.png")
            paths[-1].write_bytes(content)
        return paths

    def summary(self) -> dict[str, Any]:
        """Return what is no picture, as JSON takes it."""

        def plain(answer: Answer) -> dict[str, Any]:
            return {"index": answer.index, "name": answer.name, "probability": round(answer.probability, 6)}

        return {
            "classes": [plain(each) for each in self.classes],
            "target": self.target,
            "place": list(self.place),
            "exits": {name: plain(answer) for name, answer in self.exits.items()},
            "faithfulness": {
                name: dict(zip(("deletion", "insertion"), curve.areas, strict=True))
                for name, curve in self.curves.items()
            },
            "attention_iou": self.overlaps,
            "notes": self.notes,
            "left_out": self.left_out,
        }


def explain_image(
    model: nn.Module,
    image: PIL.Image.Image | Tensor | str | Path,
    *,
    methods: Sequence[str] | None = None,
    target: int | None = None,
    place: tuple[float, float] | None = None,
    topk: int = 5,
    class_names: Sequence[str] | None = None,
    data_config: Mapping[str, Any] | None = None,
    mask: Array | None = None,
    with_faithfulness: bool = False,
) -> Explanation:
    """Explain what a model makes of an image.

    >>> import timm, torch, visionzoo
    >>> model = timm.create_model("zoo_deit_t", depth=2, num_classes=3, img_size=32)
    >>> found = visionzoo.explain_image(model, torch.zeros(3, 32, 32), methods=["attended", "rollout"])
    >>> found.maps["rollout"].shape, [reach.kind for reach in found.attended]
    ((2, 2), ['FullMixer', 'FullMixer'])

    Args:
        model: of images to logits; it runs in evaluation mode and is left in the mode in which it came. What a method
            needs beside that is stated where it is refused.
        image: a picture or its path, which is resized, cropped and normalized as `data_config` says; or a tensor
            [C, H, W] or [1, C, H, W], which is taken as it is.
        methods: of `METHODS`; None for all but the `COSTLY`. Those that the model lacks something for are left out;
            `Explanation.left_out` has them, with the reasons.
        target: number of the class that is explained; None for the likeliest.
        place: shares of height and width, from 0 to 1; None for the middle; in rollout and flow for the class token.
        topk: number of the likeliest classes.
        class_names: in the order of the logits; None for numbers.
        data_config: as timm's `resolve_data_config` returns it; None for the model's own.
        mask: [h, w] of 0 and more, not all of them 0, of the image as the model sees it: where a feature is. Each map's
            Attention-IoU with it is then in `Explanation.overlaps`.
        with_faithfulness: delete and insert the pixels of each map (2 (H + 1) passes through the model for each).

    Raises:
        ValueError: if a method is unknown, or none of those that are asked for can be made; or the class, place, mask
            or image is none.
        ModuleNotFoundError: if a library is not installed that all of these methods need: captum for DeepLIFT and
            gradients x input, scipy for flow.
    """
    asked = list(METHODS) if methods is None else list(dict.fromkeys(methods))
    for name in asked:
        if name not in METHODS:
            raise ValueError(
                f"unknown method {name!r}{did_you_mean(name, METHODS)}, expected some of {', '.join(METHODS)}"
            )
    if place is not None and not (len(place) == 2 and all(0 <= share <= 1 for share in place)):
        raise ValueError(f"place is two shares from 0 to 1, of height and width, got {place=}")
    if topk < 1:
        raise ValueError(f"topk must be positive, got {topk=}")
    whole = None if mask is None else _checked_mask(mask)
    config = dict(resolve_data_config({}, model=model)) | dict(data_config or {})
    modes = [(module, module.training) for module in model.modules()]
    grads = [each for each in model.parameters() if each.requires_grad]
    model.eval().requires_grad_(False)
    try:
        batch = _batch(model, image, config)
        return _explain(
            model, batch, asked, methods is None, target, place, topk, class_names, config, whole, with_faithfulness
        )
    finally:
        for module, training in modes:  # some may be fixed in a model that trains
            module.training = training
        for each in grads:
            each.requires_grad_()


def _explain(
    model: Any,
    batch: Tensor,
    asked: Sequence[str],
    all_there_are: bool,
    target: int | None,
    place: tuple[float, float] | None,
    topk: int,
    class_names: Sequence[str] | None,
    config: Mapping[str, Any],
    mask: Array | None,
    with_faithfulness: bool,
) -> Explanation:
    with torch.no_grad():
        out = model(batch)
    logits = out if isinstance(out, Tensor) else out[0]
    if logits.ndim != 2 or not logits.shape[1] or getattr(model, "num_classes", None) == 0:
        raise ValueError(f"{type(model).__name__} has no classes to explain, its output is {tuple(logits.shape)}")
    if not bool(logits.isfinite().all()):
        raise ValueError(f"{type(model).__name__} makes NaN or infinite logits of the image; try a wider dtype")
    names = [f"class {i}" for i in range(logits.shape[1])] if class_names is None else list(class_names)
    if len(names) != logits.shape[1]:
        raise ValueError(f"expected {logits.shape[1]} class names, one for each logit, got {len(names)}")
    if target is not None and not 0 <= target < len(names):
        raise ValueError(f"target must be a class from 0 to {len(names) - 1}, got {target=}")
    shares = logits[0].double().softmax(-1)
    best = shares.topk(min(topk, len(names)))
    classes = [Answer(i, names[i], p) for p, i in zip(best.values.tolist(), best.indices.tolist(), strict=True)]
    chosen = classes[0].index if target is None else target
    found = Explanation(as_seen(batch[0], config), classes, chosen, place or (0.5, 0.5))
    attention: list[Tensor] = []

    def weights() -> list[Tensor]:
        attention.extend(() if attention else attention_weights(model, batch))
        return attention

    makers: dict[str, Callable[[], None]] = {
        "attended": lambda: _attended(found, model, batch),
        "features": lambda: found.features.extend((n, c.cpu().numpy()) for n, c in feature_colors(model, batch)),
        "rollout": lambda: _rollout(found, model, batch, weights(), place),
        "flow": lambda: _flow(found, model, batch, weights(), place),
        "gradient_input": lambda: found.maps.update(
            gradient_input=gradient_input(model, batch, chosen).double().cpu().numpy()
        ),
        "deeplift": lambda: _deeplift(found, model, batch),
        "frequency": lambda: _frequency(found, model, batch, config),
        "tokens": lambda: _tokens(found, model, batch),
        "exits": lambda: _exits(found, model, batch, names),
    }
    errors: dict[str, ValueError | ModuleNotFoundError] = {}
    for name in asked:
        if all_there_are and name in COSTLY:
            found.left_out[name] = "made only where it is asked for"
            continue
        try:
            makers[name]()
        except (ValueError, ModuleNotFoundError) as error:
            errors[name] = error
            found.left_out[name] = reason(error)
    if asked and len(errors) == len(asked):
        checks: dict[str, Callable[[], object]] = {**makers, "attended": lambda: last_mixers(model)}  # that takes long
        _refuse(errors, [name for name in METHODS if name not in {*asked, *COSTLY} and _works(checks[name])])
    size = batch.shape[2:]
    for name, values in found.maps.items():
        saliency = torch.from_numpy(values)
        if with_faithfulness:
            found.curves[name] = faithfulness(model, batch, saliency, chosen)
        if mask is not None:
            whole = resize_map(torch.from_numpy(mask), (size[0], size[1]))
            above = resize_map(saliency.clamp(min=0), (size[0], size[1]))
            found.overlaps[name] = float(attention_iou(above[None], whole[None])) if above.any() else 0.0
    return found


def _refuse(errors: Mapping[str, ValueError | ModuleNotFoundError], others: Sequence[str]) -> NoReturn:
    """Raise the one error that methods have in common, or one that has them all; and what other methods there are."""
    first, *more = errors.values()
    have = f"; of this model {', '.join(others)} can be made" if others else ""
    if all(type(error) is type(first) and str(error) == str(first) for error in more):
        if isinstance(first, ModuleNotFoundError):
            raise first
        raise ValueError(f"{first}{have}") from first
    listed = "; ".join(f"{name}: {reason(error)}" for name, error in errors.items())
    raise ValueError(f"none of {count_of(len(errors), 'method')} can be made: {listed}{have}")


def _works(make: Callable[[], object]) -> bool:
    try:
        make()
    except (ValueError, ModuleNotFoundError):
        return False
    return True


def _checked_mask(mask: Any) -> Array:
    values = np.asarray(mask, dtype=np.float64)
    if values.ndim != 2 or not values.size or not np.isfinite(values).all() or values.min() < 0 or not values.any():
        got = f", from {values.min():g} to {values.max():g}" if values.size else ""
        raise ValueError(f"mask is [h, w] of numbers from 0, not all of them 0; got {values.shape}{got}")
    return values


def reason(error: ValueError | ModuleNotFoundError) -> str:
    """Return why a method was not made; of a library that is not installed, how to install it."""
    missing = (error.name or "").partition(".")[0] if isinstance(error, ModuleNotFoundError) else ""
    return f'{missing} is not installed; install it with: pip install "visionzoo[view]"' if missing else str(error)


def _batch(model: nn.Module, image: Any, config: Mapping[str, Any]) -> Tensor:
    """Return [1, C, H, W] of an image, on the model's device and in its dtype."""
    parameter = next(model.parameters(), torch.zeros(()))
    if isinstance(image, str | Path):
        with PIL.Image.open(image) as opened:
            opened.load()
            image = opened
    if isinstance(image, PIL.Image.Image):
        if image.mode[0] in "IF":
            raise ValueError(
                f"the picture has pixels of 16 or 32 bits ({image.mode}), whose range only you know; give one of 8 bits"
            )
        mode = {1: "L", 3: "RGB"}.get(config["input_size"][0], image.mode)
        _check_channels(len(PIL.Image.new(mode, (1, 1)).getbands()), config)
        transform: Any = create_transform(**config, is_training=False)
        image = transform(image.convert(mode))
    if not isinstance(image, Tensor) or image.ndim not in (3, 4) or (image.ndim == 4 and len(image) != 1):
        shape = f"a tensor {tuple(image.shape)}" if isinstance(image, Tensor) else type(image).__name__
        raise ValueError(f"expected a picture, its path, or one image [C, H, W] as a tensor, got {shape}")
    _check_channels(image.shape[-3], config)
    return (image if image.ndim == 4 else image[None]).to(parameter)


def _check_channels(channels: int, config: Mapping[str, Any]) -> None:
    if wrong := [name for name in ("mean", "std") if len(config[name]) not in (1, channels)]:
        raise ValueError(
            f"the image has {count_of(channels, 'channel')}, {wrong[0]} {count_of(len(config[wrong[0]]), 'number')}; "
            f"give one for each in data_config, such as dict({wrong[0]}=({', '.join(['0.5'] * channels)}))"
        )


def as_seen(image: Tensor, config: Mapping[str, Any]) -> Array:
    """Return the image [H, W, 3] from 0 to 1 that a normalized one [C, H, W] is of: what the model sees, cropped."""
    mean, std = (torch.tensor(config[name], device=image.device)[:, None, None] for name in ("mean", "std"))
    pixels = (image.double() * std + mean).clamp(0, 1).permute(1, 2, 0)
    return (pixels if pixels.shape[2] == 3 else pixels.mean(2, keepdim=True).expand(-1, -1, 3)).cpu().numpy()


def _source(model: Any, batch: Tensor, place: tuple[float, float] | None) -> tuple[int | None, tuple[int, int]]:
    """Return the token that is looked from, None for the mean of the map's, and the size of the map."""
    (feature,) = model.forward_intermediates(batch, indices=[0], stop_early=True, intermediates_only=True)
    size = (feature.shape[2], feature.shape[3])
    prefix = _prefix(model)
    if place is None:
        reads_class = prefix and getattr(model.head, "pool_type", "") == "token"
        return (0 if reads_class else None), size
    row, column = (min(int(share * side), side - 1) for share, side in zip(place, size, strict=True))
    return prefix + row * size[1] + column, size


def _prefix(model: Any) -> int:
    """Return how many tokens come before those of the map in `attention_weights`."""
    count: int = model.num_prefix_tokens + model.test_registers
    return count


def _attended(found: Explanation, model: nn.Module, batch: Tensor) -> None:
    found.attended.extend(attended(model, batch, found.place))
    without = len(last_mixers(model)) - len(found.attended)
    left = f"; {count_of(without, 'further mixer sees', 'further mixers see')} tokens without places" if without else ""
    found.notes["attended"] = f"from {_named(1, found.place)}{left}"


def _rollout(
    found: Explanation, model: Any, batch: Tensor, weights: Sequence[Tensor], place: tuple[float, float] | None
) -> None:
    with torch.no_grad():
        source, size = _source(model, batch, place)
    joint = attention_rollout(weights)
    row = joint[_prefix(model) :].mean(0) if source is None else joint[source]
    found.maps["rollout"] = row[_prefix(model) :].unflatten(0, size).numpy()
    found.notes["rollout"] = f"of {_named(source, place)}"


def _flow(
    found: Explanation, model: Any, batch: Tensor, weights: Sequence[Tensor], place: tuple[float, float] | None
) -> None:
    with torch.no_grad():
        source, size = _source(model, batch, found.place if place is None else place)
        if place is None and _source(model, batch, None)[0] == 0:
            source = 0
    assert source is not None
    flow = attention_flow(weights, source)
    found.maps["flow"] = flow[_prefix(model) :].unflatten(0, size).numpy()
    found.notes["flow"] = f"of {_named(source, place if source == 0 else found.place)}"


def _named(source: int | None, place: tuple[float, float] | None) -> str:
    if source is None:
        return "the mean of the map's tokens"
    return (
        "the class token"
        if place is None
        else f"the place at {place[0]:.0%} of the height, {place[1]:.0%} of the width"
    )


def _deeplift(found: Explanation, model: nn.Module, batch: Tensor) -> None:
    lift = deeplift(model, batch, found.target)
    found.maps["deeplift"] = lift.map.double().cpu().numpy()
    found.notes["deeplift"] = (
        f"its sum misses the difference of the logits, {lift.difference:.4g}, by {lift.gap:.2g}: the gradient stands "
        "for the rule in layers that captum has none for"
    )


def _frequency(found: Explanation, model: nn.Module, batch: Tensor, config: Mapping[str, Any]) -> None:
    found.frequency = frequency_channel(model, batch, found.target, std=torch.tensor(config["std"]))


def _tokens(found: Explanation, model: nn.Module, batch: Tensor) -> None:
    kept = kept_places(model, batch)
    if not kept:
        raise ValueError(
            f"{type(model).__name__} as built has no reducers, so all tokens stay; give it some, such as "
            "reduce='representation_shift' for an isotropic model"
        )
    found.tokens.update({name: mask[0].double().cpu().numpy() for name, mask in kept.items()})


@torch.no_grad()
def _exits(found: Explanation, model: nn.Module, batch: Tensor, names: Sequence[str]) -> None:
    places = model.exit_places() if isinstance(model, Contract) else {}
    if not places:
        raise ValueError(f"{type(model).__name__} has no early exits; zoo_dynperceiver_* have some")
    assert isinstance(model, Contract)
    state = model.begin(batch)
    for part in range(len(model.parts)):
        state = model.advance(part, state)
        for name in (name for name, place in places.items() if place == part):
            probability, index = model.classify(name, state)[0].double().softmax(-1).max(-1)
            found.exits[name] = Answer(int(index), names[int(index)], float(probability))
