"""A training step as CUDA graphs: what Python launches one by one is recorded once and launched again as a whole.

A step is three recordings: forward, loss and backward, one for each shape of the batch; clipping and the optimizer's
update; and a moving average of the weights. The first batches of a shape train as usual and are the warm-up, so that
there is nothing to undo: weights, running statistics, averages and random numbers are those of a training without
graphs. Recording itself computes nothing.
"""

from __future__ import annotations

import contextlib
import inspect
import warnings
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple, Protocol

import torch
from timm.utils import ModelEmaV3, unwrap_model
from torch import Tensor, nn
from torch.optim import SGD, Optimizer

from visionzoo._torch_private import foreach_add_, foreach_copy_, foreach_mul_, foreach_sub, foreach_zero_
from visionzoo.kernels.small_maps import recorded
from visionzoo.replicas import Replicas

WARMUP = 3  # steps before a recording: libraries and compilers choose and load what they run in them
RECENT = 32  # batches among which a shape must have come WARMUP times, so that the odd last batch of an epoch has not


class CaptureError(RuntimeError):
    """A step that cannot be recorded; the message says why."""


class Recorder(Protocol):
    """What records functions, and runs what is not recorded beside it."""

    def aside(self, tensors: Sequence[Tensor] = ()) -> contextlib.AbstractContextManager[None]:
        """Run what is called in a `with` block, on given tensors, where recordings are made."""

    def record(self, function: Callable[[], Any]) -> tuple[Callable[[], None], Any]:
        """Record a function without computing; return what runs it again, and its result, which every run overwrites.

        Nothing but tensors is looked at in a run, and they are those of the recording. All recordings share memory: a
        result is there until another recording is run.
        """


