"""Weights load whoever wrote them, and whatever does not fit is said."""

import argparse
import pickle

import pytest
import timm
import torch
from golden import Record
from quick import quick_model
from safetensors.torch import save_file

import visionzoo
from visionzoo.models._checkpoint import read_checkpoint
from visionzoo.models._registry import TINY

NAME = "zoo_poolformer_s12"
IMAGE = torch.randn(1, 3, 64, 64, generator=torch.Generator().manual_seed(0))


@pytest.fixture(scope="module")
def source():
    return quick_model(NAME)


@pytest.fixture
def target():
    return timm.create_model(NAME).eval()


def _same(a, b):
    with torch.no_grad():
        return torch.equal(a(IMAGE), b(IMAGE))


@pytest.mark.parametrize("prefix", ["", "module.", "_orig_mod.", "module._orig_mod.", "_orig_mod.module.", "model."])
@pytest.mark.parametrize("container", [None, "model", "model_state", "state_dict", "model_ema", "state_dict_ema"])
def test_wrappers_and_containers_are_taken_off(source, target, prefix, container):
    state = {prefix + name: value for name, value in source.state_dict().items()}
    report = visionzoo.load_weights(target, {container: state, "epoch": 3} if container else state)
    assert _same(source, target)
    assert len(report.loaded) == len(state) and not report.missing and not report.unexpected


def test_a_detectors_backbone_is_taken_out_of_it(source, target):
    state = {f"backbone.{name}": value for name, value in source.state_dict().items()}
    state |= {"neck.lateral.weight": torch.zeros(3), "bbox_head.fc.bias": torch.zeros(3)}
    report = visionzoo.load_weights(target, {"state_dict": state, "meta": {}})
    assert _same(source, target) and not report.unexpected
    assert report.beside == ["neck.lateral.weight", "bbox_head.fc.bias"]


@pytest.mark.parametrize("prefix", ["model.", "module.", "net.", "module.model.", "timm_model.", "model._orig_mod."])
def test_what_lies_beside_the_wrapped_model_is_reported(source, target, prefix):
    own = source.state_dict()
    beside = {"criterion.weight": torch.ones(1000)} | {f"ema_model.{name}": value + 1 for name, value in own.items()}
    state = {prefix + name: value for name, value in own.items()} | beside
    report = visionzoo.load_weights(target, {"state_dict": state, "epoch": 3})
    assert _same(source, target) and not report.missing and not report.unexpected
    assert report.beside == list(beside) and f"{len(beside)} beside: criterion.weight, " in str(report)


def test_a_name_that_wrappers_have_is_no_wrapper_where_most_lies_elsewhere(source, target):
    report = visionzoo.load_weights(target, {**source.state_dict(), "model.x": torch.ones(1)}, strict=False)
    assert _same(source, target) and report.unexpected == ["model.x"] and not report.beside


def test_averaged_weights_win_unless_told_otherwise(source, target):
    other = {name: value + 1 for name, value in source.state_dict().items()}
    both = {"state_dict": other, "state_dict_ema": source.state_dict()}
    visionzoo.load_weights(target, both)
    assert _same(source, target)
    visionzoo.load_weights(target, both, use_ema=False)
    assert not _same(source, target)


@pytest.mark.parametrize("wrap", ["ddp", "compile", "feature getter"])
def test_a_wrapped_model_can_be_loaded_into(source, target, wrap):
    if wrap == "feature getter":
        getter = timm.create_model(NAME, features_only=True, out_indices=(0, 2)).eval()
        report = visionzoo.load_weights(getter, source.state_dict())
        with torch.no_grad():
            expected = source.forward_intermediates(IMAGE, indices=[0, 2], intermediates_only=True)
            assert all(torch.equal(a, b) for a, b in zip(getter(IMAGE), expected, strict=True))
        assert {name.split(".")[0] for name in report.dropped} == {"stages", "norm", "head"}
        return
    wrapped = torch.nn.DataParallel(target) if wrap == "ddp" else torch.compile(target, backend="eager")
    visionzoo.load_weights(wrapped, source.state_dict())
    assert _same(source, target)


@pytest.mark.parametrize("form", ["safetensors", "torch", "folder", "authors' checkpoint"])
def test_files_are_read(source, target, tmp_path, form):
    path = tmp_path / {"safetensors": "w.safetensors", "folder": "model.safetensors"}.get(form, "w.pth")
    if path.suffix == ".safetensors":
        save_file(source.state_dict(), path)
    elif form == "torch":
        torch.save(source.state_dict(), path)
    else:  # with the command line beside the weights
        torch.save({"model": source.state_dict(), "args": argparse.Namespace(lr=0.1), "epoch": 300}, path)
    visionzoo.load_weights(target, tmp_path if form == "folder" else path)
    assert _same(source, target)


