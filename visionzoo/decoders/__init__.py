"""Decoders that label pixels, on the maps of any hierarchical backbone of the zoo or of timm, in plain torch.

`visionzoo.create_segmentor(backbone, decoder, num_classes)` builds both as one network. A decoder is named as mixers
are: a name of `DECODERS`, or `dict(type=name, **options)`.
"""

from visionzoo.decoders.base import Decoder
from visionzoo.decoders.create import DECODERS, SEGMENTORS, Network, create_segmentor, list_segmentors
from visionzoo.decoders.edaformer import EDAFormerDecoder
from visionzoo.decoders.fuss_free import FussFreeDecoder, FussFreeEncoder
from visionzoo.decoders.guided_attention import GuidedAttentionDecoder
from visionzoo.decoders.multi_task import MultiTaskNetwork
from visionzoo.decoders.paratranscnn import ParallelBackbones, ParaTransCNNDecoder
from visionzoo.decoders.segmentor import Segmentor

__all__ = [
    "DECODERS",
    "SEGMENTORS",
    "Decoder",
    "EDAFormerDecoder",
    "FussFreeDecoder",
    "FussFreeEncoder",
    "GuidedAttentionDecoder",
    "MultiTaskNetwork",
    "Network",
    "ParaTransCNNDecoder",
    "ParallelBackbones",
    "Segmentor",
    "create_segmentor",
    "list_segmentors",
]
