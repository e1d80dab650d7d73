"""Every shipped classification config is built, takes a training step and predicts, at a small size."""

import re
from pathlib import Path

import pytest
import torch
from timm.task import ClassificationTask

from visionzoo.engine.data import mixing
from visionzoo.engine.flags import train_parser
from visionzoo.engine.models import build_model, data_config
from visionzoo.engine.recipe import learning_rate, make_loss, make_optimizer, make_scheduler
from visionzoo.models.registry import FAMILIES, VARIANTS

FOLDER = Path(__file__).parents[2] / "configs" / "classification"
CONFIGS = sorted(FOLDER.glob("*.yaml"))
PAPERS = [path for path in CONFIGS if path.stem.endswith("_imagenet")]


def test_the_configs_are_there():
    assert len(CONFIGS) >= 5 and len(PAPERS) >= 3


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_a_config_builds_steps_and_predicts(path):
    args = train_parser().parse_with_config([str(path)])
    args.num_classes = 10
    model = build_model(args, drop_rate=args.drop, drop_path_rate=args.drop_path)
    assert data_config(args, model)["input_size"][0] == 3
    args.lr, _ = learning_rate(args, world_size=1)
    task = ClassificationTask(model, make_loss(args), verbose=False)
    optimizer = make_optimizer(args, model)
    _, epochs = make_scheduler(args, optimizer, updates_per_epoch=10)
    assert epochs == args.epochs + args.cooldown_epochs

    images = torch.randn(2, 3, 32, 32)
    targets = torch.full((2, 10), 0.1) if mixing(args) else torch.tensor([1, 2])
    before = model.get_classifier().weight.detach().clone()
    loss = task(images, targets)["loss"]
    loss.backward()
    optimizer.step()
    assert loss.isfinite()
    assert not torch.equal(model.get_classifier().weight, before)
    assert model.eval()(images).shape == (2, 10)


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_a_config_states_its_command(path):
    head = path.read_text().split("\nmodel:")[0]
    assert f"tools/train.py configs/classification/{path.name}" in head


@pytest.mark.parametrize("path", PAPERS, ids=lambda path: path.stem)
def test_a_papers_config_states_its_source_cost_and_the_published_numbers(path):
    text = path.read_text()
    for words in ("Not run here", "Source: ", "Cost as published: ", "arXiv "):
        assert words in text
    family = path.stem.removesuffix("_imagenet")
    stated = dict(re.findall(rf"# (zoo_{family}\w+)\b.*?(\d\d\.\d)$", text, re.MULTILINE))
    assert stated
    for model, top1 in stated.items():
        assert float(top1) == VARIANTS[model].published.top1
    assert set(stated) >= {name for name in FAMILIES[family] if VARIANTS[name].published.size == 224}
