"""Training steps as graphs: the same numbers as without, to the bit. On the CPU a tape stands for CUDA's graphs."""

import copy
import math
import sys

import pytest
import timm
import torch
import torch.nn.functional as F
from tape import TapeRecorder
from timm.layers import DropPath
from timm.optim import Lamb, Lookahead
from timm.utils import ModelEmaV3
from torch import nn
from torch.nn.utils import clip_grad_norm_

import visionzoo
from visionzoo.graphs import WARMUP, CaptureError, CudaRecorder, TrainingStep, make_capturable


class Net(nn.Module):
    """With running statistics, random paths, a layer that is not used and one that does not learn."""

    def __init__(self):
        super().__init__()
        self.conv, self.norm = nn.Conv2d(3, 4, 3, bias=False), nn.BatchNorm2d(4)
        self.path, self.drop = DropPath(0.4), nn.Dropout(0.2)
        self.fc, self.unused, self.frozen = nn.Linear(4, 5), nn.Linear(2, 2), nn.Linear(4, 4)
        self.frozen.requires_grad_(False)

    def forward(self, x):
        x = self.norm(self.conv(x)).relu().mean((2, 3))
        return self.fc(self.drop(x + self.path(self.frozen(x))))


@pytest.fixture(autouse=True)
def capturable_on_the_cpu(monkeypatch):
    """torch lets `capturable` be on devices only that have graphs."""
    for name in ("adam", "nadam", "rmsprop", "adadelta"):
        module = sys.modules[f"torch.optim.{name}"]
        monkeypatch.setattr(module, "_get_capturable_supported_devices", lambda *_, **__: ["cpu", "cuda"])


OPTIMIZERS = {
    "sgd": lambda p: torch.optim.SGD(p, momentum=0.9, nesterov=True, weight_decay=1e-2),
    "adamw": lambda p: torch.optim.AdamW(p, weight_decay=0.1, foreach=True),
    "single": lambda p: torch.optim.AdamW(p, weight_decay=0.1, foreach=False),
    "nadam": lambda p: torch.optim.NAdam(p, foreach=True),
    "rmsprop": lambda p: torch.optim.RMSprop(p, eps=0.1, foreach=True, momentum=0.9),
    "adadelta": lambda p: torch.optim.Adadelta(p, eps=0.1, foreach=True),
    "lamb": lambda p: Lamb(p),
    "lookahead": lambda p: Lookahead(torch.optim.AdamW(p), k=2),
}


def batches(sizes, soft=False):
    generator = torch.Generator().manual_seed(1)
    for batch, side in sizes:
        images = torch.randn(batch, 3, side, side, generator=generator)
        labels = torch.randint(5, (batch,), generator=generator)
        yield images, F.one_hot(labels, 5).float() * 0.8 + 0.04 if soft else labels


def train(sizes, optimizer="adamw", recorder=None, clip=None, soft=False, change=None, device="cpu", **options):
    """Train, and return what there is to compare; `change` is called before each step."""
    torch.manual_seed(0)
    model = Net().to(device)
    made = OPTIMIZERS[optimizer](
        [
            {"params": [*model.conv.parameters()]},
            {"params": [p for name, p in model.named_parameters() if not name.startswith("conv")]},
        ]
    )
    if recorder is None:
        make_capturable(made)  # so that the arithmetic is the same
    ema = ModelEmaV3(model, decay=0.9, use_warmup=True)

    def forward(images, labels):
        logits = model(images)
        return {"loss": F.cross_entropy(logits, labels), "output": logits}

    clipping = clip and (lambda: clip_grad_norm_(model.parameters(), clip))
    step = TrainingStep(forward, made, recorder=recorder, clip=clipping, ema=ema, model=model, **options)
    losses, given = [], list(batches(sizes, soft))
    for number, batch in enumerate(given):
        for place, group in enumerate(made.param_groups):
            group["lr"] = 0.01 * (place + 1) / (number + 1)
        if change is not None:
            change(number, made)
        torch.manual_seed(100 + number)
        result = step(*(tensor.to(device) for tensor in batch))
        losses.append(result["loss"].clone())
        assert all(isinstance(group["lr"], float) for group in made.param_groups)
    for batch, same in zip(given, batches(sizes, soft), strict=True):
        assert all(map(torch.equal, batch, same))
    state = {**model.state_dict(), **{f"ema.{k}": v for k, v in ema.module.state_dict().items()}}
    state |= {f"{n}.{k}": v for n, s in made.state_dict()["state"].items() for k, v in s.items()}
    return torch.stack(losses), {k: v.clone() for k, v in state.items() if isinstance(v, torch.Tensor)}, step


