"""Several processes: they learn what one learns, stop together, and take up each other's checkpoints."""

import os
import signal
import traceback
from pathlib import Path

import pytest
import timm
import torch
from engine.helpers import TINY, UPDATES, assert_same, learned, results
from engine.two import in_two_processes, losses
from quick import learned_from, meta_model, quick_model
from timm.data.distributed_sampler import RepeatAugSampler
from timm.task import ClassificationTask
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

from visionzoo.engine import sharding
from visionzoo.engine.building import build_run
from visionzoo.engine.checkpoints import read_checkpoint
from visionzoo.engine.errors import Interrupted, UserError
from visionzoo.engine.flags import train_parser
from visionzoo.engine.options import changed
from visionzoo.engine.parallel import launcher, start_process, translate_slurm
from visionzoo.engine.training import Training, train
from visionzoo.models import _registry

pytestmark = pytest.mark.slow
POOLFORMER = {"model": "zoo_poolformer_s12", "model_kwargs": {"depths": [1, 1], "embed_dims": [8, 16]}}
SAME = {  # nothing that depends on how images are dealt out: no batch norm, no augmentation
    **POOLFORMER,
    "no_aug": True,
    "drop_path": 0.0,
    "clip_grad": 0.5,
    "model_ema": True,
    "model_ema_decay": 0.8,
    "log_interval": 1,
    "epochs": 2,
    "checkpoint_hist": 1,
}


@pytest.fixture(scope="module")
def straight(tmp_path_factory, images):
    """A run of one process with batches of 12."""
    output = tmp_path_factory.mktemp("straight")
    parser = train_parser()
    parser.set_defaults(**TINY, data_dir=str(images), output=str(output), experiment="run")
    train(changed(parser.parse_with_config([]), **SAME, batch_size=12))
    return output / "run"


@pytest.mark.parametrize("way", ["ddp", "fsdp", "fsdp-compiled"])
def test_two_processes_learn_what_one_learns_from_batches_twice_as_large(make_args, straight, way):
    compiled = {"torchcompile": "eager"} if "compiled" in way else {}
    args = make_args(batch_size=6, fsdp="fsdp" in way, **SAME, **compiled)
    in_two_processes(train, args)
    one, two = losses(straight), losses(folder_of(args))
    assert len(one) == len(two) == 2 * 3
    assert one == pytest.approx(two, rel=1e-5)
    folder = folder_of(args)
    for mine, theirs in zip(results(straight), results(folder), strict=True):
        assert {k: float(v) for k, v in mine.items()} == pytest.approx(
            {k: float(v) for k, v in theirs.items()}, rel=1e-4
        )
    mine, theirs = learned(straight), learned(folder)
    for key in ("state_dict", "state_dict_ema"):
        assert mine[key].keys() == theirs[key].keys()
        for name in mine[key]:
            torch.testing.assert_close(theirs[key][name], mine[key][name], rtol=1e-3, atol=1e-5)
    timm.create_model(SAME["model"], num_classes=3, **SAME["model_kwargs"]).load_state_dict(theirs["state_dict"])


def folder_of(args):
    return Path(args.run.output) / args.run.experiment


@pytest.mark.parametrize("ways", [(True, True), (True, False), (False, True)], ids=str)
def test_runs_with_and_without_fsdp_take_up_each_others_checkpoints(make_args, straight, ways):
    before, after = ways
    in_two_processes(train, make_args(batch_size=6, fsdp=before, max_steps=2, recovery_interval=1, **SAME))
    args = make_args(batch_size=6, fsdp=after, resume="auto", **SAME)
    in_two_processes(train, args)
    mine, theirs = learned(straight), learned(folder_of(args))
    assert theirs["optimizer"]["state"].keys() == mine["optimizer"]["state"].keys()
    for number, entries in mine["optimizer"]["state"].items():
        for name, value in entries.items():
            torch.testing.assert_close(theirs["optimizer"]["state"][number][name], value, rtol=1e-3, atol=1e-5)
    for name, value in mine["state_dict"].items():
        torch.testing.assert_close(theirs["state_dict"][name], value, rtol=1e-3, atol=1e-5)


