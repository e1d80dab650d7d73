"""Exported files do what their models do, in torch and in onnxruntime, and wrong ones are refused."""

import importlib.util
import os
import signal
from pathlib import Path

import pytest
import torch
from quick import quick_model
from torch import nn
from torch.torch_version import TorchVersion

import visionzoo
from visionzoo.deploy import FORMATS, Reference, Shape, export, formats
from visionzoo.deploy.sweep import randomise
from visionzoo.engine import UserError
from visionzoo.kernels import route_regions
from visionzoo.layers.mixers import MIXERS, RoutedMixer, WindowMixer, build_mixer
from visionzoo.models._registry import FAMILIES, TINY

if not importlib.util.find_spec("onnxscript"):
    pytest.skip('needs pip install "visionzoo[export]"', allow_module_level=True)

ONE_EACH = [next(name for name in TINY if name in names) for names in FAMILIES.values()]


def one_each(*some):
    """A model of each family, of which `some` run without --full."""
    return pytest.mark.parametrize(
        "name", [pytest.param(n, marks=[] if n in some else pytest.mark.full) for n in ONE_EACH]
    )


SHAPE = Shape(1, (3, 64, 64))


def tiny(name):
    return randomise(quick_model(name, num_classes=10, **TINY[name]), SHAPE)


@one_each("zoo_convit_t")
def test_programs_take_any_batch_and_size_or_the_model_says_that_they_cannot(name, tmp_path):
    model, shape = tiny(name), Shape(1, (3, 224, 224), dynamic_size=True)
    if not model.ANY_SIZE:
        with pytest.raises(ValueError, match=r"resize the images, or build .*img_size="):
            Reference.of(model, shape)
        return
    reference = Reference.of(model, shape)
    assert len({tuple(image.shape[2:]) for image in reference.images}) == 4 and reference.spread > 0.05
    try:
        file = export(visionzoo.fuse(model), tmp_path / "x.pt2", "pt2", shape, reference)
    except UserError as error:  # older exporters turn down more
        assert "size" in str(error) and (not model.DYNAMIC_SIZE or TorchVersion(torch.__version__) < "2.14")
    else:
        assert model.DYNAMIC_SIZE and file.error < 1e-4 * reference.spread


@one_each("zoo_biformer_t")  # a pyramid with kernels
def test_files_take_any_batch_and_give_the_models_logits(name, tmp_path):
    model = tiny(name)
    reference = Reference.of(model, SHAPE)
    assert [len(image) for image in reference.images] == [1, 3] and reference.spread > 0.05
    fused = visionzoo.fuse(model)
    for format in ("pt2", "onnx"):
        file = export(fused, tmp_path / f"x{FORMATS[format].suffix}", format, SHAPE, reference)
        assert file.error < 1e-4 * reference.spread
    assert {path.name for path in tmp_path.iterdir()} == {"x.pt2", "x.onnx"}

    import onnx

    graph = onnx.load(tmp_path / "x.onnx").graph
    assert {node.domain for node in graph.node} == {""}  # ONNX's own operators
    axes = [dim.dim_param or dim.dim_value for dim in graph.input[0].type.tensor_type.shape.dim]
    assert axes == ["batch", 3, 64, 64] and (graph.input[0].name, graph.output[0].name) == ("image", "logits")


class Nhwc(nn.Module):
    def __init__(self, mixer):
        super().__init__()
        self.mixer = mixer

    def forward(self, image):
        return self.mixer(image.permute(0, 2, 3, 1))


OTHERS = (
    "adaptive_fourier",
    "forward_cross",
    "hashed_linear",
    "neighborhood",
    "window",
)  # none of these three has them


@pytest.mark.parametrize("name", [pytest.param(n, marks=[] if n in OTHERS else [pytest.mark.full]) for n in MIXERS])
def test_every_mixer_is_written_in_onnx(name, tmp_path):
    model, shape = randomise(Nhwc(build_mixer(name, 16, 2)).eval(), Shape(1, (16, 16, 16))), Shape(1, (16, 16, 16))
    reference = Reference.of(model, shape)
    assert export(model, tmp_path / "x.onnx", "onnx", shape, reference).error < 1e-4 * reference.spread


def test_tables_that_are_resized_are_interpolated_in_onnx(tmp_path):
    mixer = build_mixer({"type": "score", "position_bias": True, "map_size": 8}, 16, 2)
    model, shape = randomise(Nhwc(mixer).eval(), Shape(1, (16, 6, 7))), Shape(1, (16, 6, 7))
    nn.init.normal_(mixer.position_bias.table)
    reference = Reference.of(model, shape)
    assert export(model, tmp_path / "x.onnx", "onnx", shape, reference).error < 1e-5 * reference.spread