def assert_equal(one, two, near=False):
    """To the bit, but for averages, which are the same formula in other steps, and what is to be `near`."""
    assert one[1].keys() == two[1].keys()
    for name, value in [*one[1].items(), ("losses", one[0])]:
        other = two[0] if name == "losses" else two[1][name]
        if near or name.startswith("ema."):
            torch.testing.assert_close(value, other, rtol=1e-5, atol=1e-6)
        else:
            assert torch.equal(value, other), name


SAME = [(4, 8)] * 9


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_a_recorded_training_is_the_training(optimizer):
    recorder = TapeRecorder()
    plain, graphed = train(SAME, optimizer), train(SAME, optimizer, recorder)
    assert_equal(plain, graphed, near=optimizer in ("rmsprop", "adadelta", "single"))  # rates are rounded sooner
    captured = optimizer not in ("lamb", "lookahead")
    assert bool(graphed[2].remarks) is not captured
    assert recorder.recordings == (3 if captured else 2)  # backward, update, average; of one shape
    assert len(recorder.runs) == (3 if captured else 2) * (len(SAME) - WARMUP)


@pytest.mark.parametrize(
    "options",
    [{"clip": 0.1}, {"accumulate": 3}, {"accumulate": 2, "clip": 0.1, "soft": True}],
    ids=["clip", "accumulate", "both"],
)
def test_clipping_accumulation_and_soft_targets(options):
    sizes = [(4, 8)] * 15
    assert_equal(train(sizes, **options), train(sizes, recorder=TapeRecorder(), **options))


def test_gradients_that_are_taken_away_and_states_that_are_loaded_act():
    kept = {}

    def change(number, optimizer):
        if number == 7:  # between the two batches of an update
            optimizer.zero_grad()
        if number == 10:
            kept.update(copy.deepcopy(optimizer.state_dict()))
            for group in kept["param_groups"]:
                group["capturable"] = False  # as a run without graphs saves them
        if number == 14:
            optimizer.load_state_dict(kept)
            make_capturable(optimizer)  # of the plain one, as in `train`

    sizes, recorder = [(4, 8)] * 24, TapeRecorder()
    plain, graphed = (train(sizes, change=change, accumulate=2, recorder=each) for each in (None, recorder))
    assert_equal(plain, graphed)
    assert recorder.recordings == 4  # backward, update, average, and the update anew


def test_a_batch_is_tensors():
    step = TrainingStep(lambda x, y: x.sum(), torch.optim.SGD(nn.Linear(2, 2).parameters()), recorder=TapeRecorder())
    with pytest.raises(TypeError, match="takes the tensors of a batch, one by one, got dict among them"):
        step(torch.zeros(1), {"boxes": torch.zeros(1)})


def test_each_shape_has_a_graph_and_an_odd_batch_none():
    sizes = [*[(4, 8)] * 5, (3, 8), *[(4, 10)] * 5, (3, 10), *[(4, 8)] * 2, (2, 8)]
    recorder = TapeRecorder()
    plain, graphed = train(sizes), train(sizes, recorder=recorder)
    assert_equal(plain, graphed)
    assert graphed[2].recorded == 2 and recorder.recordings == 4


@pytest.mark.parametrize("when", ["unrecorded", "recorded"])
def test_what_learns_later_is_in_the_update_or_refused(when):
    def run(recorder, sizes):
        model = nn.ModuleList([nn.Linear(2, 1), nn.Linear(2, 1)])
        for parameter in model.parameters():
            nn.init.constant_(parameter, 0.5)
        optimizer, calls = torch.optim.AdamW(model.parameters(), foreach=True), []
        make_capturable(optimizer)

        def forward(x):
            calls.append(x)
            late = len(x) > 1 if when == "unrecorded" else len(calls) > WARMUP
            return sum(layer(x).square().sum() for layer in model[: 2 if late else 1])

        step = TrainingStep(forward, optimizer, recorder=recorder)
        for size in sizes:
            step(torch.ones(size, 2))
        return [p.detach() for p in model.parameters()]

    if when == "recorded":
        with pytest.raises(CaptureError, match="a parameter has a gradient that had none before"):
            run(TapeRecorder(), [1] * (WARMUP + 1))
        return
    recorder = TapeRecorder()
    for one, two in zip(run(None, [1] * 6 + [2] * 9), run(recorder, [1] * 6 + [2] * 9), strict=True):
        assert torch.equal(one, two)
    assert recorder.recordings == 4  # two of backward passes, two of updates


