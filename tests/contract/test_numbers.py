"""What every model computes is consistent with itself: one build a form, real numbers, a small image."""

import copy
import io
import math
from contextlib import nullcontext
from types import SimpleNamespace

import pytest
import torch
from quick import FORMS, learned_from, meta_model, quick_model, size_for
from tape import Capture


@pytest.fixture(scope="module", params=FORMS)
def run(request):
    """Build a model and run it once on two images: what every test below compares with."""
    name, kwargs = request.param
    model = quick_model(name, num_classes=5, **kwargs)
    image = torch.randn(2, 3, *size_for(model, 72, 40), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        last, taps = model.forward_intermediates(image)
        logits = model.forward_head(last)
    return SimpleNamespace(model=model, image=image, last=last, taps=taps, logits=logits)


def _same(out, expected):
    """Whether tensors, or those of all branches, are equal."""
    if isinstance(expected, tuple):
        return len(out) == len(expected) and all(map(torch.equal, out, expected))
    return torch.equal(out, expected)


def _last(run):
    """Return the features that the last of all maps is of."""
    return run.last[0 if run.model.HEAD_INPUT.startswith("NCHW") else -1] if isinstance(run.last, tuple) else run.last


def _close(out, expected, rtol=1e-4):
    assert torch.isfinite(expected).all()
    assert (out - expected).norm() <= rtol * expected.norm()


@torch.no_grad()
def test_any_size_gives_maps_as_feature_info_says_or_is_refused(run):
    model, cfg = run.model, run.model.pretrained_cfg
    # Shapes do without memory and arithmetic, but cost more than the arithmetic of all but the largest models.
    device = "meta" if sum(p.numel() for p in model.parameters()) > 1e8 else "cpu"
    model = meta_model(cfg["architecture"]) if device == "meta" else model
    for size in [cfg["input_size"][1:], (320, 256), (333, 251), (200, 333)]:
        if not model.ANY_SIZE and size != model.img_size:
            with pytest.raises(ValueError, match=r"made for maps of .*resize the images, or build .*img_size="):
                model(torch.zeros(1, 3, *size))
            continue
        last, maps = model.forward_intermediates(torch.zeros(1, 3, *size, device=device))
        if model.HEAD_INPUT.startswith("NCHW"):
            last = last[0] if isinstance(last, tuple) else last  # the map, before other tokens
            assert last.shape == maps[-1].shape
        else:  # tokens: those of the map behind those that have no place on it
            streams = last if isinstance(last, tuple) else (last,)
            assert len(streams) == model.BRANCHES and len(maps) % model.BRANCHES == 0
            for tokens, m in zip(streams, maps[model.num_parts - 1 :: model.num_parts], strict=True):
                prefix = tokens.shape[1] - m[0, 0].numel()
                assert 0 <= prefix <= 8 and tokens.shape[2] == m.shape[1]
        for m, info in zip(maps, model.feature_info, strict=True):
            assert m.shape[1] == info["num_chs"]
            for side, full in zip(m.shape[2:], size, strict=True):
                low, high = math.floor(full / info["reduction"]), math.ceil(full / info["reduction"])
                assert low <= side <= high, (size, m.shape, info)
        if size == cfg["input_size"][1:] and model.HEAD_INPUT.startswith("NCHW"):
            assert last.shape[2:] == cfg["pool_size"]
            if model.HEAD_INPUT == "NCHW":  # else the head pools something beside the map, too
                assert last.shape[1] == model.num_features


@torch.no_grad()
def test_parts_make_the_whole(run):
    assert _same(run.model.forward_features(run.image), run.last)
    assert torch.equal(run.model(run.image), run.logits)


@torch.no_grad()
def test_any_features_come_alone_and_in_both_layouts(run):
    model, count = run.model, len(run.taps)
    for indices in ([0], [1], [0, -1], list(range(1, min(count, 4)))):
        maps = model.forward_intermediates(run.image, indices=indices, stop_early=True, intermediates_only=True)
        assert len(maps) == len(indices)
        assert all(torch.equal(m, run.taps[i]) for m, i in zip(maps, indices, strict=True))
    (nhwc,) = model.forward_intermediates(run.image, 1, norm=True, intermediates_only=True, output_fmt="NHWC")
    if model.HEAD_INPUT.startswith("NCHW"):
        assert torch.equal(nhwc.permute(0, 3, 1, 2), _last(run))
    else:
        assert torch.equal(nhwc.flatten(1, 2), _last(run)[:, -nhwc[0, ..., 0].numel() :])
    if "NLC" in model.FORMATS:
        (tokens,) = model.forward_intermediates(
            run.image, 1, norm=True, intermediates_only=True, output_fmt="NLC", return_prefix_tokens=True
        )
        assert isinstance(tokens, tuple) == bool(model.num_prefix_tokens)
        whole = torch.cat([tokens[1], tokens[0]], 1) if isinstance(tokens, tuple) else tokens
        assert torch.equal(whole, _last(run))


@torch.no_grad()
def test_a_sample_depends_on_its_pixels_not_on_its_batch_or_layout(run):
    assert (run.logits[0] - run.logits[1]).norm() > 1e-3 * run.logits[0].norm()
    _close(run.model(run.image[1:].contiguous(memory_format=torch.channels_last)), run.logits[1:])


@torch.no_grad()
def test_fx_graph_computes_the_same(run):
    assert torch.equal(torch.fx.symbolic_trace(run.model)(run.image), run.logits)


def test_all_parameters_learn_and_checkpointing_changes_no_gradient(run):
    model = run.model.train()
    statistics = {name: value.clone() for name, value in model.named_buffers() if "running" in name}
    try:
        norms = []
        for checkpointing in (False, True):
            model.zero_grad(set_to_none=True)
            model.set_grad_checkpointing(checkpointing)
            with nullcontext() if checkpointing else Capture():  # whose operators go into CUDA graphs, too
                learned_from(model, run.image).backward()
            assert not [name for name, p in model.named_parameters() if p.requires_grad and p.grad is None]
            norms.append(torch.stack([p.grad.norm() for p in model.parameters()]).double())
        assert norms[0].norm() > 0
        _close(norms[1], norms[0], 1e-5)
    finally:
        model.zero_grad(set_to_none=True)
        model.set_grad_checkpointing(False)
        for name, value in statistics.items():
            model.get_buffer(name).copy_(value)
        model.eval()


@torch.no_grad()
def test_pruned_model_gives_the_same_features_and_can_be_used(run):
    shared = {id(tensor): tensor for tensor in (*run.model.parameters(), *run.model.buffers())}
    pruned = copy.deepcopy(run.model, dict(shared))  # the copy shares the weights: the largest would not fit twice
    assert pruned.prune_intermediate_layers([1], prune_norm=True) == [1]
    (tap,) = pruned.forward_intermediates(run.image, [1], intermediates_only=True)
    assert torch.equal(tap, run.taps[1])
    if run.model.HEAD_INPUT == "NCHW":
        assert torch.equal(pruned.forward_features(run.image), tap)
    assert len(list(pruned.parameters())) < len(list(run.model.parameters()))
    assert len(run.model.parts) * run.model.BRANCHES == len(run.taps)
    pruned(run.image)  # without the later parts, norm and head
    replaced = copy.deepcopy(run.model, dict(shared))
    replaced.head = torch.nn.Identity()
    assert _same(replaced(run.image), run.last)
    with pytest.raises(ValueError, match=r"head was replaced by a Identity.*reset_classifier"):
        replaced.forward_head(run.last, pre_logits=True)
    replaced.reset_classifier(7)
    assert replaced(run.image).shape == (2, 7)


@torch.no_grad()
def test_whole_model_is_saved_and_loaded(run):
    """Pickled, as `torch.save(model)` does, and processes that are started with a model."""
    saved = io.BytesIO()
    torch.save(run.model, saved)
    saved.seek(0)
    assert _same(torch.load(saved, weights_only=False).forward_features(run.image), run.last)
