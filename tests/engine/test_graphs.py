"""--cuda-graphs in a training by the command's engine; a tape stands for CUDA's graphs on the CPU."""

import sys

import pytest
import torch
from engine.helpers import UPDATES, assert_same, learned
from engine.two import in_two_processes
from tape import TapeRecorder
from timm.utils import unwrap_model
from torch.nn.parallel import DistributedDataParallel

from visionzoo.engine.building import build_run, check_graphs
from visionzoo.engine.errors import UserError
from visionzoo.engine.optimization import make_optimizer
from visionzoo.engine.options import changed
from visionzoo.engine.parallel import Process, start_process
from visionzoo.engine.training import Training, train
from visionzoo.graphs import make_capturable
from visionzoo.models.biformer import BiFormer

AUGMENTED = {"mixup": 0.4, "cutmix": 1.0, "reprob": 0.5, "model_ema": True, "model_ema_decay": 0.9, "clip_grad": 1.0}


def tapes(monkeypatch):
    """Let --cuda-graphs record tapes on the CPU, on these recorders."""
    made = []
    monkeypatch.setattr("visionzoo.engine.building.check_graphs", lambda *_: None)
    monkeypatch.setattr("visionzoo.engine.training.CudaRecorder", lambda _: made.append(TapeRecorder()) or made[-1])
    monkeypatch.setattr(sys.modules["torch.optim.adam"], "_get_capturable_supported_devices", lambda *_, **__: ["cpu"])
    return made


@pytest.fixture
def recorders(monkeypatch):
    return tapes(monkeypatch)


def never_warm(monkeypatch):
    """Let nothing be recorded from now on."""
    monkeypatch.setattr("visionzoo.graphs.WARMUP", 10**9)


@pytest.mark.parametrize(
    "options",
    [{"grad_accum_steps": 3, "batch_size": 5}, {"amp": True, "amp_dtype": "float16", "skip_nonfinite": 2}],
    ids=["accumulated", "scaler"],
)
def test_a_recorded_run_is_the_run(make_args, tmp_path, monkeypatch, recorders, options):
    options = {"epochs": 3, "val_split": "", "cuda_graphs": True, **options}
    train(make_args(experiment="graphs", **options))
    runs = len(recorders[0].runs)
    never_warm(monkeypatch)
    train(make_args(experiment="unrecorded", **options))
    assert runs >= 8 and not recorders[1].runs
    assert_same(learned(tmp_path / "output/unrecorded"), learned(tmp_path / "output/graphs"))


@pytest.mark.parametrize("way", ["logit", "feature", "scalekd"])
def test_a_recorded_distillation_is_the_run(make_args, trained, tmp_path, monkeypatch, recorders, way):
    """Also of a teacher that sees the images normalized otherwise."""
    options = {"epochs": 2, "val_split": "", "cuda_graphs": True, "no_curves": True, "mean": [0.2, 0.3, 0.4]}
    options |= {"kd_distill_type": way, "kd_checkpoint": str(trained[0] / "model_best.pth.tar")}
    train(make_args(experiment="graphs", **options))
    runs = len(recorders[0].runs)
    never_warm(monkeypatch)
    train(make_args(experiment="unrecorded", **options))
    assert runs >= 4 and not recorders[1].runs
    assert_same(learned(tmp_path / "output/unrecorded"), learned(tmp_path / "output/graphs"))


def test_a_recorded_run_goes_on_as_if_never_stopped_nor_recorded(make_args, tmp_path, monkeypatch, recorders):
    options = {**AUGMENTED, "epochs": 3, "cuda_graphs": True, "sched_on_updates": True, "val_interval": 3}
    train(make_args(experiment="stopped", max_steps=UPDATES + 2, **options))
    train(make_args(experiment="stopped", resume="auto", **options))
    assert [bool(recorder.runs) for recorder in recorders] == [True, True]
    never_warm(monkeypatch)
    train(make_args(experiment="straight", **options))
    straight, stopped = (learned(tmp_path / "output" / name) for name in ("straight", "stopped"))
    assert_same({**straight, "kept": [], "best": 0}, {**stopped, "kept": [], "best": 0})


def test_runs_with_and_without_graphs_take_up_each_other(make_args, tmp_path, recorders):
    options = {"opt_eps": 1e-2, "epochs": 3, "val_split": "", "experiment": "run"}
    train(make_args(max_steps=2, **options))
    train(make_args(max_steps=8, resume="auto", cuda_graphs=True, **options))
    assert recorders[0].runs
    train(make_args(resume="auto", **options))
    mixed = learned(tmp_path / "output/run")
    train(make_args(**{**options, "experiment": "plain"}))
    plain = learned(tmp_path / "output/plain")
    for name, value in plain["state_dict"].items():
        torch.testing.assert_close(value, mixed["state_dict"][name], rtol=1e-3, atol=1e-4)


