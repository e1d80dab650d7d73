"""What a user can fix is one message; everything else keeps its traceback."""

import signal
import sys
from collections.abc import Callable, Iterable
from difflib import get_close_matches
from importlib import import_module
from types import ModuleType


class UserError(ValueError):
    """Input that cannot work: the message says what was expected, what came, and what to do."""


class UnreadableImageError(UserError):
    """An image file that cannot be decoded."""


class NotNamedError(UserError):
    """A model or its weights that flags are to name.

    Args:
        what: is missing.
        advice: which flags of most commands name it; others have flags of their own.
    """

    def __init__(self, what: str, advice: str) -> None:
        super().__init__(f"{what} {advice}")
        self.what = what


class Interrupted(Exception):
    """The run was asked to stop by a signal."""

    def __init__(self, signum: int, advice: str = "") -> None:
        super().__init__(signum, advice)  # both in args: exceptions cross process borders as pickles
        self.signum = signum
        self.advice = advice

    def __str__(self) -> str:
        return f"stopped by {signal.Signals(self.signum).name}{self.advice and '; ' + self.advice}"


def run_tool(main: Callable[[], object]) -> None:
    """Run `main`; print what a user can fix as one message and exit with 1, or 128 + the signal's number.

    Tools leave SIGINT to the system while they import; here it becomes Python's KeyboardInterrupt again.
    """
    if signal.getsignal(signal.SIGINT) == signal.SIG_DFL:
        signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        main()
    except UserError as error:
        print(f"error: {printable(str(error))}", file=sys.stderr)
        sys.exit(1)
    except Interrupted as error:
        print(f"\n{error}", file=sys.stderr)
        sys.exit(128 + error.signum)
    except KeyboardInterrupt:
        print("\nstopped by SIGINT", file=sys.stderr)
        sys.exit(128 + signal.SIGINT)


def printable(text: str) -> str:
    r"""Return a text with escapes (`\x1b`, `\udce9`) for what would steer a terminal and what no terminal can show.

    File names may hold both: codes that color or clear the screen, and bytes that are not UTF-8. Ends of lines stay.
    """
    return "".join(c if c.isprintable() or c in "\n\t" else c.encode("unicode_escape").decode() for c in text)


def closest(name: str, valid: Iterable[str]) -> str:
    """Return `; did you mean ...?` with the valid names nearest to `name`, or nothing when none is near."""
    valid = list(valid)
    matches = get_close_matches(name, valid, n=4) or [other for other in valid if name and name in other][:4]
    return f"; did you mean {' or '.join(matches)}?" if matches else ""


def require(module: str, extra: str = "train") -> ModuleType:
    """Import an optional dependency, or raise UserError naming the extra that installs it."""
    try:
        return import_module(module)
    except ModuleNotFoundError as error:
        if error.name is None or not module.startswith(error.name):
            raise  # the module is there, something that it needs is not
        raise UserError(f'{module} is not installed; install it with: pip install "visionzoo[{extra}]"') from error
