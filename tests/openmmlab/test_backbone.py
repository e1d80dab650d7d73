"""The wrapper that OpenMMLab's configs name, its necks, and its optimizer constructor."""

import copy
import itertools
import subprocess
import sys

import pytest
import timm
import torch

pytest.importorskip("mmengine", reason='needs pip install "visionzoo[openmmlab]"')

from mmengine.model import convert_sync_batchnorm
from mmengine.optim import build_optim_wrapper
from mmengine.registry import MODELS
from quick import of_each_kind, size_for
from timm.layers import LayerNorm2d
from torch import nn

from visionzoo.engine import UserError
from visionzoo.models._registry import FAMILIES, TINY
from visionzoo.openmmlab import ZooBackbone, feature_channels, feature_strides

ONE_EACH = of_each_kind(next(name for name in names if name in TINY) for names in FAMILIES.values())


def build(name="zoo_davit_t", **options):
    torch.manual_seed(0)
    return ZooBackbone(name, **options)


@pytest.mark.parametrize("name", ONE_EACH)
def test_the_maps_of_any_family_have_the_stated_channels_and_strides(name):
    backbone = build(name).eval()
    height, width = size_for(backbone.model, 64, 96)
    with torch.no_grad():
        maps = backbone(torch.randn(1, 3, height, width))
    assert [x.shape[1] for x in maps] == feature_channels(name) == backbone.out_channels
    strides = feature_strides(name)
    assert [x.shape[2:] for x in maps] == [(-(-height // stride), -(-width // stride)) for stride in strides]
    assert strides == backbone.out_strides


def test_it_is_the_model_of_the_zoo():
    backbone = build().eval()
    model = timm.create_model("zoo_davit_t", features_only=True).eval()
    model.model.load_state_dict(backbone.model.state_dict())
    image = torch.randn(1, 3, 64, 64)
    with torch.no_grad():
        for ours, theirs in zip(backbone(image), model(image), strict=True):
            assert torch.equal(ours, theirs)


def test_gates_go_into_the_stages_that_are_built_and_keep_pretrained_weights(tmp_path):
    torch.save(build().model.state_dict(), tmp_path / "weights.pth")
    init_cfg = {"type": "Pretrained", "checkpoint": str(tmp_path / "weights.pth")}
    backbone = build(gates=("eca", None, "triplet", None), out_indices=(1, 2), init_cfg=init_cfg)
    backbone.init_weights()
    gates = [name for name in backbone.model.state_dict() if ".branch_gate." in name]
    assert any("stages.0" in name for name in gates) and any("stages.2" in name for name in gates)
    for name, value in build().model.state_dict().items():
        if name in backbone.model.state_dict():
            assert torch.equal(backbone.model.state_dict()[name], value), name
    with pytest.raises(UserError, match="unknown gate 'eka'"):
        build(gates="eka")


def test_subsets_of_stages_build_no_more_than_they_need():
    whole, part = build(), build(out_indices=(0, -2))
    assert part.out_indices == (0, 2) and len(part.model.stages) == 3
    assert feature_channels("zoo_davit_t", (0, -2)) == [96, 384]
    with torch.no_grad():
        assert [x.shape[1] for x in part(torch.randn(1, 3, 64, 64))] == [96, 384]
    assert len(list(part.parameters())) < len(list(whole.parameters()))


def test_each_map_can_have_a_norm_of_its_own():
    norms = [None, {"type": "LN2d", "eps": 1e-6}, {"type": "GN", "num_groups": 1}, {"type": "BN"}]
    backbone = build(out_norm=norms)
    kinds = (nn.Identity, LayerNorm2d, nn.GroupNorm, nn.BatchNorm2d)
    assert all(isinstance(norm, kind) for norm, kind in zip(backbone.out_norms, kinds, strict=True))
    second = backbone.eval()(torch.randn(1, 3, 64, 64))[1]
    torch.testing.assert_close(second.mean(1), torch.zeros(1, 8, 8), atol=1e-5, rtol=0)
    assert all(isinstance(norm, LayerNorm2d) for norm in build(out_norm={"type": "LN2d"}).out_norms)


def test_frozen_stages_have_no_gradients_and_stay_in_eval_mode():
    backbone = build("zoo_shvit_s1", frozen_stages=2, drop_path_rate=0.5).train()
    frozen = [*backbone.model.stem.parameters(), *backbone.model.stages[:2].parameters()]
    statistics = copy.deepcopy(dict(backbone.model.stem.named_buffers()))
    sum(x.mean() for x in backbone(torch.randn(2, 3, 64, 64))).backward()
    assert all(parameter.grad is None for parameter in frozen)
    assert all(parameter.grad is not None for parameter in backbone.model.stages[2].parameters())
    assert not backbone.model.stem.training and not backbone.model.stages[1].training
    assert backbone.model.stages[2].training
    for name, value in backbone.model.stem.named_buffers():
        assert torch.equal(value, statistics[name]), name


def test_norm_eval_keeps_the_statistics_of_batch_norms():
    image = torch.randn(2, 3, 64, 64)
    for norm_eval in (False, True):
        backbone = build("zoo_biformer_t", norm_eval=norm_eval).train()
        before = copy.deepcopy(dict(backbone.named_buffers()))
        backbone(image)
        changed = [name for name, value in backbone.named_buffers() if not torch.equal(value, before[name])]
        assert bool(changed) != norm_eval
        norms = [m for m in backbone.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)]
        assert norms and all(m.training != norm_eval and m.weight.requires_grad for m in norms)


@pytest.mark.parametrize("name", ONE_EACH)
@pytest.mark.parametrize("out_indices", [None, pytest.param((0,), marks=pytest.mark.full), (1, 2)])
def test_no_parameter_is_left_without_a_gradient(name, out_indices):
    backbone = build(name, out_indices=out_indices, out_norm={"type": "LN2d"}).train()
    sum(x.square().mean() for x in backbone(torch.randn(2, 3, *size_for(backbone.model, 64, 64)))).backward()
    assert not [name for name, parameter in backbone.named_parameters() if parameter.grad is None]


def test_checkpointing_gives_the_same_gradients():
    image = torch.randn(1, 3, 64, 64)
    grads = []
    for with_cp in (False, True):
        backbone = build(with_cp=with_cp).train()
        sum(x.square().mean() for x in backbone(image)).backward()
        grads.append([parameter.grad for parameter in backbone.parameters()])
    for one, other in zip(*grads, strict=True):
        torch.testing.assert_close(one, other)


def test_further_arguments_reach_the_model():
    backbone = build("zoo_biformer_t", regions=4, in_chans=5, drop_path_rate=0.3)
    assert backbone.model.stages[0].blocks[0].mixer.regions == (4, 4)
    assert feature_channels("zoo_biformer_t", embed_dims=(32, 64, 128, 256)) == [32, 64, 128, 256]
    with torch.no_grad():
        assert len(backbone(torch.randn(1, 5, 64, 64))) == 4


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"name": "zoo_biformr_s"}, "'zoo_biformr_s' is not a model of the zoo; did you mean zoo_biformer_s"),
        ({"name": "resnet50"}, "'resnet50' is not a model of the zoo"),
        ({"out_indices": (0, 4)}, "feature indices must be from -4 to 3"),
        ({"out_indices": ()}, "out_indices must be numbers of stages or blocks, such as (1, 2, 3), got out_indices=()"),
        ({"out_indices": 2}, "out_indices must be numbers of stages or blocks, such as (1, 2, 3), got out_indices=2"),
        ({"out_indices": (1, 1)}, "out_indices must be different stages, the first one first, got out_indices=(1, 1)"),
        ({"out_indices": (3, 0)}, "out_indices must be different stages, the first one first, got out_indices=(3, 0)"),
        ({"window": 3}, "zoo_davit_t cannot be built with"),
        ({"drop_path_rate": 2.0}, "drop_path_rate must be from 0 to below 1, got drop_path_rate=2.0"),
        ({"out_norm": {"type": "LN3d"}}, "out_norm must be a config of mmcv's norms, such as dict(type='LN2d')"),
        ({"out_norm": "LN2d"}, "out_norm must be a config of mmcv's norms, such as dict(type='LN2d')"),
        ({"frozen_stages": 5}, "frozen_stages must be from -1 to 4 for zoo_davit_t, got frozen_stages=5"),
        ({"out_norm": [None]}, "one config or one for each of out_indices=(0, 1, 2, 3), got 1"),
        ({"init_cfg": {"type": "Xavier"}}, "init_cfg must be dict(type='Pretrained', checkpoint=FILE_OR_URL)"),
        ({"pretrained": True, "init_cfg": {"type": "Pretrained", "checkpoint": "x"}}, "either pretrained=True or a"),
    ],
)
def test_wrong_arguments_are_named(options, message):
    with pytest.raises(UserError) as caught:
        build(**options)
    assert message in str(caught.value)


