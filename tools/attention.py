"""Draw what a head's queries see: python tools/attention.py IMAGES... --checkpoint FILE [flags].

For models with class queries (--head intr of tools/train.py): the image under the attention of the predicted and of the
true class, of the mean of the heads and of each head. For efficient probing (--probe ep): that of each query.
"""

import signal

if __name__ == "__main__":  # Ctrl-C during the imports, which take seconds, is no traceback; run_tool takes over
    signal.signal(signal.SIGINT, signal.SIG_DFL)

from visionzoo.engine import run_tool


def main() -> None:
    """Parse, look, draw."""
    from visionzoo.engine.flags import attention_parser

    args = attention_parser().parse()
    from visionzoo.engine.attention import show_attention  # after parsing: --help and typing errors come at once

    show_attention(args)


if __name__ == "__main__":
    run_tool(main)
