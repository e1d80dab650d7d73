"""Ctrl-C and SIGTERM between two updates instead of in the middle of one."""

import contextlib
import os
import signal
import threading
from collections.abc import Iterator
from types import FrameType
from typing import Any

from visionzoo.engine.errors import Interrupted

SIGNALS = (signal.SIGINT, signal.SIGTERM)


class StopSignals:
    """Within `with`, a signal is kept until `check` is called; a second one, or one within `at_once`, raises there.

    Raises:
        Interrupted: a signal came.
    """

    def __init__(self) -> None:
        self.received: int | None = None
        self._at_once = False
        self._process = os.getpid()
        self._before: dict[int, Any] = {}

    def __enter__(self) -> "StopSignals":
        if threading.current_thread() is threading.main_thread():  # Python lets no other thread set handlers
            self._before = {number: signal.signal(number, self._handle) for number in SIGNALS}
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if os.getpid() != self._process:
            return  # a loading process, to which the terminal sends Ctrl-C too: it is ended from here
        if self._at_once or self.received is not None:
            raise Interrupted(number)
        self.received = number

    def check(self) -> None:
        """Raise Interrupted when a signal has come."""
        if self.received is not None:
            raise Interrupted(self.received)

    @contextlib.contextmanager
    def at_once(self) -> Iterator[None]:
        """Let signals raise wherever they come: for work that changes no state."""
        self.check()
        self._at_once = True
        try:
            yield
        finally:
            self._at_once = False
