"""Test-time registers: visionzoo registers IMAGES... --model NAME --checkpoint FILE [flags].

For isotropic models: which neurons make tokens of large norm, and maps of the norms before and after they are moved to
a token that was not trained. On a model without such tokens it says so.
"""


def main() -> None:
    """Parse, look, move, draw."""
    from visionzoo.engine.trained_flags import registers_parser

    config = registers_parser().parse()
    from visionzoo.engine.registers import show_registers  # after parsing: --help and typing errors come at once

    show_registers(config)
