"""Heads on the last map of any backbone: equal to the authors', fitting every model, and what is refused."""

import logging
import re

import pytest
import timm
import torch
from golden import Record, relative_error
from quick import meta_model, size_for
from torch import nn

import visionzoo
from visionzoo.layers.class_queries import ClassQueryHead
from visionzoo.layers.map_heads import EfficientProbeHead, EfficientProbing
from visionzoo.layers.specs import build_spec
from visionzoo.models._heads import HEADS
from visionzoo.models._registry import TINY

SMALL = {  # options for narrow maps
    "attentive": {"num_heads": 2},
    "ep": {"num_queries": 2, "d_out": 2},
    "intr": {"hidden_dim": 8, "num_heads": 2, "enc_layers": 1, "dec_layers": 2, "mlp_dim": 16},
}
SPECS = [{"type": name, **options} for name, options in SMALL.items()]


def _tiny(name, head=None, **kwargs):
    torch.manual_seed(0)
    return timm.create_model(name, head=head, **{"num_classes": 3, **TINY[name], **kwargs})


@pytest.mark.parametrize("name", ["ep", "ep_bias", "ep_narrow"])
def test_efficient_probing_is_the_authors(name):
    record = Record(f"heads/{name}")
    pooling = EfficientProbing(**record.meta["factory_kwargs"]).double()
    pooling.load_state_dict({key.replace("cls_token", "query"): v for key, v in record.state_dict().items()})
    x = record.image()
    assert relative_error(pooling(x).detach(), record.arrays["out"]) <= 1e-9
    seen = pooling.attention(x)
    torch.testing.assert_close(seen.sum(2), torch.ones_like(seen[..., 0]))


def test_the_probe_with_its_classifier_is_the_authors():
    record = Record("heads/ep_probe")
    options = record.meta["factory_kwargs"]
    head = EfficientProbeHead(options["dim"], options["nb_classes"], num_queries=3, d_out=2).double().eval()
    ours = {"0.cls_token": "pooling.query", "0.v.weight": "pooling.v.weight", "2.weight": "fc.weight"}
    ours |= {"2.bias": "fc.bias"} | {f"1.{key}": f"norm.{key}" for key in head.norm.state_dict()}
    head.load_state_dict({ours[key]: value for key, value in record.state_dict().items()})
    x = record.image().mT.unflatten(2, (3, 5))  # tokens of a map
    assert relative_error(head(x).detach(), record.arrays["logits"]) <= 1e-9
    assert head.attention(x).shape == (2, 3, 3, 5)


ENDS = ("zoo_davit_t", "zoo_crossvit_t", "zoo_tnt_s")  # what ends in another way than those of the next test


INTR_NAMES = [  # the authors' -> ours
    (r"^transformer\.(encoder|decoder)\.layers\.", r"\1."),
    (r"multihead_attn", "cross_attn"),
    (r"linear1", "mlp.0"),
    (r"linear2", "mlp.3"),
    (r"\.norm(\d)\.", lambda found: f".norms.{int(found[1]) - 1}."),
    (r"^transformer\.decoder\.norm\.", "norm."),
    (r"^transformer\.encoder\.norm\.", "encoder_norm."),
    (r"^presence_vector\.", "presence."),
    (r"^query_embed\.", "fc."),
    (r"^backbone\.positions\.row_embed\.weight$", "positions.rows"),
    (r"^backbone\.positions\.col_embed\.weight$", "positions.columns"),
]


@pytest.mark.parametrize("name", ["intr", "intr_learned", "intr_pre_norm"])
def test_class_queries_are_the_authors(name):
    record = Record(f"heads/{name}")
    asked = dict(record.meta["factory_kwargs"])
    options = {ours: asked[key] for key, ours in (("nheads", "num_heads"), ("dim_feedforward", "mlp_dim"))}
    options |= {key: asked[key] for key in ("hidden_dim", "enc_layers", "dec_layers")}
    options |= {"pre_norm": asked.get("pre_norm", False), "position": asked.get("position_embedding", "sine")}
    head = ClassQueryHead(asked["channels"], asked["num_queries"], **options).double().eval()
    state = {}
    for key, value in record.state_dict().items():
        for pattern, ours in INTR_NAMES:
            key = re.sub(pattern, ours, key)
        state[key] = value.flatten(1) if key == "input_proj.weight" else value
    head.load_state_dict(state)
    x = record.image()
    with torch.no_grad():
        assert relative_error(head(x), record.arrays["logits"]) <= 1e-9
        encoded = head.encode(x).mT.unflatten(2, x.shape[2:])
        assert relative_error(encoded, record.arrays["encoded"]) <= 1e-9
        attention = head.attention(x)
        assert attention.shape == (options["dec_layers"], 2, options["num_heads"], 5, 3, 5)
        assert relative_error(attention.flatten(4), record.arrays["attention"]) <= 1e-9
        assert relative_error(head(x, pre_logits=True), encoded.mean((2, 3))) <= 1e-12


