"""Measure CRATE's objective, layer by layer: python tools/sparse_rate.py IMAGES... --checkpoint FILE [flags].

For models with attention in subspaces (zoo_crate_*, or any with mixers=subspace). Writes a table, sparse_rate.csv, and
the paper's figure of it, sparse_rate.png: coding rates of the tokens that attention sees, and the share of values that
are not zero after each block.
"""

import signal

if __name__ == "__main__":  # Ctrl-C during the imports, which take seconds, is no traceback; run_tool takes over
    signal.signal(signal.SIGINT, signal.SIG_DFL)

from visionzoo.engine import run_tool


def main() -> None:
    """Parse, measure, write."""
    from visionzoo.engine.flags import sparse_rate_parser

    args = sparse_rate_parser().parse()
    from visionzoo.engine.sparse_rate import measure_sparse_rate  # after parsing: --help and typing errors come at once

    measure_sparse_rate(args)


if __name__ == "__main__":
    run_tool(main)
