"""Detection tokens beside the map of a backbone with window attention: ViDT, ICLR 2022, arXiv:2110.03921.

Facts from methods/swin_w_ram.py of https://github.com/naver-ai/vidt at a8c48b5 (Apache-2.0); the code here is our own.
ViDT's reconfigured attention module has no weights of its own: the backbone's projections, norms and MLPs serve the
tokens as well. A Swin with `unshifted="none"` shifts maps of one window, too, as theirs does; by default it does not.
"""

from __future__ import annotations

from collections.abc import Sequence
from math import pi
from typing import Any

import torch
import torch.nn.functional as F
from timm.layers import trunc_normal_
from torch import Tensor, nn

from visionzoo.layers.attention import hide
from visionzoo.layers.block import Block
from visionzoo.layers.mixers.window import WindowMixer
from visionzoo.layers.outputs import recomputed
from visionzoo.layers.patch_merge import PatchMerge
from visionzoo.models.swin import SwinTransformer

# authors' names of tensors -> those of a module that has the backbone as `model` and `DetectionTokens` as `tokens`
AUTHORS_KEYS: list[tuple[str, Any]] = [
    (r"\.downsample\.(expansion|norm2)\.", None),  # which no forward pass uses
    (r"^det_token$", "tokens.token"),
    (r"^det_pos_embed$", "tokens.position"),
    (r"^layers\.(\d)\.blocks\.(\d+)\.det_pos_linear\.", r"tokens.projections.\1.\2."),
    (r"^layers\.3\.downsample\.", "tokens.merge."),
    *SwinTransformer.CHECKPOINT_KEYS["authors"],
    (r"^(stem|stages)\.", r"model.\1."),
]


