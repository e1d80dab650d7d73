"""Export to ONNX, torch.export or AOTInductor: visionzoo export [CONFIG.py] --checkpoint FILE [flags].

With a .py config (configs/detection, configs/segmentation) a detector or segmentor, else a classifier.
"""

import sys

from visionzoo.engine import is_openmmlab


def main() -> None:
    """Parse, build, run."""
    if is_openmmlab(sys.argv[1:]):
        from visionzoo.openmmlab.export import export_dense
        from visionzoo.openmmlab.flags import export_parser as parser

        export_dense(parser().parse())
        return
    from visionzoo.deploy.flags import export_parser

    config = export_parser().parse()
    if config.sweep.all is not None:
        from visionzoo.deploy.sweep import sweep

        sweep(config)
        return
    from visionzoo.deploy.command import export_model  # after parsing: --help and typing errors come at once

    export_model(config)
