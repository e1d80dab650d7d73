"""ViDT is the authors' function with its gradients, takes their checkpoints, and names what it cannot do."""

import argparse
import re

import pytest
import torch
from golden import Record, relative_error
from quick import no_initialisation
from recipes.gates import normal, some
from recipes.vidt import CROPPED, IMAGE, MASK, SWIN, TOKENS, VECTOR, WIDTH, objects

pytest.importorskip("mmdet", reason='needs pip install "visionzoo[openmmlab]"')

from mmdet.structures import DetDataSample
from mmdet.structures.mask import BitmapMasks
from mmengine.config import Config
from mmengine.optim import build_optim_wrapper
from mmengine.registry import MODELS, init_default_scope
from mmengine.runner import load_checkpoint
from mmengine.structures import InstanceData

from visionzoo.engine.configs import shipped_configs
from visionzoo.engine.errors import UserError
from visionzoo.layers.pyramid_fusion import PyramidFusion
from visionzoo.openmmlab import checkpoints
from visionzoo.openmmlab.vidt import COCO_IDS
from visionzoo.openmmlab.vidt_plus import _zigzag, from_vectors, to_vectors

EPS = torch.finfo(torch.float32).eps  # what mmdet adds to the number by which a loss is divided
BODY = {
    "type": "DetectionTokenBackbone",
    "name": "zoo_swin_n",
    "depths": SWIN["depths"],
    "embed_dims": [SWIN["embed_dim"] * 2**i for i in range(4)],
    "num_heads": SWIN["num_heads"],
    "window_size": SWIN["window_size"],
    "num_tokens": TOKENS,
}


def build(config="vidt_zoo-swin-n_50e_coco", num_classes=91, layers=2, **head):
    """A shipped config's detector, with the sizes of the records."""
    torch.manual_seed(0)
    init_default_scope("mmdet")
    cfg = Config.fromfile(str(shipped_configs()[config])).model
    cfg.backbone = BODY
    cfg.neck.in_channels = [*BODY["embed_dims"][1:], WIDTH]
    cfg.decoder.num_layers = layers
    cfg.decoder.layer_cfg.ffn_cfg.update(feedforward_channels=32, ffn_drop=0.0)
    for attention in ("self_attn_cfg", "cross_attn_cfg"):
        cfg.decoder.layer_cfg[attention].dropout = 0.0
    cfg.bbox_head.update(num_classes=num_classes, **head)
    return MODELS.build(cfg)


def samples(sizes=(IMAGE[2:], CROPPED)):
    return [DetDataSample(metainfo={"img_shape": tuple(size), "scale_factor": (1.0, 1.0)}) for size in sizes]


def names_of(record, model):
    """The authors' names of our parameters."""
    numbered = {name: torch.full(shape, float(i)) for i, (name, shape, _) in enumerate(record.meta["state"])}
    for name, part in model.named_modules():
        if hasattr(part, "take_names"):
            part.take_names(numbered, f"{name}." if name else "")
    return {name: record.meta["state"][int(value.reshape(-1)[0])][0] for name, value in numbered.items()}


def test_outputs_and_gradients_are_the_authors():
    record = Record("vidt/vidt")
    model = build().double().eval()
    model.load_state_dict(record.state_dict())  # by the authors' names
    image = record.image().requires_grad_()
    logits, boxes = model(image, samples(), mode="tensor")
    outs = {"logits": logits, "boxes": boxes}
    sum((x * normal(4 + i, x.shape)).sum() for i, x in enumerate(outs.values())).backward()
    own = outs | {"grad_image": image.grad}
    names = names_of(record, model)
    own |= {f"grad/{names[name]}": p.grad for name, p in model.named_parameters() if p.grad is not None}
    assert sorted(own) == sorted(record.arrays)
    for key, expected in record.arrays.items():
        assert relative_error(some(own[key].detach(), expected.size), expected) <= record.tolerance(), key


