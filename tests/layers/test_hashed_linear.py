"""Hashed linear attention against its definition; fitted hash functions against random ones."""

import math

import pytest
import torch
import torch.nn.functional as F

from visionzoo.layers.hashing import KernelHash, fit_hash, hash_error, nearest_and_furthest
from visionzoo.layers.mixers import HashedLinearMixer


@torch.no_grad()
def test_it_is_attention_between_signs_of_kernels():
    torch.manual_seed(0)
    mixer = HashedLinearMixer(8, 2, num_bits=5, num_anchors=3).double()
    mixer.hash.mean.copy_(torch.rand(1, 2, 1, 3))
    x = torch.randn(1, 4, 5, 8, dtype=torch.float64)
    qk, v = (layer(x).view(20, 2, 4) for layer in (mixer.qk, mixer.v))
    out = torch.zeros(20, 2, 4).double()
    for head in range(2):
        tokens = [token / math.sqrt(token @ token) for token in qk[:, head]]
        distances = torch.tensor([[(t - a) @ (t - a) for a in mixer.hash.anchor[0, head]] for t in tokens])
        kernels = torch.exp(-distances / (2 * distances.mean())) - mixer.hash.mean[0, head]
        codes = torch.sign(kernels @ mixer.hash.weight[head].T)
        assert codes.unique().tolist() == [-1, 1]
        for i in range(20):
            above, below = 6 * v[i, head], 20 * 6
            for j in range(20):
                above = above + (codes[i] @ codes[j]) * v[j, head]
                below = below + codes[i] @ codes[j]
            out[i, head] = above / below
    torch.testing.assert_close(mixer(x).view(20, 8), mixer.proj(out.flatten(1)), rtol=1e-12, atol=1e-12)


def test_the_gradient_passes_where_a_sum_is_small():
    functions = KernelHash(1, 2, num_bits=2, num_anchors=1)
    functions.weight.copy_(torch.tensor([[[1.0], [1e4]]]))
    tokens = F.normalize(torch.randn(1, 1, 6, 2), dim=-1).requires_grad_()
    for bit, passes in ((0, True), (1, False)):
        (gradient,) = torch.autograd.grad(functions(tokens)[..., bit].sum(), tokens)
        assert gradient.any() == passes


def test_no_token_makes_a_code_that_is_no_number():
    mixer = HashedLinearMixer(8, 2)
    torch.nn.init.zeros_(mixer.qk.weight)
    torch.nn.init.zeros_(mixer.qk.bias)  # tokens without length
    out = mixer(torch.randn(1, 3, 3, 8, requires_grad=True))
    out.sum().backward()
    assert out.isfinite().all()
    mixer.hash.anchor.zero_()  # and without distance from the anchors
    assert mixer(torch.randn(1, 3, 3, 8)).isfinite().all()


def _maps(generator, batch=4, heads=2, count=49, dim=8):
    """Draw tokens of a few kinds each, as those of images are."""
    kinds = torch.randn(batch, heads, 5, dim, generator=generator)
    kinds = kinds + torch.randn(1, heads, 1, dim, generator=generator)
    chosen = torch.randint(5, (batch, heads, count), generator=generator)
    tokens = kinds.gather(2, chosen[..., None].expand(-1, -1, -1, dim))
    return F.normalize(tokens + 0.3 * torch.randn(tokens.shape, generator=generator), dim=-1)


def test_fitted_codes_tell_which_tokens_are_alike_better_than_random_ones_on_other_maps():
    generator = torch.Generator().manual_seed(0)
    maps = _maps(generator, batch=8)
    seen, others = maps[:4], maps[4:]
    pairs = nearest_and_furthest(others, 5)
    torch.manual_seed(0)
    functions = KernelHash(2, 8, num_bits=8, num_anchors=20)
    random = hash_error(functions(others), *pairs)
    bits = []
    before, after = fit_hash(functions, seen, neighbors=5, steps=30, advance=lambda: bits.append(1))
    assert len(bits) == 8
    assert after == pytest.approx(hash_error(functions(seen), *nearest_and_furthest(seen, 5)))
    assert after < 0.9 * before
    assert hash_error(functions(others), *pairs) < 0.7 * random
    kernels = functions.kernels(seen)
    torch.testing.assert_close(functions.mean, kernels.mean((0, 2), keepdim=True))
    distances = torch.cdist(functions.anchor[0], seen.transpose(0, 1).flatten(1, 2))
    assert distances.amin(-1).max() < 1e-3  # the anchors are tokens


def test_the_error_is_that_of_the_matrix_of_products():
    generator = torch.Generator().manual_seed(0)
    tokens = _maps(generator, batch=2, count=20)
    near, far = nearest_and_furthest(tokens, 3, chunk=7)
    products = tokens @ tokens.mT
    ranks = products.argsort(-1)
    assert torch.equal(near.sort().values, ranks[..., -3:].sort().values)
    assert torch.equal(far.sort().values, ranks[..., :3].sort().values)
    codes = torch.randn(2, 2, 20, 6, generator=generator).sign()
    targets = torch.zeros(2, 2, 20, 20).scatter(-1, near, 1.0).scatter(-1, far, -1.0)
    expected = (codes @ codes.mT / 6 - targets).square().mean()
    assert hash_error(codes, near, far) == pytest.approx(expected.item(), rel=1e-5)


@pytest.mark.parametrize(
    ("tokens", "message"),
    [
        (torch.ones(2, 1, 4, 2), r"2 maps of 4 tokens are too few for 10 anchors"),
        (torch.ones(16, 1, 1, 2), r"at least 2 in a map"),
        (torch.full((2, 1, 8, 2), torch.nan), r"NaN or infinite"),
    ],
)
def test_tokens_that_nothing_can_be_fitted_to_are_refused(tokens, message):
    functions = KernelHash(1, 2, num_bits=2, num_anchors=10)
    before = functions.anchor.clone()
    with pytest.raises(ValueError, match=message):
        fit_hash(functions, tokens)
    assert torch.equal(functions.anchor, before)
