"""The losses of a run: fetched from the device now and then, and what is done where one is not finite."""

import math

import torch
from timm.utils import reduce_tensor
from torch import Tensor

from visionzoo.engine.errors import UserError
from visionzoo.engine.images import batch_names
from visionzoo.engine.run import Run

ADVICE = "A lower --lr, --clip-grad 1 or --amp-dtype bfloat16 may help"
NAMES = 8  # of a batch's images in a message


class Losses:
    """The losses of the batches since the last fetch, and the updates that were left out.

    Attributes:
        spoilt: whether the update in progress is to be left out.
        skipped: the updates of this start that were.
    """

    def __init__(self, run: Run) -> None:
        self.run = run
        self.spoilt = False
        self.skipped = 0
        self._pending: list[tuple[Tensor, int, int]] = []  # loss, images and number of a batch
        self._averages: list[tuple[Tensor, Tensor]] = []  # of batch norms, and what they were before the batch

    def expect(self) -> None:
        """Keep what the forward pass of the next batch changes, where its loss may be passed over."""
        if self.run.args.skip_nonfinite:
            self._averages = [(buffer, buffer.clone()) for buffer in self.run.trainable.buffers()]

    def add(self, loss: Tensor, images: int, index: int) -> None:
        """Keep the loss of a batch until it is fetched; set `spoilt` where --skip-nonfinite passes over it.

        Raises:
            UserError: it is not finite, and more have been passed over than that allows.
        """
        run, allowed = self.run, self.run.args.skip_nonfinite
        loss = loss.detach()
        if not allowed or not run.process.agree(int(not loss.isfinite())):
            self._pending.append((loss, images, index))
            return
        self.spoilt = True
        self.skipped += 1
        where = self._where(float(loss), index)
        if self.skipped > allowed:
            raise UserError(f"{where}, after {allowed} left out (--skip-nonfinite). {ADVICE}. {run.last_good()}")
        run.say(f"{where}: the update is left out, {self.skipped} of {allowed}")
        for buffer, before in self._averages:
            buffer.copy_(before)

    def fetch(self) -> float:
        """Add the losses since the last call to the run's, and return their mean.

        Raises:
            UserError: one is not finite.
        """
        run = self.run
        if not self._pending:
            return math.nan
        losses = torch.stack([loss for loss, _, _ in self._pending]).double()
        own = losses.tolist()
        if run.process.distributed:
            losses = reduce_tensor(losses, run.process.world_size)
        values, counts = losses.tolist(), [float(count) for _, count, _ in self._pending]
        for value, mine, (_, _, index) in zip(values, own, self._pending, strict=True):
            if not math.isfinite(value):
                where = self._where(mine, index)
                raise UserError(
                    f"{where}. {ADVICE}, and --skip-nonfinite N leaves out N such updates. {run.last_good()}"
                )
        self._pending = []
        total, images = run.losses
        run.losses = (total + sum(map(float.__mul__, values, counts)), images + int(sum(counts)))
        return float(losses.mean())

    def _where(self, value: float, index: int) -> str:
        """Return place and images of a loss that is not finite, of the first process that has one."""
        run, said = self.run, None
        if not math.isfinite(value):
            names = batch_names(run.loader, run.args.seed, run.epoch, index)
            listed = ", ".join(names[:NAMES]) + (f" and {len(names) - NAMES} more" if len(names) > NAMES else "")
            update = run.epoch * run.updates_per_epoch + index // run.args.grad_accum_steps + 1
            images = f" (images {listed})" if names else ""
            said = f"the loss is {value} in epoch {run.epoch}, batch {index}, update {update}{images}"
        return str(run.process.told(said))
