"""Flags that regularize attention: they are for training, are counted, and a run continues as if never stopped."""

import pytest
import torch
from engine.helpers import assert_same, learned

from visionzoo.engine.building import build_run
from visionzoo.engine.errors import UserError
from visionzoo.engine.parallel import Process
from visionzoo.engine.training import train

HOST = {
    "model": "zoo_poolformer_s12",
    "model_kwargs": {"depths": [1, 1], "embed_dims": [8, 16], "mixers": ["pool", "full"], "layer_scale": 1.0},
    "drop_path": 0.0,
}
FLAGS = {"relaxed_attention": 0.3, "relaxed_attention_std": 0.2, "subsample_attention": 0.25}
SAID = (
    "attention relaxed by 0.3, drawn with a standard deviation of 0.2 in training, in 1 of 2 mixers",
    "attention to 0.25 of the keys in training, drawn anew, in 1 of 2 mixers",
)


def test_a_run_says_it_and_continues_as_if_never_stopped(make_args, tmp_path, capsys):
    train(make_args(experiment="whole", epochs=1, **HOST, **FLAGS))
    said = capsys.readouterr().out
    assert all(line in said for line in SAID)
    train(make_args(experiment="halves", epochs=1, max_steps=1, **HOST, **FLAGS))
    train(make_args(experiment="halves", epochs=1, resume="auto", **HOST, **FLAGS))
    assert_same(learned(tmp_path / "output/halves"), learned(tmp_path / "output/whole"))


@pytest.mark.parametrize("flag", ["relaxed_attention", "subsample_attention"])
def test_it_changes_training_only(make_args, flag):
    runs = [
        build_run(make_args(experiment=name, **HOST, **given), Process(torch.device("cpu")))
        for name, given in (("with", {flag: FLAGS[flag]}), ("without", {}))
    ]
    models = [run.trainable for run in runs]
    models[1].load_state_dict(models[0].state_dict())
    image = torch.randn(2, 3, 32, 32)
    for training in (True, False):
        outs = []
        for model in models:
            torch.manual_seed(0)
            outs.append(model.train(training)(image))
        assert torch.equal(*outs) != training
    for run in runs:
        run.close()


def test_reducers_have_no_place_beside_subsets(make_args):
    reducing = {
        "depth": 2,
        "embed_dim": 8,
        "num_heads": 2,
        "patch_size": 8,
        "img_size": 32,
        "reduce": [None, "class_attention"],
    }
    args = make_args(model="zoo_deit_t", model_kwargs=reducing, subsample_attention=0.5)
    with pytest.raises(UserError, match="--subsample-attention: zoo_deit_t has reducers, which hide tokens"):
        build_run(args, Process(torch.device("cpu")))
