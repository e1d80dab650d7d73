"""Embedding-free attention: keys that are values, and their reduction in inference."""

import pytest
import torch
import torch.nn.functional as F
from quick import quick_model

from visionzoo.layers.mixers import EmbeddingFreeMixer


@torch.no_grad()
def test_keys_are_values_and_queries_are_the_tokens():
    torch.manual_seed(0)
    mixer = EmbeddingFreeMixer(8, 2, reduction=2).double()
    x = torch.randn(1, 5, 7, 8, dtype=torch.float64)
    keys = mixer.kv(F.avg_pool2d(x.permute(0, 3, 1, 2), 2).permute(0, 2, 3, 1)).reshape(6, 8)
    expected = torch.cat(
        [(x[0, ..., s] @ keys[:, s].mT * 0.5).softmax(-1) @ keys[:, s] for s in (slice(4), slice(4, 8))], dim=-1
    )
    torch.testing.assert_close(mixer(x)[0], mixer.proj(expected), rtol=1e-12, atol=1e-12)


@torch.no_grad()
def test_inference_reduction_acts_in_eval_mode_only():
    torch.manual_seed(0)
    x = torch.randn(1, 8, 8, 8)
    mixer, plain, wide = (EmbeddingFreeMixer(8, 2, reduction=r, isr=i) for r, i in ((2, 2), (2, 1), (4, 1)))
    for other in (plain, wide):
        other.load_state_dict(mixer.state_dict())
    assert torch.equal(mixer.train()(x), plain(x))
    assert torch.equal(mixer.eval()(x), wide.eval()(x)) and not torch.equal(mixer(x), plain(x))


@torch.no_grad()
def test_the_models_reduction_is_stage_by_stage():
    tiny = {"depths": (1, 1, 1, 1), "embed_dims": (8, 16, 16, 32), "num_heads": (1, 2, 2, 4)}
    plain, reduced = (quick_model("zoo_eft_t", **tiny, isr=isr) for isr in ((1, 1, 1, 1), (1, 1, 2, 1)))
    image = torch.randn(1, 3, 96, 96)
    pairs = zip(plain.forward_intermediates(image)[1], reduced.forward_intermediates(image)[1], strict=True)
    same = [torch.equal(own, other) for own, other in pairs]
    assert same == [True, True, False, False]
    with pytest.raises(ValueError, match="isr"):
        quick_model("zoo_eft_t", **tiny, isr=(2, 2))