def test_synchronised_batch_norms_compute_the_same():
    backbone = build("zoo_biformer_t", norm_eval=True)
    image = torch.randn(1, 3, 64, 64)
    expected = backbone.train()(image)
    changed = convert_sync_batchnorm(backbone).train()
    kinds = {type(module).__name__ for module in changed.modules()}
    assert "SyncBatchNorm" in kinds and "BatchNorm2d" not in kinds
    for out, before in zip(changed(image), expected, strict=True):
        torch.testing.assert_close(out, before)


def checkpoint(tmp_path, wrap):
    torch.manual_seed(1)
    model = timm.create_model("zoo_levit_128s", num_classes=3)
    path = tmp_path / "model.pth"
    torch.save(wrap(model.state_dict()), path)
    return model, {"type": "Pretrained", "checkpoint": str(path)}


@pytest.mark.parametrize(
    "wrap",
    [
        lambda state: {"model": state},
        lambda state: {"state_dict": {f"backbone.model.{k}": v for k, v in state.items()} | {
            "backbone.out_norms.0.weight": torch.ones(3), "neck.conv.weight": torch.ones(2)}},
    ],
    ids=["a classifier's", "a detector's"],
)  # fmt: skip
def test_a_checkpoint_is_loaded_before_training_only(tmp_path, wrap):
    model, init_cfg = checkpoint(tmp_path, wrap)
    backbone = build("zoo_levit_128s", init_cfg=init_cfg, out_norm={"type": "BN"})
    weight = "stages.1.blocks.0.mlp.fc1.linear.weight"
    assert not torch.equal(backbone.model.get_parameter(weight), model.get_parameter(weight))
    backbone.init_weights()
    assert torch.equal(backbone.model.get_parameter(weight), model.get_parameter(weight))
    with torch.no_grad():
        backbone.model.get_parameter(weight).zero_()
    backbone.init_weights()
    assert backbone.model.get_parameter(weight).abs().max() == 0


