"""Focus-DETR is the authors' function with its losses, trains on any image, and says what it cannot do."""

import re
from copy import deepcopy
from functools import cache
from pathlib import Path

import pytest
import torch
from golden import Record, relative_error
from recipes import focus_detr as recipe

pytest.importorskip("mmdet", reason='needs pip install "visionzoo[openmmlab]"')

from mmdet.models.layers.transformer import deformable_detr_layers
from mmdet.structures import DetDataSample
from mmengine.config import Config
from mmengine.registry import MODELS, init_default_scope
from mmengine.structures import InstanceData

from visionzoo.models._checkpoint import rename
from visionzoo.openmmlab import feature_channels

CONFIG = Path(__file__).parents[2] / "configs/detection/focus-detr_zoo-davit-t_tiny.py"


@cache
def config():
    return Config.fromfile(str(CONFIG))


def build(dim=32, **changes):
    """Build the shipped detector with fewer channels and queries."""
    torch.manual_seed(0)
    cfg = deepcopy(config())
    init_default_scope(cfg.default_scope)
    model = cfg.model
    model.backbone.update(name="zoo_poolformer_s12", depths=(1, 1, 1, 1), out_norm=None)
    model.neck.update(in_channels=feature_channels("zoo_poolformer_s12", (1, 2, 3)), out_channels=dim)
    model.update(num_queries=recipe.QUERIES, keep_ratios=recipe.KEEP, num_dual_tokens=recipe.DUAL)
    for coder in (model.encoder, model.decoder):
        coder.num_layers = recipe.LAYERS
        for part in coder.layer_cfg.values():
            part.embed_dims = dim
        coder.layer_cfg.ffn_cfg.feedforward_channels = 32
    model.positional_encoding.num_feats = dim // 2
    model.bbox_head.update(num_classes=recipe.CLASSES, embed_dims=dim)
    model.dn_cfg.group_cfg.num_dn_queries = 4
    model.test_cfg.max_per_img = 7
    cfg.merge_from_dict({f"model.{key}": value for key, value in changes.items()})
    return MODELS.build(cfg.model)


def samples(boxes=recipe.BOXES, labels=recipe.LABELS):
    found = []
    for size, each, classes in zip(recipe.IMAGES, boxes, labels, strict=True):
        meta = {"batch_input_shape": recipe.SIDE, "img_shape": size, "ori_shape": size, "scale_factor": (1.0, 1.0)}
        found.append(DetDataSample(metainfo=meta))
        boxes_ = torch.tensor(each).view(-1, 4)
        found[-1].gt_instances = InstanceData(bboxes=boxes_, labels=torch.tensor(classes, dtype=torch.long))
    return found


def test_outputs_losses_and_gradients_are_the_authors(monkeypatch):
    record = Record("focus_detr/detector")
    model = build(recipe.CHANNELS).double().train()
    state = record.state_dict()
    lacking, unknown = model.load_state_dict(state, strict=False)  # by the authors' names
    assert not unknown and all(name.startswith(("backbone.", "neck.")) for name in lacking)
    queries, boxes, mask = recipe.denoising()
    positions = iter(recipe.positions())
    monkeypatch.setattr(model.positional_encoding, "forward", lambda *_, **__: next(positions))
    monkeypatch.setattr(type(model.dn_query_generator), "__call__", lambda *_: (queries, boxes, mask, {}))
    maps, data = [x.requires_grad_() for x in recipe.levels()], samples()
    to_head = model.forward_transformer(maps, data)
    logits, sizes = to_head["foreground"]
    scores, found = model.bbox_head(to_head["hidden_states"], to_head["references"])
    outputs = {f"scores{i}": x for i, x in enumerate(scores)} | {f"boxes{i}": x for i, x in enumerate(found)}
    outputs |= {"scores_enc": to_head["enc_outputs_class"], "boxes_enc": to_head["enc_outputs_coord"]}
    outputs |= {"foreground": logits}
    names = zip(state, rename(state, model)[0], strict=True)
    used = {f"map{i}": x for i, x in enumerate(maps)} | {own: model.get_parameter(ours) for own, ours in names}
    own = recipe.kept(outputs, model.foreground_loss(logits, sizes.tolist(), data), used)
    assert own.keys() == record.arrays.keys() and len(own) > 140
    for key, expected in record.arrays.items():
        if abs(expected).max() < 1e-13:  # keys' biases: a softmax does not feel them
            assert own[key].abs().max() < 1e-13, key
        else:
            assert relative_error(own[key].detach(), expected.reshape(-1)) <= 1e-9, key


