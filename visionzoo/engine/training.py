"""The training loop over timm's task, optimizer and schedule.

Everything random in a step follows from (seed, epoch, step, process), so a run that continues from a checkpoint, be it
in mid-epoch, is the run that was never stopped; a checkpoint needs no random states.
"""

import contextlib
import math
import time
from collections.abc import Iterable, Iterator
from contextlib import AbstractContextManager
from typing import Any

import torch
import torch.distributed
from timm.utils import dispatch_clip_grad, distribute_bn, unwrap_model
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.data import IterableDataset

from visionzoo.engine.building import build_run
from visionzoo.engine.cached import DeviceLoader
from visionzoo.engine.calling import autocast, set_epoch
from visionzoo.engine.checkpoints import BEST
from visionzoo.engine.data import end_loading, train_loader
from visionzoo.engine.errors import Interrupted, UserError
from visionzoo.engine.evaluation import evaluate
from visionzoo.engine.flags import TrainConfig
from visionzoo.engine.images import CheckedImages, announce_epoch, batches, loading_death, seed_everything
from visionzoo.engine.interruption import StopSignals
from visionzoo.engine.loss_tracking import LossTracker
from visionzoo.engine.optimization import total_batch
from visionzoo.engine.parallel import start_process
from visionzoo.engine.probing import train_mode
from visionzoo.engine.profiling import TRACE, Trace, Waiting, peak_memory
from visionzoo.engine.run import Run
from visionzoo.graphs import CaptureError, CudaRecorder, TrainingStep
from visionzoo.text import count_of


def train(config: TrainConfig) -> dict[str, Any]:
    """Train what `config` describes (`visionzoo train`); return the run's last row, best metric and folder.

    Raises:
        UserError: the input cannot work, the loss is not finite, or a checkpoint cannot be written.
        Interrupted: by a signal; a checkpoint is written and the command to continue is in the message.
    """
    process = start_process(config.device.device)
    result = Training(build_run(config, process)).fit()
    if process.distributed:
        torch.distributed.destroy_process_group()
    return result


