"""Quantized models as whole numbers: the same outputs, and files that hold int8 and int4 and run in onnxruntime."""

import importlib.util
import json

import numpy as np
import pytest
import timm
import torch
from engine.helpers import run_tool
from torch import nn

import visionzoo
from visionzoo.deploy import Reference, Shape, checking, export, int_operators
from visionzoo.deploy.integers import IntegerWeight, to_integers
from visionzoo.engine import UserError
from visionzoo.quantization import QueryKeyProjection, calibrate, quantize

MODELS = {
    "zoo_deit_t": dict(depth=1, embed_dim=16, num_heads=2, patch_size=8, img_size=32),
    "zoo_swin_t": dict(depths=[1, 2], embed_dims=[8, 16], num_heads=[1, 2], window_size=3),
    "zoo_pvtv2_b0": dict(depths=[1, 1], embed_dims=[8, 16], num_heads=[1, 2], mlp_ratios=[2, 2], reductions=[2, 1]),
    "zoo_poolformer_s12": dict(depths=[1, 1], embed_dims=[8, 16]),
    "test_resnet": {},
}
SHAPE = Shape(1, (3, 32, 32))
needs_onnx = pytest.mark.skipif(not importlib.util.find_spec("onnxscript"), reason='needs "visionzoo[export]"')


def quantized(name, weights=2, activations=4, **options):
    """A quantized model whose shifts and scales are not where they begin."""
    torch.manual_seed(0)
    model = timm.create_model(name, num_classes=3, **MODELS[name])
    quantize(model, weights, activations, **options)
    calibrate(model, torch.randn(4, 3, 32, 32))
    for name, parameter in model.named_parameters():
        if name.endswith((".before", ".after")):
            torch.nn.init.normal_(parameter, std=0.1)
    return model.eval()


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("zoo_deit_t", {"reparameterize": True}),
        ("zoo_deit_t", {"weights": 8, "activations": 8}),
        ("zoo_swin_t", {"reparameterize": True}),
        ("zoo_pvtv2_b0", {"weights": 4, "weight_quantizer": "lsq"}),
        ("zoo_poolformer_s12", {"weights": 7, "activations": 3}),
        ("test_resnet", {}),
    ],
)
def test_whole_numbers_give_the_same_outputs(name, options):
    model = quantized(name, **options).double()
    images = torch.randn(2, 3, 32, 32, dtype=torch.float64)
    before = {key: value.clone() for key, value in model.state_dict().items()}
    numbers = to_integers(model)
    out = model(images)
    assert (numbers(images) - out).abs().max() <= 1e-9 * out.abs().max()
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    weights = [module for module in numbers.modules() if isinstance(module, IntegerWeight)]
    pairs = sum(isinstance(module, QueryKeyProjection) for module in model.modules())
    layers = sum(hasattr(module, "quantize_weight") for module in model.modules())
    assert len(weights) == layers + pairs and all(weight.integers.dtype == torch.int8 for weight in weights)


@needs_onnx
@pytest.mark.parametrize("name", ["zoo_deit_t", "zoo_poolformer_s12"])
def test_files_hold_whole_numbers_and_onnxruntime_computes_by_them(name, tmp_path, capsys):
    import onnx
    import onnxruntime

    deit = name == "zoo_deit_t"
    model = quantized(name, weights=2 if deit else 4, reparameterize=deit)
    numbers = to_integers(model)
    reference = Reference.of(model, SHAPE)
    file = export(numbers, tmp_path / "x.onnx", "onnx", SHAPE, reference)
    assert file.error < 1e-5 * max(1, reference.scale)
    program = onnx.load(file.path)
    kinds = [onnx.TensorProto.DataType.Name(tensor.data_type) for tensor in program.graph.initializer]
    weights = {key: module for key, module in numbers.named_modules() if isinstance(module, IntegerWeight)}
    small = len(weights) - 2  # but for the first and the last layer's
    assert kinds.count("INT4") == small and f"onnx: {small} weights in 4 bits, opset 21" in capsys.readouterr().out
    found = {tensor.name: tensor for tensor in program.graph.initializer}
    for key, module in weights.items():
        numbers = onnx.numpy_helper.to_array(tensor := found[f"{key}.integers"]).astype(np.int8)
        if tensor.data_type == onnx.TensorProto.INT4 and not deit:  # of odd numbers from -15 to 15
            numbers = 2 * numbers + 1
        assert np.array_equal(numbers, module.integers.numpy())
    options = onnxruntime.SessionOptions()
    options.optimized_model_filepath = str(tmp_path / "optimized.onnx")
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_ENABLE_EXTENDED
    onnxruntime.InferenceSession(str(file.path), options, providers=["CPUExecutionProvider"])
    used = [node.op_type for node in onnx.load(tmp_path / "optimized.onnx").graph.node]
    assert used.count("MatMulIntegerToFloat") >= 3 and "MatMulNBits" not in used