def test_checkpoints_of_the_authors_have_heads_under_further_names():
    model = build()
    model.init_weights()  # before it, mmdet's level_embed is whatever the memory held, which may be NaN
    state = {}
    for name, value in Record("focus_detr/detector").state_dict().items():
        state[name] = value
        for head in ("class_embed.", "bbox_embed."):
            if name.startswith(head):
                state[f"transformer.decoder.{name}"] = value
    state["transformer.encoder.enhance_MCSP.0.weight"] = state["enhance_MCSP_layerlist.1.weight"] = torch.zeros(5, 32)
    state["neck.convs.0.norm.weight"] = torch.full((32,), 3.0)
    renamed = rename(state, model)[0]
    own = model.state_dict()
    assert renamed.keys() == {name for name in own if not name.startswith(("backbone.", "neck."))} | {
        "neck.convs.0.gn.weight"
    }
    ours = {name: own[name] for name in own if not name.startswith("backbone.")}
    again = build()
    again.load_state_dict(ours | {"backbone.nothing": torch.zeros(1)}, strict=False)  # ours stay
    assert all(torch.equal(again.state_dict()[name], value) for name, value in ours.items())


@pytest.mark.parametrize("same_size", [True, False])
def test_images_of_any_size_learn_also_without_objects(same_size):
    model = build().train()
    model.init_weights()
    data = samples(([], recipe.BOXES[0]), ([], recipe.LABELS[0]))
    if same_size:
        for sample in data:
            sample.set_metainfo({"img_shape": recipe.SIDE})
    losses = model.loss(torch.randn(2, 3, *recipe.SIDE), data)
    total, values = model.parse_losses(losses)
    total.backward()
    assert all(x.isfinite() for x in values.values()) and values["loss_foreground"] > 0
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())
    empty = samples(([], []), ([], []))
    assert model.parse_losses(model.loss(torch.randn(2, 3, *recipe.SIDE), empty))[0].isfinite()
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        (first, second) = model.eval().predict(torch.randn(2, 3, *recipe.SIDE), samples())
    assert first.pred_instances.bboxes.shape == second.pred_instances.bboxes.shape == (7, 4)


def test_all_parameters_learn_under_autocast():
    model = build().train()
    model.init_weights()
    with torch.autocast("cpu", torch.bfloat16):
        loss, _ = model.parse_losses(model.loss(torch.randn(2, 3, *recipe.SIDE), samples()))
    loss.backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())


@pytest.mark.parametrize("ratio", [0.4, 1.0])
def test_each_image_has_its_share_of_refined_tokens(ratio):
    model = build(focus_ratio=ratio).eval()
    model.init_weights()
    maps = [x[:, :32].float() for x in recipe.levels()]
    inputs, _ = model.pre_transformer(maps, samples())
    with torch.no_grad():
        out = model.forward_encoder(**inputs)
    valid = (~inputs["feat_mask"]).sum(1)
    assert valid[0] == inputs["feat"].shape[1] > valid[1]
    changed = (out["memory"] != inputs["feat"]).any(-1)
    counts = (valid * ratio).int() + (ratio < 1)
    assert torch.equal(changed.sum(1), counts) and not (changed & inputs["feat_mask"]).any()
    for scores, mask, own, count in zip(out["foreground"], inputs["feat_mask"], changed, counts.tolist(), strict=True):
        best = scores.masked_fill(mask, -torch.inf).topk(count).indices
        assert own[best].all()


WRONG = [
    ({"focus_ratio": 0.0}, "ratios must be above 0 and at most 1, got focus_ratio=0.0"),
    ({"keep_ratios": [1.0, 1.2]}, "got focus_ratio=0.5 and keep_ratios=[1.0, 1.2]"),
    ({"keep_ratios": [1.0]}, "one entry for each layer of the encoder, which has 2, got [1.0]"),
    ({"strides": [8, 16, 32]}, "one entry for each of the num_feature_levels=4, got [8, 16, 32]"),
    ({"strides": [0, 16, 32, 64]}, "got strides=[0, 16, 32, 64]"),
    (
        {"object_sizes": [(-1, 64)]},
        "one entry for each of the num_feature_levels=4, got [8, 16, 32, 64] and [(-1, 64)]",
    ),
    ({"foreground_weight": -1.0}, "foreground_weight=-1.0"),
    ({"num_dual_tokens": 0}, "num_tokens must be 1 or more, got num_tokens=0"),
]


@pytest.mark.parametrize(("options", "message"), WRONG)
def test_wrong_options_are_named(options, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        build(**options)


def test_checkpointed_layers_are_named(monkeypatch):
    monkeypatch.setattr(deformable_detr_layers, "checkpoint_wrapper", lambda layer: layer)
    with pytest.raises(ValueError, match="layers of the encoder are not checkpointed; leave num_cp out"):
        build(**{"encoder.num_cp": 1})


def test_another_number_of_levels_is_named():
    model = build(**{"neck.num_outs": 3})
    with pytest.raises(ValueError, match="expected num_feature_levels=4 levels of the neck, got 3"):
        model.loss(torch.randn(2, 3, *recipe.SIDE), samples())


def test_images_too_small_for_the_queries_are_named():
    model = build(num_queries=152)
    with pytest.raises(ValueError, match="have 151 tokens, of which num_queries=152 must be chosen"):
        model.loss(torch.randn(2, 3, *recipe.SIDE), samples())
