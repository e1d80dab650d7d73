"""Triton's kernels run on every machine: on a GPU where there is one, else in Triton's interpreter."""

import os

import torch

if not torch.cuda.is_available():  # before anything imports triton
    os.environ["TRITON_INTERPRET"] = "1"