class _Malicious:
    def __reduce__(self):
        return print, ("code from the file runs",)


def test_code_in_a_pickle_is_refused_and_not_run(target, tmp_path, capsys):
    before = {name: value.clone() for name, value in target.state_dict().items()}
    path = tmp_path / "evil.pth"
    torch.save({"model": _Malicious()}, path)
    with pytest.raises(ValueError, match=r"evil\.pth is refused: it holds more than tensors"):
        visionzoo.load_weights(target, path)
    path.write_bytes(pickle.dumps(_Malicious()))  # not in torch's container
    with pytest.raises(ValueError, match=r"evil\.pth"):
        visionzoo.load_weights(target, path)
    assert "code from the file runs" not in capsys.readouterr().out
    assert all(torch.equal(before[name], value) for name, value in target.state_dict().items())


@pytest.mark.parametrize("suffix", ["pth", "safetensors"])
@pytest.mark.parametrize("keep", [0.0, 0.001, 0.5, 0.99])
def test_a_truncated_file_is_named(source, tmp_path, suffix, keep):
    path = tmp_path / f"cut.{suffix}"
    save_file(source.state_dict(), path) if suffix == "safetensors" else torch.save(source.state_dict(), path)
    data = path.read_bytes()
    path.write_bytes(data[: int(keep * len(data))])
    with pytest.raises(ValueError, match=rf"cut\.{suffix} \(\d+ bytes\) cannot be read.*damaged or cut short"):
        read_checkpoint(path)


@pytest.mark.parametrize(
    "text", ['"""A config."""\n', "<!DOCTYPE html>", "version https://git-lfs.github.com/spec/v1", "u"]
)
def test_a_text_is_no_checkpoint(tmp_path, text):
    (tmp_path / "page.pth").write_text(text)
    with pytest.raises(ValueError, match=r"page\.pth .* cannot be read as a checkpoint"):
        read_checkpoint(tmp_path / "page.pth")


def test_a_bit_that_flipped_in_a_weight_is_noticed(source, target, tmp_path):
    path = tmp_path / "flipped.pth"
    torch.save(source.state_dict(), path)
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)
    torch.load(path, weights_only=True)  # torch itself does not
    with pytest.raises(ValueError, match=r"flipped\.pth .* damaged or cut short: the checksum of .* does not fit"):
        visionzoo.load_weights(target, path)


def test_a_missing_file_and_a_file_without_tensors_are_named(target, tmp_path):
    with pytest.raises(ValueError, match=r"no checkpoint at .*nowhere\.pth"):
        visionzoo.load_weights(target, tmp_path / "nowhere.pth")
    torch.save({"epoch": 3}, tmp_path / "empty.pth")
    with pytest.raises(ValueError, match="holds no tensors; its entries are epoch"):
        visionzoo.load_weights(target, tmp_path / "empty.pth")
    torch.save([1, 2], tmp_path / "list.pth")
    with pytest.raises(ValueError, match="holds a list"):
        visionzoo.load_weights(target, tmp_path / "list.pth")


def test_missing_and_unexpected_names_are_raised_under_strict_and_reported_without(source, target):
    state = source.state_dict()
    state["surplus"] = state.pop("stages.0.blocks.0.mlp.fc1.weight")
    with pytest.raises(ValueError, match=r"1 missing: stages\.0\.blocks\.0\.mlp\.fc1\.weight; 1 unexpected: surplus"):
        visionzoo.load_weights(target, state)
    report = visionzoo.load_weights(target, state, strict=False)
    assert report.missing == ["stages.0.blocks.0.mlp.fc1.weight"] and report.unexpected == ["surplus"]


def test_another_models_checkpoint_is_refused_before_anything_is_loaded(target):
    before = {name: value.clone() for name, value in target.state_dict().items()}
    with pytest.raises(ValueError, match="less than 90 %"):
        visionzoo.load_weights(target, timm.create_model("test_resnet").state_dict(), strict=False)
    with pytest.raises(ValueError, match=r"other shapes than PoolFormer.*another variant"):
        wider = timm.create_model(NAME, embed_dims=(96, 128, 320, 512))
        visionzoo.load_weights(target, wider.state_dict(), strict=False)
    assert all(torch.equal(before[name], value) for name, value in target.state_dict().items())


def test_a_part_of_a_checkpoint_loads_only_when_told_to(source, target):
    part = {name: value for name, value in source.state_dict().items() if name.startswith("stages.0")}
    with pytest.raises(ValueError, match="allow_partial=True"):
        visionzoo.load_weights(target, part, strict=False)
    assert visionzoo.load_weights(target, part, strict=False, allow_partial=True).loaded == list(part)


