"""One call makes a model fast, and what it returns computes what the model does."""

import pytest
import timm
import torch
from quick import quick_model
from torch import nn

import visionzoo


def _model(name="zoo_levit_128s"):
    return quick_model(name, depths=(1, 1, 1), num_classes=7)


def _error(out, expected):
    return ((out.double() - expected.double()).norm() / expected.norm()).item()


IMAGE = torch.randn(2, 3, 64, 80, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("channels_last", [True, False])
@torch.no_grad()
def test_default_on_a_cpu_is_an_eager_fused_copy(channels_last):
    model = _model().train()
    fast = visionzoo.optimize_for_inference(model, channels_last=channels_last)
    assert type(fast.model) is type(model) and not fast.training and model.training
    assert not any(isinstance(module, nn.modules.batchnorm._BatchNorm) for module in fast.modules())
    assert fast.stages[1].downsample[0].kv.linear.bias is not None
    weight = fast.stem[2].conv.weight
    assert weight.is_contiguous(memory_format=torch.channels_last) == channels_last
    assert _error(fast(IMAGE), model.eval()(IMAGE)) <= 2e-6


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
@torch.no_grad()
def test_images_are_cast_to_the_dtype_and_the_model_is_not_changed(dtype):
    model = _model("zoo_shvit_s1")
    fast = visionzoo.optimize_for_inference(model, dtype=dtype)
    assert {p.dtype for p in fast.parameters()} == {dtype} and {p.dtype for p in model.parameters()} == {torch.float32}
    out = fast(IMAGE)
    assert out.dtype == dtype
    assert _error(out, model(IMAGE)) <= 20 * torch.finfo(dtype if dtype.itemsize < 4 else torch.float32).eps


@torch.no_grad()
def test_optimizing_twice_is_once():
    once = visionzoo.optimize_for_inference(_model())
    twice = visionzoo.optimize_for_inference(once)
    assert torch.equal(once(IMAGE), twice(IMAGE)) and type(twice.model) is type(once.model)


@pytest.mark.slow
@torch.no_grad()
def test_compiled_model_is_one_graph_that_is_ready_after_the_example():
    model = _model().double()
    torch.compiler.reset()
    graphs = []

    def backend(graph, _):
        graphs.append(graph)
        return graph

    fast = visionzoo.optimize_for_inference(
        model, mode="default", backend=backend, fullgraph=True, example_input=(2, 3, 64, 80)
    )
    assert len(graphs) == 1
    expected = model(IMAGE.double())
    for image in (IMAGE, IMAGE.double()):
        assert _error(fast(image), expected) <= 1e-12
    with torch.enable_grad():
        assert not fast(IMAGE).requires_grad
    assert len(graphs) == 1


def test_inductor_is_told_to_leave_memory_formats_alone(monkeypatch):
    given = []
    monkeypatch.setattr(torch, "compile", lambda model, **kwargs: given.append(kwargs) or model)
    visionzoo.optimize_for_inference(_model(), mode="reduce-overhead", dynamic=True, options={"max_autotune": True})
    visionzoo.optimize_for_inference(_model(), mode="default", backend="eager")
    assert given == [
        {"dynamic": True, "options": {"triton.cudagraphs": True, "layout_optimization": False, "max_autotune": True}},
        {"mode": "default", "backend": "eager"},
    ]


@pytest.mark.parametrize("name", ["zoo_levit_128s", "zoo_poolformer_s12"])  # the second has nothing to fold
def test_training_is_refused_and_the_rest_is_the_model_s(name):
    fast = visionzoo.optimize_for_inference(quick_model(name))
    with pytest.raises(RuntimeError, match="train the model that it was made from"):
        fast.train()
    assert not fast.eval().training and not fast(IMAGE).requires_grad
    assert fast.num_classes == 1000 and fast.forward_features(IMAGE).shape[:2] == (2, fast.num_features)
    with pytest.raises(AttributeError, match="no_such_thing"):
        _ = fast.no_such_thing


@torch.no_grad()
def test_feature_extractors_give_all_their_maps():
    model = timm.create_model("zoo_shvit_s1", features_only=True, depths=(1, 1, 1)).eval()
    fast = visionzoo.optimize_for_inference(model, example_input=IMAGE)
    assert all(_error(own, other) <= 2e-6 for own, other in zip(fast(IMAGE), model(IMAGE), strict=True))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"dtype": torch.int8}, "dtype=torch.int8"),
        ({"example_input": (3, 224, 224)}, r"\(3, 224, 224\)"),
        ({"example_input": (1, 3, 0, 224)}, r"\(1, 3, 0, 224\)"),
        ({"dynamic": True}, "mode='default'"),
    ],
)
def test_bad_arguments_are_named(options, message):
    with pytest.raises(ValueError, match=message):
        visionzoo.optimize_for_inference(_model(), **options)


@pytest.mark.slow
@torch.no_grad()
def test_inductor_on_a_cpu():
    model = quick_model("zoo_shvit_s1", depths=(1,), embed_dims=(16,), partial_dims=(4,), num_classes=7)
    torch.compiler.reset()
    fast = visionzoo.optimize_for_inference(model, mode="default", example_input=IMAGE[:1])
    assert _error(fast(IMAGE[:1]), model(IMAGE[:1])) <= 1e-5


@pytest.mark.gpu
@pytest.mark.parametrize("name", ["zoo_levit_128s", "zoo_shvit_s1"])
@torch.no_grad()
def test_cuda_graphs_on_a_gpu(name):
    model = _model(name).cuda()
    image = IMAGE.cuda()
    expected = model(image)
    for dtype, tolerance in ((torch.float32, 1e-3), (torch.bfloat16, 0.1), (torch.float16, 0.02)):
        torch.compiler.reset()
        fast = visionzoo.optimize_for_inference(model, dtype=dtype, example_input=image)
        outs = [fast(image).clone() for _ in range(3)]
        assert all(_error(out, expected) <= tolerance for out in outs)
        assert torch.equal(outs[0], outs[1])
        assert not torch.equal(fast(image * 2), outs[0])  # the graph reads the new image
