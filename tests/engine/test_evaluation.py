import contextlib
import csv
import json

import pytest
import torch
from engine.helpers import truncate, write_images

from visionzoo.engine.errors import UserError
from visionzoo.engine.evaluation import COLUMNS, evaluate, evaluate_checkpoint
from visionzoo.engine.images import IGNORED
from visionzoo.engine.parallel import Process
from visionzoo.engine.trained_flags import eval_parser

CPU = Process(torch.device("cpu"))


def evaluated(*flags):
    return evaluate_checkpoint(eval_parser().parse([*map(str, flags), "--device", "cpu", "-j", "0"]))


class Loader(list):
    dataset = range(6)


def logits_of(classes, count=7):
    return torch.nn.functional.one_hot(torch.tensor(classes), count).float() * 5


def test_metrics_are_those_of_the_formulas():
    logits = torch.randn(30, 7, generator=torch.Generator().manual_seed(0))
    targets = torch.arange(30) % 7
    loader = Loader([(logits[:20], targets[:20]), (logits[20:], targets[20:])])
    (metrics,) = evaluate([torch.nn.Identity()], loader, CPU, precision=contextlib.nullcontext)
    order = logits.argsort(dim=1, descending=True)
    assert metrics.count == 30
    assert metrics.top1 == pytest.approx(100 * (order[:, 0] == targets).float().mean().item())
    assert metrics.top5 == pytest.approx(100 * (order[:, :5] == targets[:, None]).any(1).float().mean().item())
    assert metrics.loss == pytest.approx(torch.nn.functional.cross_entropy(logits, targets).item())


def test_models_are_measured_apart_in_one_pass():
    class Negative(torch.nn.Module):
        def forward(self, logits):
            return -logits

    loader = Loader([(logits_of([0, 1]), torch.tensor([0, 1]))])
    right, wrong = evaluate([torch.nn.Identity(), Negative()], loader, CPU, precision=contextlib.nullcontext)
    assert (right.top1, wrong.top1, wrong.count) == (100.0, 0.0, 2)
    assert wrong.loss > right.loss


def test_top5_of_three_classes_is_all():
    (metrics,) = evaluate(
        [torch.nn.Identity()], Loader([(torch.eye(3), torch.tensor([0, 2, 1]))]), CPU, precision=contextlib.nullcontext
    )
    assert (metrics.top5, metrics.top1) == (100.0, pytest.approx(100 / 3))


def test_ignored_images_do_not_count():
    loader = Loader([(logits_of([0, 1, 2]), torch.tensor([0, IGNORED, 1]))])
    (metrics,) = evaluate([torch.nn.Identity()], loader, CPU, precision=contextlib.nullcontext)
    assert (metrics.count, metrics.top1) == (2, 50.0)
    with pytest.raises(UserError, match="no image"):
        evaluate(
            [torch.nn.Identity()],
            Loader([(logits_of([0]), torch.tensor([IGNORED]))]),
            CPU,
            precision=contextlib.nullcontext,
        )


def test_images_that_the_sampler_repeats_count_once(monkeypatch):
    sums = []
    monkeypatch.setattr(torch.distributed, "all_reduce", sums.append)
    for rank, numbers in enumerate([[0, 4], [1, 5], [2, 0], [3, 1]]):  # 6 images on 4 processes, as timm deals them
        process = Process(torch.device("cpu"), rank=rank, world_size=4, distributed=True)
        loader = Loader([(logits_of(numbers), torch.tensor(numbers))])
        evaluate([torch.nn.Identity()], loader, process, precision=contextlib.nullcontext)
    assert sum(float(part[0, 3]) for part in sums) == 6


def test_a_checkpoint_alone_gives_what_its_run_reported(trained):
    folder, result = trained
    last = evaluated("--checkpoint", folder / "last.pth.tar", "--recorded-data")
    assert last["top1"] == pytest.approx(result["eval_top1"], abs=1e-3)
    assert last["loss"] == pytest.approx(result["eval_loss"], abs=1e-5)
    assert (last["images"], last["img_size"], last["model"]) == (9, 32, "zoo_biformer_t")
    assert json.loads((folder / "eval-last.json").read_text()) == last
    raw = evaluated("--checkpoint", folder / "last.pth.tar", "--no-ema", "--recorded-data")
    assert raw["top1"] == pytest.approx(result["raw_top1"], abs=1e-3)
    assert raw["loss"] != pytest.approx(last["loss"], abs=1e-6)


