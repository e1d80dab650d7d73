"""Signals that end a run: between two updates instead of in the middle of one, and of all processes at the same one."""

import contextlib
import multiprocessing
import os
import signal
import threading
from collections.abc import Iterator
from types import FrameType
from typing import Any

from visionzoo.engine.errors import Interrupted
from visionzoo.engine.parallel import Process, under_torchrun

SIGNALS = [signal.SIGINT, signal.SIGTERM]
if hasattr(signal, "SIGHUP"):
    SIGNALS.append(signal.SIGHUP)  # of a terminal that was closed, or a connection that was lost


class StopSignals:
    """Within `with`, a signal is kept until `check` is called; a second one, or one within `at_once`, raises there.

    Under torchrun, and in a process that another Python process started, a second one is skipped: these pass on what
    a terminal or a scheduler has sent to all already, and end what does not end by itself.

    Attributes:
        received: the first signal.
        cut_short: whether a second one has raised in the middle of whatever ran.

    Raises:
        Interrupted: a signal came.
    """

    def __init__(self, process: Process) -> None:
        self.process = process
        self.received: int | None = None
        self.cut_short = False
        self._at_once = False
        self._process = os.getpid()
        self._before: dict[int, Any] = {}

    def __enter__(self) -> "StopSignals":
        if threading.current_thread() is threading.main_thread():  # Python lets no other thread set handlers
            caught = [n for n in SIGNALS if n == signal.SIGINT or signal.getsignal(n) != signal.SIG_IGN]  # nohup
            self._before = {number: signal.signal(number, self._handle) for number in caught}
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if os.getpid() != self._process:
            return  # a loading process that has not left the group yet: it is ended from here
        if self._at_once:
            self.received = number
            raise Interrupted(number)
        if self.received is not None and not (under_torchrun() or multiprocessing.parent_process()):
            self.cut_short = True
            raise Interrupted(number)
        self.received = number

    def check(self) -> None:
        """Raise Interrupted when a signal has come, to any of the processes; all call this equally often."""
        if number := self.process.agree(self.received or 0):
            self.received = number
            raise Interrupted(number)

    @contextlib.contextmanager
    def at_once(self) -> Iterator[None]:
        """Let signals raise wherever they come: for work that changes no state."""
        self.check()
        self._at_once = not self.process.distributed  # the others would wait for this one
        try:
            yield
        finally:
            self._at_once = False


def outlive_signals() -> None:
    """Let a loading process, which calls this, survive signals that other processes than its parent send.

    Schedulers (Slurm, systemd) send SIGTERM to all processes of a job at once: the run is to end its loading processes,
    once it has saved. Where signals cannot be waited for (macOS, Windows), nothing changes.
    """
    if hasattr(signal, "sigwaitinfo"):
        signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)
        threading.Thread(target=_end_by_parent, daemon=True).start()


def _end_by_parent() -> None:
    while signal.sigwaitinfo(SIGNALS).si_pid != os.getppid():
        pass
    os._exit(0)
