"""Draw what a head's queries see: visionzoo attention IMAGES... --checkpoint FILE [flags].

For models with class queries (visionzoo train --head intr): the image under the attention of the predicted and of the
true class, of the mean of the heads and of each head. For efficient probing (--probe ep): that of each query.
"""


def main() -> None:
    """Parse, look, draw."""
    from visionzoo.engine.trained_flags import attention_parser

    config = attention_parser().parse()
    from visionzoo.engine.attention import show_attention  # after parsing: --help and typing errors come at once

    show_attention(config)