def test_class_queries_drop_in_training_alone_and_come_anew_with_the_classes():
    torch.manual_seed(0)
    head = ClassQueryHead(12, 5, **SMALL["intr"], dropout=0.5)
    x = torch.randn(2, 12, 3, 5)
    assert not torch.equal(head(x), head(x))
    assert torch.equal(head.eval()(x), head(x))
    encoder = head.encoder[0].mlp[0].weight.clone()
    head.reset(7)
    assert head(x).shape == (2, 7) and torch.equal(head.encoder[0].mlp[0].weight, encoder) and not head.fc.training
    head.reset(0)
    assert head(x).shape == (2, 8)
    with pytest.raises(ValueError, match="no classes whose attention could be shown; set num_classes"):
        head.attention(x)
    with pytest.raises(ValueError, match="maps of 50 x 50 at most, got 3 x 51; give smaller images"):
        ClassQueryHead(12, 5, **SMALL["intr"], position="learned")(torch.zeros(1, 12, 3, 51))


@pytest.mark.parametrize(
    "name", [name if name in ENDS else pytest.param(name, marks=pytest.mark.full) for name in TINY]
)
def test_every_family_takes_a_head(name):
    """Shapes only, at a size that no patch divides; the classifier comes and goes as timm's do."""
    if "memory" in name:
        with pytest.raises(ValueError, match="has a memory, whose token its own head reads"):
            meta_model(name, head=SPECS[1], **TINY[name])
        return
    model = meta_model(name, head=SPECS[1], **TINY[name])
    features = model.forward_features(torch.empty(2, 3, *size_for(model, 72, 40), device="meta"))
    assert model.forward_head(features).shape == (2, 1000)
    assert model.forward_head(features, pre_logits=True).shape == (2, model.head_hidden_size)
    model.reset_classifier(0)
    assert model.forward_head(features).shape == (2, model.head_hidden_size)
    model.reset_classifier(0, "")
    assert model.forward_head(features) is features or len(features) == model.BRANCHES
    model.reset_classifier(5, "ep")
    assert model.forward_head(features).shape == (2, 5)


@pytest.mark.parametrize(
    ("name", "spec"),
    [("zoo_levit_128s", SPECS[1]), ("zoo_convit_t", SPECS[0]), ("zoo_crossvit_t", SPECS[2]), ("zoo_pvt_t", SPECS[1])],
)
def test_a_head_reads_the_last_map_and_learns(name, spec):
    model = _tiny(name, spec)
    x = torch.randn(2, 3, 64, 64)
    model.train()(x).sum().backward()
    assert all(parameter.grad is not None for parameter in model.head.parameters())
    model.eval()
    with torch.no_grad():
        _, maps = model.forward_intermediates(x, norm=True)
        heads = model.head if isinstance(model.head, nn.ModuleList) else [model.head]
        expected = [head(each) for head, each in zip(heads, maps[model.num_parts - 1 :: model.num_parts], strict=True)]
        logits = model(x)
        torch.testing.assert_close(logits, sum(expected) / len(expected))
        torch.testing.assert_close(visionzoo.fuse(model)(x), logits, rtol=1e-4, atol=1e-5)
        assert torch.equal(torch.fx.symbolic_trace(model)(x), logits)
        assert (logits[0] - logits[1]).abs().max() > 0
    assert _tiny(name, spec, features_only=True, out_indices=(1,))(x)[0].ndim == 4


@pytest.mark.parametrize("spec", SPECS, ids=SMALL)
def test_a_head_alone_is_exported(spec):
    head = build_spec("head", spec, HEADS, 8, 3, "own", 0.0).eval()
    x = torch.randn(2, 8, 3, 5)
    with torch.no_grad():
        torch.testing.assert_close(torch.export.export(head, (x,)).module()(x), head(x))


