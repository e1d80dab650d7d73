"""Every shipped detection and segmentation config is built, takes a training step and predicts, at a tiny size."""

import ast
from pathlib import Path

import pytest
import torch
from quick import no_initialisation

pytest.importorskip("mmdet", reason='needs pip install "visionzoo[openmmlab]"')

from mmengine.optim import build_optim_wrapper
from mmengine.registry import MODELS
from openmmlab.shrink import inputs, load_small

from visionzoo.openmmlab.config_checks import check_channels
from visionzoo.openmmlab.config_errors import unread

FOLDER = Path(__file__).parents[2] / "configs"
CONFIGS = sorted(path for kind in ("detection", "segmentation") for path in (FOLDER / kind).glob("*.py"))


def test_the_configs_are_there():
    names = " ".join(path.stem for path in CONFIGS)
    for word in (
        "retinanet",
        "retinanet-sdanet",
        "mask-rcnn",
        "cascade-mask-rcnn",
        "dino",
        "focus-detr",
        "vidt",
        "vidt-plus",
        "semantic-fpn",
        "upernet",
        "mask2former",
        "eco-mask2former",
    ):
        assert word in names
    for word in ("edaformer_zoo-eft-t", "fuss-free_zoo-ffnet46ns-ccc"):
        assert word in names
    for family in (
        "biformer",
        "davit",
        "poolformer",
        "shvit",
        "levit",
        "flatten",
        "pvt",
        "swin",
        "cswin",
        "halonet",
        "nat",
        "dinat",
        "litv2",
        "favit",
        "fcaformer",
        "eft",
        "ffnet",
        "l2vit",
        "inline",
        "stvit",
        "pcpvt",
        "transnext",
        "spectformer",
        "affnet",
    ):
        assert f"zoo-{family}" in names


def _stand_ins():
    """Configs of which each is the first of its head: for the others they stand, unless --full."""
    first = {path.stem.partition("_zoo-")[0]: path for path in reversed(CONFIGS)}
    del first["cascade-mask-rcnn-sdanet"]  # of its neck retinanet-sdanet is the smaller one
    del first["focus-detr-4scale"]  # focus-detr is the smaller one
    first["vidt"] = FOLDER / "detection" / "vidt_zoo-swin-n_tiny.py"  # ten times smaller than the first, as the next
    first["vidt-plus"] = FOLDER / "detection" / "vidt-plus_zoo-swin-n_50e_coco.py"
    return first.values()


STAND_INS = _stand_ins()
STEPPED = [pytest.param(path, id=path.stem, marks=[] if path in STAND_INS else [pytest.mark.full]) for path in CONFIGS]


@pytest.mark.parametrize("path", STEPPED)
def test_a_config_steps_and_predicts(path):
    torch.manual_seed(0)
    cfg = load_small(str(path))
    check_channels(cfg)
    assert unread(cfg) == []
    data = inputs(cfg)
    with no_initialisation():
        model = MODELS.build(cfg.model)
    draw(model)
    model.train()
    optimizer = build_optim_wrapper(model, cfg.optim_wrapper)
    loss, _ = model.parse_losses(model(**model.data_preprocessor(data, training=True), mode="loss"))
    assert loss.isfinite()
    optimizer.backward(loss)
    dead = [name for name, p in model.named_parameters() if p.requires_grad and p.grad is None]
    assert not dead, "parameters without a gradient stop training on several GPUs"
    optimizer.step()
    model.eval()
    with torch.no_grad():
        first, second = model.test_step(inputs(cfg))
    if cfg.default_scope == "mmdet":
        assert first.pred_instances.bboxes.shape[1] == 4 and len(second.pred_instances.scores) > 0
        assert ("masks" in first.pred_instances) == ("rcnn" in path.stem or "vidt-plus" in path.stem)
    else:
        assert first.pred_sem_seg.data.shape == (1, 64, 64) and 0 <= first.pred_sem_seg.data.max() < 150


@torch.no_grad()
def draw(model):
    """Small random weights, the same short row over and over, and the norms' and other vectors' initial values."""
    row = 0.02 * torch.randn(4099)
    for parameter in model.parameters():
        if parameter.ndim > 1:
            parameter.copy_(row.repeat(parameter.numel() // len(row) + 1)[: parameter.numel()].view_as(parameter))
        elif not parameter.isfinite().all() or parameter.abs().max() > 1e3:
            parameter.zero_()


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_a_config_is_a_recipe(path):
    text = path.read_text()
    doc = " ".join(ast.get_docstring(ast.parse(text)).split())
    code = [line for line in text.split('"""', 2)[2].splitlines() if line.strip()]
    assert len(code) <= 20
    assert f"tools/train.py configs/{path.parent.name}/{path.name}" in doc
    for word in ("Hardware: ", "Published: "):
        assert word in doc
    assert "arXiv:" in doc or path.stem.endswith(("_digits", "_tiny"))
