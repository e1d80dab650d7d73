"""Multi-scale self-guided attention, J-BHI 2021, https://arxiv.org/abs/1906.02849, as a decoder.

Facts from src/models/my_stacked_danet.py, src/models/attention.py and src/main.py of
https://github.com/sinAshish/Multi-Scale-Attention at 96d76f2 (no license, so only facts are taken); the code here is
our own. The authors have one backbone, a ResNeXt-101 on images of one channel, and a finest map of even sides. Here the
autoencoders' maps are resized where sides are odd, and a side of one pixel is not halved. What they build and never
call (`conv6_*`, `conv7_*`, `attention*`, `refine*`) is left out. Their loss is the sum of the cross-entropies of all
eight predictions and of the terms. Here the decoder's logits, the mean of the last four, add a cross-entropy of their
own.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from visionzoo.decoders.base import Decoder, conv_norm_act, resize
from visionzoo.kernels import channel_attention
from visionzoo.layers.arguments import Positive
from visionzoo.layers.attention import attend
from visionzoo.layers.outputs import add_term, collecting
from visionzoo.layers.tracing import one_node

_LAYERS = ("conv", "bn", "bn.act")  # what `conv_norm_act` calls the layers that the authors number


def _numbered(layer: int) -> str:
    """Return our name of the layer of that number in a row of convolutions, each with norm and activation."""
    return f"{layer // 3}.{_LAYERS[layer % 3]}"


def _conv_norm_prelu(in_dim: int, out_dim: int, kernel_size: int) -> nn.Module:
    return conv_norm_act(in_dim, out_dim, kernel_size, bias=True, act_layer="prelu")


class PositionAttention(nn.Module):
    """DANet's position attention (arXiv:1809.02983): each position of [B, C, H, W] attends to all; O((H·W)²·C).

    Queries and keys have an eighth of the channels and no scale; what is attended is added, times a learned factor that
    begins at 0.

    Args:
        dim: channels C.
    """

    def __init__(self, dim: int):
        super().__init__()
        self.query, self.key = (nn.Conv2d(dim, max(dim // 8, 1), 1) for _ in range(2))
        self.value = nn.Conv2d(dim, dim, 1)
        self.gamma = nn.Parameter(torch.zeros(1))

    def forward(self, x: Tensor) -> Tensor:
        """[B, C, H, W] to [B, C, H, W]."""
        q, k, v = (layer(x).flatten(2).mT.unsqueeze(1) for layer in (self.query, self.key, self.value))
        return x + self.gamma * attend(q, k, v, scale=1.0).squeeze(1).mT.reshape(x.shape)


class ChannelAttention(nn.Module):
    """DANet's channel attention (arXiv:1809.02983): each channel of [B, C, H, W] attends to those unlike it; O(H·W·C²).

    Scores are the negative products of the channels, without a scale; what is attended is added, times a learned factor
    that begins at 0.
    """

    def __init__(self) -> None:
        super().__init__()
        self.gamma = nn.Parameter(torch.zeros(1))

    @one_node  # it looks at shapes
    def forward(self, x: Tensor) -> Tensor:
        """[B, C, H, W] to [B, C, H, W]."""
        tokens = x.permute(0, 2, 3, 1).unsqueeze(3).contiguous()  # one head
        return x + self.gamma * channel_attention(tokens, tokens, tokens, scale=-1.0).squeeze(3).permute(0, 3, 1, 2)


class SemanticAutoencoder(nn.Module):
    """Map to a code of a quarter of its height and width and four times its channels, and back.

    Args:
        dim: channels C of the map.
    """

    def __init__(self, dim: int):
        super().__init__()
        widths = (dim, 2 * dim, 4 * dim)
        self.encoder = nn.ModuleList(self._convs(a, b) for a, b in pairwise(widths))
        self.decoder = nn.ModuleList(self._convs(a, b) for a, b in ((4 * dim, 2 * dim), (2 * dim, dim)))
        self.up = nn.ModuleList(nn.ConvTranspose2d(width, width, 2, 2) for width in (2 * dim, dim))

    @staticmethod
    def _convs(in_dim: int, out_dim: int) -> nn.Sequential:
        return nn.Sequential(*(conv_norm_act(width, out_dim, 3, bias=True) for width in (in_dim, out_dim)))

    @one_node  # it looks at shapes
    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """[B, C, H, W] to the code [B, 4·C, ⌊H/4⌋, ⌊W/4⌋] (sides of 1 at least) and the map again, [B, C, H, W]."""
        maps = [x]
        for convs in self.encoder:
            y = convs(maps[-1])
            maps.append(F.max_pool2d(y, (min(y.shape[-2], 2), min(y.shape[-1], 2))))
        y = maps[-1]
        for convs, up, like in zip(self.decoder, self.up, (maps[1], x), strict=True):
            y = resize(up(convs(y)), like)
        return maps[-1], y


class GuidedAttention(nn.Module):
    """One pass of attention over the maps of all levels, guided by an autoencoder that the levels share.

    Args:
        levels: number of maps.
        dim: channels C.
    """

    def __init__(self, levels: int, dim: int):
        super().__init__()
        self.autoencoder = SemanticAutoencoder(2 * dim)
        self.position = nn.ModuleList(self._branch(dim, PositionAttention(dim)) for _ in range(levels))
        self.channel = nn.ModuleList(self._branch(dim, ChannelAttention()) for _ in range(levels))
        self.guide = nn.ModuleList(nn.Conv2d(2 * dim, dim, 3, padding=1) for _ in range(levels))
        self.proj = nn.ModuleList(nn.Conv2d(dim, dim, 1) for _ in range(levels))

    @staticmethod
    def _branch(dim: int, attention: nn.Module) -> nn.Sequential:
        return nn.Sequential(_conv_norm_prelu(2 * dim, dim, 3), attention, _conv_norm_prelu(dim, dim, 3))

    def forward(self, level: int, x: Tensor) -> tuple[Tensor, Tensor]:
        """Map of a level with the fused one [B, 2·C, H, W] to [B, C, H, W] and the autoencoder's code."""
        code, again = self.autoencoder(x)
        if self.training and collecting():
            add_term("reconstruction", F.mse_loss(again, x))
        attended = self.position[level](x) + self.channel[level](x)
        return self.proj[level](attended * self.guide[level](again)), code


