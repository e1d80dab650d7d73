"""Reducers: what is computed of the tokens that stay, what becomes of those that do not, and what is refused."""

from contextlib import contextmanager

import pytest
import timm
import torch
from quick import draw_weights
from tape import assert_recorded_alike
from torch.utils.flop_counter import FlopCounterMode

import visionzoo
from visionzoo.layers.mixers import MIXERS, build_mixer
from visionzoo.layers.reducers import REDUCERS, build_reducer
from visionzoo.layers.reducers.base import gather
from visionzoo.layers.reducers.pooling import pool
from visionzoo.layers.tokens import Tokens, mix_tokens
from visionzoo.models._reducing import kept_places
from visionzoo.models._registry import TINY

SMALL = {"depth": 4, "local_depth": 0, "embed_dim": 24, "num_classes": 5, "mixers": "full"}
TAKE = {
    "channel",
    "flow",
    "full",
    "linear",
    "sparsifiner",
    "spatial_reduction",
    "subspace",
    "taylor_shift",
}  # mixers that take dropped tokens
GRAPHS = {"class_attention"}  # whose graphs stand for all
DROP = sorted(name for name, reducer in REDUCERS.items() if not reducer.MAKES_TOKENS)


def _model(reduce, **kwargs):
    torch.manual_seed(0)
    model = timm.create_model("zoo_convit_t", reduce=reduce, **{**SMALL, **kwargs})
    return draw_weights(model).double().eval()


def _image(*size):
    return torch.randn(3, 3, *(size or (64, 80)), dtype=torch.float64, generator=torch.Generator().manual_seed(1))


def _reducers(model):
    return [(i, block.reducer) for i, block in enumerate(model.blocks) if block.reducer is not None]


@contextmanager
def _masked(model, masked=True):
    """Let dropped tokens stay as zeros, or not, whatever the mode."""
    for _, reducer in _reducers(model):
        reducer.masked = masked
    yield
    for _, reducer in _reducers(model):
        reducer.masked = None


@pytest.mark.parametrize(
    ("name", "pool"), [*((name, "token") for name in DROP), *((DROP[0], pool) for pool in ("avg", "max", "avgmax", ""))]
)
@torch.no_grad()
def test_masked_tokens_give_what_gathered_ones_give(name, pool):
    model, image = _model(name, global_pool=pool), _image()
    gathered, maps = model.forward_intermediates(image, norm=True)
    counts = [model.begin(image).x.shape[1]]
    for block in model.blocks:
        block.register_forward_hook(lambda module, args, out: counts.append(out.x.shape[1]))
    logits = model(image)
    assert counts[-1] < counts[0]
    with _masked(model):
        counts.clear()
        masked, others = model.forward_intermediates(image, norm=True)
        assert {*counts} == {1 + 20}
        for out, expected in zip([model(image), masked, *others], [logits, gathered, *maps], strict=True):
            assert (out - expected).norm() <= 1e-9 * expected.norm()


def test_training_masks_and_evaluation_gathers():
    model, image = _model("class_attention"), _image()
    shapes = []
    model.blocks[3].register_forward_hook(lambda module, args, out: shapes.append(out.x.shape[1]))
    model.train()(image).sum().backward()
    model.eval()(image)
    assert shapes == [1 + 20, 1 + 7]  # 20 · 0.7 · 0.7 · 0.7, rounded up each time
    assert all(p.grad is not None for p in model.parameters())


@pytest.mark.parametrize("name", REDUCERS)
def test_each_can_be_recorded_as_a_cuda_graph(name):
    model = _model((None, name, name), depth=3)  # the second sees what the first has left
    assert_recorded_alike(model.train(), _image(48, 64))


