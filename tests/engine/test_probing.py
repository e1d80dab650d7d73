"""Probes and heads that the flags put onto a model: what learns, what checkpoints keep, and what is refused."""

import json

import pytest
import timm
import torch
from engine.helpers import TINY, UPDATES, assert_same, learned, run_tool

from visionzoo.engine.building import build_run
from visionzoo.engine.checkpoints import read_checkpoint
from visionzoo.engine.errors import UserError
from visionzoo.engine.parallel import Process
from visionzoo.engine.probing import choose_head
from visionzoo.engine.training import train

EP = {"probe": "ep", "head_kwargs": {"num_queries": 2, "d_out": 2}}


@pytest.fixture
def start(trained):
    return str(trained[0] / "model_best.pth.tar")


def test_a_probe_learns_alone_goes_on_as_if_never_stopped_and_is_used_as_built(
    make_args, start, images, tmp_path, capsys
):
    flags = {"freeze": True, "initial_checkpoint": start, **EP}
    result = train(make_args(experiment="whole", **flags))
    said = capsys.readouterr().out
    assert "missing: head.pooling.query" in said and "2 dropped: head.fc.weight" in said
    before, after = read_checkpoint(start)["state_dict_ema"], learned(tmp_path / "output/whole")["state_dict"]
    changed = {name for name, value in after.items() if name not in before or not torch.equal(before[name], value)}
    assert changed == {name for name in after if name.startswith("head.")}  # nor have batch norms seen a thing
    assert after["head.norm.num_batches_tracked"] == 2 * UPDATES and after["head.fc.weight"].shape == (3, 8)

    train(make_args(experiment="halves", max_steps=UPDATES + 1, **flags))
    train(make_args(experiment="halves", resume="auto", **flags))
    assert_same(learned(tmp_path / "output/halves"), learned(tmp_path / "output/whole"))

    last = str(tmp_path / "output/whole/last.pth.tar")
    capsys.readouterr()
    assert run_tool("eval", "--checkpoint", last, "--data-dir", str(images), "-j", "0", "--device", "cpu") == 0
    assert json.loads((tmp_path / "output/whole/eval-last.json").read_text())["top1"] == round(result["eval_top1"], 4)
    assert run_tool("export", "--checkpoint", last, "--output", str(tmp_path / "x"), "--format", "pt2") == 0
    assert run_tool("convert", TINY["model"], last, str(tmp_path / "folder"), "--license", "mit") == 0
    model = timm.create_model(f"local-dir:{tmp_path / 'folder'}", pretrained=True)
    assert torch.equal(model.head.pooling.query, after["head.pooling.query"])


def test_attentive_probing_changes_its_head_alone(make_args, start, tmp_path):
    flags = {"freeze": True, "initial_checkpoint": start, "probe": "attentive", "head_kwargs": {"num_heads": 2}}
    train(make_args(max_steps=1, **flags))
    before, after = read_checkpoint(start)["state_dict_ema"], learned(tmp_path / "output/run")["state_dict"]
    assert all(torch.equal(value, before[name]) for name, value in after.items() if not name.startswith("head."))
    assert "head.pooling.latent" in after


def test_a_head_is_trained_with_the_whole_model(make_args, start, tmp_path):
    train(make_args(initial_checkpoint=start, max_steps=1, head="ep", head_kwargs={"num_queries": 4}))
    before, after = read_checkpoint(start)["state_dict_ema"], learned(tmp_path / "output/run")["state_dict"]
    assert after["head.pooling.query"].shape == (1, 4, 16)
    assert not torch.equal(before["stages.0.blocks.0.mixer.qkv.weight"], after["stages.0.blocks.0.mixer.qkv.weight"])
    again = {"initial_checkpoint": str(tmp_path / "output/run/last.pth.tar"), "experiment": "x"}
    run = build_run(
        make_args(freeze=True, probe="ep", head_kwargs={"num_queries": 4}, **again), Process(torch.device("cpu"))
    )
    assert torch.equal(run.trainable.head.pooling.query, after["head.pooling.query"])  # of the same head: taken up
    learning = [id(parameter) for group in run.optimizer.param_groups for parameter in group["params"]]
    assert sorted(learning) == sorted(map(id, run.trainable.head.parameters())) and len(learning) == 4


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ({"probe": "ep"}, "--probe ep is what --freeze trains .*: add --freeze; .* give --head"),
        ({"probe": "ep", "freeze": True, "head": "ep"}, "--probe ep together with --head ep"),
        ({"head_kwargs": {"num_queries": 2}}, "num_queries=2 are options of a head: give --probe or --head too"),
        (
            {"head_kwargs": {"num_queries": 2}, "probe": "linear", "freeze": True},
            "num_queries=2 are options of a head: --probe linear has none",
        ),
        ({"head": "ep", "model": "test_convnext"}, "'ep' can be put onto zoo_.* models, test_convnext is timm's own"),
        ({"head": "ep", "model_kwargs": {"head": "attentive"}}, "--model-kwargs head='attentive' beside"),
    ],
)
def test_flags_that_contradict_are_one_message(make_args, flags, message):
    with pytest.raises(UserError, match=message):
        args = make_args(**flags)
        choose_head(args.fit, args.model)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_queries": 3}, "num_queries must divide the 16 channels of the output, got num_queries=3; .* 2, 4"),
        ({"d_out": 0}, "d_out must divide the 16 channels, got d_out=0"),
        ({"queries": 2}, r"queries=2 \(did you mean 'num_queries'\?\)"),
    ],
)
def test_options_that_do_not_fit_name_the_remedy(make_args, options, message):
    with pytest.raises(UserError, match=f"cannot build {TINY['model']}: .*{message}"):
        train(make_args(head="ep", head_kwargs=options))