@pytest.mark.full
@pytest.mark.parametrize("name", ["zoo_biformer_t", "zoo_dinat_mini", "zoo_poolformer_s12"])
def test_onnx_files_take_any_size(name, tmp_path):
    model, shape = tiny(name), Shape(1, (3, 64, 64), dynamic_size=True)
    export(model, tmp_path / "x.onnx", "onnx", shape, Reference.of(model, shape))


class TakesOneSize(nn.Module):
    def forward(self, image):
        return image.mean((2, 3)) * (2 if image.shape[2] > 60 else 1)


def test_a_model_that_goes_another_way_at_other_sizes_is_refused(tmp_path):
    shape = Shape(1, (3, 64, 64), dynamic_size=True)
    reference = Reference.of(TakesOneSize(), shape)
    with pytest.raises(UserError, match=r"any size, but its outputs differ by .* nothing was written"):
        export(TakesOneSize(), tmp_path / "x.onnx", "onnx", shape, reference)
    with pytest.raises(UserError, match=r"any size, but the file does not run: .*Guard|cannot export"):
        export(TakesOneSize(), tmp_path / "x.pt2", "pt2", shape, reference)
    assert not list(tmp_path.iterdir())


def test_a_file_that_does_something_else_is_not_written(tmp_path):
    reference = Reference.of(nn.Flatten(), SHAPE)
    for other, message in (
        (nn.Sequential(nn.Flatten(), nn.ReLU()), "outputs differ by"),
        (nn.Identity(), "the model's"),
    ):
        (tmp_path / "x.pt2").write_text("what was there")
        with pytest.raises(UserError, match=message):
            export(other, tmp_path / "x.pt2", "pt2", SHAPE, reference)
        assert (tmp_path / "x.pt2").read_text() == "what was there"
    outputs = [[output * torch.nan for output in outputs] for outputs in reference.outputs]
    with pytest.raises(UserError, match="differ by nan"):
        export(nn.Flatten(), tmp_path / "x.pt2", "pt2", SHAPE, Reference(reference.images, outputs))


def test_a_signal_that_ends_an_export_leaves_no_folder(tmp_path, monkeypatch):
    def write(model, path, *_):
        assert path.parent.name.startswith(".export-") and signal.getsignal(signal.SIGTERM) != signal.SIG_DFL
        path.write_bytes(b"x")
        os.kill(os.getpid(), signal.SIGTERM)

    monkeypatch.setitem(FORMATS, "pt2", formats.Format(".pt2", write, FORMATS["pt2"].load))
    model = nn.Sequential(nn.Flatten(), nn.Linear(3 * 64 * 64, 2))
    with pytest.raises(SystemExit) as ended:
        export(model, tmp_path / "x.pt2", "pt2", SHAPE, Reference.of(model, SHAPE))
    assert ended.value.code == 128 + signal.SIGTERM and not list(tmp_path.iterdir())
    assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL


def test_a_fixed_batch_is_fixed(tmp_path):
    shape = Shape(2, (3, 64, 64), dynamic_batch=False)
    model = tiny("zoo_poolformer_s12")
    file = export(model, tmp_path / "x.pt2", "pt2", shape, Reference.of(model, shape))
    assert file.checked == [(2, 3, 64, 64)] * 2
    program = torch.export.load(file.path)
    assert next(node for node in program.graph.nodes if node.name == "x").meta["val"].shape == (2, 3, 64, 64)


def test_an_aotinductor_package_runs_what_was_compiled(tmp_path):
    try:
        formats.require_compiler()
    except UserError as error:
        pytest.skip(str(error))
    model, shape = nn.Sequential(nn.Conv2d(3, 4, 3), nn.GELU()).eval(), Shape(1, (3, 8, 8))
    file = export(model, tmp_path / "x.aoti.pt2", "aoti", shape, Reference.of(model, shape))
    assert file.error < 1e-5 and file.checked == [(1, 3, 8, 8), (3, 3, 8, 8)]


def test_without_a_compiler_it_is_said_what_is_missing(monkeypatch, tmp_path):
    import torch._inductor.config as config

    monkeypatch.delenv("CXX", raising=False)
    missing = config.patch({"cpp.cxx": ("no-such-compiler",)})  # monkeypatch would leave the setting deleted
    message = r"finds no compiler \(.*no-such-compiler.*install one .*--format onnx pt2"
    with missing, pytest.raises(UserError, match=message):
        export(nn.Flatten(), tmp_path / "x.aoti.pt2", "aoti", SHAPE, Reference.of(nn.Flatten(), SHAPE))


def test_programs_traced_with_many_windows_take_maps_of_one(tmp_path):
    model, shape = Nhwc(WindowMixer(16, 2, window_size=7)), Shape(1, (16, 20, 20), dynamic_size=True)
    export(model, tmp_path / "x.pt2", "pt2", shape, Reference.of(model, shape))
    program = torch.export.load(tmp_path / "x.pt2").module()
    for size in ((2, 16, 7, 7), (1, 16, 3, 40)):
        torch.testing.assert_close(program(image := torch.randn(size)), model(image))