def test_another_setting_than_the_rate_is_recorded_anew():
    def change(number, optimizer):
        for group in optimizer.param_groups:
            group["weight_decay"] = 0.1 if number < 6 else 0.5

    recorder = TapeRecorder()
    assert_equal(train(SAME, change=change), train(SAME, recorder=recorder, change=change))
    assert recorder.recordings == 4


@pytest.mark.parametrize("optimizer", ["adamw", "lamb"])
def test_gradients_that_were_taken_away_come_back(optimizer):
    def change(number, optimizer):
        optimizer.zero_grad()

    sizes = [*SAME, (3, 8), *SAME]
    plain, graphed = (train(sizes, optimizer, recorder, change=change) for recorder in (None, TapeRecorder()))
    assert_equal(plain, graphed)


def test_without_a_recorder_a_step_is_the_loop_that_one_writes():
    sizes, (losses, state, _) = [(4, 8)] * 6, train([(4, 8)] * 6, "sgd", clip=0.1, accumulate=2)
    torch.manual_seed(0)
    model = Net()
    ema = ModelEmaV3(model, decay=0.9, use_warmup=True)
    parts = [[*model.conv.parameters()], [p for name, p in model.named_parameters() if not name.startswith("conv")]]
    optimizer = OPTIMIZERS["sgd"]([{"params": part} for part in parts])
    for number, (images, labels) in enumerate(batches(sizes)):
        for place, group in enumerate(optimizer.param_groups):
            group["lr"] = 0.01 * (place + 1) / (number + 1)
        torch.manual_seed(100 + number)
        loss = F.cross_entropy(model(images), labels)
        torch.testing.assert_close(loss.detach(), losses[number])
        (loss / 2).backward()
        if number % 2:
            clip_grad_norm_(model.parameters(), 0.1)
            optimizer.step()
            optimizer.zero_grad()
            ema.update(model, step=(number + 1) // 2)
    for name, value in {**model.state_dict(), **{f"ema.{k}": v for k, v in ema.module.state_dict().items()}}.items():
        torch.testing.assert_close(value, state[name])


def test_the_average_starts_at_the_weights_to_the_bit():
    _, state, _ = train([(4, 8)], recorder=TapeRecorder())
    for name in Net().state_dict():
        assert torch.equal(state[f"ema.{name}"], state[name]), name


@pytest.mark.parametrize(
    ("reads", "message"),
    [
        (lambda x: x if x.sum() > 0 else -x, "operation not permitted"),
        (lambda x: x[x > 0], "operation not permitted"),
        (lambda x: x * torch.tensor([1.0, 2.0], device=x.device), "Cannot copy between CPU and CUDA"),
        (lambda x: x[:, [1, 0]], "Cannot copy between CPU and CUDA"),
    ],
    ids=["number", "mask", "constant", "list"],
)
def test_what_host_and_device_wait_for_is_refused_by_name(reads, message):
    model = nn.Linear(3, 2)

    def forward(x):
        return reads(model(x)).sum()

    step = TrainingStep(forward, torch.optim.SGD(model.parameters()), recorder=TapeRecorder())
    before = None
    with pytest.raises(CaptureError, match=f"forward and backward pass cannot be recorded.*: {message}"):
        for _ in range(WARMUP + 1):
            before = copy.deepcopy(model.state_dict())
            step(torch.ones(1, 3))
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


@pytest.mark.parametrize(
    ("returned", "found"), [(lambda x: (x.sum(), x), "tuple"), (lambda x: x, r"shape \(3,\)"), (lambda x: {}, "dict")]
)
def test_what_is_no_loss_is_refused(returned, found):
    step = TrainingStep(returned, torch.optim.SGD(nn.Linear(2, 2).parameters()))
    with pytest.raises(TypeError, match=f"expected a scalar loss, or a mapping with `loss`, got {found}"):
        step(torch.ones(3))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({}, "all weights of the optimizer on one CUDA device, got cpu; move the model there before"),
        ({"accumulate": 0}, "accumulate is the number of batches of an update, 1 or more, got accumulate=0"),
        ({"accumulate": 1.5}, "accumulate is the number of batches of an update, 1 or more, got accumulate=1.5"),
        ({"model": nn.Linear(1, 1)}, "give ema and the model that it averages, or neither"),
    ],
)
def test_what_cannot_be_a_graph_is_refused(options, message):
    optimizer = torch.optim.SGD(nn.Linear(2, 2).parameters())
    with pytest.raises(ValueError, match=message):
        visionzoo.graph_training_step(lambda x: x, optimizer, **options)