def test_masks_losses_and_gradients_of_vidt_plus_are_the_authors():
    record = Record("vidt/vidt_plus")
    model = build("vidt-plus_zoo-swin-n_50e_coco", 90, vector_size=VECTOR, mask_size=MASK).double().train()
    model.load_state_dict(record.state_dict())
    head, image, given = model.bbox_head, record.image().requires_grad_(), samples()
    for sample, each in zip(given, objects(), strict=True):
        masks = BitmapMasks(each["masks"].numpy().astype("uint8"), *each["masks"].shape[1:])
        sample.gt_instances = InstanceData(bboxes=each["boxes"], labels=each["labels"], masks=masks)
        sample.set_metainfo({"batch_input_shape": IMAGE[2:]})
    inputs = model.forward_transformer(image, given)
    states = inputs["hidden_states"]
    logits, boxes = head(states, inputs["references"])
    outs = {"logits": logits, "boxes": boxes, "vectors": head.vector_branch(states)}
    outs["ious"] = torch.stack([branch(x) for branch, x in zip(head.overlap_branches, states, strict=True)])
    outs |= {f"label{i}": x for i, x in enumerate(inputs["enc_outputs_class"])}
    losses = head.loss(**inputs, batch_data_samples=given)
    total = sum((x * normal(4 + i, x.shape)).sum() for i, x in enumerate(outs.values()))
    (total + sum(x for key, x in losses.items() if key.endswith(("overlap", "vector", "focal", "dice")))).backward()
    own = outs | {"grad_image": image.grad}
    for name, theirs in names_of(record, model).items():
        grad = model.get_parameter(name).grad
        row = [torch.zeros_like(grad[:1])] * ("cls_branches" in name)  # of the background
        own[f"grad/{theirs}"] = torch.cat([*row, grad])
    counted = 5 / (5 + EPS)
    for i, layer in enumerate(("d0.", "d1.", "")):
        for theirs, ours in {
            "ce": "cls",
            "bbox": "bbox",
            "giou": "iou",
            "iouaware": "overlap",
            "vector": "vector",
        }.items():
            scale = 1 if ours in ("overlap", "vector") else counted
            own[f"loss_{theirs}" + f"_{i}" * (i < 2)] = losses[f"{layer}loss_{ours}"] / scale
    own |= {f"loss_token_{kind}": losses[f"loss_label_{kind}"] for kind in ("focal", "dice")}
    with torch.no_grad():
        for i, result in enumerate(head.predict(states, inputs["references"], given, rescale=False)):
            masks = result.masks.double()
            own |= {f"scores{i}": result.scores, f"masks{i}": (masks * normal(3, masks.shape)).sum((1, 2))}
    assert sorted(own) == sorted(record.arrays)
    for key, expected in record.arrays.items():
        assert relative_error(some(own[key].detach(), expected.size), expected.reshape(-1)) <= record.tolerance(), key


def test_the_authors_file_of_cocos_91_ids_gives_the_rows_of_80_classes(tmp_path):
    model = build(num_classes=80)
    content = Record("vidt/vidt").state_dict()
    path = str(tmp_path / "vidt.pth")
    torch.save({"model": content, "epoch": 49, "args": argparse.Namespace(lr=1e-4)}, path)
    assert checkpoints.check_fit(model, path, Config({"model": {}}), None) == []
    load_checkpoint(model, path)
    rows = content["class_embed.1.weight"]
    assert torch.equal(model.bbox_head.cls_branches[1].weight, rows[COCO_IDS])
    assert len(COCO_IDS) == 80 and (COCO_IDS[0], COCO_IDS[11], COCO_IDS[-1]) == (1, 13, 90)  # person, stop sign, brush
    again = build(num_classes=80)
    again.load_state_dict(model.state_dict())  # by our own names
    assert torch.equal(again.backbone.tokens.token, model.backbone.tokens.token)


@pytest.mark.parametrize(("size", "millions"), [("n", 15), ("t", 37), ("s", 60), ("b", 99)])
@pytest.mark.parametrize(("kind", "more"), [("vidt", 0), ("vidt-plus", 1)])
def test_published_sizes(kind, more, size, millions):
    init_default_scope("mmdet")
    cfg = Config.fromfile(str(shipped_configs()[f"{kind}_zoo-swin-{size}_50e_coco"])).model
    cfg.backbone.pretrained = False
    with torch.device("meta"), no_initialisation():
        model = MODELS.build(cfg)
    learns = ("overlap_branches", "memory_trans", "label_branch")  # only, and is not counted
    count = sum(p.numel() for name, p in model.named_parameters() if not any(part in name for part in learns))
    assert abs(count / 1e6 - millions - more) < 1.0, count


