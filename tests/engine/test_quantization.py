"""--quantize: a run says what it quantizes, continues to the bit, and its checkpoint is read by other commands."""

import re

import pytest
import torch
from engine.helpers import UPDATES, assert_same, learned, restored, run_tool
from engine.two import in_two_processes

from visionzoo.engine.building import build_run
from visionzoo.engine.checkpoints import read_checkpoint
from visionzoo.engine.errors import UserError
from visionzoo.engine.parallel import Process
from visionzoo.engine.trained_flags import eval_parser, predict_parser
from visionzoo.engine.training import Training, train
from visionzoo.quantization import LSQ, is_quantized

DEIT = {
    "model": "zoo_deit_t",
    "model_kwargs": {"depth": 1, "embed_dim": 16, "num_heads": 2, "patch_size": 8, "img_size": 32},
    "drop_path": 0.0,
    "lr": 1e-2,
}
BITS = {"quantize": {"weights": 2, "activations": 4}}
WHOLE = {**DEIT, "quantize": {**BITS["quantize"], "reparameterize": True}, "quantize_anneal": 1, "model_ema": True}


def test_a_run_anneals_and_continues_as_if_never_stopped(make_args, tmp_path, capsys):
    train(make_args(experiment="whole", weight_decay=0.5, **WHOLE))
    said = capsys.readouterr().out
    assert "quantized are 6 layers, 2 of them first or last with 8 bits, and attention in 1 of 1 mixer, 1 with" in said
    assert said.count("annealing: ") == 1 and "epoch 1: annealing: " in said
    assert "of 2,560 quantized weights are farther than 0.005 from rounding to another level and stay" in said
    train(make_args(experiment="halves", max_steps=UPDATES + 1, weight_decay=0.5, **WHOLE))
    train(make_args(experiment="halves", resume="auto", weight_decay=0.5, **WHOLE))
    assert_same(learned(tmp_path / "output/halves"), learned(tmp_path / "output/whole"))


def test_only_weights_near_rounding_change_while_annealing(make_args):
    training = Training(build_run(make_args(**WHOLE, quantize_margin=0.1), Process(torch.device("cpu"))))
    run, states = training.run, []
    hold, restore = run.annealing.hold, run.annealing.restore

    def held():
        hold()
        states.append([(m.clone(), w.clone()) for m, w in run.annealing._before])

    def restored():
        restore()
        for (weight, rows, _), (frozen, before) in zip(run.annealing.held, states[-1] if states else [], strict=False):
            assert torch.equal(weight[rows][frozen], before[frozen])
            assert not torch.equal(weight[rows][~frozen], before[~frozen])

    run.annealing.hold, run.annealing.restore = held, restored
    training.fit()
    assert len(states) == UPDATES and 0 < states[0][0][0].sum() < states[0][0][0].numel()


def test_checkpoints_build_quantized_models_elsewhere(make_args, images, tmp_path, capsys):
    train(make_args(epochs=1, **DEIT, **BITS))
    folder = tmp_path / "output/run"
    path = str(folder / "last.pth.tar")
    model = restored(predict_parser, "x.png", "--checkpoint", path).model
    assert is_quantized(model)
    state = read_checkpoint(path)["state_dict"]
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())
    assert all(quantizer.begun for quantizer in model.modules() if isinstance(quantizer, LSQ))
    assert restored(eval_parser, "--checkpoint", path, "--data-dir", str(images)).recorded.model["quantize"]
    capsys.readouterr()
    assert run_tool("eval", "--checkpoint", path, "--recorded-data", "--device", "cpu", "-j", "0") == 0


@pytest.mark.parametrize("quantized", [False, True])
def test_training_starts_from_weights_of_either_kind(make_args, tmp_path, quantized):
    train(make_args(epochs=1, experiment="start", **DEIT, **(BITS if quantized else {})))
    path = tmp_path / "output/start/last.pth.tar"
    state = read_checkpoint(path)["state_dict"]
    run = build_run(make_args(initial_checkpoint=str(path), **DEIT, **BITS), Process(torch.device("cpu")))
    own = run.trainable.state_dict()
    assert all(torch.equal(own[name], value) for name, value in state.items())
    assert (own.keys() == state.keys()) == quantized and is_quantized(run.trainable)
    run.close()


@pytest.mark.parametrize("flag", ["resume", "initial_checkpoint", "pretrained_path"])
@pytest.mark.parametrize(
    ("there", "here", "message"),
    [
        (
            BITS,
            {"quantize": {"weights": 2, "activations": 2}},
            "in another way than this model: give --quantize",
        ),
        (
            BITS,
            {"quantize": {**BITS["quantize"], "reparameterize": True}},
            "in another way than this model: give --quantize",
        ),
        (BITS, {}, "is of a quantized model: give --quantize weights=2 activations=4"),
        ({}, BITS, "is of a model that is not quantized: leave --quantize out; `visionzoo train --initial-checkpoint`"),
    ],
    ids=["bits", "parts", "float", "quantized"],
)
def test_checkpoints_quantized_otherwise_are_refused(make_args, tmp_path, flag, there, here, message):
    train(make_args(epochs=1, max_steps=1, experiment="start", **DEIT, **there))
    path = str(tmp_path / "output/start/last.pth.tar")
    args = make_args(**{"experiment": "other", **DEIT, **here, flag: path})
    if not there and flag != "resume":
        build_run(args, Process(torch.device("cpu"))).close()  # from float weights
        return
    if flag == "pretrained_path":
        message = "whose quantizers would be left out; start from it by --initial-checkpoint"
    with pytest.raises(UserError, match=re.escape(message)):
        build_run(args, Process(torch.device("cpu")))


def test_evaluation_refuses_other_bits_than_were_trained(make_args, tmp_path, capsys):
    train(make_args(epochs=1, max_steps=1, **DEIT, **BITS))
    path = str(tmp_path / "output/run/last.pth.tar")
    args = ("eval", "--checkpoint", path, "--recorded-data", "--device", "cpu", "-j", "0")
    assert run_tool(*args, "--quantize", "weights=2", "activations=8") == 1
    said = capsys.readouterr().err
    assert f"{path} is quantized in another way than this model: give --quantize weights=2 activations=4" in said


@pytest.mark.slow
def test_two_processes_begin_and_stay_alike(make_args):
    in_two_processes(_alike, make_args(batch_size=6, epochs=1, clip_grad=1.0, **DEIT, **BITS))


def _alike(args):
    from visionzoo.engine.parallel import start_process

    training = Training(build_run(args, start_process("cpu")))
    for end in (False, True):
        if end:
            training.fit()
        for value in training.run.trainable.state_dict().values():
            values = [torch.zeros_like(value) for _ in range(2)]
            torch.distributed.all_gather(values, value.contiguous())
            assert torch.equal(*values)