@pytest.mark.parametrize("format", ["pt2", "onnx"])
def test_kernels_asked_for_by_name_are_refused(format, monkeypatch, tmp_path):
    monkeypatch.setenv("VISIONZOO_BACKEND", "triton")
    if not torch.cuda.is_available():
        monkeypatch.setenv("TRITON_INTERPRET", "1")
    device = "cuda" if torch.cuda.is_available() else "cpu"
    model, shape = Nhwc(RoutedMixer(32, 2, regions=2, topk=2)).to(device), Shape(1, (32, 4, 4))
    reference = Reference.of(model, shape)
    with pytest.raises(UserError, match=r"Triton kernels by name \(.*visionzoo.*VISIONZOO_BACKEND unset"):
        export(model, tmp_path / f"x{FORMATS[format].suffix}", format, shape, reference)


class Routes(nn.Module):
    def forward(self, image):
        q = image.permute(0, 2, 3, 1).unsqueeze(3)
        return route_regions(q, q, regions=4, topk=5).float()


@pytest.mark.parametrize("format", ["pt2", "onnx"])
def test_of_equal_regions_an_exported_router_takes_the_first_too(format, tmp_path):
    images = [torch.randn(batch, 4, 16, 16, generator=torch.Generator().manual_seed(batch)) for batch in (1, 3)]
    for image in images:
        image[:, :, 4:12] = 1.0  # eight equal regions, as black borders make them
    reference = Reference(images, [[Routes()(image)] for image in images])
    assert len(reference.outputs[0][0].unique()) > 5
    file = export(Routes(), tmp_path / f"x{FORMATS[format].suffix}", format, Shape(1, (4, 16, 16)), reference)
    assert file.error == 0


class Mean(nn.Module):
    def forward(self, image):
        return image.mean((2, 3))


@pytest.mark.parametrize("opset", [15, 17, 18, 20])
def test_a_file_is_of_the_opset_that_was_asked_for_or_is_not_written(opset, tmp_path):
    import onnx

    model, shape = nn.Sequential(nn.Conv2d(3, 4, 1), nn.GroupNorm(2, 4), nn.GELU(), Mean()).eval(), Shape(1, (3, 4, 4))
    try:
        export(model, tmp_path / "x.onnx", "onnx", shape, Reference.of(model, shape), opset=opset)
    except UserError as error:
        assert opset < 18 and f"--opset {opset}: torch" in str(error) and "in opset 18" in str(error)
        assert not list(tmp_path.iterdir())
    else:
        assert [entry.version for entry in onnx.load(tmp_path / "x.onnx").opset_import if not entry.domain] == [opset]


def test_names_that_are_not_utf_8_are_refused_before_torch_aborts(tmp_path):
    reference = Reference.of(nn.Flatten(), SHAPE)
    path = tmp_path / os.fsdecode(b"caf\xe9") / "x.pt2"
    with pytest.raises(UserError, match="is not UTF-8, which ONNX and torch's files need"):
        export(nn.Flatten(), path, "pt2", SHAPE, reference)
    for format in ("pt2", "onnx"):
        export(nn.Flatten(), tmp_path / f"猫 é/x.{format}", format, SHAPE, reference)


@pytest.mark.parametrize("opset", [18, 22, 23])
def test_what_only_trains_is_in_no_file(opset, tmp_path):
    import onnx

    model = nn.Sequential(nn.Conv2d(3, 4, 3, bias=False), nn.BatchNorm2d(4), nn.Dropout(0.5), nn.Flatten()).eval()
    nn.init.normal_(model[1].bias)
    shape = Shape(1, (3, 8, 8))
    export(model, tmp_path / "x.onnx", "onnx", shape, Reference.of(model, shape), opset=opset)
    graph = onnx.load(tmp_path / "x.onnx").graph
    assert not {node.op_type for node in graph.node} & {"Dropout", "BatchNormalization"}
    (bias,) = (node.input[2] for node in graph.node if node.op_type == "Conv")  # into which the norm was folded
    assert [list(entry.dims) for entry in graph.initializer if entry.name == bias] == [[4]]
    onnx.checker.check_model(str(tmp_path / "x.onnx"), full_check=True)


def test_weights_beside_a_file_are_moved_and_replaced_with_it(tmp_path, monkeypatch):
    save = torch.onnx.ONNXProgram.save
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(torch.onnx.ONNXProgram, "save", lambda *args: save(*args, external_data=True))
    model, shape = nn.Sequential(nn.Flatten(), nn.Linear(1200, 50)).eval(), Shape(1, (3, 20, 20))
    reference = Reference.of(model, shape)
    file = export(model, Path("a/x.onnx"), "onnx", shape, reference)
    assert sorted(map(str, Path().rglob("*.*"))) == ["a/x.onnx", "a/x.onnx.data"] and file.megabytes > 0.2
    assert reference.error_of(FORMATS["onnx"].load(file.path)) < 1e-5  # where it lies now