def test_checkpoints_of_the_models_own_head_load_when_asked(tmp_path, caplog):
    name, spec = "zoo_levit_128s", SPECS[1]  # whose own head has a batch norm, too
    plain, probed = _tiny(name, num_classes=7), _tiny(name, spec)
    own = [key for key in probed.state_dict() if key.startswith("head.") and "num_batches" not in key]
    with pytest.raises(
        ValueError, match=r"6 missing: head.pooling.query.* Only the head is missing: pass new_head=True"
    ):
        visionzoo.load_weights(probed, plain.state_dict())
    before = probed.head.fc.weight.clone()
    report = visionzoo.load_weights(probed, plain.state_dict(), new_head=True)
    assert report.missing == own and not report.unexpected and "head.fc.weight" in report.dropped
    assert torch.equal(probed.head.fc.weight, before)
    report = visionzoo.load_weights(again := _tiny(name, spec), probed.state_dict())
    assert not report.missing and torch.equal(again.head.pooling.query, probed.head.pooling.query)
    with pytest.raises(
        ValueError, match="The checkpoint is of a model with another head: build it with the same head="
    ):
        visionzoo.load_weights(_tiny(name), _tiny(name, {**spec, "d_out": 1}).state_dict())

    torch.save(plain.state_dict(), tmp_path / "weights.pth")
    overlay = {"file": str(tmp_path / "weights.pth"), "num_classes": 7}
    with caplog.at_level(logging.WARNING):
        loaded = _tiny(name, spec, pretrained=True, pretrained_cfg_overlay=overlay)
    assert "with another head: 14 of its tensors are left out, and the 7 of the new one keep" in caplog.text
    key = "stages.0.blocks.0.mixer.qkv.linear.weight"
    assert torch.equal(loaded.state_dict()[key], plain.state_dict()[key])


@pytest.mark.parametrize(
    ("head", "message"),
    [
        ("epp", r"unknown head 'epp' \(did you mean 'ep'\?\)"),
        (5, "head: expected a name or dict"),
        ({"type": "ep", "num_queries": 7}, "ConViT has 192 channels. .*num_queries must divide the 192 .* 3, 4, 6, 8"),
        (
            {"type": "ep", "num_queries": 64, "d_out": 2},
            "must divide the 96 channels of the output, got num_queries=64",
        ),
        ({"type": "ep", "num_queries": 0}, "got num_queries=0; pass one that does, such as 1, 2, 3, 4"),
        ({"type": "ep", "d_out": 5}, "d_out must divide the 192 channels, got d_out=5"),
        ({"type": "ep", "queries": 2}, r"queries=2 \(did you mean 'num_queries'\?\)"),
        ({"type": "ep", "num_queries": 2.5}, "num_queries must be int"),
        ({"type": "attentive", "num_heads": 7}, "num_heads must divide the 192 channels, got num_heads=7"),
        ({"type": "attentive", "mlp_ratio": 0.0}, "mlp_ratio must be above 0, got mlp_ratio=0.0"),
        ({"type": "intr", "hidden_dim": 30}, "hidden_dim must be a multiple of 4, .* got hidden_dim=30; pass 28"),
        ({"type": "intr", "num_heads": 7}, "num_heads must divide hidden_dim=256, got num_heads=7; .* 4, 8"),
        ({"type": "intr", "dec_layers": 0}, "1 or more dec_layers and mlp_dim, got enc_layers=6, dec_layers=0"),
        ({"type": "intr", "dropout": 1.0}, "dropout must be from 0 to below 1, got dropout=1.0"),
        ({"type": "intr", "position": "cosine"}, "position must be .*'sine', 'learned'.*, got position='cosine'"),
    ],
)
def test_wrong_heads_are_named(head, message):
    with pytest.raises(ValueError, match=message):
        timm.create_model("zoo_convit_t", device="meta", head=head)


def test_a_head_has_no_pooling_but_its_own():
    with pytest.raises(ValueError, match=r"global_pool='avg', expected one of \('', 'ep'\)"):
        timm.create_model("zoo_convit_t", device="meta", head="ep", global_pool="avg")
    model = timm.create_model("zoo_convit_t", device="meta", head="ep", global_pool="")
    with pytest.raises(
        ValueError, match="needs pooling, got num_classes=1000 and global_pool=''; leave global_pool out"
    ):
        model(torch.empty(1, 3, 32, 32, device="meta"))


def test_flags_name_the_heads():
    from visionzoo.engine.flags import HEADS as FLAGS

    assert sorted(FLAGS) == sorted(HEADS) == sorted(SMALL)