@pytest.mark.parametrize("channels", [1, 4, 10])
def test_first_convolution_is_adapted_to_the_image_channels_as_timm_does(source, channels):
    target = timm.create_model(NAME, in_chans=channels)
    report = visionzoo.load_weights(target, source.state_dict())
    expected = timm.models.adapt_input_conv(channels, source.stem.conv.weight.detach())
    assert torch.equal(target.stem.conv.weight, expected)
    assert report.adapted == [f"stem.conv.weight (3 to {channels} input channels)"]


@pytest.mark.parametrize(("have", "want"), [(1, 3), (1, 4), (3, 1), (13, 1), (2, 1), (2, 4), (4, 12)])
@torch.no_grad()
def test_any_image_channels_become_any_others(have, want):
    """Of a grey image, its channels alike, every count makes the same map where one count divides the other."""
    source = quick_model(NAME, in_chans=have, depths=(1,) * 4).double()
    target = quick_model(NAME, in_chans=want, depths=(1,) * 4).double()
    report = visionzoo.load_weights(target, source.state_dict())
    assert report.adapted == [f"stem.conv.weight ({have} to {want} input channels)"]
    grey = torch.randn(1, 1, 64, 64, dtype=torch.float64)
    expected = source(grey.expand(-1, have, -1, -1))
    assert (target(grey.expand(-1, want, -1, -1)) - expected).norm() <= 1e-12 * expected.norm()


@torch.no_grad()
def test_fewer_of_many_channels_are_the_first_scaled():
    source, target = (quick_model(NAME, in_chans=channels, depths=(1,) * 4) for channels in (13, 4))
    visionzoo.load_weights(target, source.state_dict())
    torch.testing.assert_close(target.stem.conv.weight, source.stem.conv.weight[:, :4] * (13 / 4))


def _sparse(state):
    state["norm.weight"] = state["norm.weight"].to_sparse()


def _meta(state):
    state["norm.weight"] = state["norm.weight"].to("meta")


def _complex(state):
    state["norm.weight"] = state["norm.weight"].to(torch.complex64)


def _kernel(state):
    state["stem.0.conv.weight"] = state["stem.0.conv.weight"][..., :1]


def _flat_table(state):
    state["stages.0.blocks.0.mixer.relative_position_bias.table"] = torch.zeros(7)


def _flat_positions(state):
    state["stem.1.table"] = torch.zeros(3)


@pytest.mark.parametrize(
    ("name", "spoil", "message"),
    [
        ("zoo_biformer_t", _sparse, r"without values that could be copied .*: norm\.weight"),
        ("zoo_biformer_t", _meta, r"without values that could be copied .*: norm\.weight"),
        ("zoo_biformer_t", _complex, r"without values that could be copied .*: norm\.weight"),
        ("zoo_biformer_t", _kernel, r"other shapes than BiFormer: stem\.0\.conv\.weight"),
        ("zoo_nat_mini", _flat_table, r"table \(7,\) cannot be brought to .*expected the offsets of a neighborhood"),
        ("zoo_swin_t", _flat_table, r"table \(7,\) cannot be brought to .*expected the offsets in a square window"),
        ("zoo_pvt_t", _flat_positions, r"stem\.1\.table \(3,\) cannot be brought to \(1, "),
    ],
    ids=["sparse", "meta", "complex", "kernel", "offsets", "window", "positions"],
)
@pytest.mark.parametrize("in_chans", [1, 3])
def test_nothing_changes_where_loading_fails(name, spoil, message, in_chans):
    state = quick_model(name, **TINY[name], in_chans=in_chans).state_dict()
    spoil(state)
    target = timm.create_model(name, **TINY[name])
    before = {name: value.clone() for name, value in target.state_dict().items()}
    with pytest.raises(ValueError, match=message):
        visionzoo.load_weights(target, state, strict=False)
    assert all(torch.equal(before[name], value) for name, value in target.state_dict().items())


def test_a_model_on_the_meta_device_is_not_loaded_into(source):
    with torch.device("meta"):
        target = timm.create_model(NAME)
    with pytest.raises(ValueError, match=r"132 of the 132 tensors of PoolFormer are on the meta device.*to_empty"):
        visionzoo.load_weights(target, source.state_dict())
    visionzoo.load_weights(target.to_empty(device="cpu").eval(), source.state_dict())
    assert _same(source, target)


