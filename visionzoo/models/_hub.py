"""A model as a folder, or a repository of Hugging Face's hub: config.json, model.safetensors and a model card.

Both load by timm: `timm.create_model("local-dir:FOLDER", pretrained=True)`, `timm.create_model("hf-hub:USER/NAME", …)`.
"""

from __future__ import annotations

import copy
import json
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from timm.models import create_model, save_for_hf
from torch import nn

from visionzoo._version import __version__
from visionzoo.models._registry import VARIANTS
from visionzoo.text import count_of, markdown_table

DATA_CONFIG = ("input_size", "interpolation", "mean", "std", "crop_pct", "crop_mode")
READING = ("input_img_mode", "apply_exif_orientation", "multi_label")  # of config.json in the notes, as NAME=VALUE


def save_pretrained(
    model: nn.Module,
    folder: str | Path,
    *,
    license: str = "",
    source: str = "",
    measured: Mapping[str, Any] | None = None,
    class_names: Sequence[str] | None = None,
    data_config: Mapping[str, Any] | None = None,
    model_args: Mapping[str, Any] | None = None,
    licence: str = "",
) -> Path:
    """Write a model into a new or empty folder, and return that.

    Args:
        model: a model of timm's registry.
        folder: for config.json, model.safetensors and README.md, the model card.
        license: of the weights, such as "apache-2.0" for your own; of published ones what `visionzoo license` prints.
        source: where the weights are from: how and on what they were trained, in Markdown.
        measured: numbers of these very weights, such as what `visionzoo eval` writes.
        class_names: in the order of the logits.
        data_config: input size, mean, std, crop and interpolation, where they are not the pretrained cfg's, and which
            of `READING` there are: the mode of the images, whether they are turned as their EXIF says, whether one
            may have several labels.
        model_args: arguments that the model was built with beside its name, where timm does not know them itself
            (before 1.0.31).
        licence: the earlier name of `license`.

    Raises:
        ValueError: the folder holds files or is none, the weights are no numbers, or their license is not stated.
    """
    folder, license = Path(folder), license or licence
    model = _bare(model)
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise ValueError(f"{folder} is not an empty folder; name a new one")
    if not license:
        raise ValueError("whose weights are these? give their license, such as 'apache-2.0' for your own")
    if class_names and len(class_names) != model.num_classes:
        raise ValueError(
            f"{count_of(len(class_names), 'class name')} for the {count_of(model.num_classes, 'class')} of the model"
        )
    if spoilt := not_finite(model):
        raise ValueError(
            f"{count_of(len(spoilt), 'tensor holds', 'tensors hold')} NaN or infinite weights, such as {spoilt[0]}: "
            "nothing is written"
        )
    before = published(model)  # as it was itself loaded from such a folder
    class_names = class_names or (before["class_names"] if before["num_classes"] == model.num_classes else None)
    reading = before["reading"] | {name: value for name in READING if (value := (data_config or {}).get(name))}
    is_new = not folder.exists()
    folder.mkdir(parents=True, exist_ok=True)
    try:
        with TemporaryDirectory(dir=folder, prefix=".") as temporary:
            new = Path(temporary) / "model"
            try:
                save_for_hf(model, str(new), model_args=dict(model_args or {}) or None, safe_serialization=True)
            except RuntimeError as error:  # two names of one tensor
                words = " ".join(str(error).split())[:300]
                raise ValueError(f"safetensors cannot keep these weights, untie them: {words}") from error
            config = json.loads((new / "config.json").read_text())
            for name in ("non_commercial", "num_classes"):  # classes stand beside, and count once
                config.get("model_args", {}).pop(name, None)
            given = {name: value for name, value in (data_config or {}).items() if name in DATA_CONFIG}
            config["pretrained_cfg"] |= {**given, "license": license}
            if reading:
                config["pretrained_cfg"]["notes"] = [f"{name}={value}" for name, value in reading.items()]
            if given:  # what the published weights were tested at says nothing about these
                for name in ("test_input_size", "test_crop_pct", "pool_size"):
                    config["pretrained_cfg"].pop(name, None)
            if class_names:
                config["label_names"] = list(class_names)
            (new / "config.json").write_text(json.dumps(config, indent=2) + "\n")
            card = model_card(config["architecture"], model, license, source, measured or {}, config["pretrained_cfg"])
            (new / "README.md").write_text(card, encoding="utf-8")
            _check_whole(model, new)
            for file in sorted(new.iterdir(), key=lambda file: file.name == "config.json"):
                file.rename(folder / file.name)  # whole, and last what makes it a model to timm
    except BaseException:
        if is_new:
            shutil.rmtree(folder, ignore_errors=True)
        raise
    return folder


def _bare(model: nn.Module) -> nn.Module:
    """Return a model without its wrappers, its weights contiguous, as safetensors needs them."""
    wrappers = (nn.DataParallel, nn.parallel.DistributedDataParallel)
    while isinstance(model, wrappers) or hasattr(model, "_orig_mod"):
        inner = model.module if isinstance(model, wrappers) else model._orig_mod
        assert isinstance(inner, nn.Module)
        model = inner
    if not (hasattr(model, "pretrained_cfg") and hasattr(model, "num_classes")):
        raise ValueError(f"expected a model as timm.create_model gives it, got {type(model).__name__}")
    if all(tensor.is_contiguous() for tensor in model.state_dict().values()):
        return model
    return copy.deepcopy(model).to(memory_format=torch.contiguous_format)  # type: ignore[call-overload]


