"""Position generators stand after chosen blocks of any model, see the map alone, and say where they cannot stand."""

import pytest
import timm
import torch
import torch.nn.functional as F
from quick import of_each_kind, size_for

from visionzoo.layers.position import PositionGenerator
from visionzoo.layers.tokens import Tokens
from visionzoo.models._positions import add_position_generators
from visionzoo.models._registry import TINY


def _generators(model):
    return {name: module for name, module in model.named_modules() if isinstance(module, PositionGenerator)}


def test_a_generator_adds_a_depthwise_convolution_with_zeros_around():
    generator = PositionGenerator(6).double()
    torch.nn.init.normal_(generator.bias)
    x = torch.randn(2, 5, 7, 6, dtype=torch.float64)
    nchw = x.permute(0, 3, 1, 2)
    expected = nchw + F.conv2d(nchw, generator.weight, generator.bias, padding=1, groups=6)
    torch.testing.assert_close(generator(x), expected.permute(0, 2, 3, 1), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("name", of_each_kind())
def test_every_family_takes_generators(name):
    torch.manual_seed(0)
    model = timm.create_model(name, num_classes=3, **TINY[name])
    if name.startswith(("zoo_cpvt", "zoo_pcpvt")):
        before = _generators(model)
        assert len(before) == (4 if "pcpvt" in name else 1)
    first = [part.blocks[0] if hasattr(part, "blocks") else part for part in model.parts]
    first = first if hasattr(model.parts[0], "blocks") else first[:1]
    add_position_generators(model)
    assert [type(block.peg) for block in first] == [PositionGenerator] * len(_generators(model))

    model.eval()
    outputs = []
    first[0].peg.register_forward_hook(lambda module, args, out: outputs.append((args[0], out)))
    image = torch.randn(2, 3, *size_for(model, 64, 96))
    tap = model.forward_intermediates(image, [0], intermediates_only=True)[0]
    ((given, out),) = outputs
    assert given.shape[1:3] == tap.shape[2:] and (out - given).norm() > 1e-3 * given.norm()
    model.train()(image).sum().backward()
    grads = [generator.weight.grad for generator in _generators(model).values()]
    assert grads[0].norm() > 0 and all(grad is not None for grad in grads)  # 0 where a class token alone is read


def test_prefix_tokens_pass_by():
    block = timm.create_model("zoo_cpvt_t", **TINY["zoo_cpvt_t"]).blocks[0].eval()
    tokens = Tokens(torch.randn(2, 1 + 12, 16), (3, 4), 1)
    with torch.no_grad():
        out = block(tokens)
        generator, block.peg = block.peg, torch.nn.Identity()
        plain = block(tokens)
        assert torch.equal(out.x[:, :1], plain.x[:, :1])
        assert torch.equal(out.map(), generator(plain.map()))


def test_generators_follow_the_blocks_that_are_named_and_start_as_released():
    model = timm.create_model("zoo_cpvt_t", depth=4, embed_dim=192, peg_after=(0, 2))
    assert list(_generators(model)) == ["blocks.0.peg", "blocks.2.peg"]
    assert {"blocks.0.peg.weight", "blocks.2.peg.weight"} <= model.no_weight_decay()
    assert abs(model.blocks[2].peg.weight.std() - 2**0.5 / 3) < 0.03 and not model.blocks[2].peg.bias.any()


@pytest.mark.parametrize("after", [(2,), (-1,), (0, 7)])
def test_blocks_that_there_are_not_are_refused_before_anything_changes(after):
    model = timm.create_model("zoo_swin_t", depths=(2, 2), embed_dims=(8, 16), num_heads=(1, 2))
    with pytest.raises(ValueError, match=r"of 2 in a row of SwinTransformer.*got after="):
        add_position_generators(model, after=after)
    assert not _generators(model)
