"""What LeViT and SHViT do beside computing logits: two classifiers, foreign checkpoints, table sizes, other mixers."""

import pytest
import timm
import torch
from golden import Record, relative_error
from quick import quick_model
from timm.layers import DropPath
from timm.task import TokenDistillationTask

import visionzoo

TINY = {"depths": (1, 1, 1), "num_classes": 6}
IMAGE = torch.randn(2, 3, 64, 96, generator=torch.Generator().manual_seed(0))


def _tiny(name="zoo_levit_128s", **kwargs):
    model = quick_model(name, **{**TINY, **kwargs})
    if getattr(model.head, "distilled", False) and model.num_classes:
        torch.nn.init.normal_(model.head.fc_dist.weight, std=0.1, generator=torch.Generator().manual_seed(1))
    return model


@pytest.mark.parametrize("stage", [0, 1, 2])
@torch.no_grad()
def test_stress_record_would_notice_a_wrong_bias_table(stress_model, stage):
    model, record = stress_model
    table = model.stages[stage].blocks[-1].mixer.bias_table
    kept = table.clone()
    try:
        side = model.stages[stage].blocks[-1].mixer.map_size[0]
        table.copy_(table.unflatten(1, (side, side)).transpose(1, 2).flatten(1))  # Δy for Δx
        error = relative_error(model(record.image()), record.arrays["stress_logits"])
        assert error > 10 * record.tolerance()
    finally:
        table.copy_(kept)


@pytest.fixture(scope="module")
def stress_model():
    record = Record("levit/levit_128s")
    model = timm.create_model("zoo_levit_128s").double().eval()
    visionzoo.load_weights(model, record.state_dict(stress=True))
    return model, record


def test_both_heads_come_apart_only_in_distilled_training():
    model = _tiny()
    assert model(IMAGE).shape == (2, 6)
    model.train()
    assert model(IMAGE).shape == (2, 6)
    model.set_distilled_training()
    logits, logits_dist = model(IMAGE)
    assert logits.shape == logits_dist.shape == (2, 6) and not torch.equal(logits, logits_dist)
    (logits.sum() + logits_dist.square().sum()).backward()
    assert all(p.grad is not None for p in model.parameters())
    assert model.eval()(IMAGE).shape == (2, 6)
    model.train().set_distilled_training(False)
    assert model(IMAGE).shape == (2, 6)


@torch.no_grad()
def test_inference_gives_the_mean_of_the_heads():
    model = _tiny()
    last = model.forward_features(IMAGE)
    mean = model.forward_head(last)
    model.head.training = model.head.distilled_training = True
    logits, logits_dist = model.forward_head(last)
    torch.testing.assert_close(mean, (logits + logits_dist) / 2)
    assert not torch.allclose(logits, logits_dist, rtol=0.1)
    pooled = model.forward_head(last, pre_logits=True)
    torch.testing.assert_close(pooled, last.mean((2, 3)))
    torch.testing.assert_close(logits_dist, model.head.fc_dist(model.head.norm_dist(pooled)))


def test_timm_distils_into_the_second_head():
    student = _tiny(num_classes=5).train()
    teacher = timm.create_model("test_resnet", num_classes=5)
    task = TokenDistillationTask(student, teacher, distill_type="hard", task_loss_weight=0.5, verbose=False)
    out = task(IMAGE, torch.tensor([1, 4]))
    out["loss"].backward()
    assert student.head.fc_dist.weight.grad.any() and student.head.fc.weight.grad.any()


def test_a_model_with_one_head_says_that_it_cannot_distil():
    for model in (_tiny(distilled=False), _tiny("zoo_shvit_s1")):
        with pytest.raises(ValueError, match="distilled=True"):
            model.set_distilled_training()
        assert isinstance(model.get_classifier(), torch.nn.Linear)
    model = _tiny("zoo_shvit_s1", distilled=True).train()
    model.set_distilled_training()
    assert len(model(IMAGE)) == len(model.get_classifier()) == 2


def test_classifier_without_pooling_is_refused_with_a_way_out():
    with pytest.raises(ValueError, match="num_classes=0"):
        _tiny(global_pool="")(IMAGE)


