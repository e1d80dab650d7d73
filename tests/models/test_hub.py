"""Folders and repositories of the hub give the same logits back; cards and licenses say whose weights they are."""

import json
import shutil

import pytest
import timm
import torch
from timm.models import generate_default_cfgs

import visionzoo
from visionzoo.models import _licenses as licenses
from visionzoo.models._licenses import NonCommercialError, describe, is_non_commercial, weights_of
from visionzoo.models._registry import VARIANTS

SMALL = {"depths": [1, 1, 1, 1], "embed_dims": [8, 8, 16, 16]}
OWN = {"license": "apache-2.0", "source": "trained on three colors", "measured": {"top1": 81.25, "img_size": 64}}


@pytest.fixture
def model():
    return timm.create_model("zoo_poolformer_s12", num_classes=3, in_chans=1, **SMALL).eval()


def logits(model):
    with torch.no_grad():
        return model(torch.linspace(-1, 1, 64 * 64).view(1, 1, 64, 64))


def test_a_folder_gives_the_same_logits_and_says_what_it_is(model, tmp_path):
    data = {"input_size": (1, 64, 64), "mean": (0.3,), "std": (0.2,), "interpolation": "bilinear", "crop_pct": 1.0}
    arguments = {**SMALL, "in_chans": 1}
    names = ["blue", "green", "red"]
    folder = visionzoo.save_pretrained(
        model, tmp_path / "m", **OWN, class_names=names, data_config=data, model_args=arguments
    )
    assert {path.name for path in folder.iterdir()} == {"config.json", "model.safetensors", "README.md"}
    again = timm.create_model(f"local-dir:{folder}", pretrained=True).eval()
    assert torch.equal(logits(model), logits(again))
    cfg = timm.data.resolve_data_config({}, model=again)
    assert {name: tuple(v) if isinstance(v := cfg[name], list) else v for name in data} == data
    config = json.loads((folder / "config.json").read_text())
    assert config["label_names"] == names and config["num_classes"] == 3
    # transformers' TimmWrapper builds with both, and cannot when an argument comes twice
    args = dict(num_classes=config["num_classes"], **config["model_args"])
    assert timm.create_model(config["architecture"], **args).num_classes == 3
    card = (folder / "README.md").read_text()
    assert card.startswith("---\n") and "\nlicense: apache-2.0\n" in card
    for words in ("trained on three colors", "| top1 | 81.25 |", "## Measured", "77.2 % top-1", "2111.11418", "Use"):
        assert words in card, words
    assert card.index("81.25") < card.index("## Published for this architecture") < card.index("77.2 %")


def test_the_hub_gives_the_same_logits(model, tmp_path, monkeypatch):
    """Over a hub that is a folder: what would be uploaded is what is downloaded."""
    hub = tmp_path / "hub"
    said = []

    def upload_folder(self, *, repo_id, folder_path, commit_message):
        shutil.copytree(folder_path, hub / repo_id)
        return f"https://huggingface.co/{repo_id}"

    def download(repo_id, filename, **_):
        assert filename in ("config.json", "model.safetensors"), "nothing that could hold a pickle is asked for"
        return str(hub / repo_id / filename)

    monkeypatch.setattr("huggingface_hub.HfApi.create_repo", lambda self, *args, **more: said.append((args, more)))
    monkeypatch.setattr("huggingface_hub.HfApi.upload_folder", upload_folder)
    monkeypatch.setattr("timm.models._hub.hf_hub_download", download)
    monkeypatch.setattr("visionzoo.models._network.get_hf_file_metadata", lambda *_, **__: None)
    arguments = {**SMALL, "in_chans": 1}
    address = visionzoo.push_to_hub(model, "me/colours", private=True, **OWN, model_args=arguments)
    assert address.endswith("me/colours") and said == [(("me/colours",), {"private": True, "exist_ok": True})]
    again = timm.create_model("hf-hub:me/colours", pretrained=True).eval()
    assert torch.equal(logits(model), logits(again))


WRAPPERS = [torch.compile, torch.nn.DataParallel, lambda model: model.to(memory_format=torch.channels_last)]


@pytest.mark.parametrize("wrap", WRAPPERS)
def test_a_model_is_kept_without_its_wrappers_and_in_any_memory_format(model, tmp_path, wrap):
    expected = logits(model)
    visionzoo.save_pretrained(wrap(model), tmp_path / "m", **OWN, model_args={**SMALL, "in_chans": 1})
    assert torch.equal(logits(timm.create_model(f"local-dir:{tmp_path / 'm'}", pretrained=True).eval()), expected)