class DetectionTokens(nn.Module):
    """Learned tokens that walk through a backbone beside its map, one for each object that may be found.

    The patches attend in windows as they do without tokens. The tokens, to which a learned position is added, attend
    to each other, and in the stages `cross_stages` also to all patches, to which sines of their place are added; padded
    patches are not seen. Between stages a token is repeated four times, in place of four neighbors.

    Time: O(P² + P·N) for P tokens and the N patches of `cross_stages`, beside the backbone's own.

    Args:
        model: whose sizes are taken, and which `forward` gets again: a pyramid whose blocks attend in windows and whose
            maps are merged 2×2, `zoo_swin_*`.
        num_tokens: detection tokens P.
        position_dim: channels of their positions.
        cross_stages: stages, negative from the end, whose tokens attend to the patches, too; of none, as the authors'
            code allows, tokens are the same for all images.
        out_dim: channels of the map after the last stage.

    Raises:
        ValueError: the model has other blocks, a number is not positive, there is no such stage, or its channels are
            no multiple of 4.

    >>> import timm
    >>> model = timm.create_model("zoo_swin_n", num_classes=0).eval()
    >>> maps, tokens = DetectionTokens(model)(model, torch.zeros(1, 3, 128, 160))
    >>> [tuple(x.shape) for x in maps], tuple(tokens.shape)
    ([(1, 96, 16, 20), (1, 192, 8, 10), (1, 384, 4, 5), (1, 256, 2, 3)], (1, 100, 384))
    """

    def __init__(
        self,
        model: nn.Module,
        *,
        num_tokens: int = 100,
        position_dim: int = 256,
        cross_stages: Sequence[int] = (-1,),
        out_dim: int = 256,
    ):
        super().__init__()
        if min(num_tokens, position_dim, out_dim) < 1:
            raise ValueError(
                f"DetectionTokens: numbers must be 1 or more, got {num_tokens=}, {position_dim=}, {out_dim=}"
            )
        stages = [list(stage.blocks) for stage in getattr(model, "stages", ())]
        other = {type(block.mixer).__name__ for blocks in stages for block in blocks if not _attends_in_windows(block)}
        if other or not stages:
            raise ValueError(
                "DetectionTokens: expected a backbone all of whose blocks attend in windows, such as zoo_swin_t, got "
                f"{type(model).__name__}" + (f" with {', '.join(sorted(other))}" if other else "")
            )
        if not all(-len(stages) <= i < len(stages) for i in cross_stages):
            raise ValueError(f"DetectionTokens: expected stages of 0 to {len(stages) - 1}, got {cross_stages=}")
        self.cross_stages = {i % len(stages) for i in cross_stages}
        self.dims = [blocks[0].dim for blocks in stages]
        if odd := [self.dims[i] for i in sorted(self.cross_stages) if self.dims[i] % 4]:
            raise ValueError(f"DetectionTokens: sines of places need a multiple of 4 channels, got {odd[0]} in a stage")
        self.token = nn.Parameter(trunc_normal_(torch.zeros(1, num_tokens, self.dims[0]), std=0.02))
        self.position = nn.Parameter(trunc_normal_(torch.zeros(1, num_tokens, position_dim), std=0.02))
        self.projections = nn.ModuleList(
            nn.ModuleList(nn.Linear(position_dim, block.dim) for block in blocks) for blocks in stages
        )
        self.merge = PatchMerge(self.dims[-1], out_dim)

    def forward(self, model: Any, image: Tensor, padded: Tensor | None = None) -> tuple[list[Tensor], Tensor]:
        """Take an image through the model, and the tokens beside it.

        Args:
            model: the backbone.
            image: [B, in_chans, H, W].
            padded: [B, H, W], True where the image was padded; None for nowhere.

        Returns:
            the maps [B, C, H', W'] of all stages but the first and one of `out_dim` channels, merged from the last of
            them; and the tokens [B, P, C] after the last stage.
        """
        x = model.begin(image).permute(0, 2, 3, 1)
        if padded is not None:  # in two steps, as released: places are rounded down in each
            factor = 2 ** (len(self.dims) - len(self.cross_stages))
            padded = _resized(padded, [max(1, n // factor) for n in x.shape[1:3]])
        tokens = self.token.to(x.dtype).expand(x.shape[0], -1, -1)
        maps = []
        stages: Any = zip(model.stages, self.projections, strict=True)
        for i, (stage, projections) in enumerate(stages):
            if i:
                tokens = stage.downsample.reduction(stage.downsample.norm(tokens.repeat(1, 1, 4)))
                x = stage.downsample(x)
            places = hidden = None
            if i in self.cross_stages:
                places, hidden = self._places(x, padded)
            for block, projection in zip(stage.blocks, projections, strict=True):
                step = (block, x, tokens, projection(self.position), places, hidden)
                x, tokens = recomputed(_step, *step) if stage.grad_checkpointing and self.training else _step(*step)
            maps.append(x)
        return [x.permute(0, 3, 1, 2) for x in [*maps[1:], self.merge(x)]], tokens

    def _places(self, x: Tensor, padded: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """Return sines of the patches' places [1 or B, H, W, C], and what hides the padded ones from the tokens."""
        if padded is None:
            return sine_positions(x.new_zeros(1, *x.shape[1:3], dtype=torch.bool), x.shape[3], x.dtype), None
        padded = _resized(padded, x.shape[1:3])
        keep = F.pad(~padded.flatten(1), (0, self.token.shape[1]), value=True)
        return sine_positions(padded, x.shape[3], x.dtype), hide(keep, x.dtype)


def _step(
    block: Any, x: Tensor, tokens: Tensor, position: Tensor, places: Tensor | None, hidden: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Take a map [B, H, W, C] and tokens [B, P, C] through a block."""
    mixer = block.mixer
    seen = block.norm1(x)
    q, k, v = mixer.split_heads(mixer.qkv(block.norm1(tokens) + position))
    if places is not None:
        _, *patches = mixer.split_heads(mixer.qkv(seen + places).flatten(1, 2))
        k, v = (torch.cat(pair, 1) for pair in zip(patches, (k, v), strict=True))
    q, k, v = (part.transpose(1, 2) for part in (q, k, v))
    attended = mixer.proj(mixer.attend(q, k, v, bias=hidden).transpose(1, 2).flatten(2))
    # joined, for stochastic depth leaves out both or neither
    joined, normalized = block.join_tokens(_joined(x, tokens), _joined(mixer(seen), attended))
    joined = block.mix_channels(joined, normalized)
    size = x.shape[1:3]
    x, tokens = joined.squeeze(1).split([size.numel(), tokens.shape[1]], 1)
    return x.unflatten(1, size), tokens


def sine_positions(padded: Tensor, dim: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """Return sines and cosines of rows, then of columns, as DETR has them, counted over what is not padded.

    Args:
        padded: [B, H, W], True at padded places.
        dim: channels C, a multiple of 4.
        dtype: of the result; computed in float32 at least.

    Returns:
        [B, H, W, C].

    >>> sine_positions(torch.zeros(2, 3, 4, dtype=torch.bool), 8).shape
    torch.Size([2, 3, 4, 8])
    """
    accumulate = torch.promote_types(dtype, torch.float32)
    there = (~padded).to(accumulate)
    powers = 2 * torch.div(torch.arange(dim // 2, device=padded.device), 2, rounding_mode="floor") / (dim // 2)
    waves = 10000 ** powers.to(accumulate)
    halves = []
    for axis in (1, 2):
        count = there.cumsum(axis)
        share = count / (count.narrow(axis, -1, 1) + 1e-6) * 2 * pi
        angles = share[..., None] / waves
        halves.append(torch.stack([angles[..., 0::2].sin(), angles[..., 1::2].cos()], -1).flatten(3))
    return torch.cat(halves, 3).to(dtype)


def _attends_in_windows(block: Any) -> bool:
    return type(block) is Block and isinstance(block.mixer, WindowMixer) and block.cpe1 is None and block.cpe2 is None


def _joined(x: Tensor, tokens: Tensor) -> Tensor:
    """[B, H, W, C] and [B, P, C] to [B, 1, H·W + P, C]."""
    return torch.cat([x.flatten(1, 2), tokens], 1).unsqueeze(1)


def _resized(padded: Tensor, size: Sequence[int]) -> Tensor:
    """[B, H, W] at the nearest places of another size."""
    return F.interpolate(padded[None].float(), size=tuple(size))[0].bool()