def test_what_is_no_function_and_no_optimizer_is_named():
    optimizer = torch.optim.SGD(nn.Linear(2, 2).parameters())
    for arguments, message in (
        ((3.0, optimizer), "forward is a function, see its example, got 3.0"),
        ((len, nn.Linear(2, 2)), "expected an optimizer of torch or timm, got Linear"),
    ):
        with pytest.raises(TypeError, match=message):
            visionzoo.graph_training_step(*arguments)
    with pytest.raises(TypeError, match=r"clip is a function, see its example, got 1.0"):
        visionzoo.graph_training_step(len, optimizer, clip=1.0)


# -- on a GPU ----------------------------------------------------------------------------------------------------------

CUDA = torch.device("cuda")


@pytest.fixture
def repeatable(monkeypatch):
    """Let cuDNN choose the same algorithm each time."""
    monkeypatch.setattr(torch.backends.cudnn, "deterministic", True)
    monkeypatch.setattr(torch.backends.cudnn, "benchmark", False)


@pytest.mark.gpu
@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize("options", [{}, {"clip": 0.1}, {"accumulate": 2}], ids=["plain", "clip", "accumulate"])
def test_cuda_graphs_are_the_training_to_the_bit(repeatable, monkeypatch, optimizer, options):
    sizes = [*[(4, 8)] * 10, (3, 8), *[(4, 10)] * 6, (3, 8), (3, 8)]
    graphed = train(sizes, optimizer, CudaRecorder(CUDA), device=CUDA, **options)
    assert graphed[2].recorded == 2
    monkeypatch.setattr("visionzoo.graphs.WARMUP", 10**9)
    plain = train(sizes, optimizer, CudaRecorder(CUDA), device=CUDA, **options)
    assert plain[2].recorded == 0
    for name, value in plain[1].items():
        assert torch.equal(value, graphed[1][name]), name
    assert torch.equal(plain[0], graphed[0])


def zoo_step(name, compile=False, **arguments):
    """A step of a model of the zoo in bfloat16, its batches of two sizes, and the model."""
    torch.manual_seed(0)
    model = timm.create_model(name, num_classes=10, device=CUDA, **arguments).train()
    called = torch.compile(model) if compile else model

    def forward(images, labels):
        with torch.autocast("cuda", torch.bfloat16):
            return F.cross_entropy(called(images), labels)

    step = visionzoo.graph_training_step(
        forward, torch.optim.AdamW(model.parameters(), lr=1e-3), clip=lambda: clip_grad_norm_(model.parameters(), 1.0)
    )
    sizes = [8] * 7 + [6] + [8] * 2
    return step, [(torch.randn(n, 3, 64, 64, device=CUDA), torch.arange(n, device=CUDA)) for n in sizes], model


MODELS = ("zoo_biformer_t", "zoo_davit_t", "zoo_pvtv2_b0", "zoo_shvit_s1", "zoo_levit_128s", "zoo_poolformer_s12")


