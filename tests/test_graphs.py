"""Training steps as graphs: the same numbers as without, to the bit. On the CPU a tape stands for CUDA's graphs."""

import copy
import sys

import pytest
import torch
import torch.nn.functional as F
from tape import TapeRecorder
from timm.layers import DropPath
from timm.optim import Lamb
from timm.utils import ModelEmaV3
from torch import nn

import visionzoo
from visionzoo.graphs import WARMUP, CaptureError, TrainingStep, make_capturable


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
    for name in ("adam", "nadam", "rmsprop"):
        module = sys.modules[f"torch.optim.{name}"]
        monkeypatch.setattr(module, "_get_capturable_supported_devices", lambda supports_xla=True: ["cpu"])


OPTIMIZERS = {
    "sgd": lambda p: torch.optim.SGD(p, momentum=0.9, nesterov=True, weight_decay=1e-2),
    "adamw": lambda p: torch.optim.AdamW(p, weight_decay=0.1, foreach=True),
    "single": lambda p: torch.optim.AdamW(p, weight_decay=0.1, foreach=False),
    "nadam": lambda p: torch.optim.NAdam(p, foreach=True),
    "rmsprop": lambda p: torch.optim.RMSprop(p, eps=0.1, foreach=True, momentum=0.9),
    "lamb": lambda p: Lamb(p),
}


def batches(sizes, soft=False):
    generator = torch.Generator().manual_seed(1)
    for batch, side in sizes:
        images = torch.randn(batch, 3, side, side, generator=generator)
        labels = torch.randint(5, (batch,), generator=generator)
        yield images, F.one_hot(labels, 5).float() * 0.8 + 0.04 if soft else labels


def train(sizes, optimizer="adamw", recorder=None, clip=None, soft=False, change=None, **options):
    """Train, and return what there is to compare; `change` is called before each step."""
    torch.manual_seed(0)
    model = Net()
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

    clipping = clip and (lambda: nn.utils.clip_grad_norm_(model.parameters(), clip))
    step = TrainingStep(forward, made, recorder=recorder, clip=clipping, ema=ema, model=model, **options)
    losses = []
    for number, batch in enumerate(batches(sizes, soft)):
        for place, group in enumerate(made.param_groups):
            group["lr"] = 0.01 * (place + 1) / (number + 1)
        if change is not None:
            change(number, made)
        torch.manual_seed(100 + number)
        result = step(*batch)
        losses.append(result["loss"].clone())
        assert all(isinstance(group["lr"], float) for group in made.param_groups)
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
    assert_equal(plain, graphed, near=optimizer in ("rmsprop", "single"))  # rates are rounded sooner
    captured = optimizer != "lamb"
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


def test_each_shape_has_a_graph_and_an_odd_batch_none():
    sizes = [*[(4, 8)] * 5, (3, 8), *[(4, 10)] * 5, (3, 10), *[(4, 8)] * 2, (2, 8)]
    recorder = TapeRecorder()
    plain, graphed = train(sizes), train(sizes, recorder=recorder)
    assert_equal(plain, graphed)
    assert graphed[2].recorded == 2 and recorder.recordings == 4


def test_another_setting_than_the_rate_is_recorded_anew():
    def change(number, optimizer):
        for group in optimizer.param_groups:
            group["weight_decay"] = 0.1 if number < 6 else 0.5

    recorder = TapeRecorder()
    assert_equal(train(SAME, change=change), train(SAME, recorder=recorder, change=change))
    assert recorder.recordings == 4


def test_gradients_that_were_taken_away_come_back():
    def change(number, optimizer):
        optimizer.zero_grad()

    sizes = [*SAME, (3, 8), *SAME]
    assert_equal(train(sizes, change=change), train(sizes, recorder=TapeRecorder(), change=change))


def test_what_reads_a_value_is_refused_by_name():
    model = nn.Linear(3, 2)

    def forward(x):
        return model(x).sum() if x.sum() > 0 else model(x).mean()

    step = TrainingStep(forward, torch.optim.SGD(model.parameters()), recorder=TapeRecorder())
    before = None
    with pytest.raises(CaptureError, match=r"forward and backward pass cannot be recorded.*: operation not permitted"):
        for _ in range(WARMUP + 1):
            before = copy.deepcopy(model.state_dict())
            step(torch.ones(1, 3))
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({}, "expected all weights on one CUDA device, got cpu"),
        ({"accumulate": 0}, "accumulate is the number of batches of an update, got accumulate=0"),
        ({"model": nn.Linear(1, 1)}, "give ema and the model that it averages, or neither"),
    ],
)
def test_what_cannot_be_a_graph_is_refused(options, message):
    optimizer = torch.optim.SGD(nn.Linear(2, 2).parameters())
    with pytest.raises(ValueError, match=message):
        visionzoo.graph_training_step(lambda x: x, optimizer, **options)