def test_another_number_of_classes_needs_a_word(source):
    target = timm.create_model(NAME, num_classes=2)
    own = target.head.fc.weight.clone()
    with pytest.raises(ValueError, match=r"has 1000 classes, the model 2\. Build the model with num_classes=1000, or"):
        visionzoo.load_weights(target, source.state_dict())
    report = visionzoo.load_weights(target, source.state_dict(), strict=False)
    assert torch.equal(target.head.fc.weight, own) and len(report.adapted) == 2 and not report.missing
    headless = timm.create_model(NAME, num_classes=0)
    report = visionzoo.load_weights(headless, source.state_dict())
    assert report.dropped == ["head.fc.weight", "head.fc.bias"]


def test_other_modules_are_refused():
    with pytest.raises(ValueError, match="expected a model of the zoo"):
        visionzoo.load_weights(torch.nn.Linear(2, 2), {})


# -- through timm's own machinery -------------------------------------------------------------------------------------


@pytest.mark.parametrize("kwargs", [{}, {"in_chans": 1}, {"in_chans": 10, "num_classes": 2}, {"num_classes": 0}])
def test_timm_loads_files_with_the_authors_names(tmp_path, kwargs):
    state = Record("poolformer/poolformer_s12").state_dict()
    torch.save(state, tmp_path / "authors.pth")
    overlay = {"file": str(tmp_path / "authors.pth")}
    model = timm.create_model(NAME, pretrained=True, pretrained_cfg_overlay=overlay, **kwargs)
    assert torch.equal(model.stages[2].blocks[3].ls1.gamma, state["network.4.3.layer_scale_1"])
    weight = timm.models.adapt_input_conv(kwargs.get("in_chans", 3), state["patch_embed.proj.weight"])
    assert torch.equal(model.stem.conv.weight, weight)
    if not kwargs:
        assert torch.equal(model.head.fc.weight, state["head.weight"])


def test_timm_loads_features_only_with_pretrained_weights(tmp_path):
    state = Record("biformer/biformer_tiny").state_dict()
    torch.save({"model": state}, tmp_path / "authors.pth")
    overlay = {"file": str(tmp_path / "authors.pth")}
    getter = timm.create_model("zoo_biformer_t", features_only=True, pretrained=True, pretrained_cfg_overlay=overlay)
    assert torch.equal(getter.model.stem[0].conv.weight, state["downsample_layers.0.0.weight"])


def test_local_dir_restores_the_model(source, tmp_path):
    from timm.models import save_for_hf

    save_for_hf(source, tmp_path, safe_serialization=True)
    restored = timm.create_model(f"local-dir:{tmp_path}", pretrained=True).eval()
    assert _same(source, restored)


def test_hf_hub_restores_the_model_from_its_cache(source, tmp_path, monkeypatch):
    """The hub's file layout, without the hub: what is in the cache needs no network."""
    import huggingface_hub.constants
    from timm.models import save_for_hf

    snapshot = tmp_path / "models--someone--poolformer" / "snapshots" / "0"
    snapshot.mkdir(parents=True)
    (tmp_path / "models--someone--poolformer" / "refs").mkdir()
    (tmp_path / "models--someone--poolformer" / "refs" / "main").write_text("0")
    save_for_hf(source, snapshot, safe_serialization=True)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    restored = timm.create_model("hf-hub:someone/poolformer", pretrained=True, cache_dir=str(tmp_path)).eval()
    assert _same(source, restored)


def test_asking_for_weights_that_nobody_has_says_what_to_do():
    for name in ("zoo_biformer_t", "zoo_davit_g"):
        with pytest.raises(RuntimeError, match=rf"No public weights are known for {name}: .*visionzoo convert"):
            timm.create_model(name, pretrained=True)


def test_weights_are_listed_where_they_exist():
    assert {"zoo_davit_t.msft_in1k", "zoo_poolformer_s12.sail_in1k"} <= set(timm.list_pretrained("zoo_*"))
    assert not [name for name in timm.list_pretrained("zoo_biformer*")]


@pytest.mark.parametrize("prefix", ["", "module.", "net."])
def test_numbered_blocks_that_authors_call_model_are_no_wrapper(prefix):
    """Their names begin with what Lightning and timm's feature getters put before a whole model's."""
    model = quick_model("zoo_activator_glu", num_classes=7, depth=3, embed_dim=24, mlp_ratio=1.5, patch_size=8)
    state = Record("activator/activator_small").state_dict()
    assert sum(name.startswith("model.0.") for name in state) > 4
    report = visionzoo.load_weights(model, {prefix + name: value for name, value in state.items()})
    assert report.names == "authors" and not report.beside
    assert torch.equal(model.blocks[1].norm2.weight, state["model.1.norm.weight"])