@needs_onnx
def test_weights_stay_bytes_where_4_bits_cannot_be_run(tmp_path, monkeypatch, capsys):
    import onnx

    monkeypatch.setattr(int_operators, "_runs_int4", lambda: False)
    model = quantized("zoo_poolformer_s12")
    file = export(to_integers(model), tmp_path / "x.onnx", "onnx", SHAPE, Reference.of(model, SHAPE))
    kinds = {tensor.data_type for tensor in onnx.load(file.path).graph.initializer}
    assert onnx.TensorProto.INT8 in kinds and onnx.TensorProto.INT4 not in kinds
    assert "onnx: 0 weights in 4 bits" in capsys.readouterr().out


@pytest.mark.parametrize("factor", [0.9, 1.1])
def test_files_may_differ_by_what_slight_noise_does(tmp_path, monkeypatch, factor):
    torch.manual_seed(0)
    shape = Shape(1, (3, 16, 16))
    model = nn.Sequential(nn.Flatten(), nn.Linear(768, 8), nn.ReLU(), nn.Linear(8, 3))
    quantize(model, 2, 2)
    calibrate(model, torch.randn(8, 3, 16, 16))
    numbers = to_integers(model)
    reference = Reference.of(model.eval(), shape)
    assert reference.response(numbers) < 1e-6  # nothing is rounded otherwise
    monkeypatch.setattr(checking, "NOISE", 0.02)
    response = reference.response(numbers)
    assert 1e-3 < response < reference.spread / 2
    moved = Reference(reference.images, [[out + factor * response for out in outs] for outs in reference.outputs])
    monkeypatch.setattr(Reference, "response", lambda *_: response)  # of the model before its outputs were moved
    if factor < 1:
        assert export(numbers, tmp_path / "x.pt2", "pt2", shape, moved).error == pytest.approx(factor * response)
    else:
        with pytest.raises(UserError, match=r"its outputs differ by .* nothing was written"):
            export(numbers, tmp_path / "x.pt2", "pt2", shape, moved)


@needs_onnx
def test_the_command_says_what_it_wrote(tmp_path, capsys):
    flags = ["--model", "zoo_poolformer_s12", "--model-kwargs", "depths=[1,1]", "embed_dims=[8,16]"]
    flags += ["--num-classes", "3", "--img-size", "32", "--format", "pt2", "--output", str(tmp_path)]
    assert run_tool("export", *flags, "--random-weights", "--quantize", "weights=4", "activations=8") == 0
    said = capsys.readouterr().out
    assert "quantized: 7 weights of 4,936 whole numbers, 0.00494 MB as bytes, 0.0197 MB as float32" in said
    assert json.loads((tmp_path / "zoo_poolformer_s12.json").read_text())["quantized"] == {
        "weights": 4,
        "activations": 8,
    }


def test_quantized_models_are_not_fused():
    with pytest.raises(ValueError, match="fuse: the model is quantized, and norms have no place in its levels"):
        visionzoo.fuse(quantized("zoo_poolformer_s12"))