@pytest.mark.gpu
@pytest.mark.parametrize("compile", [False, pytest.param(True, marks=pytest.mark.full)], ids=["eager", "compiled"])
@pytest.mark.parametrize("name", [*MODELS, "zoo_halonet_26t", "zoo_nat_mini"])
def test_models_learn_alike_as_graphs(repeatable, monkeypatch, name, compile):
    losses = []
    for warmup in (WARMUP, 10**9):
        monkeypatch.setattr("visionzoo.graphs.WARMUP", warmup)
        step, batches, model = zoo_step(name, compile)
        losses.append(torch.stack([step(*batch).clone() for batch in batches]).cpu())
        assert step.recorded == (warmup == WARMUP)
        assert all(bool(tensor.isfinite().all()) for tensor in model.state_dict().values())
    torch.testing.assert_close(losses[0], losses[1], rtol=0.02, atol=0.02)  # in bfloat16
    if not compile:
        torch.testing.assert_close(losses[0][: WARMUP + 1], losses[1][: WARMUP + 1], rtol=1e-3, atol=1e-3)


@pytest.mark.gpu
def test_attention_trains_outside_of_a_graph_after_one(repeatable):
    """cuDNN's did not, in torch 2.11: an illegal memory access."""
    step, batches, _ = zoo_step("zoo_deit_t", img_size=64)
    for _ in range(3):
        losses = [float(step(*batch)) for batch in batches]
    assert step.recorded >= 1 and all(map(math.isfinite, losses))
    q, k, v = (torch.randn(8, 4, 128, 64, device=CUDA, dtype=torch.bfloat16, requires_grad=True) for _ in range(3))
    F.scaled_dot_product_attention(q, k, v).sum().backward()
    torch.cuda.synchronize()
    assert all(bool(t.grad.isfinite().all()) for t in (q, k, v))


@pytest.mark.gpu
def test_paths_are_dropped_anew_in_each_step(repeatable):
    torch.manual_seed(3)
    drop = nn.Dropout(0.5)
    weight = nn.Parameter(torch.ones(1000, device=CUDA))
    step = visionzoo.graph_training_step(lambda x: drop(x * weight).sum(), torch.optim.SGD([weight], lr=0.0))
    x = torch.ones(1000, device=CUDA)
    torch.manual_seed(7)
    first = [float(step(x)) for _ in range(8)]
    assert len(set(first)) > 5
    torch.manual_seed(7)
    assert [float(step(x)) for _ in range(8)] == first


@pytest.mark.gpu
def test_a_failed_recording_leaves_the_gpu_usable():
    model = nn.Linear(3, 2, device=CUDA)
    step = visionzoo.graph_training_step(
        lambda x: model(x).sum() * float(x.sum() > 0), torch.optim.SGD(model.parameters())
    )
    x = torch.ones(1, 3, device=CUDA)
    with pytest.raises(CaptureError, match="forward and backward pass cannot be recorded as a CUDA graph"):
        for _ in range(WARMUP + 1):
            step(x)
    assert math.isfinite(float(model(x).sum()))
    graphed = visionzoo.graph_training_step(lambda x: model(x).sum(), torch.optim.SGD(model.parameters(), lr=0.1))
    for _ in range(WARMUP + 2):
        graphed(x)
    assert graphed.recorded == 1 and math.isfinite(float(model(x).sum()))


@pytest.mark.gpu
@pytest.mark.filterwarnings("ignore:graph_training_step. not recorded")
def test_float16_with_a_scaler(repeatable):
    model = nn.Sequential(nn.Linear(8, 8), nn.GELU(), nn.Linear(8, 1)).to(CUDA)
    scaler = torch.amp.GradScaler("cuda", init_scale=2.0**40, growth_interval=4)  # overflows at first

    def forward(x):
        with torch.autocast("cuda", torch.float16):
            return model(x).float().square().mean()

    step = visionzoo.graph_training_step(
        forward,
        torch.optim.SGD(model.parameters(), lr=0.05),
        scaler=scaler,
        clip=lambda: clip_grad_norm_(model.parameters(), 1.0),
    )
    x = torch.randn(64, 8, device=CUDA)
    losses = [float(step(x)) for _ in range(80)]
    assert scaler.get_scale() < 2.0**30 and losses[-1] < 0.7 * losses[0]


@pytest.mark.gpu
def test_no_later_stream_is_the_recorders():
    """A training in which a loader got it ended in NaN."""
    recorder = CudaRecorder(CUDA)
    assert recorder.stream.cuda_stream not in {torch.cuda.Stream(CUDA).cuda_stream for _ in range(64)}
