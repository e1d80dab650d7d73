"""EDAFormer's decoder, 160,000 iterations on ADE20K, AdamW: mmseg's config for SegFormer with parts of the zoo."""

_base_ = ["mmseg.py", "mmseg::segformer/segformer_mit-b0_8xb2-160k_ade20k-512x512.py"]
custom_imports = dict(imports=["visionzoo.openmmlab.decoders"], allow_failed_imports=False)

sync_bn = "torch"
model = dict(
    backbone=dict(_delete_=True, type="ZooBackbone", pretrained=True),
    decode_head=dict(
        _delete_=True,
        type="ZooDecodeHead",
        num_classes=150,
        loss_decode=dict(type="CrossEntropyLoss", use_sigmoid=False, loss_weight=1.0),
    ),
)
