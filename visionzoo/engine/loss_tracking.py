"""The losses of a run: fetched from the device now and then, and what is done where one is not finite."""

import math
from collections.abc import Mapping

import torch
from timm.utils import reduce_tensor
from torch import Tensor

from visionzoo.engine.errors import UserError
from visionzoo.engine.images import batch_names
from visionzoo.engine.run import Run
from visionzoo.text import some

ADVICE = "A lower --lr, --clip-grad 1 or --amp-dtype bfloat16 may help"
NAMES = 8  # of a batch's images in a message


class LossTracker:
    """The losses of the batches since the last fetch, and the updates that were left out.

    Attributes:
        spoilt: whether the update in progress is to be left out.
        skipped: the updates of this start that were.
    """

    def __init__(self, run: Run) -> None:
        self.run = run
        self.spoilt = False
        self.skipped = 0
        self._pending: list[tuple[Tensor, int, int]] = []  # loss and its parts, images and number of a batch
        self._parts: list[str] = []  # names of the parts
        self._averages: list[tuple[Tensor, Tensor]] = []  # of batch norms, and what they were before the batch

    def expect(self) -> None:
        """Keep what the forward pass of the next batch changes, where its loss may be skipped."""
        if self.run.config.run.skip_nonfinite:
            self._averages = [(buffer, buffer.clone()) for buffer in self.run.trainable.buffers()]

    def add(self, result: Mapping[str, Tensor], images: int, index: int) -> None:
        """Keep the losses of a batch until they are fetched; set `spoilt` where --skip-nonfinite skips it.

        Args:
            result: of timm's task: `loss`, `output` and scalars that the loss is made of.
            images: of the batch.
            index: of the batch in the epoch.

        Raises:
            UserError: it is not finite, and more have been skipped than that allows.
        """
        run, allowed = self.run, self.run.config.run.skip_nonfinite
        loss = result["loss"].detach()
        if not allowed or not run.process.agree(int(not loss.isfinite())):
            self._parts = [name for name in result if name not in ("loss", "output")]
            values = torch.stack([loss, *(result[name].detach().to(loss) for name in self._parts)])
            self._pending.append((values, images, index))
            return
        self.spoilt = True
        self.skipped += 1
        where = self._where(float(loss), index)
        if self.skipped > allowed:
            raise UserError(f"{where}, after {allowed} left out (--skip-nonfinite). {ADVICE}. {run.last_good()}")
        run.say(f"{where}: the update is left out, {self.skipped} of {allowed}")
        for buffer, before in self._averages:
            buffer.copy_(before)

    def fetch(self) -> dict[str, float]:
        """Add the losses since the last call to the run's; return the mean of `loss` and of its parts, by name.

        Raises:
            UserError: one is not finite.
        """
        run = self.run
        if not self._pending:
            return {"loss": math.nan}
        losses = torch.stack([loss for loss, _, _ in self._pending]).double()
        own = losses[:, 0].tolist()
        if run.process.distributed:
            losses = reduce_tensor(losses, run.process.world_size)
        counts = [count for _, count, _ in self._pending]
        for value, mine, (_, _, index) in zip(losses[:, 0].tolist(), own, self._pending, strict=True):
            if not math.isfinite(value):
                where = self._where(mine, index)
                raise UserError(
                    f"{where}. {ADVICE}, and --skip-nonfinite N leaves out N such updates. {run.last_good()}"
                )
        self._pending = []
        total, images, parts = run.progress.losses
        added, *added_parts = (losses * losses.new_tensor(counts)[:, None]).sum(0).tolist()
        parts = {name: parts.get(name, 0.0) + value for name, value in zip(self._parts, added_parts, strict=True)}
        run.progress.losses = (total + added, images + sum(counts), parts)
        return dict(zip(("loss", *self._parts), losses.mean(0).tolist(), strict=True))

    def _where(self, value: float, index: int) -> str:
        """Return place and images of a loss that is not finite, of the first process that has one."""
        run, said = self.run, None
        if not math.isfinite(value):
            epoch = run.progress.epoch
            names = batch_names(run.loader, run.config.device.seed, epoch, index)
            update = epoch * run.updates_per_epoch + index // run.config.fit.grad_accum_steps + 1
            images = f" (images {some(names, NAMES)})" if names else ""
            said = f"the loss is {value} in epoch {epoch}, batch {index}, update {update}{images}"
        return str(run.process.told(said))