def test_the_authors_index_tables_and_second_head_are_left_out():
    record = Record("levit/levit_128s")
    state = record.state_dict()
    for name, shape, kind in record.meta["state"]:
        if kind == "const":
            state[name] = torch.zeros(shape, dtype=torch.long)
    assert any(name.endswith("attention_bias_idxs") for name in state)
    report = visionzoo.load_weights(timm.create_model("zoo_levit_128s", distilled=False), {"model": state})
    assert report.names == "authors" and not report.missing and not report.unexpected
    assert {name.split(".")[1] for name in report.dropped} == {"norm_dist", "fc_dist"}


def test_checkpoint_with_other_classes_keeps_both_own_classifiers_where_asked():
    state = _tiny(num_classes=9).state_dict()
    model = _tiny()
    with pytest.raises(ValueError, match="9 classes"):
        visionzoo.load_weights(model, state)
    report = visionzoo.load_weights(model, state, strict=False)
    assert len(report.adapted) == 4 and not report.missing  # weight and bias of two


def test_a_checkpoint_of_another_variant_is_refused():
    state = Record("levit/levit_128s").state_dict()
    with pytest.raises(ValueError, match="probably a checkpoint of another"):
        visionzoo.load_weights(timm.create_model("zoo_levit_128"), state)


@pytest.mark.parametrize("name", ["zoo_levit_128s", "zoo_shvit_s1"])
@torch.no_grad()
def test_tables_resize_to_any_image(name):
    model = _tiny(name)
    for size in ((32, 32), (65, 230), (320, 256)):
        assert model(torch.randn(1, 3, *size)).shape == (1, 6)


def test_img_size_says_what_the_tables_are_for():
    model = _tiny(img_size=(250, 100))
    sizes = [stage.blocks[0].mixer.map_size for stage in model.stages]
    assert sizes == [(16, 7), (8, 4), (4, 2)]
    assert [stage.downsample[0].map_size for stage in list(model.stages)[1:]] == sizes[:2]
    maps = model.forward_intermediates(torch.randn(1, 3, 250, 100), intermediates_only=True)
    assert [tuple(m.shape[2:]) for m in maps] == sizes


def test_bias_tables_are_not_decayed():
    model = _tiny()
    assert len(model.no_weight_decay()) == 5
    assert all(name.endswith("bias_table") for name in model.no_weight_decay())


@pytest.mark.parametrize("name", ["zoo_levit_128s", "zoo_shvit_s1"])
@torch.no_grad()
def test_residual_branches_start_as_nothing(name):
    model = timm.create_model(name, **TINY).eval()
    for stage in model.stages:
        x = torch.randn(1, 3, 4, stage.blocks[0].mlp.fc2.linear.out_features)
        assert torch.equal(stage.blocks(x), x)


def test_stochastic_depth_is_constant_in_levit_and_rises_in_shvit():
    rates = [m.drop_prob for m in _tiny(drop_path_rate=0.2).modules() if isinstance(m, DropPath)]
    assert rates == [0.2] * 5  # three blocks, two transitions
    rates = [m.drop_prob for m in _tiny("zoo_shvit_s1", drop_path_rate=0.2).modules() if isinstance(m, DropPath)]
    assert rates == pytest.approx([0.1, 0.2])


@pytest.mark.parametrize("host", ["zoo_levit_192", "zoo_shvit_s2", "zoo_davit_t", "zoo_poolformer_s12"])
@pytest.mark.parametrize("mixer", ["levit", "single_head", "none", "window"])
def test_mixers_and_hosts_combine(host, mixer):
    depths = {"depths": (1, 1, 1)} if "levit" in host or "shvit" in host else {"depths": (1, 1, 1, 1)}
    model = _tiny(host, mixers=mixer, **depths).train()
    image = IMAGE.clone().requires_grad_()
    model(image).square().sum().backward()
    assert image.grad.any() and torch.isfinite(image.grad).all()
    assert (model.stages[1].blocks[0].mixer is None) == (mixer == "none")


@pytest.mark.slow
def test_compiled_training_step_is_one_graph():
    model = _tiny()
    torch.compiler.reset()
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    gradients = []
    for run in (model, compiled):
        model.zero_grad()
        run(IMAGE).square().sum().backward()
        gradients.append([p.grad.clone() for p in model.parameters()])
    for own, expected in zip(*gradients, strict=True):
        assert (own - expected).norm() <= 1e-3 * expected.norm() + 1e-5
