"""Cross-shaped windows: stripes, halves of the heads, and a position term that ends where a stripe does."""

import pytest
import torch

from visionzoo.layers.mixers import CrossWindowMixer


def _loops(mixer, x):
    """One query after the other; stripes are cut from a map with zeros (of q, k, v) on both sides."""
    height, width, dim = *x.shape[1:3], mixer.head_dim
    stripe = mixer.stripe_width
    vertical = mixer.num_heads if stripe is None else mixer.num_heads - mixer.num_heads // 2
    q, k, v = mixer.qkv(x)[0].chunk(3, dim=-1)  # [H, W, C]
    out = torch.zeros_like(x[0])
    for g in range(mixer.num_heads):
        channels = slice(g * dim, (g + 1) * dim)
        branch = int(g >= vertical)
        first = g - branch * vertical
        conv = mixer.lepe[branch]
        sides = [height, width]
        top, left = 0, 0
        if stripe is not None:
            sides[1 - branch] = stripe
            left, top = [(-length % stripe) // 2 * (axis != branch) for axis, length in ((1, width), (0, height))]

        def stripe_of(r, c, sides=sides, top=top, left=left):
            return (r + top) // sides[0], (c + left) // sides[1]

        def at(t, r, c, channels=channels):
            inside = 0 <= r < height and 0 <= c < width
            return t[r, c, channels] if inside else torch.zeros(dim, dtype=t.dtype)

        reach = max(height, width) + (stripe or 0)
        for y in range(height):
            for z in range(width):
                near = [
                    (r, c)
                    for r in range(-reach, reach)
                    for c in range(-reach, reach)
                    if stripe_of(r, c) == stripe_of(y, z)
                ]
                scores = torch.stack([at(k, r, c) for r, c in near]) @ q[y, z, channels] * dim**-0.5
                value = scores.softmax(0) @ torch.stack([at(v, r, c) for r, c in near])
                for dy in (-1, 0, 1):
                    for dz in (-1, 0, 1):
                        if stripe_of(y + dy, z + dz) == stripe_of(y, z):
                            kernel = conv.weight[first * dim : (first + 1) * dim, 0, dy + 1, dz + 1]
                            value = value + kernel * at(v, y + dy, z + dz)
                out[y, z, channels] = value + conv.bias[first * dim : (first + 1) * dim]
    return mixer.proj(out[None])


@pytest.mark.parametrize(
    ("heads", "stripe", "size"),
    [(2, 2, (4, 6)), (2, 3, (4, 5)), (3, 2, (3, 5)), (1, 2, (4, 3)), (2, None, (3, 4)), (2, 4, (2, 3))],
)
def test_heads_attend_inside_their_stripes(heads, stripe, size):
    torch.manual_seed(0)
    mixer = CrossWindowMixer(6, heads, stripe_width=stripe).double()
    for parameter in mixer.parameters():
        torch.nn.init.normal_(parameter)
    x = torch.randn(1, *size, 6, dtype=torch.float64)
    torch.testing.assert_close(mixer(x), _loops(mixer, x), rtol=1e-11, atol=1e-11)


def test_wrong_stripes_are_named():
    with pytest.raises(ValueError, match="stripe_width must be positive or None, got stripe_width=0"):
        CrossWindowMixer(8, 2, stripe_width=0)


def test_exports_for_maps_with_and_without_padding():
    mixer = CrossWindowMixer(8, 2, stripe_width=2).eval()
    any_size = {axis: torch.export.Dim.DYNAMIC for axis in (1, 2)}
    program = torch.export.export(mixer, (torch.randn(1, 5, 7, 8),), dynamic_shapes=(any_size,), strict=False).module()
    for size in [(6, 4), (5, 6), (8, 3)]:
        x = torch.randn(1, *size, 8)
        torch.testing.assert_close(program(x), mixer(x))