def test_weight_decay_spares_what_the_authors_spare():
    model = torch.nn.ModuleDict({"backbone": MODELS.build(BODY), "head": torch.nn.Linear(2, 2)})
    wrapper = {
        "type": "OptimWrapper",
        "optimizer": {"type": "AdamW", "lr": 1e-4, "weight_decay": 1e-4},
        "constructor": "ZooOptimWrapperConstructor",
        "paramwise_cfg": {
            "vector_decay_mult": 0.0,
            "custom_keys": {name: {"decay_mult": 0.0} for name in ("tokens.token", "tokens.position")},
        },
    }
    groups = build_optim_wrapper(model, wrapper).param_groups
    decays = {id(p): group["weight_decay"] for group in groups for p in group["params"]}
    for name, parameter in model.named_parameters():
        spared = name.startswith("backbone.") and (parameter.ndim == 1 or name.endswith((".token", ".position")))
        assert decays[id(parameter)] == (0.0 if spared else 1e-4), name
    assert all(group["lr"] == 1e-4 for group in groups)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"name": "zoo_davit_t"}, "expected a backbone all of whose blocks attend in windows"),
        ({"num_tokens": 0}, "numbers must be 1 or more, got num_tokens=0"),
        ({"out_norm": {"type": "LN2d"}}, "it gives the maps of all stages but the first, as they are; remove out_norm"),
        ({"out_indices": (1, 2)}, "it gives the maps of all stages but the first, as they are; remove out_indices"),
    ],
)
def test_wrong_options_are_named(options, message):
    given = {"type": "DetectionTokenBackbone", "name": "zoo_swin_n", **options}
    with torch.device("meta"), pytest.raises(UserError, match=re.escape(message)):
        MODELS.build(given)


@pytest.mark.parametrize(
    ("build_it", "message"),
    [
        (lambda: PyramidFusion([8, 16], 48), "a positive multiple of 32 channels of the levels"),
        (lambda: PyramidFusion([], 32), "expected maps, a positive multiple of 32 channels"),
        (lambda: PyramidFusion([8], 0), "out_channels=0"),
        (lambda: PyramidFusion([8], 32, 0), "1 channel or more of the bottlenecks"),
        (
            lambda: build("vidt-plus_zoo-swin-n_50e_coco", vector_size=65, mask_size=8),
            "vector_size must be from 1 to mask_size² = 64, got vector_size=65",
        ),
    ],
)
def test_wrong_parts_are_named(build_it, message):
    with torch.device("meta"), pytest.raises(ValueError, match=re.escape(message)):
        build_it()


def test_images_without_objects_train_all_of_it():
    model = build("vidt-plus_zoo-swin-n_50e_coco", 3, vector_size=VECTOR, mask_size=MASK).train()
    model.init_weights()
    given = samples()
    for sample in given:
        masks = BitmapMasks([], *sample.img_shape)
        sample.gt_instances = InstanceData(bboxes=torch.zeros(0, 4), labels=torch.zeros(0).long(), masks=masks)
        sample.set_metainfo({"batch_input_shape": IMAGE[2:]})
    losses = model(torch.randn(IMAGE), given, mode="loss")
    assert all(loss.isfinite() for loss in losses.values())
    sum(losses.values()).backward()
    assert all(parameter.grad is not None for parameter in model.parameters())


def test_vectors_give_back_masks_and_zigzag_begins_with_the_lowest():
    assert [*zip(*_zigzag(8, 6), strict=True)] == [(0, 0), (0, 1), (1, 0), (2, 0), (1, 1), (0, 2)]
    assert sorted(zip(*_zigzag(8, 64), strict=True)) == [(row, column) for row in range(8) for column in range(8)]
    masks = torch.zeros(2, 32, 32, dtype=torch.float64)
    masks[0, 4:20, 8:30] = masks[1, :9, :] = 1
    assert torch.equal(from_vectors(to_vectors(masks, 1024), 32), masks.bool())
    few = from_vectors(to_vectors(masks, 100), 32)
    assert (few == masks.bool()).double().mean() > 0.97