@torch.no_grad()
def test_what_is_computed_is_that_of_the_tokens_alone():
    """By hand: the first block, the best half by attention of the class token, the other blocks on these alone."""
    reduced, plain = _model((None, {"type": "class_attention", "keep_rate": 0.5}, None, None)), _model(None)
    plain.load_state_dict(reduced.state_dict())
    image = _image()
    tokens = plain.begin(image)
    x = plain.blocks[0].norm1(tokens.x)
    q, k, _ = plain.blocks[0].mixer.qkv(x).unflatten(2, (3, 4, 6)).unbind(2)
    attention = (torch.einsum("bgd,bngd->bgn", q[:, 0], k) * 6**-0.5).softmax(-1).mean(1)[:, 1:]
    x = plain.advance(0, tokens).x
    out, places = [], attention.topk(10).indices.sort(1).values
    for sample, kept in zip(x, places, strict=True):
        state = Tokens(torch.cat([sample[:1], sample[1:][kept]])[None], (2, 5), 1)
        for i in (1, 2, 3):
            state = plain.advance(i, state)
        out.append(plain.forward_head(plain.norm(state.x)))
    torch.testing.assert_close(reduced(image), torch.cat(out), rtol=1e-9, atol=1e-12)
    (last,) = reduced.forward_intermediates(image, 1, intermediates_only=True)
    filled = last.flatten(2).abs().amax(1) > 0
    assert torch.equal(filled.nonzero()[:, 1].view(3, 10), places)


@torch.no_grad()
def test_representation_shift_is_how_far_the_mlp_moves_a_token():
    model, image = _model((None, None, {"type": "representation_shift", "keep_rate": 0.25}, None)), _image()
    state = model.advance(0, model.begin(image))
    block = model.blocks[1]
    mixed = state.x + block.mixer(block.norm1(state.x).unsqueeze(1)).squeeze(1)
    length = block.mlp(block.norm2(mixed)).norm(dim=-1)[:, 1:]
    torch.testing.assert_close(model.advance(1, state).scores, length)
    (last,) = model.forward_intermediates(image, 1, intermediates_only=True)
    filled = last.flatten(2).abs().amax(1) > 0
    assert torch.equal(filled.nonzero()[:, 1].view(3, 5), length.topk(5).indices.sort(1).values)


@pytest.mark.parametrize(
    ("name", "options"),
    [*((name, {}) for name in MIXERS), ("taylor_shift", {"threshold": 0, "output_normalized": True})],
)
@torch.no_grad()
def test_mixers_do_not_see_dropped_tokens(name, options):
    torch.manual_seed(0)
    options = {"map_size": 4} if name == "levit" else options
    mixer = build_mixer({"type": name, **options}, 16, 2).eval().double()
    assert mixer.takes_dropped_tokens == (name in TAKE)
    if not mixer.takes_dropped_tokens or name == "sparsifiner":  # which knows that tokens are gone: see its own test
        return
    x, keep = (
        torch.randn(2, 2 + 20, 16, dtype=torch.float64),
        torch.arange(40).view(2, 20) % torch.tensor([[2], [3]]) > 0,
    )
    out = mix_tokens(mixer, Tokens(x, (4, 5), 2, keep=keep))
    for sample, kept, mixed in zip(x, keep, out, strict=True):
        there = torch.cat([torch.ones(2, dtype=torch.bool), kept])
        alone = mixer(sample[there][None, None])[0, 0]
        assert (mixed[there] - alone).norm() <= 1e-9 * alone.norm()


@torch.no_grad()
def test_images_that_keep_different_numbers_are_padded():
    x, source = torch.arange(8.0).view(2, 4, 1) + 1, torch.tensor([[0, 0, 2, 3], [3, 1, -1, 2]])
    chosen = torch.tensor([[False, True, True, True], [True, False, False, False]])
    left, to, keep = gather(x, source, chosen, None, 0)
    assert left.squeeze(-1).tolist() == [[2, 3, 4], [5, 0, 0]]
    assert to.tolist() == [[-1, -1, 1, 2], [-1, -1, -1, -1]]
    assert keep.tolist() == [[True, True, True], [True, False, False]]
    left, to, _ = gather(x, None, torch.zeros(2, 4, dtype=torch.bool), None, 0)
    assert left.shape == (2, 0, 1) and not Tokens(left, (2, 2), 0, to).map().any()
    left, again, _ = gather(left, to, torch.zeros(2, 0, dtype=torch.bool), None, 0)  # by a reducer behind that one
    assert left.shape == (2, 0, 1) and torch.equal(again, to)


