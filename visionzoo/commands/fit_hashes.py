"""Fit hash functions to images: visionzoo fit-hashes IMAGES... --model NAME --checkpoint FILE [flags].

For models with hashed attention (zoo_ecoformer_*, or any with mixers=hashed_linear). The checkpoint may be of the
softmax form; what is written is a checkpoint of the model, to evaluate or to train further by --initial-checkpoint.
"""


def main() -> None:
    """Parse, fit, write."""
    from visionzoo.engine.trained_flags import fit_hashes_parser

    config = fit_hashes_parser().parse()
    from visionzoo.engine.hashing import fit_hashes  # after parsing: --help and typing errors come at once

    fit_hashes(config)
