"""Flags that regularize attention: they are for training, are counted, and a run continues as if never stopped."""

import pytest
import torch
from engine.helpers import UPDATES, assert_same, learned

from visionzoo.engine.parallel import Process
from visionzoo.engine.run import build_run
from visionzoo.engine.training import train

HOST = {
    "model": "zoo_poolformer_s12",
    "model_kwargs": {"depths": [1, 1], "embed_dims": [8, 16], "mixers": ["pool", "full"], "layer_scale": 1.0},
    "drop_path": 0.0,
}
CASES = {
    "relaxed": (
        {"relaxed_attention": 0.3, "relaxed_attention_std": 0.2},
        "attention relaxed by 0.3, drawn with a standard deviation of 0.2 in training, in 1 of 2 mixers",
    ),
}


@pytest.mark.parametrize("case", CASES)
def test_it_is_said_changes_training_only_and_resumes_as_if_never_stopped(make_args, tmp_path, capsys, case):
    flags, said = CASES[case]
    train(make_args(experiment="whole", **HOST, **flags))
    assert said in capsys.readouterr().out
    train(make_args(experiment="halves", max_steps=UPDATES + 1, **HOST, **flags))
    train(make_args(experiment="halves", resume="auto", **HOST, **flags))
    assert_same(learned(tmp_path / "output/halves"), learned(tmp_path / "output/whole"))
    models = [
        build_run(make_args(experiment=name, **HOST, **given), Process(torch.device("cpu"))).trainable
        for name, given in (("with", flags), ("without", {}))
    ]
    models[1].load_state_dict(models[0].state_dict())
    image = torch.randn(2, 3, 32, 32)
    for training in (True, False):
        outs = []
        for model in models:
            torch.manual_seed(0)
            outs.append(model.train(training)(image))
        assert torch.equal(*outs) != training