def _check_whole(model: nn.Module, folder: Path) -> None:
    """Raise ValueError where the model that a folder describes would not take the weights that lie in it."""
    with torch.device("meta"):
        again = create_model(f"local-dir:{folder}", pretrained=False)
    theirs, own = ({n: tuple(t.shape) for n, t in m.state_dict().items()} for m in (again, model))
    if strangers := sorted(name for name in theirs.keys() | own.keys() if theirs.get(name) != own.get(name)):
        raise ValueError(
            f"{type(model).__name__} is not as it was built: "
            f"{count_of(len(strangers), 'tensor is', 'tensors are')} other than its config.json "
            f"says, such as {strangers[0]}. A model that was fused or cut cannot be loaded again: give the original. "
            "Arguments that it was built with go into model_args"
        )


def published(model: nn.Module) -> dict[str, Any]:
    """Return what the config.json says that a model was loaded by: `num_classes`, `class_names` and its `reading`."""
    cfg: Any = getattr(model, "pretrained_cfg", None) or {}
    return published_by(cfg)


def published_by(cfg: Mapping[str, Any]) -> dict[str, Any]:
    """Return the same of the config itself."""
    notes = dict(str(note).partition("=")[::2] for note in cfg.get("notes") or ())
    reading = {name: value if name == "input_img_mode" else True for name, value in notes.items() if name in READING}
    names = cfg.get("label_names")
    if isinstance(names, Mapping):  # by their numbers, as JSON has them
        names = [names[number] for number in sorted(names, key=int)]
    return {"num_classes": cfg.get("num_classes"), "class_names": names and [*map(str, names)], "reading": reading}


def not_finite(model: nn.Module) -> list[str]:
    """Return the names of the tensors that hold NaN, and of the parameters that hold infinities."""
    parameters = {name: parameter for name, parameter in model.named_parameters() if not parameter.isfinite().all()}
    return [*parameters, *(name for name, buffer in model.named_buffers() if buffer.isnan().any())]


def push_to_hub(model: nn.Module, repo_id: str, *, private: bool = False, token: str | None = None, **card: Any) -> str:
    """Upload a model to USER/NAME on Hugging Face's hub and return the address; the rest is as in `save_pretrained`.

    The token is that of `hf auth login` where none is given. Files that are there already are replaced.
    """
    from huggingface_hub import HfApi

    with TemporaryDirectory() as temporary:
        folder = save_pretrained(model, Path(temporary) / "model", **card)
        api = HfApi(token=token, library_name="visionzoo", library_version=__version__)
        api.create_repo(repo_id, private=private, exist_ok=True)
        return str(api.upload_folder(repo_id=repo_id, folder_path=folder, commit_message="Add model"))


def model_card(
    name: str,
    model: nn.Module,
    license: str,
    source: str,
    measured: Mapping[str, Any],
    cfg: Mapping[str, Any],
) -> str:
    """Return the card: what the model is, whose it is, and its numbers, those measured apart from those published."""
    head = ["---", "tags:", "- image-classification", "- timm", "- visionzoo", "library_name: timm"]
    head += [f"license: {license}", "---", f"# {name}", ""]
    parameters = sum(parameter.numel() for parameter in model.parameters())
    facts = {
        "Architecture": f"`{name}` of visionzoo {__version__}",
        "Parameters": f"{parameters / 1e6:.2f} M",
        "Input": " x ".join(map(str, cfg["input_size"])),
        "Classes": str(model.num_classes),
        "License of the weights": license,
        "Source of the weights": source or cfg.get("origin_url") or "not stated",
    }
    if papers := cfg.get("paper_ids"):
        papers = [papers] if isinstance(papers, str) else papers
        links = (f"https://arxiv.org/abs/{p.removeprefix('arXiv:')}" if "arXiv" in p else p for p in papers)
        facts["Paper"] = ", ".join(links)
    lines = [*head, _table(("", ""), facts), ""]
    if measured:
        lines += ["## Measured with these weights", "", _table(("Metric", "Value"), measured), ""]
    published = VARIANTS[name].published if name in VARIANTS else None
    if published and published.top1 is not None:
        lines += [
            "## Published for this architecture",
            "",
            f"{published.top1:g} % top-1 on ImageNet-1k at {published.size}² ({published.source}); not of these "
            "weights unless they are the authors'.",
            "",
        ]
    use = ["import timm, torch", "import visionzoo  # registers the model", ""]
    use += ['model = timm.create_model("hf-hub:USER/NAME", pretrained=True).eval()  # or local-dir:FOLDER']
    use += [f"logits = model(torch.randn(1, {', '.join(map(str, cfg['input_size']))}))"]
    return "\n".join([*lines, "## Use", "", "```python", *use, "```", ""])


def _table(header: tuple[str, str], rows: Mapping[str, Any]) -> str:
    return markdown_table(header, [(key, f"{v:g}" if isinstance(v, float) else v) for key, v in rows.items()])
