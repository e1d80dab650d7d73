"""Exported files do what their models do, in torch and in onnxruntime, and wrong ones are refused."""

import importlib.util

import pytest
import torch
from quick import quick_model
from torch import nn

import visionzoo
from visionzoo.deploy import FORMATS, Reference, Shape, export, exporting
from visionzoo.deploy.sweep import randomise
from visionzoo.engine import UserError
from visionzoo.kernels import dispatch, route_regions
from visionzoo.layers.mixers import RoutedMixer, WindowMixer
from visionzoo.models.registry import FAMILIES

if not importlib.util.find_spec("onnxscript"):
    pytest.skip('needs pip install "visionzoo[export]"', allow_module_level=True)

TWO = {"depths": [1, 1], "embed_dims": [8, 16]}
FOUR = {"depths": [1] * 4, "embed_dims": [8, 16, 16, 16], "num_heads": [1, 2, 2, 2]}
SMALL = {
    "zoo_biformer_t": {**TWO, "topks": [1, -2], "regions": 2},
    "zoo_cswin_t": {**TWO, "num_heads": [2, 2], "stripe_widths": [1, 3]},
    "zoo_davit_t": {**TWO, "num_heads": [1, 2]},
    "zoo_nat_mini": {**FOUR, "kernel_size": 3},
    "zoo_dinat_mini": {**TWO, "num_heads": [1, 2], "kernel_size": 3, "dilations": [[2], [1]]},
    "zoo_pvt_t": FOUR,
    "zoo_pvtv2_b2_li": FOUR,
    "zoo_stvit_s": FOUR,
    "zoo_litv2_s": FOUR,
    "zoo_favit_b0": FOUR,
    "zoo_eft_t": FOUR,
    "zoo_ffnet_1": {"depths": [1] * 4, "embed_dims": [8, 16, 32, 64]},
    "zoo_l2vit_t": {**FOUR, "depths": [2, 1, 1, 1]},
    "zoo_inline_swin_t": FOUR,
    "zoo_swin_t": {"depths": [2], "embed_dims": [16], "num_heads": [2]},
    "zoo_flatten_swin_t": FOUR,
    "zoo_halonet_26t": {"layout": ["c", "a"], "embed_dims": [16, 32], "mid_dims": [8, 16], "num_heads": [1, 2]},
    "zoo_levit_128s": {"depths": [1, 1, 1], "embed_dims": [16, 24, 32], "num_heads": [1, 1, 1], "key_dim": 8},
    "zoo_poolformer_s12": TWO,
    "zoo_shvit_s1": {"depths": [1, 1, 1], "embed_dims": [16, 32, 32], "partial_dims": [0, 8, 8]},
}
SHAPE = Shape(1, (3, 64, 64))


def tiny(name):
    return randomise(quick_model(name, num_classes=10, **SMALL[name]), SHAPE)


def test_every_family_is_exported_below():
    assert all(any(name in SMALL for name in variants) for variants in FAMILIES.values())


@pytest.mark.parametrize("name", SMALL)
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


@pytest.mark.parametrize("name", ["zoo_biformer_t", "zoo_dinat_mini", "zoo_poolformer_s12"])
def test_files_take_any_size_where_the_model_can_be_traced_so(name, tmp_path):
    model, shape = tiny(name), Shape(1, (3, 64, 64), dynamic_size=True)
    reference = Reference.of(model, shape)
    assert [tuple(image.shape[2:]) for image in reference.images][2:] == [(128, 64), (37, 101), (48, 48)]
    for format in ("pt2", "onnx"):
        export(model, tmp_path / f"x{FORMATS[format].suffix}", format, shape, reference)


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


def test_a_fixed_batch_is_fixed(tmp_path):
    shape = Shape(2, (3, 64, 64), dynamic_batch=False)
    model = tiny("zoo_poolformer_s12")
    file = export(model, tmp_path / "x.pt2", "pt2", shape, Reference.of(model, shape))
    assert file.checked == [(2, 3, 64, 64)] * 2
    program = torch.export.load(file.path)
    assert next(node for node in program.graph.nodes if node.name == "x").meta["val"].shape == (2, 3, 64, 64)


def test_an_aotinductor_package_runs_what_was_compiled(tmp_path):
    try:
        exporting.require_compiler()
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


class Nhwc(nn.Module):
    def __init__(self, mixer):
        super().__init__()
        self.mixer = mixer

    def forward(self, image):
        return self.mixer(image.permute(0, 2, 3, 1))


def test_programs_traced_with_many_windows_take_maps_of_one(tmp_path):
    model, shape = Nhwc(WindowMixer(16, 2, window_size=7)), Shape(1, (16, 20, 20), dynamic_size=True)
    export(model, tmp_path / "x.pt2", "pt2", shape, Reference.of(model, shape))
    program = torch.export.load(tmp_path / "x.pt2").module()
    for size in ((2, 16, 7, 7), (1, 16, 3, 40)):
        torch.testing.assert_close(program(image := torch.randn(size)), model(image))


@pytest.mark.parametrize("format", ["pt2", "onnx"])
def test_kernels_asked_for_by_name_are_refused(format, monkeypatch, tmp_path):
    monkeypatch.setenv(dispatch.ENVIRONMENT_VARIABLE, "triton")
    if not torch.cuda.is_available():
        monkeypatch.setenv("TRITON_INTERPRET", "1")
    device = "cuda" if torch.cuda.is_available() else "cpu"
    model, shape = Nhwc(RoutedMixer(32, 2, regions=2, topk=2)).to(device), Shape(1, (32, 4, 4))
    reference = Reference.of(model, shape)
    with pytest.raises(UserError, match=r"Triton kernels by name \(.*visionzoo.*unset VISIONZOO_BACKEND"):
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