def test_what_could_not_be_loaded_again_is_not_written(tmp_path):
    levit = timm.create_model("zoo_levit_128s", num_classes=3).eval()
    tied = timm.create_model("test_convnext", num_classes=3)
    tied.head.norm.bias = tied.head.norm.weight
    for model, message in [
        (visionzoo.fuse(levit), r"is not as it was built: \d+ tensors are other than its config.json says"),
        (tied, "safetensors cannot keep these weights, untie them"),
        (timm.create_model("test_convnext", features_only=True), "as timm.create_model gives it, got FeatureListNet"),
        (torch.nn.Linear(2, 2), "as timm.create_model gives it, got Linear"),
    ]:
        with pytest.raises(ValueError, match=message):
            visionzoo.save_pretrained(model, tmp_path / "m", license="mit")
    assert not (tmp_path / "m").exists()


def test_a_pickle_in_a_folder_is_refused(model, tmp_path):
    from engine.helpers import write_pickle_that_runs

    folder = visionzoo.save_pretrained(model, tmp_path / "m", **OWN, model_args={**SMALL, "in_chans": 1})
    (folder / "model.safetensors").unlink()
    write_pickle_that_runs(folder / "pytorch_model.bin", tmp_path / "witness")
    with pytest.raises(RuntimeError, match=r"weights_only|mkdir"):
        timm.create_model(f"local-dir:{folder}", pretrained=True)
    assert not (tmp_path / "witness").exists()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"license": ""}, "whose weights are these"),
        ({"class_names": ["a"]}, "1 class name for the 3 classes"),
    ],
)
def test_what_cannot_be_saved_is_refused(model, tmp_path, change, message):
    with pytest.raises(ValueError, match=message):
        visionzoo.save_pretrained(model, tmp_path / "m", **{**OWN, **change})
    (tmp_path / "full").mkdir()
    (tmp_path / "full/x").touch()
    with pytest.raises(ValueError, match="is not an empty folder"):
        visionzoo.save_pretrained(model, tmp_path / "full", **OWN)


def test_every_model_of_the_zoo_has_licences():
    for name in VARIANTS:
        assert describe(name).startswith(f"{name}\n  code: ")
        assert all(weights.license != "unknown" and weights.origin for weights in weights_of(name))


@pytest.mark.parametrize(
    ("license", "expected"),
    [
        *[("cc-by-nc-4.0", True), ("cc-by-nc-sa-4.0", True), ("Non-Commercial", True), ("research-only", True)],
        *[(None, False), ("ncsa", False), ("mit", False), ("apache-2.0", False)],
    ],
)
def test_non_commercial_licenses_are_recognized(license, expected):
    assert is_non_commercial(license) == expected


def test_non_commercial_weights_need_a_word(model, tmp_path, monkeypatch):
    folder = visionzoo.save_pretrained(model, tmp_path / "m", **OWN, model_args={**SMALL, "in_chans": 1})
    entries = {"zoo_poolformer_s12.nc": {"hf_hub_id": "me/nc", "license": "cc-by-nc-4.0", "num_classes": 3}}
    entries["zoo_poolformer_s12.nc"] |= {"input_size": (1, 64, 64), "first_conv": "stem.conv", "classifier": "head.fc"}
    cfg = generate_default_cfgs(entries)["zoo_poolformer_s12"].default
    monkeypatch.setattr("timm.models._hub.hf_hub_download", lambda *_, filename, **__: str(folder / filename))
    monkeypatch.setattr("visionzoo.models._network.get_hf_file_metadata", lambda *_, **__: None)
    options = dict(pretrained=True, pretrained_cfg=cfg, num_classes=3, in_chans=1, **SMALL)
    with pytest.raises(NonCommercialError, match=r"cc-by-nc-4\.0, which forbids commercial use.*--non-commercial"):
        timm.create_model("zoo_poolformer_s12", **options)
    again = timm.create_model("zoo_poolformer_s12", non_commercial=True, **options).eval()
    assert torch.equal(logits(again), logits(model))
    own = dict(options, pretrained_cfg_overlay={"file": str(folder / "model.safetensors")})
    timm.create_model("zoo_poolformer_s12", **own)  # one's own weights are one's own
    assert licenses.check("x", "mit", accepted=False) is None
