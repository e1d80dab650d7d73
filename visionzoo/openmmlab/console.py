"""What a training prints: OpenMMLab's log, whose pages go to the log file; the terminal names them."""

from __future__ import annotations

import contextlib
import io
import logging
from collections.abc import Iterator
from typing import Any

from visionzoo.text import count_of

PAGES = {  # beginnings of mmengine 0.10's records of a hundred lines and more, and what the terminal has instead
    f"\n{'-' * 60}\nSystem environment:": "System environment",
    "Config:\n": "Config, whole",
    "Hooks will be executed in the following order:": "Hooks in their order",
}
ITS_OWN = (  # warnings of mmengine 0.10 about calls that are mmengine's own
    '"FileClient" will be deprecated in future.',
    '"HardDiskBackend" is the alias of "LocalBackend"',
)


def shorten(logger: logging.Logger, log_file: str) -> None:
    """Let what a logger shows on terminals leave out pages and warnings that no user can act on; its files have all.

    Args:
        logger: mmengine's, with its handlers.
        log_file: the file, which the terminal names.
    """
    for handler in logger.handlers:
        if type(handler) is logging.StreamHandler and not isinstance(handler.formatter, _Short):
            handler.setFormatter(_Short(handler.formatter or logging.Formatter(), log_file))
            handler.addFilter(lambda record: not record.getMessage().startswith(ITS_OWN))


class _Short(logging.Formatter):
    def __init__(self, whole: logging.Formatter, log_file: str) -> None:
        super().__init__()
        self.whole, self.log_file = whole, log_file

    def format(self, record: logging.LogRecord) -> str:
        text = record.getMessage()
        for beginning, title in PAGES.items():
            if text.startswith(beginning):
                lines = count_of(len(text.strip().splitlines()), "line")
                record = logging.makeLogRecord({**vars(record), "msg": f"{title}: {lines} in {self.log_file}"})
                record.args = None
        return self.whole.format(record)


@contextlib.contextmanager
def results_unseen(logger: logging.Logger) -> Iterator[None]:
    """Let nothing be printed or logged within `with` but warnings: for results that are none.

    Where it fails, what was printed is printed after all.
    """
    level = logger.level
    logger.setLevel(logging.WARNING)
    said: Any = io.StringIO()
    try:
        with contextlib.redirect_stdout(said):
            yield
    except BaseException:
        print(said.getvalue(), end="")
        raise
    finally:
        logger.setLevel(level)
