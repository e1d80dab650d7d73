"""Every shipped classification config is built, takes a training step and predicts, at a small size."""

import re
from pathlib import Path

import pytest
import timm
import torch

from visionzoo.benchmark.comparison import _runs
from visionzoo.engine.data import mixing
from visionzoo.engine.distillation import make_task
from visionzoo.engine.flags import compare_parser, train_parser
from visionzoo.engine.idle_flags import idle_flags
from visionzoo.engine.models import build_model, data_config
from visionzoo.engine.optimization import learning_rate, make_optimizer, make_scheduler, total_batch
from visionzoo.engine.options import changed
from visionzoo.engine.probing import choose_head
from visionzoo.engine.restoring import Trained
from visionzoo.layers.mixers import MIXERS, build_mixer
from visionzoo.models._registry import VARIANTS

FOLDER = Path(__file__).parents[2] / "configs" / "classification"
COMPARISONS = [path for path in sorted(FOLDER.glob("*.yaml")) if "tools/compare.py" in path.read_text()]
CONFIGS = sorted(set(FOLDER.glob("*.yaml")) - set(COMPARISONS))
PAPERS = [path for path in CONFIGS if path.stem.endswith(("_imagenet", "_cifar10"))]  # on what the authors trained on


def test_the_configs_are_there():
    family = r"^zoo_(ecoformer_|flatten_|inline_)?((?:moh|memory|lambda)_vit|t2t_nystrom|[a-z0-9]+)(_.*)?$"
    families = {re.sub(family, r"\1\2", name) for name in VARIANTS}
    families -= {"sehalonet", "eca", "dinats", "isodinat", "vitrpb", "metaformer"}  # with another's
    families |= {"spectformer_plain"}  # whose models of one width are trained otherwise than the pyramids
    assert {path.stem.rpartition("_")[0] for path in PAPERS} == families


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_a_config_builds_steps_and_predicts(path, monkeypatch):
    args = train_parser().parse_with_config([str(path)])
    size = args.input.img_size or 64
    args = changed(args, num_classes=10, img_size=size)
    model = build_model(args.model, args.input, drop_rate=args.fit.drop, drop_path_rate=args.fit.drop_path)
    config = data_config(args.model, args.input, model)
    assert config["input_size"][0] == 3
    if (
        teacher_name := args.distillation.kd_model_name
    ):  # a small teacher in the place of the published one, which is only looked up
        assert timm.get_pretrained_cfg(teacher_name, allow_unregistered=False).has_weights
        teacher = Trained(timm.create_model("test_resnet", num_classes=10), config)
        monkeypatch.setattr("visionzoo.engine.distillation.restore", lambda *asked: teacher)
    lr, _ = learning_rate(args.schedule, args.optimizer.opt, total_batch(args.fit, 1))
    task = make_task(args, model, config, None, torch.device("cpu"))
    optimizer = make_optimizer(args.optimizer, lr, task.get_trainable_module())
    _, epochs = make_scheduler(args.schedule, optimizer, updates_per_epoch=10, seed=0)
    plan = args.schedule
    assert epochs == plan.epochs + plan.cooldown_epochs + (plan.warmup_epochs if plan.warmup_prefix else 0)

    images = torch.randn(2, 3, size, size)
    targets = torch.full((2, 10), 0.1) if mixing(args.augmentation) else torch.tensor([1, 2])
    classifier = model.get_classifier()
    classifiers = classifier if isinstance(classifier, tuple) else (classifier,)
    before = [linear.weight.detach().clone() for linear in classifiers]
    loss = task(images, targets)["loss"]
    loss.backward()
    optimizer.step()
    assert loss.isfinite()
    assert not any(torch.equal(linear.weight, old) for linear, old in zip(classifiers, before, strict=True))
    assert model.eval()(images).shape == (2, 10)


@pytest.mark.parametrize("path", CONFIGS + COMPARISONS, ids=lambda path: path.stem)
def test_a_config_states_its_command(path):
    head = path.read_text().split("\nmodel:")[0]
    tool = "compare" if path in COMPARISONS else "train"
    assert f"tools/{tool}.py configs/classification/{path.name}" in head


@pytest.mark.parametrize("path", CONFIGS + COMPARISONS, ids=lambda path: path.stem)
def test_a_config_has_no_flags_without_effect(path):
    assert not idle_flags(compare_parser().parse_with_config([str(path)]).train)


def _check_models(path, every):
    args = compare_parser().parse_with_config([str(path)])
    args = changed(args, num_classes=10)
    size = args.train.input.img_size
    runs = {model: run for (model, _), run in reversed(_runs(args, path.parent).items())}
    assert len(runs) >= (3 if args.comparison.probes or args.comparison.variants else 7)
    for model, run in list(runs.items())[::every]:
        config = choose_head(run.config.fit, run.config.model)
        if " + " in model:
            with torch.device("meta"):
                build_model(config, run.config.input)
        else:
            built = build_model(config, run.config.input).train()
            assert built(torch.randn(2, 3, size, size)).shape == (2, 10)


@pytest.mark.parametrize("path", COMPARISONS, ids=lambda path: path.stem)
def test_the_models_of_a_comparison_take_its_images(path):
    _check_models(path, every=23 if "mixers" in path.stem else 1)


@pytest.mark.full
def test_all_mixers_of_the_comparison_take_its_images():
    _check_models(FOLDER / "cifar10_mixers.yaml", every=1)


def test_the_comparison_of_mixers_has_every_mixer_by_options_that_it_takes():
    args = compare_parser().parse_with_config([str(FOLDER / "cifar10_mixers.yaml")])
    specs = [{name: value for name, value in mixer.items() if name != "label"} for mixer in args.comparison.mixers]
    assert {spec["type"] for spec in specs} == {*MIXERS, "none"}
    for spec in specs:
        for width, heads in ((64, 2), (128, 4)):
            build_mixer(spec, width, heads)


@pytest.mark.parametrize("path", PAPERS, ids=lambda path: path.stem)
def test_a_papers_config_states_its_source_cost_and_the_published_numbers(path):
    text = path.read_text()
    for words in ("Not run here", "Source: ", "Cost as published: ", "arXiv "):
        assert words in text
    stated = dict(re.findall(r"^# (zoo_\w+)\b.* (\d\d\.\d+)$", text, re.MULTILINE))
    for model, top1 in stated.items():
        assert float(top1) == VARIANTS[model].published.top1
    family = f"zoo_{path.stem.rpartition('_')[0]}_"
    size = VARIANTS[train_parser().parse_with_config([str(path)]).model.model].published.size
    published = {
        name
        for name, variant in VARIANTS.items()
        if name.startswith(family) and variant.published.size == size and variant.published.top1 is not None
    }
    assert set(stated) >= published
