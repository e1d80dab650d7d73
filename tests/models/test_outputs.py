"""Outputs beside logits: only in training, only when asked, each once, whatever runs the model."""

import copy
import threading

import pytest
import timm
import torch
from early_exit import NAME, WEIGHTS, EarlyExit, balance_of
from torch import nn

import visionzoo
from visionzoo.deploy import Reference, Shape, export
from visionzoo.layers import outputs
from visionzoo.layers.mixers.base import Mixer
from visionzoo.layers.outputs import Exit, Outputs, add_term, collect, collecting
from visionzoo.layers.tokens import TokenBlock
from visionzoo.models._isotropic import Isotropic
from visionzoo.models._registry import VARIANTS


@pytest.fixture
def model():
    torch.manual_seed(0)
    return timm.create_model(NAME, num_classes=3).train()


@pytest.fixture
def images():
    return torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(1))


def loss_and_gradients(model, images, call=None):
    """A loss in which everything counts, and its gradients."""
    model.zero_grad()
    logits, exits, terms = (model if call is None else call)(images)
    loss = logits.square().mean() + 2 * terms["balance"] + sum(out.logits.square().mean() for out in exits)
    loss.backward()
    return float(loss), [parameter.grad.clone() for parameter in model.parameters()]


def assert_equal(one, two):
    assert one[0] == pytest.approx(two[0], rel=1e-6)
    for mine, theirs in zip(one[1], two[1], strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-5, atol=1e-7)


def test_outputs_come_in_training_and_only_when_asked(model, images):
    plain = model(images)
    assert type(plain) is torch.Tensor
    model.set_auxiliary()
    out = model(images)
    assert type(out) is Outputs and torch.equal(out.logits, plain)
    early, taught = out.exits
    assert early._replace(logits=None) == Exit("early", None)
    torch.testing.assert_close(taught.target, plain.softmax(-1))
    assert not taught.target.requires_grad and taught.logits.shape == early.logits.shape == (2, 3)
    torch.testing.assert_close(early.logits, model.early(model.stages[0](model.stem(images))))
    assert out.terms.keys() == {"balance"}
    assert out.terms["balance"].item() == pytest.approx(balance_of(model, images), rel=1e-5)
    assert model.auxiliary_weights() == WEIGHTS
    assert type(model.eval()(images)) is torch.Tensor
    model.train().set_auxiliary(False)
    assert torch.equal(model(images), plain)


def test_what_is_not_a_forward_pass_of_the_whole_model_collects_nothing(model, images):
    model.set_auxiliary()
    features, maps = model.forward_intermediates(images)
    assert type(features) is torch.Tensor and [part.shape[1] for part in maps] == [8, 16]
    assert type(model.forward_features(images)) is torch.Tensor and not collecting()
    getter = timm.create_model(NAME, features_only=True).train()
    assert all(type(part) is torch.Tensor for part in getter(images))


def test_terms_count_once_when_blocks_are_recomputed(model, images):
    model.set_auxiliary()
    straight = loss_and_gradients(model, images)
    model.set_grad_checkpointing()
    assert_equal(straight, loss_and_gradients(model, images))
    assert not collecting()
    out = model(images)
    out.logits.sum().backward()
    assert out.terms["balance"].item() == pytest.approx(balance_of(model, images), rel=1e-5)


def test_a_module_may_compute_its_term_only_where_one_collects(images):
    """Then the recomputed pass must collect too, or torch finds other tensors in it than in the first."""

    class Costly(Mixer):
        AUXILIARY = {"balance": 1.0}

        def __init__(self, dim):
            super().__init__(dim)
            self.map = nn.Linear(dim, dim)

        def forward(self, x):
            y = self.map(x)
            if collecting():
                add_term("balance", y.exp().mean())
            return y

    torch.manual_seed(0)
    blocks = [TokenBlock(8, Costly(8)) for _ in range(2)]
    model = Isotropic(blocks=blocks, embed_dim=8, img_size=32, class_token=False, num_classes=3, norm=nn.LayerNorm(8))
    model.train().set_auxiliary()
    straight = loss_and_gradients(model, images)
    model.set_grad_checkpointing()
    assert_equal(straight, loss_and_gradients(model, images))


@pytest.mark.parametrize(("backend", "checkpointing"), [("eager", False), ("eager", True), ("aot_eager", True)])
def test_compiled_models_return_the_same(model, images, backend, checkpointing):
    torch._dynamo.reset()
    model.set_auxiliary()
    model.set_grad_checkpointing(checkpointing)
    straight = loss_and_gradients(model, images)
    compiled = torch.compile(model, fullgraph=True, backend=backend)
    with torch._dynamo.config.patch(skip_fwd_side_effects_in_bwd_under_checkpoint=checkpointing):
        for _ in range(2):
            assert_equal(straight, loss_and_gradients(model, images, compiled))
    model.eval()
    assert type(compiled(images)) is torch.Tensor and not collecting()


