"""Nyström attention against its definition: landmarks one by one, and the inverse that it approaches."""

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from visionzoo.layers.mixers import NystromMixer
from visionzoo.layers.tokens import Tokens, mix_tokens


@pytest.mark.parametrize(
    ("height", "width", "lengths"), [(2, 6, [3, 3, 3, 3]), (2, 7, [3, 3, 4, 4]), (1, 3, [1, 1, 1])]
)
@torch.no_grad()
def test_tokens_attend_to_landmarks_that_attend_to_tokens(height, width, lengths):
    torch.manual_seed(0)
    mixer = NystromMixer(8, 2, num_landmarks=4, num_iterations=40, qkv_bias=True).double()
    tokens = Tokens(3 * torch.randn(2, 2 + height * width, 8, dtype=torch.float64), (height, width), 2)
    out = torch.zeros_like(tokens.x)
    for sample in range(2):
        q, k, v = mixer.qkv(tokens.x[sample]).view(-1, 3, 2, 4).permute(1, 2, 0, 3)
        for g in range(2):
            near_q, near_k = (torch.stack([part.mean(0) for part in t[g, 2:].split(lengths)]) for t in (q, k))
            inner = torch.linalg.inv((near_q @ near_k.T / 2).softmax(-1))
            seen = (near_q @ k[g].T / 2).softmax(-1) @ v[g]
            out[sample, :, 4 * g : 4 * g + 4] = (q[g] @ near_k.T / 2).softmax(-1) @ inner @ seen
    torch.testing.assert_close(mix_tokens(mixer, tokens), mixer.proj(out), rtol=1e-9, atol=1e-9)


@torch.no_grad()
def test_values_are_added_as_they_are_and_from_neighbours():
    torch.manual_seed(0)
    x = torch.randn(1, 2, 3, 8, dtype=torch.float64)
    plain = NystromMixer(8, 2, num_landmarks=0, out_dim=4).double()
    q, k, v = plain.qkv(x).view(6, 3, 2, 2).permute(1, 2, 0, 3)
    attended = (q @ k.mT / 2).softmax(-1) @ v  # scores are divided by the width of heads before
    torch.testing.assert_close(plain(x).view(6, 4), plain.proj(attended.transpose(0, 1).flatten(1)))
    mixer = NystromMixer(8, 2, num_landmarks=0, out_dim=4, value_kernel=3, value_residual=True).double()
    mixer.load_state_dict(plain.state_dict(), strict=False)
    kernel = mixer.conv.weight.view(2, 1, 3, 1)
    padded = torch.nn.functional.pad(v, (0, 0, 1, 1))
    near = sum(padded[:, i : i + 6] * kernel[:, :, i] for i in range(3))
    expected = plain.proj((attended + near).transpose(0, 1).flatten(1)) + v.transpose(0, 1).flatten(1)
    torch.testing.assert_close(mixer(x).view(6, 4), expected)


def test_its_cost_is_linear_in_the_tokens():
    mixer = NystromMixer(8, 2, num_landmarks=4)
    costs = []
    for side in (8, 16, 24):
        with FlopCounterMode(display=False) as counter:
            mixer(torch.randn(1, side, 8, 8))
        costs.append(counter.get_total_flops())
    assert costs[2] - costs[1] == costs[1] - costs[0] > 0