def test_a_checkpoint_that_does_not_fit_stops_the_run(tmp_path):
    _, init_cfg = checkpoint(tmp_path, lambda state: {"model": state})
    with pytest.raises(UserError, match="probably a checkpoint of another"):
        build("zoo_shvit_s1", init_cfg=init_cfg).init_weights()
    with pytest.raises(UserError, match="no checkpoint at nowhere"):
        build(init_cfg={"type": "Pretrained", "checkpoint": "nowhere.pth"}).init_weights()


def test_pretrained_without_a_network_says_what_to_do(tmp_path, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(UserError, match=r"are neither in the cache(.|\n)*init_cfg.checkpoint=FILE"):
        build("zoo_convit_t", pretrained=True).init_weights()


def test_pretrained_without_public_weights_says_what_to_do():
    with pytest.raises(ValueError, match=r"No public weights are known for zoo_biformer_t(.|\n)*pretrained=False"):
        build("zoo_biformer_t", pretrained=True).init_weights()


def test_a_finer_pyramid_from_stride_16():
    torch.manual_seed(0)
    maps = [torch.randn(1, channels, side, side + 1) for channels, side in ((8, 8), (12, 4), (16, 2))]
    for upsamples, extra, sides in (
        (2, False, [32, 16, 8, 4, 2]),
        (1, True, [16, 8, 4, 2, 1]),
        (1, False, [16, 8, 4, 2, 1]),
    ):
        neck = MODELS.build({"type": "UpsamplingFPN", "in_channels": [8, 12, 16], "out_channels": 6, "num_outs": 5,
                             "num_upsamples": upsamples, "add_extra_convs": extra})  # fmt: skip
        outs = neck(maps)
        assert [x.shape[2] for x in outs] == sides and {x.shape[1] for x in outs} == {6}
        sum(x.sum() for x in outs).backward()
        assert all(parameter.grad is not None for parameter in neck.parameters())
    with pytest.raises(ValueError, match="2 finer and 3 levels, but num_outs=4"):
        MODELS.build(
            {"type": "UpsamplingFPN", "in_channels": [8, 12, 16], "out_channels": 6, "num_outs": 4, "num_upsamples": 2}
        )


def test_a_pyramid_from_one_map():
    neck = MODELS.build({"type": "SimplePyramid", "in_channels": 16, "out_channels": 6})
    outs = neck([torch.randn(1, 16, 8, 6)])
    assert [tuple(x.shape) for x in outs] == [(1, 6, h, w) for h, w in ((32, 24), (16, 12), (8, 6), (4, 3), (2, 2))]
    with pytest.raises(ValueError, match=r"scales must be of 4, 2, 1 and 0.5, got scales=\(3,\)"):
        MODELS.build({"type": "SimplePyramid", "in_channels": 16, "scales": (3,)})


def test_an_isotropic_backbone_gives_a_pyramid_and_freezes_its_first_blocks():
    tiny = {"depth": 3, "local_depth": 2, "embed_dim": 16}
    backbone = build("zoo_convit_t", out_indices=(2,), frozen_stages=1, **tiny).train()
    neck = MODELS.build({"type": "SimplePyramid", "in_channels": backbone.out_channels[0], "out_channels": 6})
    levels = neck(backbone(torch.randn(2, 3, 64, 96)))
    assert [tuple(x.shape[2:]) for x in levels] == [(16, 24), (8, 12), (4, 6), (2, 3), (1, 2)]
    sum(x.sum() for x in levels).backward()
    model = backbone.model
    frozen = {id(p) for part in (model.stem, model.positions, model.prefix, model.blocks[0]) for p in part.parameters()}
    assert {id(p) for p in backbone.parameters() if p.grad is None} == frozen
    assert feature_strides("zoo_convit_t", (0, 2), **tiny) == [16, 16]


def optimizer(model, **paramwise):
    cfg = {
        "type": "OptimWrapper",
        "optimizer": {"type": "AdamW", "lr": 1.0, "weight_decay": 0.1},
        "constructor": "ZooOptimWrapperConstructor",
        "paramwise_cfg": paramwise,
    }
    groups = build_optim_wrapper(model, cfg).optimizer.param_groups
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    settings = [tuple(sorted((k, v) for k, v in group.items() if k != "params")) for group in groups]
    assert len(set(map(repr, settings))) == len(groups), "groups of equal settings cost time"
    return {names[id(parameter)]: group for group in groups for parameter in group["params"]}


def test_layers_nearer_to_the_image_learn_slower():
    model = nn.ModuleDict({"backbone": build(out_norm={"type": "LN2d"}), "head": nn.Linear(2, 2)})
    groups = optimizer(model, layer_decay=0.5, custom_keys={"head": {"lr_mult": 3.0}})
    blocks = [
        f"backbone.model.stages.{i}.blocks.{j}." for i, depth in enumerate((1, 1, 3, 1)) for j in range(2 * depth)
    ]
    rates = [{group["lr"] for name, group in groups.items() if name.startswith(block)} for block in blocks]
    assert all(len(rate) == 1 for rate in rates)
    rates = [rate.pop() for rate in rates]
    assert all(earlier < later for earlier, later in itertools.pairwise(rates))
    assert groups["backbone.model.stem.conv.weight"]["lr"] < rates[0]
    assert groups["backbone.out_norms.0.weight"]["lr"] == 1.0 and groups["head.weight"]["lr"] == 3.0
    last = groups["backbone.model.stages.3.blocks.1.mlp.fc1.weight"]["lr"]
    assert last == 0.5 and rates[-2] == 0.25


def test_parameters_of_positions_can_be_spared_weight_decay():
    model = nn.ModuleDict({"backbone": build("zoo_levit_128s"), "head": nn.Linear(2, 2)})
    groups = optimizer(model, position_decay_mult=0.0, norm_decay_mult=0.5)
    tables = [name for name in groups if name.endswith("bias_table")]
    assert len(tables) == 11 and all(groups[name]["weight_decay"] == 0 for name in tables)
    assert groups["backbone.model.stem.0.norm.weight"]["weight_decay"] == 0.05
    assert groups["head.weight"].get("weight_decay", 0.1) == 0.1


def test_the_constructor_says_what_it_needs():
    with pytest.raises(ValueError, match="layer_decay must be above 0 and up to 1"):
        optimizer(nn.ModuleDict({"backbone": build()}), layer_decay=1.5)
    with pytest.raises(ValueError, match="the model has no ZooBackbone"):
        optimizer(nn.Linear(2, 2), layer_decay=0.5)


@pytest.mark.slow
def test_custom_imports_alone_are_enough_from_an_empty_directory(tmp_path):
    """Configs of a user's own, with mmdet and mmseg imported before them, as their tools do."""
    for project in ("mmdet", "mmseg"):
        (tmp_path / f"{project}.config.py").write_text(
            f"default_scope = {project!r}\n"
            "custom_imports = dict(imports=['visionzoo.openmmlab'])\n"
            "model = dict(backbone=dict(type='ZooBackbone', name='zoo_shvit_s1'))\n"
        )
    code = (
        "import mmdet.apis, mmseg.apis\n"
        "from mmengine.config import Config\n"
        "for project in (mmdet, mmseg):\n"
        "    cfg = Config.fromfile(f'{project.__name__}.config.py')\n"
        "    import mmdet.registry, mmseg.registry\n"
        "    print(type(project.registry.MODELS.build(cfg.model.backbone)).__name__)\n"
        "from mmcv.ops import nms\n"
        "from mmdet.models.dense_heads import base_dense_head\n"
        "print(base_dense_head.batched_nms.__name__)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.stdout.split()[-3:] == ["ZooBackbone", "ZooBackbone", "batched_nms"], done.stderr