def test_a_compiled_part_of_a_model_adds_its_terms(model, images):
    torch._dynamo.reset()
    model.set_auxiliary()
    straight = loss_and_gradients(model, images)
    for stage in model.stages:
        stage.compile(fullgraph=True, backend="eager")
    for _ in range(2):
        assert_equal(straight, loss_and_gradients(model, images))


def test_models_inside_models_keep_their_terms_apart(model, images):
    """Asked, an inner model has its own; not asked, it is a part of the outer one; in eval mode it adds nothing."""
    inner = copy.deepcopy(model)
    own = balance_of(inner, images)
    with collect() as terms:
        inner.set_auxiliary()
        out = inner(images)
        assert not terms and out.terms["balance"].item() == pytest.approx(own, rel=1e-5)
        inner.set_auxiliary(False)
        inner(images)
        assert terms["balance"].item() == pytest.approx(own, rel=1e-5)
        inner.eval()(images)
        assert terms["balance"].item() == pytest.approx(own, rel=1e-5)


def test_threads_do_not_mix_their_terms(model, images):
    model.set_auxiliary()
    expected = balance_of(model, images)
    found, inside, done = [], threading.Event(), threading.Event()

    def other():
        found.append(model(images).terms["balance"].item())

    def hook(*_):
        if threading.current_thread() is thread:  # stands still after its first stage
            inside.set()
            done.wait(30)
        else:
            thread.start()
            inside.wait(30)

    thread = threading.Thread(target=other)
    model.stages[0].register_forward_hook(hook)
    found.append(model(images).terms["balance"].item())
    done.set()
    thread.join()
    assert found == pytest.approx([expected, expected], rel=1e-5) and not collecting()


def test_a_failed_pass_leaves_nothing_behind(model, images):
    model.set_auxiliary()
    with pytest.raises(ValueError, match="expected"):
        model(images[:, :1])
    assert not collecting()
    add_term("balance", torch.zeros(3))  # nobody collects: not even looked at


def test_what_cannot_work_is_refused(model):
    with (
        collect(),
        pytest.raises(ValueError, match=r"expected a scalar for 'balance', got shape \(3,\); take its mean"),
    ):
        add_term("balance", torch.zeros(3))
    plain = timm.create_model("zoo_poolformer_s12", depths=(1, 1), embed_dims=(8, 8))
    with pytest.raises(ValueError, match="PoolFormer as built has no exits and no terms"):
        plain.set_auxiliary()
    plain.set_auxiliary(False)
    model.stages[1].blocks[0].mixer.AUXILIARY = {"balance": 0.2}
    with pytest.raises(ValueError, match=r"'balance' has the weight 0\.1 and in stages\.1\.blocks\.0\.mixer 0\.2"):
        model.auxiliary_weights()
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        _ = outputs.nothing


def test_saved_exported_and_copied_models_give_a_tensor(model, images, tmp_path):
    model.set_auxiliary()
    folder = visionzoo.save_pretrained(model, tmp_path / "m", licence="apache-2.0")
    again = timm.create_model(f"local-dir:{folder}", pretrained=True)
    assert type(again.train()(images)) is torch.Tensor
    model.eval()
    assert torch.equal(again.eval()(images), model(images))
    shape = Shape(1, (3, 32, 32))
    reference = Reference.of(model, shape)
    for format in ("pt2", "onnx"):
        pytest.importorskip("onnxscript" if format == "onnx" else "torch")
        file = export(model, tmp_path / f"x.{format}", format, shape, reference)
        assert file.error < 1e-4 * max(reference.spread, 1e-3)


def test_zoo_backbone_gives_maps(model, images, monkeypatch):
    pytest.importorskip("mmengine")
    from visionzoo.openmmlab.backbone import ZooBackbone

    monkeypatch.setitem(VARIANTS, NAME, None)
    backbone = ZooBackbone(NAME).train()
    assert [(type(part), part.shape[1]) for part in backbone(images)] == [(torch.Tensor, 8), (torch.Tensor, 16)]
    assert not collecting()


def test_the_family_is_no_model_of_the_zoo():
    assert NAME not in timm.list_models("zoo_*") and NAME not in VARIANTS and issubclass(EarlyExit, nn.Module)
