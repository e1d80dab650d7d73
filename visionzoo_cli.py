"""The command `visionzoo`. It stands beside the package, which imports torch: help and Ctrl-C do not wait for that."""

import os
import runpy
import select
import signal
import sys
from collections.abc import Callable
from difflib import get_close_matches
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path

COMMANDS = {  # each is the module of this name in visionzoo/commands
    "train": "train a classifier, detector or segmentor",
    "eval": "evaluate a checkpoint or a pretrained model",
    "predict": "classify images, or draw boxes and masks",
    "export": "write files that run without visionzoo: ONNX, torch.export, AOTInductor",
    "convert": "make a folder that timm loads of a checkpoint, or upload it to Hugging Face's hub",
    "compare": "train several models alike and compare accuracy, speed and memory",
    "models": "list the models with what is published of them",
    "parts": "list the mixers, gates, reducers, heads and decoders that models are built of",
    "configs": "list the configs that train, eval and the others find by name",
    "license": "show whose code and weights a model is made of",
    "check-data": "say what a folder of COCO or ADE20K lacks",
    "benchmark": "measure operations, models and memory against other implementations",
    "view": "look at what a model makes of an image: a web page, or pictures",
    "attention": "draw what the queries of a head see",
    "registers": "move a model's outliers to test-time registers",
    "sparse-rate": "measure CRATE's objective layer by layer",
    "fit-hashes": "fit the hash functions of hashed attention to images",
    "fit-gate": "fit a gate that chooses how many layers of a Mask2Former's encoder run",
    "multi-task": "train one backbone to classify and segment, and slim it to a budget",
    "overfit": "check data, heads and losses: fit detectors and segmentors to a hundred images",
}
ALIASES = {"licence": "license"}


def main() -> None:
    """Run the command that the first argument names, or print the list of them."""
    _until_nobody_reads(_main)


def _main() -> None:
    word = next(iter(sys.argv[1:]), None)
    if word in (None, "-h", "--help", "help"):
        print(help_text(), file=sys.stderr if word is None else sys.stdout)
        sys.exit(2 if word is None else 0)
    if word == "--version":
        print(version())
        return
    command = ALIASES.get(str(word), str(word))
    if command not in COMMANDS:
        near = get_close_matches(command, [*COMMANDS, "--help", "--version"], n=2)
        meant = f"; did you mean {' or '.join(near)}?" if near else ""
        print(f"error: unknown command {word!r}{meant} (visionzoo --help lists them)", file=sys.stderr)
        sys.exit(1)
    sys.argv = [f"visionzoo {command}", *sys.argv[2:]]
    _run(command)


def run(command: str) -> None:
    """Run a command on the arguments in `sys.argv`, without a traceback for Ctrl-C or for what a user can fix."""
    _until_nobody_reads(lambda: _run(command))


def _run(command: str) -> None:
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # during the imports, which take seconds; run_tool takes over
    from visionzoo.engine.errors import run_tool

    module = command.replace("-", "_")
    run_tool(lambda: import_module(f"visionzoo.commands.{module}").main())


def _until_nobody_reads(command: Callable[[], None]) -> None:
    """Run a command; where whoever read its output has gone (`| head`), stop silently, as Unix tools do.

    The signal SIGPIPE stays ignored, so that a connection of a training that breaks is an error of its own.
    """
    try:
        try:
            command()
        finally:
            sys.stdout.flush()  # of --help too, which leaves by SystemExit
    except BrokenPipeError:
        if not hasattr(select, "poll"):  # Windows
            raise
        gone = [stream for stream in (sys.stdout, sys.stderr) if _is_unread(stream.fileno())]
        if not gone:
            raise  # of another pipe
        for stream in gone:  # Python flushes once more at its end
            os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())
        sys.exit(128 + signal.SIGPIPE)


def _is_unread(descriptor: int) -> bool:
    """Whether a pipe's reader has gone."""
    poll = select.poll()
    poll.register(descriptor, 0)  # errors are reported unasked
    return any(event & (select.POLLERR | select.POLLHUP) for _, event in poll.poll(0))


def help_text() -> str:
    """Return the list of the commands, a line each."""
    width = max(map(len, COMMANDS)) + 2
    lines = [f"  {name:{width}}{about}" for name, about in COMMANDS.items()]
    return "\n".join(
        [
            "usage: visionzoo COMMAND [arguments]",
            "",
            "Vision backbones from the literature: train, evaluate, export and compare them.",
            "",
            "commands:",
            *lines,
            "",
            "visionzoo COMMAND --help lists the arguments of one, visionzoo --version prints the version.",
        ]
    )


def version() -> str:
    """Return the version of the package, which is not imported for it."""
    spec = find_spec("visionzoo")
    assert spec is not None and spec.origin is not None
    return str(runpy.run_path(str(Path(spec.origin).with_name("_version.py")))["__version__"])
