"""What a checkpoint says about its training steers no later command beyond its model and the way images are read."""

import argparse
import json
import math

import pytest
import timm
import torch
from engine.helpers import restored, run_tool

from visionzoo.engine.checkpoints import read_checkpoint
from visionzoo.engine.data import open_split
from visionzoo.engine.errors import UserError
from visionzoo.engine.evaluation import evaluate_checkpoint
from visionzoo.engine.recorded import Recorded, read_recorded, recorded_beside, take_data
from visionzoo.engine.trained_flags import eval_parser
from visionzoo.engine.training import train


@pytest.fixture
def altered(trained, tmp_path):
    """Write a checkpoint of which the record says something else."""

    def alter(state=(), **args):
        content = read_checkpoint(trained[0] / "last.pth.tar")
        content |= dict(state)
        content["args"] = {**content["args"], **args}
        path = tmp_path / "altered.pth.tar"
        torch.save(content, path)
        return str(path)

    return alter


def evaluated(*flags):
    return evaluate_checkpoint(eval_parser().parse([*map(str, flags), "--device", "cpu"]))


def test_the_recorded_data_set_is_shown_and_not_opened_without_a_flag(altered, images):
    with pytest.raises(UserError) as error:
        evaluated("--checkpoint", altered(val_split="secret"), "-j", 0)
    assert f"data_dir={str(images)!r}, val_split='secret'" in str(error.value)
    assert "pass --recorded-data" in str(error.value)


@pytest.mark.parametrize(
    "record",
    [
        {"dataset": "wds/x", "data_dir": "pipe:touch {mark}; echo ", "val_split": "x-{{0..1}}.tar|10"},
        {"dataset": "wds/x", "data_dir": "/data", "val_split": "a.tar::pipe:touch {mark}|10"},
        {"dataset": "wds/x", "data_dir": "/data", "val_split": "{{pipe,x}}:touch {mark}|10"},
        {"dataset": "wds/x", "data_dir": "http:x", "val_split": "a"},
        {"dataset": "", "data_dir": "s3://bucket/x"},
        {"dataset": "", "data_dir": "//server/share"},
        {"dataset": "", "val_data_dir": "\\\\server\\share"},
        {"dataset": "", "class_map": "https://x/y.txt"},
    ],
)
@pytest.mark.parametrize("flags", [[], ["--recorded-data"]])
def test_commands_and_addresses_of_a_record_are_never_followed(altered, tmp_path, monkeypatch, record, flags):
    mark = tmp_path / "mark"
    record = {key: value.format(mark=mark) for key, value in record.items()}
    opened = []
    monkeypatch.setattr("visionzoo.engine.data.create_dataset", lambda name, **kwargs: opened.append((name, kwargs)))
    with pytest.raises(UserError) as error:
        evaluated("--checkpoint", altered(**record), *flags)
    assert ("a command or an address" in str(error.value)) == bool(flags)
    assert not opened and not mark.exists()


def test_plain_names_and_paths_are_taken_with_the_flag():
    for record in (
        {"dataset": "hfds/zh-plus/tiny-imagenet", "val_split": "valid[:10%]"},
        {"dataset": "wds/x", "data_dir": "/data/shards", "val_split": "x-{000..012}.tar|5000"},
        {"data_dir": "C:\\images", "val_split": "val"},
        {"data_dir": "/data/run 3: new/images"},
    ):
        config = take_data(eval_parser().parse(["--recorded-data"]), Recorded(data=record), "x.pth")
        data = config.data
        assert {"dataset": data.dataset, "data_dir": data.data_dir, "val_split": config.result.split} == {
            "dataset": "", "data_dir": None, "val_split": "", **record
        }  # fmt: skip
    with pytest.raises(UserError, match="give one"):
        take_data(eval_parser().parse(["--recorded-data", "--data-dir", "x"]), Recorded(data=record), "x.pth")


def test_processes_and_devices_of_a_record_are_not_taken(altered, images, monkeypatch):
    seen = []
    opened = []
    monkeypatch.setattr("visionzoo.engine.evaluation.eval_loader", lambda *args, **_: seen.append(args))
    monkeypatch.setattr(
        "visionzoo.engine.evaluation.open_split", lambda data, **more: opened.append(more) or open_split(data, **more)
    )
    path = altered(workers=1_000_000, device="cuda:7", dataset_trust_remote_code=True, dataset_download=True, seed=7)
    with pytest.raises(TypeError):  # there is no loader
        evaluated("--checkpoint", path, "--data-dir", images)
    ((data, _, _, process),) = seen
    assert (data.workers, process.device.type, opened[0]["seed"]) == (4, "cpu", 42)
    assert not data.dataset_trust_remote_code and not data.dataset_download


