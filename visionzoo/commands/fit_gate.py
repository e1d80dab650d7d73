"""Fit a gate that chooses by the image how many layers of a Mask2Former's encoder run: visionzoo fit-gate CONFIG.py.

For configs whose head has exits (configs/segmentation/eco-mask2former_*), after their training. Measures every exit on
every training image, fits a gate for each --beta, measures exits and gates on the test images, and writes checkpoints
with gate, their config, a table and a picture.
"""


def main() -> None:
    """Parse, fit, write."""
    from visionzoo.engine import UserError
    from visionzoo.engine.errors import require

    require("mmseg", extra="openmmlab")
    from visionzoo.openmmlab.flags import fit_gate_parser

    config = fit_gate_parser().parse()
    if len({f"{beta:g}" for beta in config.beta}) < len(config.beta):  # the names of the checkpoints
        raise UserError(f"--beta: each once, got {' '.join(map(str, config.beta))}; files are named by six digits")
    from visionzoo.openmmlab.gate_fitting import fit_gate  # after parsing: --help and typing errors come at once

    fit_gate(config)
