"""--aa on cached images: timm's operations and draws, on whole batches."""

import random

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from timm.data.auto_augment import LEVEL_TO_ARG, NAME_TO_OP, rand_augment_ops

from visionzoo.engine._compat import posterize
from visionzoo.engine.auto_augment import FUNCTIONS, NONE, BatchAutoAugment
from visionzoo.engine.images import seed_everything

CONFIG = {"input_size": (3, 40, 36), "mean": (0.5, 0.4, 0.3)}
FILL = (128, 102, 76)
MOVING = ("Rotate", "ShearX", "ShearY", "TranslateX", "TranslateY", "TranslateXRel", "TranslateYRel")


def pictures(channels=3):
    torch.manual_seed(0)
    smooth = F.interpolate(torch.rand(4, channels, 9, 9), CONFIG["input_size"][1:], mode="bicubic").clamp(0, 1) * 255
    smooth[0] = smooth[0] * 0.4 + 50  # without the ends of the range
    return smooth.round().byte()


def by_pillow(name, images, arguments):
    function = posterize if "Posterize" in name else NAME_TO_OP[name]
    how = {"fillcolor": FILL, "resample": Image.Resampling.BILINEAR}
    done = [function(Image.fromarray(image.permute(1, 2, 0).numpy()), *arguments, **how) for image in images]
    return torch.from_numpy(np.stack(done)).permute(0, 3, 1, 2)


@pytest.mark.parametrize("name", [name for name in NAME_TO_OP if name != "GaussianBlurRand"])
def test_operations_are_those_of_pillow(name):
    """But for rounding; where pixels from beyond the border begin, torchvision blends them and Pillow does not."""
    images = pictures()
    for level in (0, 0.3, 3, 6.3, 10):
        random.seed(level)
        arguments = LEVEL_TO_ARG[name](level, {"translate_const": 18}) if LEVEL_TO_ARG[name] else ()
        got = FUNCTIONS[NAME_TO_OP[name].__name__](images, *arguments, fillcolor=FILL, resample=None)
        expected = by_pillow(name, images, arguments)
        assert got.dtype == torch.uint8 and got.shape == images.shape
        error = (got.int() - expected.int()).abs()
        if name in MOVING:
            white = by_pillow(name, torch.full_like(images, 255), arguments)
            white = (white != torch.tensor(FILL).view(3, 1, 1)).all(1, keepdim=True).float()
            inside, outside = -F.max_pool2d(F.pad(-white, [1] * 4), 3, 1) == 1, F.max_pool2d(white, 3, 1, 1) == 0
            assert inside.float().mean() > 0.3 and (level < 3 or outside.any())
            assert (error * (inside | outside)).max() <= 1
        elif name == "GaussianBlur":  # three box filters in Pillow, which repeats the border
            assert error[..., 6:-6, 6:-6].max() <= 3
        else:
            assert error.max() <= 1


def test_random_blur_is_between_none_and_the_whole():
    images = pictures()
    sharp = images.float().std()
    seen = [float(FUNCTIONS["gaussian_blur_rand"](images, 1.0).float().std() / sharp) for _ in range(30)]
    assert min(seen) < 0.95 and max(seen) > 0.99


def test_images_of_one_channel_and_one_row_are_taken():
    for policy in ("rand-m9-n3-p1-inc1", "3a", "original"):
        augment = BatchAutoAugment(policy, CONFIG | {"mean": (0.5,)})
        for shape in ((64, 1, 9, 7), (64, 1, 1, 8), (0, 1, 8, 8)):
            images = torch.randint(256, shape, dtype=torch.uint8)
            assert augment(images).shape == shape and augment(images).dtype == torch.uint8


def test_every_image_gets_what_was_drawn_for_it_in_that_order(monkeypatch):
    """Operation k writes k + 1 behind what an image has."""
    for policy in ("rand-m9-n3-p0.7", "original", "rand-n2-tweights", "v0-mstd1"):
        augment = BatchAutoAugment(policy, CONFIG)
        for number, operation in enumerate(augment.operations):
            monkeypatch.setattr(
                operation, "aug_fn", lambda x, *_, n=number, **__: torch.cat([x[:, 1:], x[:, :1] * 0 + n + 1], 1)
            )
        drawn = augment.draw(50)
        monkeypatch.setattr(augment, "draw", lambda count, drawn=drawn: drawn)
        got = augment(torch.zeros(50, 5, 1, 1, dtype=torch.uint8)).flatten(1).tolist()
        expected = [[int(n) + 1 for n in row if n != NONE] for row in drawn]
        assert [[n for n in row if n] for row in got] == expected
        assert len({tuple(row) for row in expected}) > 10


def test_operations_are_drawn_as_often_as_timm_draws_them():
    seed_everything(0)
    for policy in ("rand-m9-n2-p0.7", "rand-n3-tweights", "rand-n2-p1-t3aw", "original", "v0", "3a"):
        augment = BatchAutoAugment(policy, CONFIG)
        timms, seen = augment.policy, []

        class Counted:
            def __init__(self, name, prob):
                self.name, self.prob = name, prob

            def __call__(self, done):
                return [*done, self.name] if random.random() < self.prob else done

        numbers = iter(range(len(augment.operations)))
        if hasattr(timms, "ops"):
            timms.ops = [Counted(next(numbers), operation.prob) for operation in timms.ops]
        else:
            timms.policy = [[Counted(next(numbers), operation.prob) for operation in chain] for chain in timms.policy]
        count = 6000
        expected = [timms([]) for _ in range(count)]
        seen = [[n for n in row if n != NONE] for row in augment.draw(count).tolist()]
        for place in range(2):
            both = np.zeros((2, len(augment.operations) + 1))
            for side, rows in enumerate((expected, seen)):
                for row in rows:
                    both[side, row[place] if len(row) > place else -1] += 1
            error = np.abs(both[0] - both[1]) / np.sqrt(np.maximum(both.sum(0), 25))
            assert error.max() < 4.5, (policy, place)  # standard deviations


def test_strength_is_drawn_as_timm_draws_it():
    augment = BatchAutoAugment("rand-m6-n2-mstd0.5-inc1", CONFIG)
    reference = rand_augment_ops(6, hparams={"magnitude_std": 0.5}, transforms=["SharpnessIncreasing"])[0]
    ours = next(operation for operation in augment.operations if operation.name == "SharpnessIncreasing")
    drawn = []
    for operation in (ours, reference):
        operation.prob, operation.aug_fn = 1.0, lambda _, factor, **__: factor
        random.seed(0)
        drawn.append([operation(None) for _ in range(20)])
    assert drawn[0] == drawn[1] and len(set(drawn[0])) == 20
    assert augment.operations[3].kwargs["fillcolor"] == FILL


@pytest.mark.parametrize(
    ("policy", "message"),
    [
        (
            "augmix-m5-w4-d2",
            r"--cache-images does not go with --aa augmix-m5-w4-d2 \(expected rand-..., original, v0 or 3a",
        ),
        ("nothing", "--aa nothing: timm cannot make it: AssertionError: Unknown AA policy nothing"),
        ("rand-m9-q3", "--aa rand-m9-q3: timm cannot make it: AssertionError: Unknown RandAugment config section"),
    ],
)
def test_policies_that_batches_cannot_have_are_refused(policy, message):
    with pytest.raises(ValueError, match=message):
        BatchAutoAugment(policy, CONFIG)


def test_every_function_of_timms_operations_is_there():
    assert {function.__name__ for function in NAME_TO_OP.values()} == FUNCTIONS.keys()