def stopped_by_the_second(args):
    original = Training._forward_backward

    def interrupted(self, *rest):
        original(self, *rest)
        if self.run.update == 2 and self.run.process.rank == 1:
            os.kill(os.getpid(), signal.SIGTERM)

    Training._forward_backward = interrupted
    with pytest.raises(Interrupted) as error:
        train(args)
    return str(error.value)


@pytest.mark.parametrize("fsdp", [False, True])
def test_a_signal_to_one_process_stops_both_at_the_same_update(make_args, tmp_path, fsdp):
    options = dict(batch_size=4, epochs=2, fsdp=fsdp, mixup=0.5, checkpoint_hist=1)
    in_two_processes(train, make_args(experiment="straight", **options))
    said, _ = in_two_processes(stopped_by_the_second, make_args(experiment="stopped", **options))
    recovery = tmp_path / "output/stopped/recovery.pth.tar"
    assert f"stopped by SIGTERM; saved {recovery}; continue with: torchrun --nproc-per-node 2 " in said
    assert read_checkpoint(recovery)["batches_done"] == 3
    in_two_processes(train, make_args(experiment="stopped", resume="auto", **options))
    if not fsdp:  # batch norms of other processes are not in a checkpoint; under DDP they follow the first one's
        assert_same(learned(tmp_path / "output/straight"), learned(tmp_path / "output/stopped"))


def pyramid_steps(name):
    """Take two steps of DDP; return what has no gradient."""
    count = len(meta_model(name, **_registry.TINY[name]).feature_info)
    pyramid = quick_model(name, features_only=True, out_indices=range(count)[-4:], **_registry.TINY[name]).train()
    ddp = DistributedDataParallel(pyramid)
    for _ in range(2):  # the second finds parameters that had no gradient in the first
        sum(maps.square().mean() for maps in ddp(torch.randn(2, 3, 64, 64))).backward()
    return [name for name, parameter in pyramid.named_parameters() if parameter.grad is None]


def sharded_step(name):
    """Return by how much the logits of a shared-out model differ from the whole one's, and what has no gradient."""
    model, image = quick_model(name, **_registry.TINY[name]), torch.randn(2, 3, 64, 64)
    expected = model(image)
    sharding.shard(ClassificationTask(model, torch.nn.CrossEntropyLoss(), verbose=False))
    logits = model(image)
    learned_from(model.train(), image).backward()
    assert any(isinstance(parameter, DTensor) for parameter in model.parameters())
    difference = float((logits - expected).abs().max() / expected.abs().max())
    return difference, [name for name, parameter in model.named_parameters() if parameter.grad is None]


def every_family(names):
    start_process("cpu")
    found = {}
    for name in names:
        for step in (pyramid_steps, sharded_step):
            try:
                found[name, step.__name__] = step(name)
            except Exception:
                found[name, step.__name__] = traceback.format_exc()
    return found


@pytest.fixture(scope="module")
def stepped():
    return in_two_processes(every_family, list(_registry.TINY))


@pytest.mark.xdist_group("every family in two processes")
@pytest.mark.parametrize("name", _registry.TINY)
def test_every_pyramid_trains_without_looking_for_unused_parameters(stepped, name):
    assert [found[name, "pyramid_steps"] for found in stepped] == [[], []]


@pytest.mark.xdist_group("every family in two processes")
@pytest.mark.parametrize("name", _registry.TINY)
def test_every_family_is_the_same_function_when_shared_out(stepped, name):
    for found in stepped:
        step = found[name, "sharded_step"]
        assert not isinstance(step, str), step
        difference, without = step
        assert difference < 1e-5 and without == []


def repeated(args):
    run = build_run(args, start_process(args.device.device))
    loop = Training(run)
    targets = [targets.tolist() for _, _, targets in loop._remaining_batches()]
    return isinstance(run.loader.sampler, RepeatAugSampler), list(run.loader.sampler), targets


