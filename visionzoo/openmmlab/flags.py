"""The command lines of train, eval, predict and export with a config of OpenMMLab."""

import argparse
from typing import Any

from mmengine.config import DictAction

from visionzoo.deploy.flags import add_export_flags
from visionzoo.engine.configs import find_config
from visionzoo.engine.errors import UserError
from visionzoo.engine.flags import SHARE, add_page_flags


class CfgOptions(DictAction):
    """mmengine's `--cfg-options KEY=VALUE ...`, which says what it cannot take."""

    def __call__(self, parser: Any, namespace: Any, values: Any, option_string: str | None = None) -> None:
        """Store the pairs as a dict.

        Raises:
            UserError: if one has no `=`.
        """
        if wrong := [value for value in values if "=" not in value]:
            raise UserError(f"{option_string}: expected KEY=VALUE, got {wrong[0]!r}; CONFIG.py comes before it")
        try:
            super().__call__(parser, namespace, values, option_string)
        except (RecursionError, AssertionError, ValueError) as error:
            raise UserError(
                f"{option_string} {' '.join(values)}: expected a value, or a list [A,B] or (A,B) of values; parts with "
                f"keys are set one by one, KEY.NUMBER.NAME=VALUE"
            ) from error


class Config(argparse.Action):
    """A config by its path, or by the name of one that visionzoo ships."""

    def __call__(self, parser: Any, namespace: Any, values: Any, option_string: str | None = None) -> None:
        """Store the path."""
        setattr(namespace, self.dest, str(find_config(values)))


def train_parser() -> argparse.ArgumentParser:
    """Return mmdet's flags, with those for your own data."""
    parser = _parser("CONFIG", "Train a detector or segmentor.")
    parser.add_argument("--work-dir", help="of logs and checkpoints (default: work_dirs/NAME_OF_CONFIG)")
    parser.add_argument("--resume", nargs="?", const="auto", metavar="FILE", help="continue from FILE, or the last one")
    parser.add_argument("--amp", action="store_true", help="mixed precision on a GPU")
    parser.add_argument("--auto-scale-lr", action="store_true", help="scale the learning rate with the whole batch")
    parser.add_argument("--seed", type=int, help="of the initial weights and the order of the data")
    parser.add_argument(
        "--skip-bad-images", action="store_true", help="skip unusable training images and masks, and log which"
    )
    parser.add_argument("--log-wandb", action="store_true", help="log to Weights & Biases too, not only to TensorBoard")
    parser.add_argument("--wandb-project", help="its project")
    _add_data(parser)
    _add_common(parser)
    return parser


def eval_parser() -> argparse.ArgumentParser:
    """Return the flags of evaluation."""
    parser = _parser("CONFIG --checkpoint FILE", "Evaluate a detector or segmentor.")
    parser.add_argument("--checkpoint", required=True, help="of the detector or segmentor, as train.py writes it")
    parser.add_argument("--work-dir", help="of the metrics (default: work_dirs/NAME_OF_CONFIG)")
    parser.add_argument("--show-dir", help="write pictures with annotation and prediction side by side there")
    _add_data(parser)
    _add_common(parser)
    return parser


def predict_parser() -> argparse.ArgumentParser:
    """Return the flags of prediction."""
    parser = _parser("CONFIG IMAGE...", "Draw boxes and masks on pictures, and write JSON.")
    parser.add_argument("images", nargs="+", help="pictures, or folders of them")
    parser.add_argument("--checkpoint", required=True, help="of the detector or segmentor, as train.py writes it")
    parser.add_argument("--output", default="output/predictions", help="folder (default: %(default)s)")
    parser.add_argument("--score-threshold", type=SHARE, default=0.3, help="of what is drawn (default: %(default)s)")
    parser.add_argument("--device", help="such as cuda:0 or cpu (default: the GPU if there is one)")
    return parser


def view_parser() -> argparse.ArgumentParser:
    """Return the flags of the page and its pictures."""
    parser = _parser("CONFIG [IMAGE...]", "Look at what a detector or segmentor finds: a local page, or pictures.")
    parser.add_argument("images", nargs="*", help="pictures, or folders of them")
    parser.add_argument("--checkpoint", required=True, help="of the detector or segmentor, as train.py writes it")
    parser.add_argument("--save", default="", metavar="DIR", help="write pictures and JSON there, and no page")
    parser.add_argument("--score-threshold", type=SHARE, default=0.3, help="of what is drawn (default: %(default)s)")
    parser.add_argument("--device", help="such as cuda:0 or cpu (default: the GPU if there is one)")
    add_page_flags(parser)
    return parser


def export_parser() -> argparse.ArgumentParser:
    """Return the flags of export."""
    parser = _parser("CONFIG --checkpoint FILE", "Export what a network puts out, before any NMS.")
    parser.add_argument("--checkpoint", default="", help="of the detector or segmentor, as train.py writes it")
    parser.add_argument("--random-weights", action="store_true", help="export without weights, to measure speed")
    add_export_flags(parser, ("onnx",))
    parser.add_argument(
        "--img-size", type=int, metavar="N", help="side of a square input (default: the config's input)"
    )
    parser.add_argument("--input-size", type=int, nargs=3, metavar="N", help="channels, height, width, likewise")
    parser.add_argument("--cfg-options", nargs="+", action=CfgOptions, metavar="KEY=VALUE", help="change the config")
    return parser


def _parser(usage: str, text: str) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(usage=f"%(prog)s {usage} [flags]", description=text)
    about = "a config of mmdet or mmseg, or the name of one of ours, which `visionzoo configs` lists"
    parser.add_argument("config", action=Config, metavar="CONFIG", help=about)
    return parser


def _add_data(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--data-root", help="folder of the data, in the layout that the config expects")
    parser.add_argument(
        "--dataset", metavar="FILE.yaml", help="your own data; see visionzoo.openmmlab.configuring.use_dataset"
    )
    parser.add_argument("--classes", metavar="A,B,...", help="names of the classes; sets num_classes everywhere")


def _add_common(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--cfg-options", nargs="+", action=CfgOptions, metavar="KEY=VALUE", help="change the config")
    parser.add_argument(
        "--launcher",
        choices=["none", "pytorch", "slurm", "mpi"],
        help="what started the processes (default: pytorch under torchrun, else none)",
    )
    parser.add_argument("--local-rank", "--local_rank", type=int, default=0, help=argparse.SUPPRESS)