def without_and_with_graphs(args):
    """Train by DistributedDataParallel, and by recordings, stopped or not; return what both have become here."""
    process, replicas = start_process(args.device.device), []
    for way, stops in (("ddp", [None]), ("graphs", [None] if args.fit.no_ddp_bb else [4, None])):
        for stop in stops:
            own = {"cuda_graphs": way == "graphs", "experiment": way, "max_steps": stop, "resume": "auto"}
            with pytest.MonkeyPatch.context() as patch:
                made = tapes(patch)
                run = build_run(changed(args, **own), process)
                make_capturable(run.optimizer)  # the same arithmetic
                Training(run).fit()
        assert isinstance(run.trainable, DistributedDataParallel) is (way == "ddp")
        models = [unwrap_model(model) for model in (run.trainable, run.task.get_eval_model(ema=True))]
        replicas.append([{name: value.tolist() for name, value in model.state_dict().items()} for model in models])
    return [*replicas, len(made[0].runs)]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("broadcast", "val_split"),
    [(True, ""), pytest.param(True, "val", marks=pytest.mark.full), pytest.param(False, "", marks=pytest.mark.full)],
)
def test_replicas_learn_by_graphs_as_by_ddp(make_args, broadcast, val_split):
    options = {**AUGMENTED, "epochs": 4, "grad_accum_steps": 2, "batch_size": 4, "opt": "sgd"}
    options |= {"no_ddp_bb": not broadcast, "dist_bn": "", "val_interval": 4, "val_split": val_split}
    found = in_two_processes(without_and_with_graphs, make_args(**options))
    for rank, ((plain, plain_average), (graphs, average), runs) in enumerate(found):
        assert runs >= 7  # backward, update and average
        for name, value in plain.items():
            assert value == graphs[name], name
            if rank == 0 or not broadcast:  # the first one's continue from the checkpoint in all
                mean, other = torch.tensor(plain_average[name]), torch.tensor(average[name])
                torch.testing.assert_close(mean, other, rtol=1e-5, atol=1e-6)
    (one, _), (two, _) = found[0][1], found[1][1]
    own = [name for name in one if one[name] != two[name]]
    assert bool(own) is not bool(val_split) and all("running" in name for name in own)


def test_what_is_not_recorded_is_said(make_args, recorders, capsys):
    train(make_args(epochs=1, cuda_graphs=True, opt="lamb", val_split="", max_steps=1))
    assert "--cuda-graphs: not recorded: the update: Lamb keeps what changes" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({}, "only launches on a CUDA device can be recorded, this is cpu"),
        ({"fsdp": True}, "--fsdp fetches weights between the launches"),
        ({"sync_bn": True}, "--sync-bn sends statistics between the launches"),
        ({"grad_checkpointing": True}, "sets random states in the backward pass"),
        ({"torchcompile": "inductor", "torchcompile_mode": "reduce-overhead"}, "makes CUDA graphs of its own"),
        ({"opt": "adahessian"}, "--opt adahessian differentiates gradients"),
    ],
)
def test_what_cannot_be_recorded_is_refused(make_args, change, message):
    process = Process(torch.device("cuda" if change else "cpu"))
    args = make_args(cuda_graphs=True, **change)
    with pytest.raises(UserError, match="--cuda-graphs: ") as error:
        check_graphs(args, process, make_optimizer(args.optimizer, 0.1, torch.nn.Linear(2, 2)))
    assert message in str(error.value)


def test_a_model_that_cannot_be_recorded_is_named(make_args, recorders, monkeypatch):
    original = BiFormer.forward

    def reads(self, x):
        return original(self, x) * (2.0 if x.sum().item() > 0 else 1.0)

    monkeypatch.setattr(BiFormer, "forward", reads)
    with pytest.raises(UserError, match=r"--cuda-graphs: the forward and backward pass cannot be .*; leave --cuda-gr"):
        train(make_args(cuda_graphs=True, val_split=""))


@pytest.mark.gpu
@pytest.mark.parametrize(
    "options",
    [{**AUGMENTED, "amp": True, "amp_dtype": "bfloat16", "workers": 2, "pin_mem": True}, {"torchcompile": "inductor"}],
    ids=["augmented", "compiled"],
)
def test_cuda_graphs_train_as_without(make_args, tmp_path, monkeypatch, options):
    monkeypatch.setattr(torch.backends.cudnn, "deterministic", True)
    options = {**options, "device": "cuda", "opt_eps": 1e-2, "epochs": 4, "cuda_graphs": True, "val_interval": 4}
    train(make_args(experiment="stopped", max_steps=UPDATES + 2, **options))
    train(make_args(experiment="stopped", resume="auto", **options))
    never_warm(monkeypatch)
    train(make_args(experiment="straight", **options))
    straight, stopped = (learned(tmp_path / "output" / name) for name in ("straight", "stopped"))
    for name, value in straight["state_dict"].items():
        torch.testing.assert_close(value, stopped["state_dict"][name], rtol=1e-2, atol=1e-2)
    assert straight["losses"][0] == pytest.approx(stopped["losses"][0], rel=1e-2)
