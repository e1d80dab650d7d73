"""Measure ours against others: visionzoo benchmark SUITE [flags]; SUITE is one of those below, or report.

Results go to benchmarks/GPU/ as they come, into SUITE.csv, and then as pictures and report.md. A measurement is named
case/implementation/measure, see --list; --only and --skip take parts of such names, or patterns with * and ?. A case
that is measured again is replaced whole, so that all its rows come from one process.

    visionzoo benchmark operations --only routed,halo --skip compiled,flex --quick
    visionzoo benchmark models --only 'biformer_t/*' --baselines path/to/BiFormer --minutes 4
"""

import argparse
import os
from collections.abc import Callable, Iterable
from importlib.util import find_spec
from pathlib import Path
from tempfile import TemporaryDirectory

from visionzoo.engine import UserError
from visionzoo.engine.checkpoints import make_folder
from visionzoo.engine.errors import closest
from visionzoo.kernels.small_maps import TABLE
from visionzoo.text import count_of

COLD = ("host", "training")  # suites whose first calls compile every kernel, whatever earlier runs have kept
DTYPES = ("bfloat16", "float16", "float32")


def parser() -> argparse.ArgumentParser:
    """Return the parser of the command line."""
    made = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    made.add_argument(
        "suite",
        choices=("operations", "models", "training", "memory", "reducers", "host", "small", "report"),
        help="report: draw anew, only",
    )
    made.add_argument("--only", type=_names, default=[], metavar="A,B", help="measure what fits one of these")
    made.add_argument("--skip", type=_names, default=[], metavar="A,B", help="but nothing that fits one of these")
    made.add_argument("--missing", action="store_true", help="only cases that the results in --output do not have yet")
    made.add_argument("--list", action="store_true", help="print the names of the measurements, measure nothing")
    made.add_argument("--quick", action="store_true", help="repeat less, for a first look")
    made.add_argument("--minutes", type=_time, metavar="M", help="start no measurement after M minutes")
    made.add_argument("--batch", type=_positive, metavar="N", help="replaces each case's batch size")
    made.add_argument("--dtype", choices=DTYPES, help="default: bfloat16 on a GPU, float32 elsewhere")
    made.add_argument("--device", choices=("cuda", "cpu"), help="default: cuda where there is one, else cpu")
    made.add_argument(
        "--baselines", "--rivals", type=Path, metavar="DIR", help="checkout of github.com/rayleizhu/BiFormer"
    )
    made.add_argument(
        "--table",
        type=Path,
        nargs="?",
        const=TABLE,
        metavar="FILE",
        help="small: write limits into the table that backend auto goes by: the package's, or FILE",
    )
    made.add_argument("--output", type=Path, metavar="DIR", help="default: benchmarks/ and the name of the GPU")
    return made


def _names(text: str) -> list[str]:
    return [name for name in text.split(",") if name]


def _positive(text: str) -> int:
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError(f"expected a positive number, got {text}")
    return number


def _time(text: str) -> float:
    minutes = float(text)
    if not 0 < minutes < float("inf"):
        raise argparse.ArgumentTypeError(f"expected a positive number of minutes, got {text}")
    return minutes


def main() -> None:
    """Parse, list the cases, run them, report."""
    args = parser().parse_args()

    import torch  # after parsing: --help comes at once

    from visionzoo.benchmark import baselines
    from visionzoo.benchmark.cases import Case, Settings, path, select
    from visionzoo.benchmark.host import host_cases
    from visionzoo.benchmark.memory import memory_cases
    from visionzoo.benchmark.models import model_cases
    from visionzoo.benchmark.operations import operation_cases
    from visionzoo.benchmark.reducers import reducer_cases
    from visionzoo.benchmark.report import write_report
    from visionzoo.benchmark.results import Results, folder_name
    from visionzoo.benchmark.runner import run_cases
    from visionzoo.benchmark.small import limits, small_cases, write_table
    from visionzoo.benchmark.training import training_cases

    if args.suite == "report":
        usual = vars(parser().parse_args(["report"])) | {"device": args.device, "output": args.output}
        if given := [name for name, value in vars(args).items() if value != usual[name]]:
            raise UserError(f"--{given[0]}: `benchmark report` draws what is measured already; leave it out")
    if args.table is not None and args.suite != "small":
        raise UserError(f"--table: the suite small measures what belongs into it, got {args.suite}")
    device = torch.device(args.device or ("cuda" if torch.cuda.is_available() else "cpu"))
    if device.type == "cuda" and not torch.cuda.is_available():
        raise UserError(f"--device {args.device}: torch {torch.__version__} sees no CUDA device here")
    folder = args.output or Path("benchmarks") / folder_name(device)
    if args.suite != "report":
        baselines.use_folder(args.baselines)
        settings = Settings(device, getattr(torch, args.dtype) if args.dtype else None, args.batch, args.quick)
        suites: dict[str, Callable[[Settings], Iterable[Case]]] = {
            "operations": operation_cases,
            "models": model_cases,
            "training": training_cases,
            "memory": memory_cases,
            "reducers": reducer_cases,
            "host": host_cases,
            "small": small_cases,
        }
        cases = list(suites[args.suite](settings))
        names = [case.name for case in cases]
        cases = select(cases, args.only, args.skip)
        if not cases:
            raise UserError(
                f"--only {','.join(args.only)} --skip {','.join(args.skip)} leave no measurement of {args.suite}"
                f"{closest(args.only[0] if args.only else '', names)}; see --list"
            )
        if args.list:
            print("\n".join(path(case, measurement) for case in cases for measurement in case.measurements))
            return
        make_folder(folder)
        results = Results(folder / f"{args.suite}.csv")
        if args.missing:
            cases = [case for case in cases if not results.has(case)]
        with TemporaryDirectory() as empty:
            if args.suite in COLD:
                os.environ["TRITON_CACHE_DIR"] = empty
            run_cases(cases, settings, results, minutes=args.minutes)
        if args.table is not None:
            found = limits(results.rows, f"visionzoo benchmark small{' --quick' * args.quick}")
            write_table(args.table, found)
            print(f"{count_of(len(found), 'limit')} in {args.table}")
    pictures = args.suite == "report" or find_spec("matplotlib") is not None
    print(write_report(folder, pictures=pictures))
    print(f"results in {folder}{'' if pictures else '; without pictures, since matplotlib is not installed'}")
