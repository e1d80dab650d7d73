"""Fit hash functions to images: python tools/fit_hashes.py IMAGES... --model NAME --checkpoint FILE [flags].

For models with hashed attention (zoo_ecoformer_*, or any with mixers=hashed_linear). The checkpoint may be of the
softmax form; what is written is a checkpoint of the model, to evaluate or to train further by --initial-checkpoint.
"""

import signal

if __name__ == "__main__":  # Ctrl-C during the imports, which take seconds, is no traceback; run_tool takes over
    signal.signal(signal.SIGINT, signal.SIG_DFL)

from visionzoo.engine import run_tool


def main() -> None:
    """Parse, fit, write."""
    from visionzoo.engine.flags import fit_hashes_parser

    args = fit_hashes_parser().parse()
    from visionzoo.engine.hashing import fit_hashes  # after parsing: --help and typing errors come at once

    fit_hashes(args)


if __name__ == "__main__":
    run_tool(main)
