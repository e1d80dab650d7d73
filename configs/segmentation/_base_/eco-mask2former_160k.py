"""Mask2Former with exits in its encoder (ECO-M2F, arXiv:2404.15244), 160,000 iterations on ADE20K.

After the training `visionzoo fit-gate` fits a gate that chooses how many layers an image gets.
"""

_base_ = "mask2former_160k.py"
custom_imports = dict(
    imports=["visionzoo.openmmlab", "mmdet.models", "visionzoo.openmmlab.encoder_exits"],
    allow_failed_imports=False,
)

model = dict(decode_head=dict(type="ExitMask2FormerHead", pixel_decoder=dict(type="ExitPixelDecoder")))
custom_hooks = [dict(type="EncoderLayersHook")]
