"""Layers that --freeze-layers stops: what changes, what is counted, and that a run continues as if never stopped."""

import pytest
import torch
from engine.helpers import UPDATES, assert_same, learned

from visionzoo.engine import building
from visionzoo.engine.building import build_run
from visionzoo.engine.errors import UserError
from visionzoo.engine.freezing import LayerFreezing
from visionzoo.engine.models import build_model
from visionzoo.engine.parallel import Process
from visionzoo.engine.training import Training, train
from visionzoo.quantization.layers import quantize_layer

SCHEDULE = {"freeze_layers": {"1": 2}, "weight_decay": 0.5, "drop_path": 0.0}


def stands(before, after):
    """Names of what is as it was, parameters and statistics."""
    return {name for name in before if torch.equal(before[name], after[name])}


def test_layers_stop_learning_at_their_epoch_and_resume_as_if_never_stopped(make_args, tmp_path, capsys):
    training = Training(build_run(make_args(experiment="whole", **SCHEDULE), Process(torch.device("cpu"))))
    model, states = training.run.trainable, []
    validate = training._validate
    training._validate = lambda: (states.append({k: v.clone() for k, v in model.state_dict().items()}), validate())[1]
    training.fit()
    said = capsys.readouterr().out
    layers = LayerFreezing({"1": 2}, model, "")
    total = sum(p.numel() for p in model.parameters())
    frozen = sum(p.numel() for p in model.parameters() if not p.requires_grad)
    assert f"epoch 0: 0 of {layers.num_layers} layers frozen: 0 of {total:,} parameters" in said
    assert f"epoch 1: 2 of {layers.num_layers} layers frozen: {frozen:,} of {total:,} parameters" in said
    assert said.count("layers frozen") == 2 and 0 < frozen < total
    names = stands(*states)
    assert {name for name, p in model.named_parameters() if not p.requires_grad} <= names  # nor have they decayed
    assert any(name.endswith("running_mean") for name in names)
    assert not any(name.startswith("head.fc") for name in names)

    train(make_args(experiment="halves", max_steps=UPDATES + 1, **SCHEDULE))
    train(make_args(experiment="halves", resume="auto", **SCHEDULE))
    assert_same(learned(tmp_path / "output/halves"), learned(tmp_path / "output/whole"))


def test_what_never_learns_has_no_place_in_the_optimizer(make_args, trained):
    start = str(trained[0] / "model_best.pth.tar")
    given = {"initial_checkpoint": start, "freeze_layers": {"0": 2, "4": 1}}
    run = build_run(make_args(epochs=5, **given), Process(torch.device("cpu")))
    inside = {id(p) for group in run.optimizer.param_groups for p in group["params"]}
    first = {name for name, p in run.trainable.named_parameters() if id(p) not in inside}
    assert first and all(name.startswith("stem") for name in first)  # layer 1 learns from epoch 4 on
    run.freezing.apply(run.trainable, 2)
    run.freezing.apply(run.trainable, run.freezing.count(5))
    assert {name for name, p in run.trainable.named_parameters() if not p.requires_grad} == first
    run.close()


def test_quantizers_without_a_use_do_not_learn_in_any_epoch(make_args, monkeypatch):
    def built(*args, **kwargs):
        model = build_model(*args, **kwargs)
        model.head.unused = torch.nn.Linear(4, 4)
        quantize_layer(model.head.unused, 2, 2, kind="lsq", signed=True)
        return model

    monkeypatch.setattr(building, "build_model", built)
    args = make_args(**SCHEDULE, quantize={"weights": 4, "activations": 4}, max_steps=1)
    training = Training(building.build_run(args, Process(torch.device("cpu"))))
    training.fit()
    unused = training.run.trainable.head.unused
    assert unused.weight.requires_grad
    assert not any(p.requires_grad for p in unused.quantize_input.parameters())


@pytest.mark.parametrize("change", [{"cuda_graphs": True}, {}])
def test_a_schedule_needs_one_process_without_graphs(make_args, change):
    several = Process(torch.device("cpu"), distributed=not change)
    with pytest.raises(
        UserError, match=r"--freeze-layers changes what learns at epoch 1, and .* fixes it at the start"
    ):
        build_run(make_args(**SCHEDULE, **change), several)


def test_a_model_that_has_no_layers_is_refused():
    with pytest.raises(UserError, match="--freeze-layers: plain does not say what its layers are"):
        LayerFreezing({"1": 1}, torch.nn.Linear(2, 2), "plain")
