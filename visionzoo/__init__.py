"""visionzoo: vision backbones from the literature as one verified library, registered into timm.

>>> import timm, visionzoo
>>> model = timm.create_model("zoo_poolformer_s12", num_classes=10)
"""

import signal
import sys

if sys.argv[:1] == ["-m"] and "visionzoo" in sys.orig_argv:  # `python -m visionzoo`: Ctrl-C from now on is no traceback
    signal.signal(signal.SIGINT, signal.SIG_DFL)

from visionzoo import models  # importing it registers the families
from visionzoo._version import __version__
from visionzoo.decoders import create_segmentor
from visionzoo.exits import EarlyExitModel, ExitModel
from visionzoo.explanation import Explanation, attention_iou, explain_image
from visionzoo.graphs import graph_training_step
from visionzoo.inference import optimize_for_inference
from visionzoo.kernels import backends, set_backend, use_backend
from visionzoo.layers.fuse import fuse
from visionzoo.models._checkpoint import LoadReport, load_weights
from visionzoo.models._heads import head_attention
from visionzoo.models._hub import push_to_hub, save_pretrained
from visionzoo.models._registers import (
    NoOutliersError,
    feature_norms,
    find_register_neurons,
    move_to_registers,
    with_test_registers,
)
from visionzoo.pruning import prune_weights
from visionzoo.replicas import Replicas

__all__ = [
    "EarlyExitModel",
    "ExitModel",
    "Explanation",
    "LoadReport",
    "NoOutliersError",
    "Replicas",
    "__version__",
    "attention_iou",
    "backends",
    "create_segmentor",
    "explain_image",
    "feature_norms",
    "find_register_neurons",
    "fuse",
    "graph_training_step",
    "head_attention",
    "load_weights",
    "models",
    "move_to_registers",
    "optimize_for_inference",
    "prune_weights",
    "push_to_hub",
    "save_pretrained",
    "set_backend",
    "use_backend",
    "with_test_registers",
]
