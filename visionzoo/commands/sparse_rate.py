"""Measure CRATE's objective, layer by layer: visionzoo sparse-rate IMAGES... --checkpoint FILE [flags].

For models with attention in subspaces (zoo_crate_*, or any with mixers=subspace). Writes a table, sparse_rate.csv, and
the paper's figure of it, sparse_rate.png: coding rates of the tokens that attention sees, and the share of values that
are not zero after each block.
"""


def main() -> None:
    """Parse, measure, write."""
    from visionzoo.engine.trained_flags import sparse_rate_parser

    config = sparse_rate_parser().parse()
    from visionzoo.engine.sparse_rate import measure_sparse_rate  # after parsing: --help and typing errors come at once

    measure_sparse_rate(config)