class GuidedAttentionDecoder(Decoder):
    """Multi-scale self-guided attention (arXiv:1906.02849): DANet's attention in two passes, guided by autoencoders.

    All maps come to `embed_dim` channels and the finest's size, and are fused to one more. Each, joined with the fused
    one, passes position and channel attention, whose sum is multiplied by what an autoencoder makes of the same input;
    the result weighs the fused map in a second such pass. A classifier reads each level's, the logits are their mean.

    In training, where `Segmentor.set_auxiliary` asks for them, there are also the logits of each level before and after
    attention (exits "before_attention_0", "after_attention_0", …, finest first), what the autoencoders lose (term
    "reconstruction") and how far their codes of the two passes are apart (term "guidance"); means of squares, summed
    over the levels. Their weights are the authors'. The classifiers before attention learn only there.

    Time and memory: O(N²) for N positions of the finest map.

    Args:
        in_channels: channels of the 2 to 4 maps, finest first.
        num_classes: classes.
        embed_dim: channels of each level.

    Raises:
        ValueError: if there are other than 2 to 4 maps, or an option is not positive.

    >>> maps = [torch.zeros(1, 8, 6, 9), torch.zeros(1, 16, 3, 5)]
    >>> GuidedAttentionDecoder([8, 16], num_classes=4, embed_dim=8)(maps).shape
    torch.Size([1, 4, 6, 9])
    """

    CHECKPOINT_KEYS = {
        "authors": [
            (r"^(?:conv[67]_|attention\d|refine\d)", None),  # which their network never calls
            (r"^down(\d)\.(\d)", lambda m: f"reduce.{int(m[1]) - 1}.{_LAYERS[int(m[2])]}"),
            (r"^fuse1\.fuse_attn\.(\d)", lambda m: f"fuse.{_numbered(int(m[1]))}"),
            (r"^predict(\d)(_2)?\.", lambda m: f"classifier.{1 if m[2] else 0}.{int(m[1]) - 1}."),
            (r"^conv8_(1?)(\d)\.", lambda m: f"passes.{1 if m[1] else 0}.proj.{4 - int(m[2])}."),
            (r"^conv_sem_(\d)_(\d)\.", lambda m: f"passes.{int(m[1]) - 1}.guide.{4 - int(m[2])}."),
            (r"^semanticModule_(\d)_1\.", lambda m: f"passes.{int(m[1]) - 1}.autoencoder."),
            (r"\.enc(\d)\.encode\.(\d)", lambda m: f".encoder.{int(m[1]) - 1}.{_numbered(int(m[2]))}"),
            (r"\.dec(\d)\.decode\.6", lambda m: f".up.{2 - int(m[1])}"),
            (r"\.dec(\d)\.decode\.(\d)", lambda m: f".decoder.{2 - int(m[1])}.{_numbered(int(m[2]))}"),
            (r"^pam_attention_(\d)_(\d)\.", lambda m: f"passes.{int(m[1]) - 1}.position.{int(m[2]) - 1}."),
            (r"^cam_attention_(\d)_(\d)\.", lambda m: f"passes.{int(m[1]) - 1}.channel.{int(m[2]) - 1}."),
            (r"\.attn\.3\.(\w+?)(?:_conv)?\b", r".1.\1"),
            (r"\.attn\.([0-2])", lambda m: f".{_numbered(int(m[1]))}"),
            (r"\.attn\.([4-6])", lambda m: f".{_numbered(int(m[1]) + 2)}"),
        ]
    }

    def __init__(self, in_channels: Sequence[Positive], num_classes: Positive, *, embed_dim: int = 64):
        super().__init__(in_channels, num_classes)
        if embed_dim < 1:
            raise ValueError(f"GuidedAttentionDecoder: embed_dim must be 1 or more, got {embed_dim=}")
        levels = len(in_channels)
        self.reduce = nn.ModuleList(_conv_norm_prelu(dim, embed_dim, 1) for dim in in_channels)
        self.fuse = nn.Sequential(
            _conv_norm_prelu(levels * embed_dim, embed_dim, 3),
            _conv_norm_prelu(embed_dim, embed_dim, 3),
            _conv_norm_prelu(embed_dim, embed_dim, 1),
        )
        self.passes = nn.ModuleList(GuidedAttention(levels, embed_dim) for _ in range(2))
        self.classifier = nn.ModuleList(
            nn.ModuleList(nn.Conv2d(embed_dim, num_classes, 1) for _ in in_channels) for _ in range(2)
        )
        exits = {f"{when}_attention_{i}": 1.0 for when in ("before", "after") for i in range(levels)}
        self.AUXILIARY = {**exits, "guidance": 0.25, "reconstruction": 0.1}
        for module in self.modules():
            if isinstance(module, nn.Conv2d | nn.ConvTranspose2d):
                nn.init.xavier_normal_(module.weight)

    def forward(self, maps: Sequence[Tensor]) -> Tensor:
        """Turn maps [B, C, H, W], finest first, into logits [B, num_classes, H, W] at the size of the first."""
        return _mean(self._classify(1, self._attend(maps)[1]))

    def decode(self, maps: Sequence[Tensor]) -> tuple[Tensor, Mapping[str, Tensor]]:
        """Return what `forward` does, and the logits of each level before and after attention."""
        logits = [self._classify(i, levels) for i, levels in enumerate(self._attend(maps))]
        exits = zip(("before", "after"), logits, strict=True)
        return _mean(logits[1]), {f"{when}_attention_{i}": x for when, xs in exits for i, x in enumerate(xs)}

    def _attend(self, maps: Sequence[Tensor]) -> tuple[list[Tensor], list[Tensor]]:
        """Return each level's map [B, embed_dim, H, W] before and after attention."""
        self.check_maps(maps, self.in_channels)
        before = [reduce(x) for reduce, x in zip(self.reduce, maps, strict=True)]
        before = [before[0], *(resize(x, before[0]) for x in before[1:])]
        fused = self.fuse(torch.cat(before[::-1], 1))
        after = []
        for i, x in enumerate(before):
            weight, first = self.passes[0](i, torch.cat((x, fused), 1))
            refined, second = self.passes[1](i, torch.cat((x, weight * fused), 1))
            if self.training and collecting():
                add_term("guidance", F.mse_loss(first, second))
            after.append(refined)
        return before, after

    def _classify(self, which: int, levels: Sequence[Tensor]) -> list[Tensor]:
        return [layer(x) for layer, x in zip(self.classifier[which], levels, strict=True)]  # type: ignore[call-overload]


def _mean(logits: Sequence[Tensor]) -> Tensor:
    return torch.stack(list(logits)).mean(0)