def test_flags_win_over_what_the_run_recorded(trained, tmp_path):
    write_images(tmp_path / "other/test", per_class=2, seed=5)
    result = evaluated(
        "--checkpoint", trained[0] / "last.pth.tar", "--data-dir", tmp_path / "other", "--split", "test",
        "--img-size", 48, "--crop-pct", 1.0, "--results-file", tmp_path / "deep/r.json",
    )  # fmt: skip
    assert (result["images"], result["img_size"], result["crop_pct"]) == (6, 48, 1.0)
    assert (tmp_path / "deep/r.json").exists()


def test_csv_has_timms_columns_and_grows_by_a_row(trained, tmp_path):
    for _ in range(2):
        evaluated("--checkpoint", trained[0] / "last.pth.tar", "--recorded-data", "--results-csv", tmp_path / "r.csv")
    with (tmp_path / "r.csv").open() as file:
        table = list(csv.DictReader(file))
    assert tuple(table[0]) == COLUMNS
    assert len(table) == 2
    assert float(table[0]["top1"]) + float(table[0]["top1_err"]) == pytest.approx(100)
    assert float(table[0]["param_count"]) == pytest.approx(0.01)


def test_classes_keep_the_numbers_of_the_training(trained, tmp_path):
    write_images(tmp_path / "val", per_class=3, seed=1)
    for file in (tmp_path / "val/blue").iterdir():
        file.unlink()
    result = evaluated("--checkpoint", trained[0] / "last.pth.tar", "--data-dir", tmp_path / "val")
    assert (result["images"], result["top1"]) == (6, 100.0)


def test_unreadable_images_are_counted_in_the_result(trained, tmp_path):
    write_images(tmp_path / "val", per_class=2, seed=1)
    truncate(tmp_path / "val/red/0.png")
    flags = ("--checkpoint", trained[0] / "last.pth.tar", "--data-dir", tmp_path / "val")
    with pytest.raises(UserError, match=r"cannot use the image .*red/0\.png"):
        evaluated(*flags)
    result = evaluated(*flags, "--skip-bad-images")
    assert (result["images"], result["skipped_images"]) == (5, 1)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ([], "which model?"),
        (["--model", "zoo_biformer_t"], "has no weights: give --checkpoint or --pretrained"),
        (["--checkpoint", "nowhere.pth"], "no checkpoint at nowhere.pth"),
        (["--checkpoint", "{last}", "--model", "zoo_davit_t"], "cannot load"),
        (["--checkpoint", "{last}", "--num-classes", "7"], "3 classes, the model 7"),
        (["--checkpoint", "{last}", "--data-dir", "nowhere"], "no data at nowhere"),
    ],
)
def test_what_cannot_be_evaluated_is_said(trained, flags, message):
    with pytest.raises(UserError) as error:
        evaluated(*(flag.format(last=trained[0] / "last.pth.tar") for flag in flags))
    assert message in str(error.value)


def test_a_model_of_other_classes_is_refused(images, tmp_path):
    import timm

    torch.save(timm.create_model("test_convnext", num_classes=5).state_dict(), tmp_path / "w.pth")
    with pytest.raises(UserError, match="num_classes is 5, the data set has 3 classes"):
        evaluated(
            "--checkpoint", tmp_path / "w.pth", "--model", "test_convnext", "--num-classes", 5, "--data-dir", images
        )


def test_weights_of_timms_own_models_are_loaded(images, tmp_path):
    import timm
    from safetensors.torch import save_file

    save_file(timm.create_model("test_convnext", num_classes=3).state_dict(), tmp_path / "w.safetensors")
    result = evaluated(
        "--checkpoint", tmp_path / "w.safetensors", "--model", "test_convnext", "--num-classes", 3,
        "--data-dir", images, "--img-size", 64,
    )  # fmt: skip
    assert result["images"] == 9