@pytest.mark.parametrize(
    "extra",
    [
        {"pretrained_cfg_overlay": {"url": "http://127.0.0.1:1/x"}},
        {"pretrained_cfg": {"file": "/etc/passwd"}},
        {"checkpoint_path": "/etc/passwd"},
        {"cache_dir": "/tmp/x"},
        {"non_commercial": True},
        {"weight_init": "http://127.0.0.1:1/x"},
        {"block": {"inner": {"hf_hub_id": "a/b"}}},
        {"table": torch.zeros(1)},
    ],
    ids=lambda extra: next(iter(extra)),
)
def test_arguments_of_a_model_that_name_weights_are_left_out_in_words(altered, extra, monkeypatch, capsys, tmp_path):
    kwargs = {"depths": [1, 1], "embed_dims": [8, 16], "topks": [1, -2], "regions": 2}
    path = altered(model_kwargs={**kwargs, **extra})
    asked = []
    create = timm.create_model
    monkeypatch.setattr(timm, "create_model", lambda name, **more: asked.append(more) or create(name, **more))
    restored(eval_parser, "--checkpoint", path)
    (name,) = extra
    assert f"not taken from its record: model_kwargs '{name}'" in capsys.readouterr().err
    assert run_tool("convert", "zoo_biformer_t", path, str(tmp_path / "folder"), "--licence", "mit") == 0
    assert f"not taken from its record: model_kwargs '{name}'" in capsys.readouterr().out
    for more in asked:
        assert name not in more and {key: more[key] for key in kwargs} == kwargs


@pytest.mark.parametrize("name", ["hf-hub:someone/something", "local-dir:/etc", "hf_hub:x/y"])
def test_a_model_that_lies_elsewhere_is_looked_up_only_on_the_users_word(altered, name, monkeypatch):
    monkeypatch.setattr(timm, "create_model", lambda *_, **__: pytest.fail("looked up"))
    with pytest.raises(UserError, match="name it yourself by --model"):
        restored(eval_parser, "--checkpoint", altered(model=name))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"args": {"model": ["a"]}}, "records model=['a']"),
        ({"args": {"num_classes": "many"}}, "records num_classes='many'"),
        ({"args": {"num_classes": True}}, "records num_classes=True"),
        ({"args": {"model_kwargs": "x"}}, "records model_kwargs='x'"),
        ({"args": {"input_img_mode": "BGR;x"}}, "records input_img_mode='BGR;x'"),
        ({"args": {"data_dir": 3}}, "records data_dir=3"),
        ({"class_names": "abc"}, "records class_names='abc'"),
        ({"class_names": [1, 2, 3]}, "records class_names=[1, 2, 3]"),
        ({"data_config": {"input_size": (3, "big", 1)}}, "records input_size=(3, 'big', 1)"),
        ({"data_config": {"mean": (0.5, float("nan"), 0.5)}}, "records mean="),
        ({"data_config": {"input_size": (3, 32, 32), "std": (1.0, 1.0)}}, "records std=(1.0, 1.0)"),
        ({"data_config": {"interpolation": "__class__"}}, "records interpolation='__class__'"),
        ({"args": {"num_classes": -3}}, "records num_classes=-3"),
        ({"args": {"num_classes": 10**12}}, "records num_classes=1000000000000"),
        ({"args": {"in_chans": 10**9}}, "records in_chans=1000000000"),
        ({"args": {"in_chans": 0}}, "records in_chans=0"),
        ({"args": {"model_kwargs": {"embed_dims": [8, 10**12]}}}, "records model_kwargs embed_dims=1000000000000"),
        ({"args": {"model_kwargs": {"a": {"b": float("nan")}}}}, "records model_kwargs a.b=nan"),
        ({"args": {"img_size": 10**9}}, "records img_size=1000000000"),
        ({"args": {"img_size": -32}}, "records img_size=-32"),
        ({"data_config": {"input_size": (3, 0, 0)}}, "records input_size=(3, 0, 0)"),
        ({"data_config": {"input_size": (3, 10**9, 32)}}, "records input_size=(3, 1000000000, 32)"),
        ({"data_config": {"input_size": (10**9, 32, 32)}}, "records input_size=(1000000000, 32, 32)"),
        ({"data_config": {"crop_pct": 1e-9}}, "records crop_pct=1e-09"),
        ({"data_config": {"crop_pct": float("inf")}}, "records crop_pct=inf"),
        ({"data_config": {"std": (0.0, 1.0, 1.0)}}, "records std=(0.0, 1.0, 1.0)"),
    ],
)
def test_a_damaged_record_is_named(change, message):
    with pytest.raises(UserError) as error:
        read_recorded(change, "x.pth")
    assert message in str(error.value) and "x.pth" in str(error.value)