@torch.no_grad()
def test_flops_are_those_of_the_tokens_that_are_left():
    def count(reduce):
        model = timm.create_model("zoo_convit_t", reduce=reduce, device="meta", **SMALL).eval()
        with FlopCounterMode(display=False) as counter:
            model(torch.empty(1, 3, 160, 160, device="meta"))
        return counter.get_total_flops()

    def block(n):  # projections, MLP and products of attention with 1 class token, in flops
        return 2 * (1 + n) * 12 * 24 * 24 + 4 * (1 + n) ** 2 * 24

    scores = 2 * (1 + 100) * 24  # of one query
    difference = count(None) - count((None, None, {"type": "class_attention", "keep_rate": 0.3}, None))
    assert difference == 2 * (block(100) - block(30)) - scores


@pytest.mark.parametrize("size", [(33, 70), (96, 48)])
@torch.no_grad()
def test_any_size_and_features_only(size):
    model = _model("class_attention")
    getter = timm.create_model(
        "zoo_convit_t", features_only=True, out_indices=(0, 3), reduce="class_attention", **SMALL
    )
    getter = getter.double().eval()
    visionzoo.load_weights(getter, model.state_dict())
    first, last = getter(_image(*size))
    grid = (-(-size[0] // 16), -(-size[1] // 16))
    assert first.shape == last.shape == (3, 24, *grid)
    full, dropped = ((m.abs().amax(1) > 0).sum((1, 2)) for m in (first, last))
    assert (full == grid[0] * grid[1]).all() and (dropped < full).all() and (dropped == dropped[0]).all()


@pytest.mark.parametrize(
    "name", [name if name in GRAPHS else pytest.param(name, marks=pytest.mark.full) for name in REDUCERS]
)
@torch.no_grad()
def test_graphs_compute_the_same(name):
    model, image = _model(name, depth=2), _image()
    expected = model(image)
    assert torch.equal(torch.fx.symbolic_trace(model)(image), expected)
    torch.testing.assert_close(torch.export.export(model, (image,)).module()(image), expected)


def test_checkpointing_changes_no_gradient():
    model, image = _model("representation_shift").train(), _image()
    grads = []
    for enable in (False, True):
        model.set_grad_checkpointing(enable)
        model.zero_grad()
        model(image).square().sum().backward()
        grads.append(torch.cat([p.grad.flatten() for p in model.parameters()]))
    torch.testing.assert_close(*grads)


def test_a_spec_alone_stands_where_its_paper_has_it():
    def places(reduce, depth):
        return [i for i, _ in _reducers(_model(reduce, depth=depth))]

    assert places("class_attention", 12) == [3, 6, 9] and places("representation_shift", 2) == [1]
    spec = {"type": "class_attention", "keep_rate": 0.5}
    assert places((None, spec, None, "representation_shift"), 4) == [1, 3] and places([None] * 4, 4) == []


FULL = {"mixers": "full", "local_depth": 0}


@pytest.mark.parametrize(
    ("reduce", "kwargs", "message"),
    [
        ("class_atention", {}, r"unknown reducer 'class_atention' \(did you mean 'class_attention'"),
        (3, {}, r"reduce: expected one entry for each of the 4 blocks, got int: 3"),
        (("class_attention",), {}, r"reduce: expected one entry for each of the 4 blocks, got 1: \('class_att"),
        ({"type": "class_attention", "keep_rate": 1.5}, {}, r"keep_rate is the share .* at most 1, got keep_rate=1.5"),
        ({"type": "representation_shift", "keep_rate": 0.0}, {}, r"above 0 and at most 1, got keep_rate=0.0"),
        ({"type": "class_attention", "keep_rate": "a"}, {}, r"keep_rate must be float, got keep_rate='a'"),
        ({"type": "class_attention", "keep": 0.5}, {}, r"reducer 'class_attention' does not take .* keep=0.5"),
        (("class_attention", None, None, None), {}, r"blocks.0 .*class token, which is not there"),
        (
            ("representation_shift", None, None, None),
            {},
            r"blocks.0 .*the block before .*there is none; put it before a",
        ),
        ("class_attention", {"class_token": False}, r"a class token, which is not there; build the model with"),
        ("class_attention", {"global_pool": "map"}, r"global_pool='map'"),
        (
            "class_attention",
            {"mixers": "neighborhood"},
            r"blocks.1 mixes by NeighborhoodMixer, which needs the whole map",
        ),
        ("class_attention", {"mixers": "pool"}, r"mixes by PoolMixer, .* put reducers behind it, .* mixers='full'"),
        (
            {"type": "token_pooling", "method": "kmode"},
            {},
            r"method must be one of \('kmedoids', 'kmeans'\), got .*kmode",
        ),
        ({"type": "token_pooling", "iterations": 0}, {}, r"iterations must be positive, got iterations=0"),
        ({"type": "selector", "temperature": 0.0}, {}, r"temperature must be positive, got temperature=0.0"),
        ({"type": "interpreter", "num_heads": 5}, {}, r"num_heads must divide dim, got dim=24 and num_heads=5"),
        ({"type": "interpreter", "threshold": 1.0}, {}, r"threshold must be from 0 to below 1, got threshold=1.0"),
        ("token_pooling", {"gates": "eca"}, r"TokenPoolingReducer makes new tokens, .* put it before gates and mixers"),
        ((None, "class_attention", "token_pooling", None), {}, r"blocks.2 .* put it before ClassAttentionReducer"),
        ("class_attention", {"mixers": ("flow",) * 4}, r"'class_attention', which FlowMixer of block 0 does not have"),
    ],
)
def test_wrong_reducers_are_named(reduce, kwargs, message):
    with pytest.raises(ValueError, match=message):
        _model(reduce, **kwargs)


@pytest.mark.parametrize("after", [(0,), (0, 1)])
@torch.no_grad()
def test_sparsifiner_masks_and_gathers_alike_at_any_size(after):
    torch.manual_seed(0)
    options = {"depth": 3, "embed_dim": 16, "num_heads": 2, "img_size": 64, "num_classes": 5, "prune_after": after}
    model = draw_weights(timm.create_model("zoo_sparsifiner_s", token_keep_rate=0.5, **options)).double().eval()
    for size in ((64, 64), (70, 90)):
        gathered = model(_image(*size))
        with _masked(model):
            torch.testing.assert_close(model(_image(*size)), gathered, rtol=1e-9, atol=1e-12)


def test_what_models_with_reducers_say_beside_logits():
    for name, term, more in (
        ("zoo_sparsifiner_s", "attention", {"prune_after": (0,)}),
        ("zoo_iared2_deit_s", "kept", {}),
    ):
        model = draw_weights(timm.create_model(name, **{**TINY[name], "num_classes": 5, **more})).double().train()
        model.set_auxiliary()
        out = model(_image(64, 64))
        assert [*out.terms] == [term] and out.terms[term] > 0
        out.terms[term].backward()
        learned = [n for n, p in model.named_parameters() if p.grad is not None and p.grad.any()]
        assert any("predictor.proj_q" in n or "reducer.qk" in n for n in learned)


def test_attention_can_be_made_sparse():
    model, image = _model(None, mixers=(None, None, None, {"type": "full", "sparse_term": True})).train(), _image()
    assert model.auxiliary_weights() == {"sparsity": 0.01}
    model.set_auxiliary()
    said = []
    block = model.blocks[3]
    block.norm1.register_forward_hook(lambda module, args, out: said.append(out))
    term = model(image).terms["sparsity"]
    q, k, _ = block.mixer.qkv(said[0]).unflatten(2, (3, 4, 6)).unbind(2)
    attention = (torch.einsum("bmgd,bngd->bgmn", q, k) * 6**-0.5).softmax(-1)
    torch.testing.assert_close(term, torch.log(1 + attention**2).mean())
    assert not _model(None).auxiliary_weights()


@torch.no_grad()
def test_the_interpreter_keeps_what_is_probable_enough():
    model, image = _model(("interpreter", None, None, None)), _image()
    tokens, reducer = model.begin(image), model.blocks[0].reducer
    x = torch.nn.functional.layer_norm(tokens.x, (24,))
    q, k = reducer.qk(x).unflatten(2, (2, 6, 4)).unbind(2)
    probable = torch.stack([(k @ q[i, 0].mT).diagonal(dim1=-2, dim2=-1)[i] for i in range(3)])  # [B, N, G]
    chosen = (probable * 4**-0.5).sigmoid().mean(-1)[:, 1:] > 0.5
    assert 0 < chosen.sum() < chosen.numel() and len({*chosen.sum(1).tolist()}) > 1
    (first,) = model.forward_intermediates(image, [0], intermediates_only=True)
    assert torch.equal(first.flatten(2).abs().amax(1) > 0, chosen)
    state = model.advance(0, tokens)
    assert state.x.shape[1] == 1 + chosen.sum(1).max() and torch.equal(state.keep.sum(1), chosen.sum(1))


def _clusters(x, weights, count, method, iterations):
    """Cluster one image's tokens as the paper says, in loops."""
    centres = [x[i] for i in weights.argsort(descending=True)[:count]]

    def nearest():
        return [min(range(count), key=lambda j: (t - centres[j]).norm()) for t in x]

    for _ in range(iterations):
        cluster = nearest()
        for j in range(count):
            members = [i for i in range(len(x)) if cluster[i] == j]
            if method == "kmeans":
                centres[j] = sum(weights[i] * x[i] for i in members) / sum(weights[i] for i in members)
            else:
                costs = [sum(weights[k] * (x[i] - x[k]).norm() ** 2 for k in members) for i in members]
                centres[j] = x[members[costs.index(min(costs))]]
    return torch.stack(centres), cluster if method == "kmeans" else nearest()


@pytest.mark.parametrize("method", ["kmedoids", "kmeans"])
def test_pooled_tokens_are_the_centres_of_weighted_clusters(method):
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(2, 14, 3, dtype=torch.float64, generator=generator).requires_grad_()
    weights = torch.rand(2, 14, dtype=torch.float64, generator=generator)
    centres, cluster = pool(x, weights, 4, method=method, iterations=3)
    for i in range(2):
        expected, clusters = _clusters(x[i].detach(), weights[i], 4, method, 3)
        torch.testing.assert_close(centres[i].detach(), expected)
        assert cluster[i].tolist() == clusters
    centres.sum().backward()
    assert x.grad.any() and x.grad.isfinite().all()


@torch.no_grad()
def test_places_of_the_map_read_the_centre_of_their_cluster():
    specs = (
        None,
        {"type": "token_pooling", "keep_rate": 0.4},
        {"type": "representation_shift", "keep_rate": 0.5},
        None,
    )
    model, image = _model(specs), _image()
    model.blocks[1].register_forward_hook(lambda module, args, out: states.append((args[0], out)))
    states = []
    first, second = model.forward_intermediates(image, [1, 2], intermediates_only=True)
    before, after = states[0]
    q, k = model.blocks[0].mixer.qkv(model.blocks[0].norm1(model.begin(image).x)).unflatten(2, (3, 4, 6)).unbind(2)[:2]
    attention = (torch.einsum("bmgd,bngd->bgmn", q, k) * 6**-0.5).softmax(-1).mean((1, 2))
    torch.testing.assert_close(before.scores, attention[:, 1:])
    assert after.x.shape[1] == 1 + 8 and all(len(m.flatten(1).unique(dim=1).mT) == 8 for m in first)
    kept = [len(m.flatten(1).mT[m.flatten(1).abs().amax(0) > 0].unique(dim=0)) for m in second]
    assert kept == [4, 4, 4]
    gathered = model(image)
    with _masked(model):
        torch.testing.assert_close(model(image), gathered, rtol=1e-9, atol=1e-12)


def test_the_selector_learns_to_reconstruct():
    model, image = _model((None, None, "selector", None)).train(), _image()
    reducer = model.blocks[2].reducer
    model.set_auxiliary()
    out = model(image)
    assert {*out.terms} == {"reconstruction", "selected"} and 0 < out.terms["selected"] < 1
    out.terms["reconstruction"].backward(retain_graph=True)
    assert all(p.grad is not None and p.grad.any() for p in reducer.parameters())
    assert not any(p.grad is not None and p.grad.any() for p in model.blocks[1].parameters())  # nothing to flatter
    tokens, kept = torch.randn(1, 4, 24).double(), torch.tensor([[1.0, 0.0, 1.0, 1.0]]).double()
    changed = tokens.clone()
    changed[0, 1] += 1
    assert torch.equal(reducer._reconstruct(tokens, kept, None), reducer._reconstruct(changed, kept, None))


CARRY = {"zoo_cpvt_t", "zoo_cpvt_t_gap", "zoo_deit_t", "zoo_deit_t_distilled", "zoo_iared2_deit_s", "zoo_sparsifiner_s"}
CARRY |= {
    "zoo_activator_geglu",
    "zoo_crate_t",
    "zoo_lambda_vit_s_024",
    "zoo_lambda_vit_t_024",
    "zoo_t2t_nystrom_7",
    "zoo_taylorshift_s",
    "zoo_taylorshift_ti",
}
WHY_NOT = {
    "zoo_convit_t": r"blocks.1 mixes by GatedPositionalMixer, which needs the whole map",
    "zoo_inline_deit_t": r"blocks.1 mixes by InjectiveLinearMixer, which needs the whole map",
    "zoo_tnt_s": r"blocks.1 \(TNTBlock\) carries more than tokens",
    "zoo_swin_t": r"reduce: SwinTransformer is not an isotropic model, its stages need whole maps.*zoo_deit_s",
    "zoo_crossvit_t": r"reduce: CrossViT is not an isotropic model, its blocks need whole maps.*zoo_deit_s",
}
ISOTROPIC = [name for name, kwargs in TINY.items() if "embed_dim" in kwargs]


@pytest.mark.parametrize("name", [*ISOTROPIC, "zoo_swin_t", "zoo_crossvit_t"])
def test_every_family_takes_reducers_or_says_why_not(name):
    create = {"num_classes": 3, "device": "meta", **TINY[name]}
    reason = WHY_NOT.get(name)
    if reason is None and name not in CARRY:
        reason = r"^reduce: (blocks.1 .*(needs the whole map|has no place for dropped tokens|carries more)|.* a memory)"
    if reason:
        with pytest.raises(ValueError, match=reason):
            timm.create_model(name, reduce="representation_shift", **create)
        return
    model = timm.create_model(name, reduce="representation_shift", **create)
    assert _reducers(model)
    model(torch.empty(2, 3, 64, 64, device="meta"))


@torch.no_grad()
def test_reducers_alone_take_and_give_what_they_say():
    for name in REDUCERS:
        reducer = build_reducer(name, 24)
        assert all(0 <= i < depth for depth in range(2, 14) for i in reducer.places(depth))
    with pytest.raises(ValueError, match="ClassAttentionReducer: dim must be positive, got dim=0"):
        build_reducer("class_attention", 0)


@torch.no_grad()
def test_gates_see_the_map_with_zeros_in_dropped_places():
    model, image = _model("class_attention", gates="eca"), _image()
    seen = []
    model.blocks[3].branch_gate.register_forward_hook(lambda module, args, out: seen.append((args[0], out)))
    gathered = model(image)
    with _masked(model):
        torch.testing.assert_close(model(image), gathered, rtol=1e-9, atol=1e-12)
    (before, after), (other, _) = seen
    assert before.shape == (3, 4, 5, 24) and (before.abs().amax(-1) > 0).sum((1, 2)).tolist() == [7, 7, 7]
    torch.testing.assert_close(before, other) and after.any()


def test_no_position_generator_or_other_state_stands_behind_a_reducer():
    small = {"depth": 3, "embed_dim": 16, "num_heads": 2}
    with pytest.raises(ValueError, match=r"blocks.2 has a position generator, a convolution of the map; put reducers"):
        timm.create_model("zoo_cpvt_t", peg_after=(0, 2), reduce="representation_shift", **small)
    assert timm.create_model("zoo_cpvt_t", reduce="representation_shift", **small).blocks[1].reducer is not None


@torch.no_grad()
def test_kept_places_are_said_for_each_reducer():
    model, image = _model((None, "representation_shift", "interpreter", None)), _image()
    said = kept_places(model, image)
    assert {name: mask.shape for name, mask in said.items()} == {"blocks.1": (3, 4, 5), "blocks.2": (3, 4, 5)}
    assert (said["blocks.1"].sum((1, 2)) == 14).all() and not (said["blocks.2"] & ~said["blocks.1"]).any()
    (last,) = model.forward_intermediates(image, [2], intermediates_only=True)
    assert torch.equal(last.abs().amax(1) > 0, said["blocks.2"])


def test_checkpoints_without_reducers_are_taken_where_that_is_said(caplog):
    plain, model = _model(None), _model(("interpreter", None, "interpreter", None))
    own = [name for name in model.state_dict() if ".reducer." in name]
    with pytest.raises(ValueError, match="Only the reducers are missing: pass new_reducers=True"):
        visionzoo.load_weights(model, plain.state_dict())
    report = visionzoo.load_weights(model, plain.state_dict(), new_reducers=True)
    assert report.missing == own == [f"blocks.{i}.reducer.qk.{part}" for i in (0, 2) for part in ("weight", "bias")]
    sparsifiner = timm.create_model("zoo_sparsifiner_s", **TINY["zoo_sparsifiner_s"])
    deit = timm.create_model("zoo_deit_t", **{**TINY["zoo_deit_t"], "depth": 3, "img_size": 64})
    assert len(visionzoo.load_weights(sparsifiner, deit.state_dict(), new_reducers=True).missing) == 3 * 6


@pytest.mark.parametrize("pool", ["avg", "max"])
@torch.no_grad()
def test_heads_pool_the_tokens_that_are_left(pool):
    model, image = _model("interpreter", global_pool=pool), _image()
    state = model.begin(image)
    for i in range(4):
        state = model.advance(i, state)
    tokens, keep = model.norm(state.x)[:, 1:], state.keep
    assert len({*keep.sum(1).tolist()}) > 1 and keep.any(1).all()
    pooled = [x[kept].mean(0) if pool == "avg" else x[kept].amax(0) for x, kept in zip(tokens, keep, strict=True)]
    torch.testing.assert_close(model(image), model.head.fc(torch.stack(pooled)), rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("name", REDUCERS)
def test_no_images_are_no_error(name, training):
    reducer = build_reducer(name, 24).train(training)
    x, scores = torch.zeros(0, 1 + 12, 24), torch.zeros(0, 12) if reducer.SCORES else None
    left = reducer(x, None, None, scores, 1)[0]
    assert left.shape[::2] == (0, 24)
