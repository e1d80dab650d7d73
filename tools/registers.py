"""Test-time registers: python tools/registers.py IMAGES... --model NAME --checkpoint FILE [flags].

For isotropic models: which neurons make tokens of large norm, and maps of the norms before and after they are moved to
a token that was not trained. On a model without such tokens it says so.
"""

import signal

if __name__ == "__main__":  # Ctrl-C during the imports, which take seconds, is no traceback; run_tool takes over
    signal.signal(signal.SIGINT, signal.SIG_DFL)

from visionzoo.engine import run_tool


def main() -> None:
    """Parse, look, move, draw."""
    from visionzoo.engine.flags import registers_parser

    args = registers_parser().parse()
    from visionzoo.engine.registers import show_registers  # after parsing: --help and typing errors come at once

    show_registers(args)


if __name__ == "__main__":
    run_tool(main)
