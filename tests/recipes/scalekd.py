"""ScaleKD: the authors' whole loss, with the projectors and a small teacher of theirs, ViT or Swin."""

from __future__ import annotations

import sys
from types import SimpleNamespace

import torch
from torch import nn
from torch.nn import functional as F

from . import Recipe, Source, drawn
from .bvr import _Registry, authors
from .gates import some

try:
    import mmengine.model as mmengine_model
except ImportError:  # needed only where records are made
    mmengine_model = None

SCALEKD = Source(
    "https://github.com/deep-optimization/ScaleKD", "478a7dbb19caa7dd6ec225cd824b0e0a74a6cdc4", "Apache-2.0"
)
CLASSES = 5
STUDENT = ((6, 4, 5), (8, 2, 3))  # channels, height and width of the two maps that are projected


class _Base(nn.Module):
    """mmengine's, without what makes batches."""

    def __init__(self, init_cfg=None, data_preprocessor=None):
        super().__init__()


class Classifier(nn.Module):
    """A linear layer on the mean of the last map."""

    def __init__(self, dim):
        super().__init__()
        self.linear = nn.Linear(dim, CLASSES)

    def forward(self, maps):
        """Map, or several, to logits."""
        last = maps if isinstance(maps, torch.Tensor) else maps[-1]
        return self.linear(last.mean((2, 3)))


class Model(nn.Module):
    """What the distiller asks of a student or a teacher."""

    with_neck, with_head = False, True

    def __init__(self, dim, backbone=None):
        super().__init__()
        if backbone is not None:
            self.backbone = backbone
        self.head = nn.Module()
        self.head.fc = Classifier(dim)
        self.head._get_loss = lambda logits, _: {"loss": F.cross_entropy(logits, labels())}
        self.neck = nn.Identity()
        self.maps = None

    def extract_feat(self, image, stage):
        """Return the maps."""
        return self.maps if self.maps is not None else self.backbone(image)


def labels() -> torch.Tensor:
    """Return the classes of two images."""
    return torch.tensor([3, 1])


def student_maps() -> list[torch.Tensor]:
    """Draw a student's two maps."""
    return [drawn(i, (2, *shape)).requires_grad_() for i, shape in enumerate(STUDENT)]


def distiller(module, file, teacher, targets, is_vit):
    """Build the distiller around a teacher."""
    name, kwargs = teacher
    for part in ("attention", "embed", "helpers"):
        found = authors(module, f"models.utils.{part}")
        vars(sys.modules["models.utils"]).update({k: v for k, v in vars(found).items() if k[0] != "_"})
    backbone = getattr(authors(module, f"models.backbones.{file}"), name)(**kwargs)
    module.Config = SimpleNamespace(fromfile=lambda built: SimpleNamespace(model=built))
    module.build_classifier = lambda built: built
    module.MODELS = SimpleNamespace(build=lambda given: given.loss)
    features = authors(module, "models.dis_losses.fmd").FreqMaskingDistillLoss
    common = {"use_this": True, "softmax_scale": [5.0, 5.0], "alpha": [0.08, 0.06], "name": ""}
    methods = [
        SimpleNamespace(
            name=f"loss_fmd_s{3 + i}",
            use_this=True,
            loss=features(
                student_dims=dim,
                teacher_dims=target[0],
                query_hw=target[1:],
                pos_hw=size,
                pos_dims=target[0],
                self_query=not i,
                **common,
            ),
        )
        for i, ((dim, *size), target) in enumerate(zip(STUDENT, targets, strict=True))
    ]
    kd = authors(module, "models.dis_losses.kd").KDLoss("loss_kd", True, temp=1.0, alpha=0.5)
    methods.append(SimpleNamespace(name="loss_kd", use_this=True, loss=kd))
    return module.ClassificationDistiller(
        Model(targets[-1][0], backbone),
        Model(STUDENT[-1][0]),
        is_vit=is_vit,
        use_logit=True,
        distill_cfg=[SimpleNamespace(methods=methods)],
    )


def losses(model: nn.Module, image: torch.Tensor) -> dict[str, torch.Tensor]:
    """Return each loss, the teacher's logits and last map, and gradients of the sum of losses; in training."""
    model.student.train()
    model.distill_losses.train()
    maps = student_maps()
    model.student.maps = [None, None, *maps]
    samples = [SimpleNamespace(gt_label=_Label(labels()[i : i + 1])) for i in range(2)]
    found = model.loss(image, samples)
    learned = {n: p for n, p in model.named_parameters() if n.startswith(("student.", "distill_losses."))}
    wanted = {f"grad_map{i}": x for i, x in enumerate(maps)} | {f"grad/{name}": p for name, p in learned.items()}
    grads = torch.autograd.grad(sum(found.values()), list(wanted.values()), allow_unused=True)
    with torch.no_grad():
        last = model.teacher.backbone(image)[-1]
    return (
        dict(found)
        | {"teacher_map": some(last), "teacher_logits": model.teacher.head.fc(last)}
        | {name: some(grad, 64) for name, grad in zip(wanted, grads, strict=True) if grad is not None}
    )


class _Label:
    """A label without scores."""

    def __init__(self, label):
        self.label = label

    def __contains__(self, name):
        return False


STAND_INS = {
    "matplotlib": {"use": lambda _: None},
    "matplotlib.pyplot": {},
    "mmcls.models": {"build_classifier": None},
    "mmcls.registry": {"MODELS": _Registry},
    "mmcls.structures": {},
    "mmcls.models.utils.helpers": {},
    "mmcls.models.utils.layer_scale": {},
    "mmengine.model": {**{k: v for k, v in vars(mmengine_model or object).items() if k[0] != "_"}, "BaseModel": _Base},
    "mmengine.config": {},
    "mmengine.structures": {},
    "mmengine.runner.checkpoint": {},
}


def recipe(size, **kwargs):
    """Return the recipe of the whole loss with a teacher."""
    return Recipe(
        SCALEKD,
        "models/classifiers/distiller.py",
        distiller,
        kwargs,
        root="mmcls",
        image=(2, 3, size, size),
        constants=("relative_position_index",),
        run=losses,
        gradients=True,
        stand_ins=STAND_INS,
        notes="the student is its two maps, drawn by recipes.scalekd.student_maps, and a linear layer on the mean of "
        "the last one, as the teacher's is; gradients are of the sum of all losses. mmengine and mmcv are 0.10.12 and "
        "2.3.6",
    )


RECIPES = {
    "vit": recipe(
        24,
        file="vision_transformer",
        teacher=(
            "VisionTransformer",
            {
                "arch": {"embed_dims": 16, "num_layers": 12, "num_heads": 2, "feedforward_channels": 32},
                "img_size": 24,
                "patch_size": 8,
                "with_cls_token": False,
                "output_cls_token": False,
            },
        ),
        targets=((16, 3, 3), (16, 3, 3)),
        is_vit=True,
    ),
    "swin": recipe(
        224,
        file="swin_transformer",
        teacher=(
            "SwinTransformer",
            {
                "arch": {"embed_dims": 8, "depths": [1, 1, 2, 2], "num_heads": [1, 1, 2, 4]},
                "out_indices": (0, 1, 2, 3),
            },
        ),
        targets=((32, 14, 14), (64, 7, 7)),
        is_vit=False,
    ),
}