@pytest.mark.parametrize("name", ["num_classes", "model_args"])
def test_a_folder_with_absurd_numbers_is_named(tmp_path, name):
    value = {"num_classes": 10**12, "model_args": {"depths": [10**12]}}[name]
    (tmp_path / "config.json").write_text(json.dumps({"architecture": "zoo_biformer_t", name: value}))
    with pytest.raises(UserError, match=rf"config\.json records (num_classes|model_kwargs depths)={10**12}"):
        recorded_beside(tmp_path)


@pytest.mark.parametrize("tool", ["eval", "predict", "export"])
def test_absurd_numbers_of_a_record_end_each_command_in_a_message(altered, images, tmp_path, tool, capsys):
    flags = {"predict": [str(images / "validation/red")], "eval": ["--data-dir", str(images)]}.get(tool, [])
    assert (
        run_tool(tool, *flags, "--checkpoint", altered(num_classes=10**12, batch_size=10**12), "--device", "cpu") == 1
    )
    assert "records num_classes=1000000000000, which is not a valid setting" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"epoch": 10**12}, "records epoch=1000000000000"),
        ({"epoch": -3}, "records epoch=-3"),
        ({"batches_done": 10**12}, "records batches_done=1000000000000"),
        ({"batches_per_epoch": float("nan")}, "records batches_per_epoch=nan"),
        ({"best": (1, float("nan"))}, "records best=(1, nan)"),
    ],
)
def test_no_run_goes_on_from_absurd_numbers(altered, make_args, change, message):
    with pytest.raises(UserError) as error:
        train(make_args(resume=altered(change)))
    assert message in str(error.value)


def test_numbers_that_a_run_does_not_take_from_a_record_spoil_nothing(altered, make_args):
    state = read_checkpoint(altered())
    for group in state["optimizer"]["param_groups"]:
        group.update(lr=float("nan"), weight_decay=float("inf"))
    path = altered({"optimizer": state["optimizer"]}, batch_size=10**12, lr=float("nan"), workers=-1)
    result = train(make_args(resume=path, epochs=7, model_ema=True))
    assert math.isfinite(result["train_loss"]) and 0 < result["lr"] < 1


def test_the_flags_of_timms_script_say_how_images_are_prepared():
    flags = {"model": "resnet18", "img_size": 32, "mean": [0.1, 0.2, 0.3], "std": None, "crop_pct": 1.0, "workers": 9}
    found = read_recorded({"args": argparse.Namespace(**flags, input_size=None, interpolation="")}, "x.pth")
    assert found.data_config == {"mean": [0.1, 0.2, 0.3], "crop_pct": 1.0, "input_size": (3, 32, 32)}
    assert found.model == {"model": "resnet18"} and not found.data


@pytest.mark.parametrize("tool", ["eval", "predict", "export"])
def test_no_command_follows_a_record_to_a_command(altered, images, tmp_path, tool, monkeypatch):
    mark = tmp_path / "mark"
    path = altered(dataset="wds/x", data_dir=f"pipe:touch {mark}; echo ", val_split="x-{0..1}.tar|10", workers=10**6)
    monkeypatch.setattr("visionzoo.deploy.command.write_files", lambda *_: [])
    flags = {"predict": [str(images / "validation/red"), "--output", str(tmp_path / "p")]}.get(tool, [])
    assert run_tool(tool, *flags, "--checkpoint", path, "--device", "cpu") == (tool == "eval")
    assert not mark.exists()
