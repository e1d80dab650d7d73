"""CSWin: classification, and the backbone for segmentation."""

from torch import nn

from . import Recipe, Source

CSWIN = Source("https://github.com/microsoft/CSWin-Transformer", "f111ae2f771df32006e7afd7916835dd67d4cb9d", "MIT")


def without_norms(model):
    """Leave the maps as the stages give them: only the dense backbone has norms after them."""
    for stage in range(1, 5):
        setattr(model, f"norm{stage}", nn.Identity())


RECIPES = {
    "cswin_t": Recipe(CSWIN, "models/cswin.py", "CSWin_64_12211_tiny_224", image=(1, 3, 224, 224)),
    "cswin_t_dense": Recipe(
        CSWIN,
        "segmentation/backbone/cswin_transformer.py",
        "CSWin",
        {"depth": [1, 2, 21, 1], "num_heads": [2, 4, 8, 16], "split_size": [1, 2, 7, 7]},
        image=(1, 3, 260, 333),
        run=lambda model, image: {f"feat{i}": feature for i, feature in enumerate(model(image))},
        change=without_norms,
        stand_ins={"mmcv_custom": {}, "mmseg.utils": {}, "segmentation.builder": {}},
    ),
}
