"""Detection tokens beside Swin are the authors' function, see no padding, and name what they cannot do."""

import re
from contextlib import nullcontext

import pytest
import timm
import torch
from golden import Record, relative_error
from recipes.gates import normal, some
from recipes.vidt import TOKENS, padding
from tape import Capture

from visionzoo.layers.block import Block
from visionzoo.layers.mixers.window import WindowMixer
from visionzoo.models._checkpoint import rename
from visionzoo.models._detection_tokens import AUTHORS_KEYS, DetectionTokens, _step

SMALL = {
    "depths": (2, 2, 2, 2),
    "embed_dims": (16, 32, 64, 128),
    "num_heads": (1, 2, 2, 4),
    "num_classes": 0,
}


class Walk(torch.nn.Module):
    """A backbone and the tokens beside it, by the names that the authors' tensors get."""

    CHECKPOINT_KEYS = {"authors": AUTHORS_KEYS}

    def __init__(self, window_size=3, **options):
        super().__init__()
        torch.manual_seed(0)
        self.model = timm.create_model("zoo_swin_n", **SMALL, window_size=window_size)
        self.model.norm = torch.nn.Identity()
        self.tokens = DetectionTokens(self.model, **{"num_tokens": TOKENS, **options})

    def forward(self, image, padded=None):
        return self.tokens(self.model, image, padded)


@pytest.mark.parametrize(("form", "options"), [("body", {}), ("body_cross", {"cross_stages": (2, 3)})])
def test_outputs_and_gradients_are_the_authors(form, options):
    record = Record(f"vidt/{form}")
    walk = Walk(**options).double().eval()
    walk.load_state_dict(rename(record.state_dict(), walk)[0])
    image = record.image().requires_grad_()
    maps, tokens = walk(image, padding())
    outs = {f"map{i}": x for i, x in enumerate(maps)} | {"tokens": tokens}
    sum((x * normal(4 + i, x.shape)).sum() for i, x in enumerate(outs.values())).backward()
    own = outs | {"grad_image": image.grad}
    numbered = {name: torch.full(shape, float(i)) for i, (name, shape, _) in enumerate(record.meta["state"])}
    names = {int(value.view(-1)[0]): name for name, value in rename(numbered, walk)[0].items()}
    own |= {f"grad/{record.meta['state'][i][0]}": walk.get_parameter(name).grad for i, name in names.items()}
    assert sorted(own) == sorted(record.arrays)
    for key, expected in record.arrays.items():
        assert relative_error(some(own[key].detach(), expected.size), expected) <= record.tolerance(), key


def test_padding_is_not_seen_and_all_of_it_learns():
    walk = Walk(window_size=2).eval()
    image, padded = torch.randn(1, 3, 64, 96), torch.zeros(1, 64, 96, dtype=torch.bool)
    padded[..., 64:] = True
    tokens = walk(image, padded)[1]
    assert torch.equal(walk(image, torch.zeros_like(padded))[1], walk(image)[1])
    assert not torch.allclose(tokens, walk(image)[1], atol=1e-4)
    other = torch.where(padded[:, None], torch.randn_like(image), image)
    seen, hidden = ((x, places) for x, places in ((other, None), (other, padded)))
    assert (walk(*hidden)[1] - tokens).abs().max() < (walk(*seen)[1] - walk(image)[1]).abs().max() / 10
    maps, tokens = walk(image, padded)
    (sum(x.square().mean() for x in maps) + tokens.square().mean()).backward()
    assert all(p.grad is not None for p in walk.parameters())


@pytest.mark.parametrize(("stages", "same"), [((), True), ((0,), False)])
def test_tokens_see_an_image_in_cross_stages_only(stages, same):
    walk = Walk(cross_stages=stages).eval()
    one, other = walk(torch.randn(2, 3, 64, 64))[1]
    assert torch.allclose(one, other, atol=1e-6) == same


def test_stochastic_depth_leaves_out_map_and_tokens_together():
    block = Block(8, WindowMixer(8, 2, window_size=2), drop_path=0.5).train()
    x, tokens = torch.randn(32, 4, 4, 8), torch.randn(32, 3, 8)
    torch.manual_seed(0)
    after = _step(block, x, tokens, torch.zeros(1, 3, 8), None, None)
    same = [(one == other).flatten(1).all(1) for one, other in zip(after, (x, tokens), strict=True)]
    assert torch.equal(*same) and 0 < same[0].sum() < 32


def test_recomputed_blocks_give_the_same_gradients_and_graphs_can_hold_it():
    walk, image, padded = Walk().train(), torch.randn(2, 3, 68, 100), padding()[:, :68, :100]
    grads = []
    for enabled in (False, True):
        walk.model.set_grad_checkpointing(enabled)
        with nullcontext() if enabled else Capture():
            maps, tokens = walk(image, padded)
        total = sum(x.square().mean() for x in maps) + tokens.square().mean()
        grads.append(torch.autograd.grad(total, [*walk.parameters()]))
    assert all(torch.allclose(one, other, atol=1e-6) for one, other in zip(*grads, strict=True))


def test_channels_that_sines_cannot_fill_are_named():
    sizes = {**SMALL, "embed_dims": (8, 16, 24, 30), "num_heads": (1, 2, 2, 2)}
    with pytest.raises(ValueError, match="sines of places need a multiple of 4 channels, got 30 in a stage"):
        DetectionTokens(timm.create_model("zoo_swin_n", **sizes))


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("zoo_swin_n", {"num_tokens": 0}, "numbers must be 1 or more, got num_tokens=0, position_dim=256, out_dim=256"),
        ("zoo_swin_n", {"cross_stages": (5,)}, "expected stages of 0 to 3, got cross_stages=(5,)"),
        (
            "zoo_davit_t",
            {},
            "all of whose blocks attend in windows, such as zoo_swin_t, got DaViT with ChannelMixer",
        ),
        ("zoo_deit_t", {}, "all of whose blocks attend in windows, such as zoo_swin_t, got DeiT"),
    ],
)
def test_wrong_arguments_are_named(name, options, message):
    with torch.device("meta"), pytest.raises(ValueError, match=re.escape(message)):
        DetectionTokens(timm.create_model(name), **options)
