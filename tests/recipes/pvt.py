"""PVT: classification, and the backbone for detection."""

from . import Recipe, Source

PVT = Source("https://github.com/whai362/PVT", "57e2dfaa5a46f9050d76f306a4fcd9a7c061f520", "Apache-2.0")

RECIPES = {
    "pvt_t": Recipe(PVT, "classification/pvt.py", "pvt_tiny"),
    "pvt_t_dense": Recipe(
        PVT,
        "detection/pvt.py",
        "pvt_tiny",
        {"pretrained": None},
        image=(1, 3, 260, 333),
        run=lambda model, image: {f"feat{i}": feature for i, feature in enumerate(model(image))},
        stand_ins={"mmdet.models.builder": {}, "mmdet.utils": {}, "mmcv.runner": {}},
    ),
}