class CudaRecorder:
    """Records CUDA graphs, on a stream of its own and in one pool of memory.

    From then on torch's attention does without cuDNN in this process: in torch 2.11 the backward pass of cuDNN's fails
    outside of a graph once there was one (illegal memory access).

    Args:
        device: a CUDA device.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        # torch hands out 32 streams in turn: the batch after a loader had got this one, the loss was NaN. What the two
        # shared is not known (memory that the recording took is one guess). Streams of another priority are others
        self.stream = torch.cuda.Stream(device, priority=-1)
        self.pool = torch.cuda.graph_pool_handle()
        torch.backends.cuda.enable_cudnn_sdp(False)

    @contextlib.contextmanager
    def aside(self, tensors: Sequence[Tensor] = ()) -> Iterator[None]:
        """Run a `with` block on the stream of the recordings, between what came before and what comes after."""
        current = torch.cuda.current_stream(self.device)
        self.stream.wait_stream(current)
        for tensor in tensors:
            tensor.record_stream(self.stream)
        with torch.cuda.stream(self.stream), recorded():
            yield
        current.wait_stream(self.stream)

    def record(self, function: Callable[[], Any]) -> tuple[Callable[[], None], Any]:
        """Record a graph. Generators of random numbers continue in each run where the one before has ended."""
        graph = torch.cuda.CUDAGraph()
        # only of this thread: those that load images may pin memory meanwhile
        of_thread = torch.cuda.graph(graph, pool=self.pool, stream=self.stream, capture_error_mode="thread_local")
        with of_thread, recorded():
            result = function()
        return graph.replay, result


class _Recording(NamedTuple):
    batch: tuple[Tensor, ...]  # where the inputs are copied to
    replay: Callable[[], None]
    result: Any


def _each(result: Any, change: Callable[[Tensor], Tensor]) -> Any:
    """Return what `forward` returned, a tensor or a mapping of tensors, with each of them changed."""
    if isinstance(result, Mapping):
        return {name: change(value) for name, value in result.items()}
    return change(result)


class TrainingStep:
    """Forward and backward pass, update and moving average, of which what repeats is recorded where it can be.

    Args:
        forward: from a batch to the loss, or to a mapping with `loss`; autocast belongs into it.
        optimizer: of the weights.
        recorder: what records; None to run all of it as it is written, with the same results.
        clip: called before the update, when the gradients have their own scale.
        scaler: of the loss in float16.
        ema: timm's moving average of `model`, which `average` updates.
        model: the model that is averaged; without, `average` does nothing.
        accumulate: batches of an update, where the step is called as a whole.
        second_order: whether gradients are to be differentiated by the optimizer.
        replicas: the model's, where several processes train it: buffers and gradients go between the recordings.

    Attributes:
        remarks: what runs unrecorded, and why.
        recorded: the number of shapes with a recording.
    """

    def __init__(
        self,
        forward: Callable[..., Any],
        optimizer: Optimizer,
        *,
        recorder: Recorder | None = None,
        clip: Callable[[], object] | None = None,
        scaler: torch.amp.GradScaler | None = None,
        ema: ModelEmaV3 | None = None,
        model: nn.Module | None = None,
        accumulate: int = 1,
        second_order: bool = False,
        replicas: Replicas | None = None,
    ) -> None:
        self.forward, self.optimizer, self.clip, self.scaler = forward, optimizer, clip, scaler
        self.ema, self.model, self.accumulate, self.second_order = ema, model, accumulate, second_order
        self.recorder, self.replicas = recorder, replicas
        self.remarks: list[str] = []
        self._parameters = [p for group in optimizer.param_groups for p in group["params"]]
        self._learning: list[Tensor] = []  # those that had a gradient
        self._gradients: list[Tensor] = []  # theirs, once something is recorded
        self._recent: deque[Any] = deque(maxlen=RECENT)
        self._backward: dict[Any, _Recording] = {}
        self._update: _Recording | None = None
        self._average: _Recording | None = None
        self._state: Any = getattr(optimizer, "state", None)  # that the recording changes
        self._settings: list[dict[str, Any]] = []  # of the optimizer's groups in the recording, but for the rates
        self._rates: list[Tensor] = []  # where the recorded update reads them
        self._sent: list[float] = []  # what is there
        self._share: Tensor | None = None  # of the weights in the average
        self._averaging: Callable[[], None] | None = None
        self._calls = self._updates = self._averages = 0
        self._warm = 0  # updates that were not recorded, of all that learns
        self._begins = True  # the next batch is the first of an update
        self._records_update = False
        if recorder is None:
            return
        if second_order:
            raise ValueError(f"{type(optimizer).__name__} differentiates gradients, which cannot be recorded")
        if scaler is not None:
            self.remarks.append("the update waits for the host to read whether gradients overflowed, under a scaler")
        elif reason := make_capturable(optimizer):
            self.remarks.append(f"the update: {reason}")
        else:
            self._records_update = True
            device, groups = self._parameters[0].device, len(optimizer.param_groups)
            self._rates = [torch.zeros((), dtype=torch.float32, device=device) for _ in range(groups)]
            self._sent = [0.0] * groups

    @property
    def recorded(self) -> int:
        """The number of shapes with a recording."""
        return len(self._backward)

    def backward(self, *batch: Tensor, group: int = 1) -> Any:
        """Add a batch's gradients; return what `forward` did, without its history.

        Args:
            batch: what `forward` takes.
            group: the number of batches of an update, by which the loss is divided.

        Raises:
            CaptureError: the step cannot be recorded.
            TypeError: the batch holds something else than tensors.
        """
        if strangers := [type(part).__name__ for part in batch if not isinstance(part, Tensor)]:
            raise TypeError(
                f"a training step takes the tensors of a batch, one by one, got {', '.join(strangers)} among them; "
                "take it apart before, and keep what is no tensor out of `forward`'s arguments"
            )
        if self._begins and self.replicas is not None:
            self.replicas.share_buffers()
        self._begins = False
        if self.recorder is None:
            return self._compute(batch, group)
        key = (group, *((t.shape, t.stride(), t.dtype, t.device) for t in batch))
        found = self._backward.get(key)
        if found is None and self._recent.count(key) >= WARMUP:
            found = self._backward[key] = self._record_backward(batch, group)
        if found is None:
            self._recent.append(key)
            self._bind_gradients()
            with self.recorder.aside(batch):
                result = self._compute(batch, group)
            self._meet_learning()
            return result
        for static, tensor in zip(found.batch, batch, strict=True):
            static.copy_(tensor, non_blocking=True)
        self._bind_gradients()
        found.replay()
        return _each(found.result, Tensor.clone)  # other recordings use its memory for what they compute

    def _compute(self, batch: Sequence[Tensor], group: int) -> Any:
        result = self.forward(*batch)
        loss = result.get("loss") if isinstance(result, Mapping) else result
        if not isinstance(loss, Tensor) or loss.dim() != 0:
            found = f"shape {tuple(loss.shape)}" if isinstance(loss, Tensor) else type(result).__name__
            raise TypeError(f"forward: expected a scalar loss, or a mapping with `loss`, got {found}")
        loss = loss / group
        if self.scaler is not None:
            loss = self.scaler.scale(loss)
        loss.backward(create_graph=self.second_order)
        return _each(result, Tensor.detach)

    def _record_backward(self, batch: Sequence[Tensor], group: int) -> _Recording:
        assert self.recorder is not None
        self._keep_gradients()
        own = tuple(tensor.detach().clone() for tensor in batch)
        with self._named_errors("forward and backward pass"):
            replay, result = self.recorder.record(lambda: self._compute(own, group))
            if sum(p.grad is not None for p in self._parameters) > len(self._learning):
                raise RuntimeError("a parameter has a gradient that had none before")
        return _Recording(own, replay, result)

    def _meet_learning(self) -> None:
        """Take note of parameters that have a gradient for the first time; an update without them is forgotten."""
        known = set(map(id, self._learning))
        for parameter in self._parameters:
            if parameter.grad is not None and id(parameter) not in known:
                self._learning.append(parameter)
                if self._gradients:
                    self._gradients.append(parameter.grad)
                self._update, self._warm = None, 0

    def _keep_gradients(self) -> None:
        """From now on gradients stay where they are, and are added to."""
        if not self._gradients:
            self._gradients = [torch.zeros_like(p) if p.grad is None else p.grad for p in self._learning]
            self._bind_gradients()

    def _bind_gradients(self) -> None:
        """Give parameters the gradients of the recordings, zeros where they were taken away (`zero_grad`)."""
        taken = []
        for parameter, gradient in zip(self._learning, self._gradients, strict=False):
            if parameter.grad is not gradient:
                taken += [gradient] if parameter.grad is None else []
                parameter.grad = gradient
        if taken:
            foreach_zero_(taken)

    def zero_grad(self) -> None:
        """Forget the gradients."""
        self._begins = True
        if self._gradients:
            foreach_zero_(self._gradients)
            self._bind_gradients()
        else:
            self.optimizer.zero_grad()

    def update(self) -> None:
        """Change the weights by the gradients, and forget these.

        Raises:
            CaptureError: the update cannot be recorded.
        """
        self._updates += 1
        self._begins = True
        if self.replicas is not None:
            self.replicas.average_gradients(self._parameters)
            if self.recorder is not None and self._update is None:
                self._meet_learning()
        state = getattr(self.optimizer, "state", None)
        if self._state is not state:  # another was loaded, and with it settings
            self._state, self._update, self._warm = state, None, 0
            if self._records_update:
                make_capturable(self.optimizer)
        if self._update is not None and self._settings != self._settings_now():
            self._update = None  # which other settings than rates need
        self._send_rates()
        if self._update is None and self._records_update and self._gradients and self._warm >= WARMUP:
            self._update = self._record_update()
        if self._update is not None:
            self._update.replay()
            return
        with self.recorder.aside() if self.recorder is not None else contextlib.nullcontext(), self._rates_in_groups():
            self._change_weights()
        self._warm += 1
        self.zero_grad()

    def _change_weights(self) -> None:
        if self.scaler is not None:
            if self.clip is not None:
                self.scaler.unscale_(self.optimizer)
                self.clip()
            self.scaler.step(self.optimizer)
            self.scaler.update()
            return
        if self.clip is not None:
            self.clip()
        self.optimizer.step()

    def _record_update(self) -> _Recording:
        assert self.recorder is not None
        self._settings = self._settings_now()

        def run() -> None:
            self._change_weights()
            foreach_zero_(self._gradients)

        with self._rates_in_groups(), self._named_errors("update"):
            return _Recording((), *self.recorder.record(run))

    def _send_rates(self) -> None:
        """Bring changed rates to the device, where an update that is recorded, or will be, reads them."""
        for number, (rate, group) in enumerate(zip(self._rates, self.optimizer.param_groups, strict=False)):
            if (now := float(group["lr"])) != self._sent[number]:
                rate.fill_(now)
                self._sent[number] = now

    @contextlib.contextmanager
    def _rates_in_groups(self) -> Iterator[None]:
        """Let the optimizer read rates from the device; outside they are numbers, for schedules, logs and files."""
        groups = self.optimizer.param_groups[: len(self._rates)]
        before = [group["lr"] for group in groups]
        try:
            for rate, group in zip(self._rates, groups, strict=True):
                group["lr"] = rate
            yield
        finally:
            for number, group in zip(before, groups, strict=True):
                group["lr"] = number

    def _settings_now(self) -> list[dict[str, Any]]:
        return [
            {name: value for name, value in group.items() if name not in ("params", "lr")}
            for group in self.optimizer.param_groups
        ]

    def average(self, updates: int) -> None:
        """Take the weights into their moving average.

        Args:
            updates: those done, by which the average's decay may grow.

        Raises:
            CaptureError: it cannot be recorded.
        """
        if self.ema is None or self.model is None:
            return
        self._averages += 1
        decay = self.ema.get_decay(updates)
        if self.recorder is not None and self._averages == 1:
            self._averaging, self._share = averaging(self.ema, unwrap_model(self.model))
        if self._averaging is None or self._share is None or not decay:  # without decay it is the weights to the bit
            self.ema.update(unwrap_model(self.model), step=updates)
            return
        self._share.fill_(1 - decay)
        if self._average is None and self.recorder is not None and self._averages > WARMUP:
            with self._named_errors("moving average"):
                self._average = _Recording((), *self.recorder.record(self._averaging))
        if self._average is None:
            self._averaging()
        else:
            self._average.replay()

    @contextlib.contextmanager
    def _named_errors(self, part: str) -> Iterator[None]:
        """Say which part of a step cannot be recorded."""
        try:
            yield
        except RuntimeError as error:
            first: BaseException = error
            while isinstance(first.__context__, RuntimeError):  # ending a recording that has failed fails, too
                first = first.__context__
            said = str(first).strip().splitlines()[0] if str(first).strip() else type(first).__name__
            raise CaptureError(
                f"the {part} cannot be recorded as a CUDA graph: {said}. What asks for a tensor's value, or draws "
                "numbers on the host, must run without"
            ) from error

    def __call__(self, *batch: Tensor) -> Any:
        """Train on a batch: `backward`, and `update` and `average` after every `accumulate` batches."""
        result = self.backward(*batch, group=self.accumulate)
        self._calls += 1
        if self._calls % self.accumulate == 0:
            self.update()
            self.average(self._updates)
        return result


def graph_training_step(
    forward: Callable[..., Any],
    optimizer: Optimizer,
    *,
    accumulate: int = 1,
    clip: Callable[[], object] | None = None,
    scaler: torch.amp.GradScaler | None = None,
    ema: ModelEmaV3 | None = None,
    model: nn.Module | None = None,
    replicas: Replicas | None = None,
) -> TrainingStep:
    """Return a training step for your own loop that runs as CUDA graphs, where the host is slower than the GPU.

    Each call of the step trains on a batch: forward and backward pass, clipping, update, moving average. The first
    three batches of a shape run as usual, then the shape has a graph; one that has not come three times within the
    last 32 unrecorded batches, such as the odd last batch of an epoch, runs as usual. Results are those of the same
    loop without graphs, but that optimizers count their steps on the device, in float32.

    The learning rates are read from `optimizer.param_groups` at each call, so that any schedule acts; where another
    setting of the optimizer changes, its update is recorded anew. Weights, running statistics and gradients stay where
    they are in memory: load into them (`load_state_dict`) instead of replacing them. What Python decides in `forward`
    is decided once, at the recording: train in one mode, and let nothing but tensors change from step to step.
    Dropout and stochastic depth draw anew in each step, from the generator that `torch.manual_seed` seeds.

    From the call on, torch's attention does without cuDNN in the whole process: in torch 2.11 the backward pass of
    cuDNN's fails outside of a graph once there was one.

    Recorded are the updates of torch's and timm's optimizers with an argument `capturable`, and of SGD; those of
    others, and with a scaler, run as usual between the graphs, which a UserWarning says. `model` may be compiled
    before, in any mode without CUDA graphs of its own. In several processes give `visionzoo.Replicas` in place of
    DistributedDataParallel, whose hooks between the launches cannot be recorded.

    Args:
        forward: from the tensors of a batch to the loss (a scalar), or to a mapping of tensors with `loss`. Autocast
            belongs into it.
        optimizer: of the weights, on a CUDA device.
        accumulate: batches of an update; their losses are divided by it.
        clip: clips the gradients before an update, such as `lambda: clip_grad_norm_(model.parameters(), 1.0)`.
        scaler: of the loss, for float16.
        ema: timm's moving average of `model`.
        model: of which `ema` is.
        replicas: the model's in several processes: gradients are averaged before the update, and not where batches are
            accumulated for it. Processes draw their own dropped paths where they are seeded apart.

    Raises:
        TypeError: `forward` or `clip` is no function, or `optimizer` no optimizer.
        ValueError: weights are not on one CUDA device, the optimizer needs second derivatives, `accumulate` is not a
            number of batches, or `ema` and `model` are not given together.

    Example:
        >>> def forward(images, labels):  # doctest: +SKIP
        ...     with torch.autocast("cuda", torch.bfloat16):
        ...         return F.cross_entropy(model(images), labels)
        >>> step = visionzoo.graph_training_step(forward, optimizer)  # doctest: +SKIP
        >>> for images, labels in loader:  # doctest: +SKIP
        ...     loss = step(images, labels)
    """
    if not isinstance(accumulate, int) or accumulate < 1:
        raise ValueError(
            f"graph_training_step: accumulate is the number of batches of an update, 1 or more, got {accumulate=}"
        )
    for name, part in (("forward", forward), ("clip", clip)):
        if not (callable(part) or (name == "clip" and part is None)):
            raise TypeError(f"graph_training_step: {name} is a function, see its example, got {part!r}")
    if not hasattr(optimizer, "param_groups"):
        raise TypeError(f"graph_training_step: expected an optimizer of torch or timm, got {type(optimizer).__name__}")
    if (ema is None) != (model is None):
        raise ValueError("graph_training_step: give ema and the model that it averages, or neither")
    devices = {p.device for group in optimizer.param_groups for p in group["params"]}
    if len(devices) != 1 or next(iter(devices)).type != "cuda":
        found = ", ".join(sorted(map(str, devices)))
        raise ValueError(
            f"graph_training_step: expected all weights of the optimizer on one CUDA device, got {found}; move the "
            "model there before you make the optimizer, or train without graphs where there is no GPU"
        )
    step = TrainingStep(
        forward,
        optimizer,
        recorder=CudaRecorder(devices.pop()),
        accumulate=accumulate,
        clip=clip,
        scaler=scaler,
        ema=ema,
        model=model,
        replicas=replicas,
        second_order=bool(getattr(optimizer, "is_second_order", False)),
    )
    for remark in step.remarks:
        warnings.warn(f"graph_training_step: not recorded: {remark}", stacklevel=2)
    return step


def averaging(ema: ModelEmaV3, model: nn.Module) -> tuple[Callable[[], None] | None, Tensor | None]:
    """Return what does `ema.update(model)` with the weights' share read from a tensor, and that tensor; or nothing.

    There is nothing where the two are on several devices or of several dtypes, or are not in float32 at least.
    """
    pairs = list(zip(ema.module.state_dict().values(), model.state_dict().values(), strict=True))
    numbers = [pair for pair in pairs if pair[0].is_floating_point()]
    counts = [pair for pair in pairs if not pair[0].is_floating_point()]
    if (
        ema.exclude_buffers
        or any(a.device != w.device or a.dtype != w.dtype for a, w in pairs)
        or any(a.dtype not in (torch.float32, torch.float64) for a, _ in numbers)
    ):
        return None, None
    averages, weights = [a for a, _ in numbers], [w for _, w in numbers]
    share = torch.zeros((), device=averages[0].device)

    @torch.no_grad()
    def run() -> None:
        steps = foreach_sub(weights, averages)
        foreach_mul_(steps, share)
        foreach_add_(averages, steps)
        if counts:
            foreach_copy_([a for a, _ in counts], [w for _, w in counts])

    return run, share


def make_capturable(optimizer: Optimizer) -> str:
    """Let an optimizer's update be one that can be recorded, with rates in tensors; return why it cannot, if so.

    Call it before the first update. `place_counts` is for states that are loaded later.
    """
    kind = type(optimizer)
    if kind is SGD:
        for group in optimizer.param_groups:
            group.update(fused=True, foreach=False)  # which reads rates from tensors
        return ""
    if "capturable" not in inspect.signature(kind).parameters:  # those around another, too, such as Lookahead
        return f"{kind.__name__} keeps what changes from step to step on the host, so it is not recorded"
    for group in optimizer.param_groups:
        group["capturable"] = True
    place_counts(optimizer)
    return ""


def place_counts(optimizer: Optimizer) -> None:
    """Put the counts of steps in an optimizer's state where its settings need them: on the device, or on the host."""
    for group in optimizer.param_groups:
        if "capturable" not in group:
            continue
        for parameter in group["params"]:
            state = optimizer.state.get(parameter, {})
            if isinstance(count := state.get("step"), Tensor):
                on_device = group["capturable"] or group.get("fused")
                state["step"] = count.to(parameter.device if on_device else "cpu", torch.float32)