def test_repeated_augmentation_shows_an_image_to_several_processes(make_args):
    (one, first, _), (two, second, _) = in_two_processes(repeated, make_args(batch_size=6, aug_repeats=2))
    assert one and two
    assert first == second and len(set(first)) == len(first) == 18  # each image once here, once there


def test_processes_of_srun_find_each_other(make_args):
    rows = in_two_processes(train, make_args(batch_size=4, epochs=1), environment="slurm")
    assert rows[0]["updates"] == rows[1]["updates"] == UPDATES


SLURM = {"SLURM_NTASKS": "16", "SLURM_PROCID": "9", "SLURM_LOCALID": "1", "SLURM_JOB_ID": "77", "SLURM_STEP_ID": "1"}
STARTED = {"SLURM_STEP_NUM_TASKS": "16", "SLURM_STEP_NODELIST": "gpu-a[07-08,11],other"}


@pytest.mark.parametrize(
    ("variables", "expected"),
    [
        ({}, {"WORLD_SIZE": None}),
        (SLURM, {"WORLD_SIZE": "1", "RANK": None}),  # a batch script that does not start its tasks
        (
            SLURM | STARTED,
            {"RANK": "9", "LOCAL_RANK": "1", "WORLD_SIZE": "16", "MASTER_ADDR": "gpu-a07", "MASTER_PORT": "15078"},
        ),
        (SLURM | STARTED | {"SLURM_STEP_NODELIST": "n1"}, {"MASTER_ADDR": "n1"}),
        (SLURM | STARTED | {"MASTER_ADDR": "10.0.0.1", "MASTER_PORT": "1"}, {"MASTER_ADDR": "10.0.0.1"}),
        (SLURM | STARTED | {"WORLD_SIZE": "4", "RANK": "3"}, {"WORLD_SIZE": "4", "RANK": "3", "MASTER_ADDR": None}),
    ],
    ids=["none", "sbatch", "srun", "one node", "given", "torchrun in srun"],
)
def test_slurms_variables_are_understood(monkeypatch, variables, expected):
    for name in [name for name in os.environ if name.startswith("SLURM")] + ["RANK", "WORLD_SIZE", "LOCAL_RANK"]:
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(os, "environ", dict(os.environ) | variables)
    translate_slurm()
    assert {name: os.environ.get(name) for name in expected} == expected


@pytest.mark.parametrize(
    ("variables", "words"),
    [
        ({}, "python"),
        ({"WORLD_SIZE": "1", "TORCHELASTIC_RUN_ID": "x"}, "python"),
        ({"WORLD_SIZE": "8", "LOCAL_WORLD_SIZE": "8", "TORCHELASTIC_RUN_ID": "x"}, "torchrun --nproc-per-node 8"),
        (
            {
                "WORLD_SIZE": "16",
                "LOCAL_WORLD_SIZE": "8",
                "GROUP_WORLD_SIZE": "2",
                "TORCHELASTIC_RUN_ID": "x",
                "MASTER_ADDR": "n1",
            },
            "torchrun --nproc-per-node 8 --nnodes 2 --rdzv-backend c10d --rdzv-endpoint n1:29400",
        ),
        ({"WORLD_SIZE": "16", "SLURM_PROCID": "0"}, "srun python"),
    ],
)
def test_the_command_to_go_on_starts_as_many_processes(monkeypatch, variables, words):
    monkeypatch.setattr(os, "environ", variables)
    assert launcher() == words


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({}, "start several by torchrun"),
        ({"amp": True}, "pass --amp-dtype bfloat16"),
        ({"clip_grad": 1.0, "clip_mode": "agc"}, "pass --clip-mode norm"),
    ],
)
def test_what_cannot_be_shared_out_is_refused(make_args, change, message):
    config = make_args(fsdp=True, **change)
    with pytest.raises(UserError, match=message):
        sharding.check(config.device, config.optimizer, bool(change), None)
