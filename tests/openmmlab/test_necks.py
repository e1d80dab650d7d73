"""SDANet's neck is the authors' function, takes their checkpoints, and stands on any neck."""

import re

import numpy as np
import pytest
import torch
from golden import Record, relative_error
from recipes.gates import normal, some
from recipes.sdanet import CHANNELS, backbone_maps
from tape import Capture

pytest.importorskip("mmdet", reason='needs pip install "visionzoo[openmmlab]"')

from mmengine.registry import MODELS

from visionzoo.layers.level_attention import LevelAttention
from visionzoo.openmmlab import checkpoints

FORMS = {"cascade": {}, "ddod": {"start_level": 1, "add_extra_convs": "on_output"}}


def neck(in_channels=CHANNELS, out_channels=256, num_outs=5, **options):
    torch.manual_seed(0)
    sizes = {"in_channels": in_channels, "out_channels": out_channels, "num_outs": num_outs}
    return MODELS.build({"type": "LevelAttentionNeck", **sizes, **options})


def our_name(name):
    for pattern, replacement in LevelAttention.CHECKPOINT_KEYS["authors"]:
        name = re.sub(pattern, replacement, name)
    return f"attention.{name}" if name.startswith("levels.") else f"pyramid.{name}"


@pytest.mark.parametrize("form", FORMS)
def test_outputs_and_gradients_are_the_authors(form):
    record = Record(f"sdanet/{form}")
    model = neck(**FORMS[form]).double().eval()
    model.load_state_dict(record.state_dict())  # by the authors' names
    maps = [x.requires_grad_() for x in backbone_maps()]
    outs = model(maps)
    sum((out * normal(4 + i, out.shape)).sum() for i, out in enumerate(outs)).backward()
    own = {f"out{i}": out for i, out in enumerate(outs)} | {f"grad_c{i}": x.grad for i, x in enumerate(maps)}
    for key, expected in record.arrays.items():
        value = own[key] if key in own else model.get_parameter(our_name(key.removeprefix("grad/"))).grad
        value = some(value.detach(), expected.size)
        if key.endswith("conv_mask.bias"):  # a softmax does not feel it: rounding only
            assert max(np.abs(expected).max(), value.abs().max()) < 1e-9
        else:
            assert relative_error(value, expected) <= record.tolerance(), key
    assert len(record.arrays) >= 150


def test_a_checkpoint_by_the_authors_names_is_recognized_inside_a_detector():
    record = Record("sdanet/cascade")
    detector = torch.nn.ModuleDict({"neck": neck()})
    content = {f"neck.{name}": value for name, value in record.state_dict().items()}
    missing, other, fitting = checkpoints.compare_weights(detector, {"state_dict": content})
    assert (missing, other, len(fitting)) == ([], [], len(content))
    assert not any("attention.levels" in name for name in content)  # the checkpoint itself stays
    again = neck()
    again.load_state_dict(detector["neck"].state_dict())


def test_it_refines_any_neck_at_any_size_and_learns():
    model = neck((8, 12, 16), 16, 4, pyramid="UpsamplingFPN", num_upsamples=1)
    model.init_weights()
    with Capture():  # a CUDA graph can hold it
        outs = model([torch.randn(2, c, *size) for c, size in ((8, (9, 5)), (12, (5, 3)), (16, (3, 2)))])
    assert [tuple(x.shape) for x in outs] == [(2, 16, *size) for size in ((18, 10), (9, 5), (5, 3), (3, 2))]
    sum(x.square().mean() for x in outs).backward()
    assert all(parameter.grad is not None for parameter in model.parameters())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_levels": 1}, "expected two levels or more, got num_levels=1"),
        ({"kernel_size": 4}, "kernel_size must be odd and positive, got kernel_size=4"),
        ({"reduction": 9}, "reduction must be above 0 and at most dim=8, got reduction=9"),
        ({"context_ratio": 0.1}, "nothing remains of dim=8 channels with context_ratio=0.1; pass 0.125 or more"),
    ],
)
def test_wrong_options_are_named(options, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        LevelAttention(**{"dim": 8, "num_levels": 2, "context_ratio": 0.25, **options})


def test_wrong_maps_are_named():
    layer = LevelAttention(8, 2, context_ratio=0.25)
    maps = [torch.zeros(1, 8, 4, 4), torch.zeros(1, 8, 2, 2)]
    with pytest.raises(ValueError, match=re.escape("expected 2 levels [B, 8, H, W], got [(1, 8, 4, 4)]")):
        layer(maps[:1])
    with pytest.raises(ValueError, match="one image has no batch statistics"):
        layer(maps)
    assert [x.shape for x in layer.eval()(maps)] == [x.shape for x in maps]
