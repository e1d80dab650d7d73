"""Keys of spatial-reduction attention: one for each whole patch, or a fixed number of pooled ones."""

import pytest
import torch
import torch.nn.functional as F

from visionzoo.layers.mixers import SpatialReductionMixer


def _mixer(**options):
    torch.manual_seed(0)
    mixer = SpatialReductionMixer(8, 2, **options).double()
    for parameter in mixer.parameters():
        torch.nn.init.normal_(parameter)
    return mixer


def _attend(mixer, x, reduced):
    """Attention of all tokens of x [1, H, W, 8] to the tokens [N', 8]."""
    tokens = x.flatten(1, 2)[0]
    out = []
    for g in range(2):
        own = slice(4 * g, 4 * g + 4)
        keys, values = (mixer.kv(reduced)[:, part * 8 :][:, own] for part in (0, 1))
        out.append((mixer.q(tokens)[:, own] @ keys.T / 2).softmax(1) @ values)
    return mixer.proj(torch.cat(out, dim=1)).view(x.shape)


@pytest.mark.parametrize("size", [(4, 6), (5, 7), (1, 6), (1, 1)])
def test_each_whole_patch_gives_a_key(size):
    mixer = _mixer(reduction=2)
    x = torch.randn(1, *size, 8, dtype=torch.float64)
    padded = torch.zeros(1, max(2, size[0]), max(2, size[1]), 8, dtype=torch.float64)  # never less than a patch
    padded[:, : size[0], : size[1]] = x
    patches = [
        padded[0, 2 * r : 2 * r + 2, 2 * c : 2 * c + 2]
        for r in range(padded.shape[1] // 2)
        for c in range(padded.shape[2] // 2)
    ]
    kernel = mixer.sr.conv.weight.permute(0, 2, 3, 1).flatten(1)  # as patches are laid out
    reduced = mixer.sr.norm(torch.stack([kernel @ p.flatten() for p in patches]) + mixer.sr.conv.bias)
    torch.testing.assert_close(mixer(x), _attend(mixer, x, reduced), rtol=1e-11, atol=1e-11)


def test_no_reduction_is_full_attention():
    mixer = _mixer()
    x = torch.randn(1, 3, 5, 8, dtype=torch.float64)
    torch.testing.assert_close(mixer(x), _attend(mixer, x, x.flatten(1, 2)[0]), rtol=1e-11, atol=1e-11)


def test_pooled_keys_are_means_of_a_grid():
    mixer = _mixer(pool_size=2)
    x = torch.randn(1, 4, 6, 8, dtype=torch.float64)
    means = x.unflatten(2, (2, 3)).unflatten(1, (2, 2)).mean((2, 4)).flatten(1, 2)[0]
    reduced = F.gelu(mixer.sr.norm(means @ mixer.sr.conv.weight[:, :, 0, 0].T + mixer.sr.conv.bias))
    torch.testing.assert_close(mixer(x), _attend(mixer, x, reduced), rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize("options", [{"reduction": 0}, {"pool_size": 0}, {"reduction": 2, "pool_size": 7}])
def test_wrong_sizes_are_named(options):
    with pytest.raises(ValueError, match="expected a positive reduction, or a positive pool_size with reduction 1"):
        SpatialReductionMixer(8, 2, **options)
