"""A trained network of several tasks from its checkpoint, whole or slimmed, and the data that this takes."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.swa_utils import update_bn
from torch.utils.data import Subset

from visionzoo.decoders import MultiTaskNetwork
from visionzoo.engine.checkpoints import read_checkpoint
from visionzoo.engine.errors import UserError
from visionzoo.engine.images import batches
from visionzoo.engine.multi_task.data import SCENES, MaskedImages, SceneLoader, open_scenes
from visionzoo.engine.multi_task.flags import MultiTaskTrainConfig, multi_task_parser
from visionzoo.engine.multi_task.task import by_layers
from visionzoo.engine.multi_task.training import build_network
from visionzoo.engine.options import filled, settings
from visionzoo.engine.recorded import command_of, read_recorded, recorded_args
from visionzoo.models._checkpoint import unwrap_state_dict
from visionzoo.slimming import slim


@dataclass(frozen=True)
class TrainedTasks:
    """A network with its weights, and what its run records.

    Attributes:
        network: in eval mode.
        config: flags of the run that build it.
        data_config: input size, mean and deviation.
        names: of the classes of pixels.
    """

    network: MultiTaskNetwork
    config: MultiTaskTrainConfig
    data_config: dict[str, Any]
    names: list[str]


def restore_tasks(path: str, *, use_ema: bool = True, state: Mapping[str, Any] | None = None) -> TrainedTasks:
    """Build the network of a checkpoint of `visionzoo multi-task`, whose content is `state` where it is read already.

    Raises:
        UserError: it is not there, damaged, or of another command.
    """
    state = read_checkpoint(path) if state is None else state
    found, args = read_recorded(state, path), recorded_args(state)
    own = ("decoder", "classifier_dim", "min_width", "train_split", "val_split", "dataset")
    try:
        tensors = unwrap_state_dict(state, use_ema=use_ema)
    except ValueError as error:
        raise UserError(f"cannot load {path}: {error}") from error
    if command_of(args) != "multi-task" or "label_classes" not in tensors or not found.class_names:
        raise UserError(
            f"{path} is no checkpoint of a run of `visionzoo multi-task`; `visionzoo eval` takes the others"
        )
    typed = multi_task_parser().typed({name: args[name] for name in own if name in args}, path)
    values = {**settings(MultiTaskTrainConfig()), **typed, **found.model, "num_classes": len(found.class_names)}
    config = filled(MultiTaskTrainConfig, values)
    network = build_network(config, tensors["label_classes"].tolist())
    try:
        network.load_state_dict(tensors)
    except RuntimeError as error:
        raise UserError(f"cannot load {path} into the network that it describes: {error}") from error
    return TrainedTasks(network.eval(), config, dict(found.data_config), found.class_names)


def data_of(data_dir: str | None, checkpoint: str, trained: TrainedTasks) -> Path:
    """Return the folder of a trained network's data: the one that is named, else that of its run.

    Raises:
        UserError: none is named, or it has other classes than the training.
    """
    dataset = "" if data_dir else trained.config.data.dataset
    if not data_dir and dataset != SCENES:
        raise UserError(f"which data? {checkpoint} was trained on a folder; give --data-dir DIR")
    root, names = open_scenes(dataset, data_dir)
    if names != trained.names:
        raise UserError(
            f"{root} has the classes {', '.join(names[:8])}..., {checkpoint} was trained on "
            f"{', '.join(trained.names[:8])}...; both have to be the same, in the same order"
        )
    return root


def norm_loader(root: Path, trained: TrainedTasks, number: int, **loading: Any) -> SceneLoader:
    """Return batches of that many training images, evenly spread, to measure batch norms on.

    Args:
        root: of the data.
        trained: whose images they are to be.
        number: of the images.
        loading: of `SceneLoader`.
    """
    split = trained.config.splits.train_split
    images = MaskedImages(root, split, len(trained.names), trained.data_config)
    number = min(number, len(images))
    spread: Any = Subset(images, [i * len(images) // number for i in range(number)])
    return SceneLoader(spread, **loading)


def slimmed_network(
    network: MultiTaskNetwork, shares: Mapping[str, float], loader: SceneLoader, device: torch.device
) -> MultiTaskNetwork:
    """Return a network cut to a share of each part, its batch norms measured on a loader's images.

    At full width it is the network itself.
    """
    if all(share == 1 for share in shares.values()):
        return network
    smaller: Any = slim(network, by_layers(shares))
    update_bn(batches(loader), smaller, device)
    return smaller.eval()


class LabelsAndPixels(nn.Module):
    """What is exported: images to labels and pixels, without the maps."""

    def __init__(self, network: nn.Module):
        super().__init__()
        self.network = network

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """[B, 3, H, W] to [B, K] and [B, num_classes, H, W]."""
        labels, pixels, _ = self.network(images)
        return labels, pixels