class Training:
    """The loop of one run."""

    def __init__(self, run: Run) -> None:
        self.run = run
        self.loader = run.loader  # another, where mixing ends
        self.stop = StopSignals(run.process)
        self.losses = LossTracker(run)
        averaged: Any = run.task.get_trainable_module(ema=True)
        self.step = TrainingStep(
            self._forward,
            run.optimizer,
            recorder=CudaRecorder(run.process.device) if run.config.fit.cuda_graphs else None,
            clip=self._before_update if run.config.optimizer.clip_grad is not None or run.annealing else None,
            scaler=run.scaler,
            ema=averaged,
            model=run.trainable,
            second_order=bool(getattr(run.optimizer, "is_second_order", False)),
            replicas=run.replicas,
        )
        for remark in self.step.remarks:
            run.say(f"--cuda-graphs: not recorded: {remark}")
        self.waiting = Waiting()
        self.frozen = ""  # what --freeze-layers has frozen, in words
        self.images, self.seconds, self.waited = 0, 0.0, 0.0  # of training since the last row of summary.csv
        traced = run.config.run.profile if run.process.is_primary else 0
        self.trace = Trace(run.folder / TRACE, traced, run.process.device)

    def fit(self) -> dict[str, Any]:
        """Train to the end, validating and saving on the way."""
        run = self.run
        try:
            return self._fit()
        except (UserError, Interrupted, RuntimeError) as error:
            told = self._told(error)
            if run.reporter:
                run.reporter.keep(str(told))  # the tool prints it
            if told is error:
                raise
            raise told from error
        finally:
            if run.reporter:
                if said := self.trace.close():
                    run.say(said)
                run.reporter.close()
            end_loading(self.loader)
            run.close()

    def _fit(self) -> dict[str, Any]:
        run = self.run
        row: dict[str, Any] = {}
        self._start_bar()
        with self.stop:
            if run.finished:
                run.say(f"nothing left to do: {count_of(run.update, 'update is', 'updates are')} done")
            try:
                while not run.finished:
                    row = self._epoch() or row
            except Interrupted as error:
                raise self._saved(error) from None
        if run.reporter and not run.config.run.no_curves:
            run.reporter.draw_curves()
        self._report_unusable()
        if run.checkpoints.best:
            row["best_epoch"], row["best_metric"] = run.checkpoints.best
            run.say(f"best {run.metric} {row['best_metric']:.5g}, epoch {row['best_epoch']}: {run.folder / BEST}")
        return {**row, "updates": run.update, "folder": str(run.folder)}

    def _told(self, error: Exception) -> Exception:
        """Return an error in a user's words, where there are such."""
        run = self.run
        if isinstance(error, RuntimeError) and self.stop.received is not None:
            # peers, and where signals cannot be waited for loading processes, get it too; their end is an error here
            return Interrupted(self.stop.received, f"nothing saved. {run.last_good()}")
        if isinstance(error, RuntimeError) and "derivative for" in str(error) and self.step.second_order:
            return UserError(
                f"--opt {run.config.optimizer.opt} needs second derivatives, which a part of {run.config.model.model} "
                f"has not: {error}. Another --opt does not need them"
            )
        if isinstance(error, CaptureError):
            return UserError(f"--cuda-graphs: {error}; leave --cuda-graphs out. {run.last_good()}")
        if died := loading_death(error):
            return UserError(f"{died}. {run.last_good()}")
        return error

    def _epoch(self) -> dict[str, Any]:
        """Train to the end of the epoch in progress, validate and save; return the row of summary.csv."""
        run, config, progress = self.run, self.run.config, self.run.progress
        started, first = time.perf_counter(), progress.batches_done
        self.waiting = Waiting()
        if first < len(run.loader):  # else it was stopped in its validation
            self._train_epoch()
        seconds = time.perf_counter() - started
        self.images += (progress.batches_done - first) * config.fit.batch_size * run.process.world_size
        self.seconds, self.waited = self.seconds + seconds, self.waited + self.waiting.seconds
        row: dict[str, Any] = {}
        ended = progress.epoch + 1
        if ended % config.run.val_interval == 0 or ended == run.num_epochs or run.at_max_steps:
            total, count, parts = progress.losses
            row = {"epoch": progress.epoch, "train_loss": total / max(count, 1)}
            row |= {f"train_{name}": value / max(count, 1) for name, value in parts.items()}
            row |= self._validate()
            row |= {"lr": run.lr, "images_per_second": self.images / self.seconds, "seconds": self.seconds}
            row |= {"waiting_seconds": self.waited, **peak_memory(run.process.device)}
            self.images, self.seconds, self.waited = 0, 0.0, 0.0
            if run.reporter:  # before the checkpoint: a row without one is dropped when the run continues
                with self._last_good_told():
                    run.reporter.epoch(run.update, row)
            self._save(row[f"eval_{run.metric}" if run.val_set else "train_loss"])
            progress.validated = True
        if advice := self.waiting.advice(seconds, config.data.workers):
            run.say(advice)
        if progress.batches_done >= len(run.loader):
            progress.next_epoch()
            if run.scheduler is not None:
                run.scheduler.step(progress.epoch)
        return row

    def _train_epoch(self) -> None:
        run, fit, progress = self.run, self.run.config.fit, self.run.progress
        accumulated = fit.grad_accum_steps
        total = len(run.loader)
        tail = total % accumulated
        train_mode(run.trainable, frozen=fit.freeze)
        self._freeze_layers()
        if run.annealing and run.anneals:
            frozen, weights = run.annealing.share()
            run.say(
                f"epoch {progress.epoch}: annealing: {frozen:,} of {weights:,} quantized weights are farther than "
                f"{run.annealing.margin:g} from rounding to another level and stay"
            )
        for model in (run.task.get_trainable_module(), run.task.get_trainable_module(ema=True)):
            set_epoch(model, progress.epoch)
        self.step.zero_grad()
        for index, images, targets in self._remaining_batches():
            group = tail if index >= total - tail else accumulated
            is_update = (index + 1) % accumulated == 0 or index + 1 == total
            self._forward_backward(index, images, targets, group, is_update)
            progress.batches_done, progress.validated = index + 1, False
            if progress.batches_done == total:  # before any checkpoint, which holds only the first process's
                self._share_batch_norms()
            if run.reporter:
                run.reporter.advance(len(images) * run.process.world_size)
            if is_update:
                self._after_update()
                if run.at_max_steps:
                    break
        if progress.batches_done < total:
            self._share_batch_norms()
            if not run.at_max_steps:
                progress.batches_done = total  # a stream can be shorter than its announced length
        self.losses.fetch()

    def _freeze_layers(self) -> None:
        """Freeze the layers of --freeze-layers for the epoch; say so where they are others than before."""
        run, epoch = self.run, self.run.progress.epoch
        if run.freezing is None:
            return
        said = run.freezing.apply(unwrap_model(run.task.get_eval_model()), run.freezing.count(epoch))
        if said != self.frozen:
            run.say(f"epoch {epoch}: {said}")
        self.frozen = said

    def _share_batch_norms(self) -> None:
        """Let all processes have the same averages of batch norm."""
        run, how = self.run, self.run.config.fit.dist_bn
        if run.process.distributed and how:
            distribute_bn(run.trainable, run.process.world_size, how == "reduce")
            if (ema := run.task.get_trainable_module(ema=True)) is not None:
                distribute_bn(ema.module, run.process.world_size, reduce=False)  # the first's, which is in checkpoints

    def _remaining_batches(self) -> Iterator[tuple[int, Tensor, Tensor]]:
        """Yield what is left of the epoch; what is done is drawn again, so that the rest is what it would have been."""
        run, config, progress = self.run, self.run.config, self.run.progress
        off = config.augmentation.mixup_off_epoch
        if off and progress.epoch >= off and self.loader.mixup_enabled:
            if not isinstance(self.loader, DeviceLoader):  # loading processes that run already would continue mixing
                end_loading(self.loader)
                self.loader = train_loader(config, run.train_set, run.data_config, run.process)
            self.loader.mixup_enabled = False
        announce_epoch(self.loader, config.device.seed, progress.epoch)
        iterator = batches(self.loader)
        for index in range(len(run.loader)):
            seed_everything(config.device.seed, progress.epoch, index, run.process.rank)
            with self.waiting():
                batch = next(iterator, None)
            if batch is None:
                return
            if index >= progress.batches_done:
                yield index, *batch

    def _forward_backward(self, index: int, images: Tensor, targets: Tensor, group: int, is_update: bool) -> None:
        """Add the gradients of a batch, one of `group`; update the weights when it is the last of them."""
        task = self.run.task
        if self.run.config.model.channels_last:
            images = images.contiguous(memory_format=torch.channels_last)
        with contextlib.nullcontext() if is_update else task.no_sync():
            if not self.losses.spoilt:
                self.losses.expect()
                result = self.step.backward(images, targets, group=group)
                self.losses.add(result, len(images), index)
        if self.losses.spoilt:
            self.losses.spoilt = not is_update
            self.step.zero_grad()
        elif is_update:
            self.step.update()

    def _forward(self, images: Tensor, targets: Tensor) -> dict[str, Tensor]:
        with autocast(self.run.config.device, self.run.process.device), self._differentiable_twice():
            return self.run.task(images, targets)

    def _differentiable_twice(self) -> AbstractContextManager[None]:
        """Let attention have second derivatives, where the optimizer takes them: torch's fused ones have none."""
        return sdpa_kernel(SDPBackend.MATH) if self.step.second_order else contextlib.nullcontext()

    def _before_update(self) -> None:
        given = self.run.config.optimizer
        if given.clip_grad is not None:
            clipped = self.run.task.get_clip_parameters(exclude_head=given.clip_mode == "agc")
            dispatch_clip_grad(clipped, given.clip_grad, mode=given.clip_mode)
        if self.run.anneals and self.run.annealing:
            self.run.annealing.hold()

    def _after_update(self) -> None:
        run, config = self.run, self.run.config
        update, lr = run.update, run.lr
        if run.annealing:
            run.annealing.restore()
        self.step.average(update)
        if run.scheduler is not None:
            run.scheduler.step_update(update)
        interval = config.run.recovery_interval
        is_recovery = interval and update % interval == 0
        # fetching waits for the device, so on a GPU it is done now and then
        if is_recovery or run.process.device.type == "cpu" or update % config.run.log_interval == 0 or update <= 10:
            losses = self.losses.fetch()
            if run.reporter:
                with self._last_good_told():
                    run.reporter.step(update, run.progress.epoch, losses=losses, lr=lr)
        if is_recovery:
            state = run.state()
            if run.process.is_primary:
                with self._last_good_told():
                    run.checkpoints.save_recovery(state)
        if said := self.trace.step():
            run.say(said)
        self.stop.check()

    def _validate(self) -> dict[str, float]:
        """Return the metrics of the averaged weights where there are such, else of the trained ones."""
        run, config = self.run, self.run.config
        if run.val_loader is None:
            return {}
        if run.replicas is not None:
            run.replicas.share_buffers()  # as DistributedDataParallel does
        models = [run.task.get_eval_model(ema=True), run.task.get_eval_model()]
        with self.stop.at_once():
            first, *raw = evaluate(
                [model for model in models if model is not None],
                run.val_loader,
                run.process,
                precision=lambda: autocast(config.device, run.process.device),
                channels_last=config.model.channels_last,
                progress=self._stoppable,
            )
        row = {f"eval_{name}": value for name, value in first.named().items()}
        name = "map" if config.data.multi_label else "top1"
        return row | ({f"raw_{name}": raw[0].named()[name]} if raw else {})

    def _stoppable(self, batches: Iterable[Any]) -> Iterator[Any]:
        """Yield batches as long as no process was asked to stop."""
        together = self.run.process.distributed and not isinstance(self.run.val_set, IterableDataset)
        for batch in batches:
            if together:  # then each process has as many batches
                self.stop.check()
            yield batch

    def _save(self, metric: float) -> None:
        run = self.run
        state = run.state()
        if not run.process.is_primary:
            return
        with self._last_good_told():
            run.checkpoints.save(state, run.progress.epoch, metric)

    @contextlib.contextmanager
    def _last_good_told(self) -> Iterator[None]:
        """Say which checkpoint there is where another, or a log, cannot be written."""
        try:
            yield
        except UserError as error:
            raise UserError(f"{error}. {self.run.last_good()}") from error

    def _saved(self, error: Interrupted) -> Interrupted:
        """Write a checkpoint where the run stands and say how to continue."""
        run = self.run
        if self.stop.cut_short:  # perhaps between the weights and their moving average
            said = f"the second signal came in the middle of an update, nothing saved. {run.last_good()}"
            return Interrupted(error.signum, said)
        self.losses.fetch()
        state = run.state()
        if not run.process.is_primary:
            return error
        with self._last_good_told():
            path = run.checkpoints.save_recovery(state)
        return Interrupted(error.signum, f"saved {path}; continue with: {run.resume_command(path.name)}")

    def _start_bar(self) -> None:
        run = self.run
        if run.reporter:
            batch = total_batch(run.config.fit, run.process.world_size)
            updates = min(run.num_epochs * run.updates_per_epoch, run.config.run.max_steps or math.inf)
            run.reporter.start_bar(int(updates) * batch, run.update * batch)

    def _report_unusable(self) -> None:
        for split, dataset in (("training", self.run.train_set), ("validation", self.run.val_set)):
            if isinstance(dataset, CheckedImages) and self.run.config.data.skip_bad_images:
                if self.run.process.distributed:
                    bad = dataset.bad.to(self.run.process.device, torch.uint8)
                    torch.distributed.all_reduce(bad, torch.distributed.ReduceOp.MAX)
                    dataset.bad.copy_(bad)
                names = dataset.bad_names()
                listed = "".join(f"\n  {name}" for name in names[:20])
                self.run.say(
                    f"{count_of(len(names), f'unusable {split} image was', f'unusable {split} images were')} "
                    f"skipped{listed}"
                )
