"""Two tasks on one backbone: both learn at every width, a stopped run continues, budgets choose widths, bad input."""

import csv
import json
import math
import os
import signal
from itertools import product

import numpy as np
import pytest
import torch
from engine.helpers import assert_same, count_reads, learned, run_tool, write_splits
from PIL import Image
from torch.nn import functional as F

from visionzoo.decoders.multi_task import Answers
from visionzoo.deploy import tasks
from visionzoo.deploy.command import export_model
from visionzoo.deploy.flags import export_parser
from visionzoo.engine.checkpoints import read_checkpoint
from visionzoo.engine.errors import Interrupted, UserError
from visionzoo.engine.multi_task import budgets, restoring, search
from visionzoo.engine.multi_task.data import UNLABELED, MaskedImages, SceneLoader
from visionzoo.engine.multi_task.flags import budget_parser, multi_task_parser
from visionzoo.engine.multi_task.task import PARTS, SandwichTask, balanced_weights, by_layers, losses
from visionzoo.engine.multi_task.training import build_run, evaluate, train
from visionzoo.engine.options import changed
from visionzoo.engine.parallel import Process
from visionzoo.engine.training import Training
from visionzoo.slimming import slim, slimmed_call

CPU = Process(torch.device("cpu"))
COLORS = {"red": (220, 30, 30), "green": (30, 220, 30), "blue": (30, 30, 220)}
NAMES = ["ground", *COLORS]
BACKBONE = {"depths": [1, 1], "embed_dims": [16, 32], "num_heads": [2, 4], "mlp_ratios": [4, 4], "reductions": [2, 1]}
FLAGS = {
    "model": "zoo_pvtv2_b0",
    "model_kwargs": BACKBONE,
    "decoder": [{"type": "edaformer", "embed_dim": 16, "depths": (1, 1, 1), "drop_path": 0.0}],
    "classifier_dim": 16,
    "img_size": 32,
    "batch_size": 8,
    "epochs": 2,
    "warmup_epochs": 0,
    "opt": "adamw",
    "lr": 5e-3,
    "workers": 0,
    "device": "cpu",
    "sched_on_updates": True,
}


def write_scenes(root, split, count, seed):
    """Gray pictures with one or two colored squares, of which the upper left pixels are not labeled."""
    random = np.random.default_rng(seed)
    for kind in ("images", "annotations"):
        (root / kind / split).mkdir(parents=True)
    for number in range(count):
        picture, mask = random.normal(110, 20, (40, 40, 3)), np.ones((40, 40), np.uint8)
        for color in random.choice(3, size=random.integers(1, 3), replace=False):
            top, left = random.integers(0, 24, 2)
            window = (slice(top, top + 16), slice(left, left + 16))
            picture[window] = random.normal(list(COLORS.values())[color], 20, (16, 16, 3))
            mask[window] = color + 2
        mask[:4, :4] = 0
        Image.fromarray(picture.clip(0, 255).astype(np.uint8)).save(root / "images" / split / f"{number}.png")
        Image.fromarray(mask).save(root / "annotations" / split / f"{number}.png")


@pytest.fixture(scope="module")
def scenes(tmp_path_factory):
    root = tmp_path_factory.mktemp("scenes")
    write_scenes(root, "train", 32, seed=0)
    write_scenes(root, "validation", 16, seed=1)
    (root / "classes.json").write_text(json.dumps(NAMES))
    return root


def given(scenes, output, **flags):
    parser = multi_task_parser()
    parser.set_defaults(**FLAGS, data_dir=str(scenes), output=str(output), experiment="run")
    return changed(parser.parse_with_config([]), **flags)


@pytest.fixture(scope="module")
def trained(scenes, tmp_path_factory):
    torch.set_num_threads(1)
    output = tmp_path_factory.mktemp("output")
    return train(given(scenes, output, epochs=8, slim_epoch=2)), output / "run/last.pth.tar"


def test_batches_of_one_on_maps_of_one_pixel_are_refused_with_the_remedy(scenes, tmp_path):
    remedy = "one by one: Expected more than 1 value.*a larger --batch-size or --img-size"
    with pytest.raises(UserError, match=remedy):
        train(given(scenes, tmp_path, batch_size=1, img_size=4))


def test_both_tasks_learn_at_every_width(trained, scenes):
    row, path = trained
    assert row["eval_miou"] > 40 and row["eval_map"] > 85 and row["best_metric"] >= row["eval_mean"]
    both = row["train_pixel_loss"] + row["train_label_loss"] + row["train_answer_loss"] + row["train_feature_loss"]
    assert row["train_loss"] == pytest.approx(both, rel=1e-5)
    network = restoring.restore_tasks(str(path)).network
    data_config = restoring.restore_tasks(str(path)).data_config
    loading = {"batch_size": 8, "device": CPU.device, "workers": 0}
    loader = SceneLoader(MaskedImages(scenes, "validation", 4, data_config), **loading)
    norms = SceneLoader(MaskedImages(scenes, "train", 4, data_config), **loading)
    smallest = restoring.slimmed_network(network, dict.fromkeys(PARTS, 0.25), norms, CPU.device)
    metrics = evaluate(smallest, loader, CPU.device, torch.inference_mode)
    assert metrics["miou"] > 35 and metrics["map"] > 75
    norm, cut = (  # measured anew, on 32 images in batches of 8
        model.segmentor.decoder.fuse.bn for model in (smallest, slim(network, by_layers(dict.fromkeys(PARTS, 0.25))))
    )
    assert (norm.num_batches_tracked, len(norm.running_mean)) == (4, 4) and not torch.equal(
        norm.running_mean, cut.running_mean
    )


def test_a_stopped_run_continues_as_if_it_never_was(scenes, tmp_path, monkeypatch):
    train(given(scenes, tmp_path, experiment="straight"))
    original = Training._after_update

    def stop(self):
        if self.run.update == 3:
            os.kill(os.getpid(), signal.SIGTERM)
        original(self)

    with monkeypatch.context() as patch:
        patch.setattr(Training, "_after_update", stop)
        with pytest.raises(Interrupted, match=r"stopped by SIGTERM; saved .*recovery\.pth\.tar; continue with: "):
            train(given(scenes, tmp_path, experiment="stopped"))
    assert read_checkpoint(tmp_path / "stopped/recovery.pth.tar")["batches_done"] == 3
    train(given(scenes, tmp_path, experiment="stopped", resume="auto", workers=1))  # whoever loads the images
    assert_same(learned(tmp_path / "straight"), learned(tmp_path / "stopped"))


def test_budgets_are_kept_and_the_full_one_is_the_network_itself(trained, scenes, tmp_path, capsys):
    _, path = trained
    flags = ["--checkpoint", str(path), "--data-dir", str(scenes), "--device", "cpu", "-j", "0"]
    config = budget_parser().parse([*flags, "--results", str(tmp_path / "b"), "--budget", "1", "0.6"])
    rows = budgets.evaluate_budgets(config)
    assert [row["budget"] for row in rows] == [0.6, 1.0]
    assert all(row["share"] <= row["budget"] for row in rows) and rows[0]["encoder"] < rows[1]["encoder"] == 1
    network = restoring.restore_tasks(str(path)).network
    data_config = restoring.restore_tasks(str(path)).data_config
    images = MaskedImages(scenes, "validation", 4, data_config)
    loader = SceneLoader(images, batch_size=16, device=CPU.device, workers=0)
    metrics = evaluate(network, loader, CPU.device, torch.inference_mode)
    assert (rows[1]["miou"], rows[1]["map"]) == (round(metrics["miou"], 2), round(metrics["map"], 2))
    with (tmp_path / "b/budgets.csv").open() as file:
        assert [float(row["miou"]) for row in csv.DictReader(file)] == [row["miou"] for row in rows]
    assert "| 0.6 | " in (tmp_path / "b/budgets.md").read_text() and "| 0.6 | " in capsys.readouterr().out
    for name in ("budgets.png", "scenes.png"):
        assert min(Image.open(tmp_path / "b" / name).size) > 300


def test_a_slimmed_network_becomes_a_program_that_needs_only_torch(trained, tmp_path):
    network = slim(restoring.restore_tasks(str(trained[1])).network, by_layers(dict.fromkeys(PARTS, 0.5)))
    budgets.save_program(network, (3, 32, 32), tmp_path / "x.pt2")
    program = torch.export.load(str(tmp_path / "x.pt2"))
    sizes = [sum(tensor.numel() for tensor in each.parameters()) for each in (program.module(), network)]
    assert sizes[0] == sizes[1] and "visionzoo" not in program.graph_module.code
    labels, pixels = program.module()(torch.zeros(1, 3, 32, 32))
    assert (labels.shape, pixels.shape) == ((1, 3), (1, 4, 32, 32))


def test_a_preference_gives_the_preferred_task_and_the_encoder_what_another_has(trained):
    network = restoring.restore_tasks(str(trained[1])).network
    widths = search.grid(0.25)
    assert widths == [0.25, 0.375, 0.5, 0.625, 0.75, 0.875, 1.0] and search.grid(0.3)[:2] == [0.3, 0.375]
    costs = search.measure_costs(network, (3, 32, 32), widths)
    shares = {"encoder": 0.5, "segmentation": 0.25, "classification": 0.75}
    assert costs.of(shares) == search.multiply_adds(slim(network, by_layers(shares)), (3, 32, 32))
    alike = search.read_preference({})
    for budget in (0.55, 0.7, 0.9, 1.0):
        chosen = search.choose_widths(budget, alike, costs, widths)
        fitting = [
            (min(encoder, other), encoder + other, encoder)
            for encoder, other in product(widths, widths)
            if costs.of({"encoder": encoder, "segmentation": other, "classification": other}) <= budget * costs.full
        ]
        assert (chosen["encoder"], chosen["segmentation"]) == (max(fitting)[2], max(fitting)[1] - max(fitting)[2])
        other = search.choose_widths(budget, search.read_preference({"segmentation": 0.5}), costs, widths)
        assert other["segmentation"] <= chosen["segmentation"] and other["encoder"] >= chosen["encoder"]
    assert search.read_preference({"segmentation": 1, "classification": 4}) == {
        "segmentation": 0.25,
        "classification": 1,
    }
    spread = search.spread_budgets(costs, widths)
    assert len(spread) == 5 and spread[-1] == 1 and spread == sorted(spread)
    assert set(search.choose_widths(spread[0], alike, costs, widths).values()) == {0.25}
    with pytest.raises(UserError, match=r"--budget 0.1: the smallest widths of this network, 0.25 .* take 0\.\d+ of"):
        search.choose_widths(0.1, alike, costs, widths)


def test_the_loss_is_that_of_labels_and_of_what_slimmed_widths_learn(scenes, tmp_path):
    run = build_run(given(scenes, tmp_path, label_weight=0.5, distill_weight=2.0, feature_weight=3.0), CPU)
    task, (images, masks) = run.task, next(iter(run.val_loader))
    assert isinstance(task, SandwichTask) and (masks == UNLABELED).any()
    network, weights = task.trainable_module.train(), task.class_weights
    torch.manual_seed(1)
    found = task(images, masks)
    torch.manual_seed(1)
    full = network(images)
    smallest, drawn = task._draw()
    assert set(smallest.values()) == {0.25} and all(0.25 <= share <= 1 for share in drawn.values())
    expected = F.cross_entropy(full.pixels, masks, weights, ignore_index=UNLABELED)
    shown = torch.stack([(masks == number).flatten(1).any(1) for number in (1, 2, 3)], 1).float()
    label_loss = F.binary_cross_entropy_with_logits(full.labels, shown)
    answers, features = [], []
    for shares in (smallest, drawn):
        own: Answers = slimmed_call(network, shares, images)
        known = masks != UNLABELED
        divergence = (full.pixels.softmax(1) * (full.pixels.log_softmax(1) - own.pixels.log_softmax(1))).sum(1)[known]
        pixels = (divergence * weights[masks[known]]).sum() / weights[masks[known]].sum()
        answers.append(pixels + 0.5 * F.binary_cross_entropy_with_logits(own.labels, full.labels.sigmoid()))
        cosines = [F.cosine_similarity(a, b, dim=1).mean() for a, b in zip(own.maps, full.maps, strict=True)]
        features.append(1 - sum(cosines) / len(cosines))
    torch.testing.assert_close(found["pixel_loss"], expected)
    torch.testing.assert_close(found["label_loss"], label_loss)
    torch.testing.assert_close(found["answer_loss"], sum(answers) / 2)
    torch.testing.assert_close(found["feature_loss"], sum(features) / 2)
    total = expected + 0.5 * label_loss + 2 * found["answer_loss"] + 3 * found["feature_loss"]
    torch.testing.assert_close(found["loss"], total)
    found["answer_loss"].backward()  # it teaches the slimmed widths only: units that neither has learn nothing
    learns = network.classifier[-1].fc1.weight.grad.abs().sum(1) > 0
    kept = math.ceil(16 * drawn[PARTS["classification"]])
    assert kept < 16 and learns[:4].all() and not learns[kept:].any()
    torch.testing.assert_close(
        losses(network, full, masks)["pixel_loss"], F.cross_entropy(full.pixels, masks, ignore_index=UNLABELED)
    )
    run.close()


def test_slimmed_widths_may_begin_to_learn_while_rates_cool_down(scenes, tmp_path):
    run = build_run(given(scenes, tmp_path, epochs=1, slim_epoch=1, cooldown_epochs=1), CPU)
    assert run.num_epochs == 2
    run.close()


def test_a_run_that_would_continue_with_another_network_is_told_which_flags_differ(trained, scenes, tmp_path):
    for flag, value, said in (
        ("classifier_dim", 24, "classifier_dim 16 -> 24"),
        ("decoder", [{"type": "edaformer", "embed_dim": 24, "depths": (1, 1, 1)}], "'embed_dim': 24"),
    ):
        with pytest.raises(UserError, match=r"(?s)does not fit this run of zoo_.*; other than in it: ") as error:
            build_run(given(scenes, tmp_path, resume=str(trained[1]), **{flag: value}), CPU)
        assert said in str(error.value) and len(str(error.value)) < 2500


def test_a_budgets_network_is_exported_with_an_output_for_each_task(trained, scenes, tmp_path):
    onnxruntime = pytest.importorskip("onnxruntime", reason='needs pip install "visionzoo[export]"')
    flags = ["--checkpoint", str(trained[1]), "--output", str(tmp_path), "--budget", "0.6", "--data-dir", str(scenes)]
    (file,) = export_model(export_parser().parse([*flags, "--format", "onnx", "--norm-images", "32"]))
    found = restoring.restore_tasks(str(trained[1]))
    loading = {"batch_size": 16, "device": CPU.device, "workers": 0}
    about = json.loads(file.path.with_suffix(".json").read_text())
    loader = restoring.norm_loader(scenes, found, 32, **loading)
    network = restoring.slimmed_network(found.network, about["widths"], loader, CPU.device)
    images = torch.randn(3, 3, 32, 32)
    session = onnxruntime.InferenceSession(str(file.path))
    with torch.no_grad():
        labels, pixels, _ = network(images)
    for own, its in zip((labels, pixels), session.run(["labels", "pixels"], {"image": images.numpy()}), strict=True):
        torch.testing.assert_close(torch.from_numpy(its), own, rtol=1e-4, atol=1e-4)
    assert max(about["widths"].values()) < 1 and about["budget"] == 0.6
    assert [(output["name"], output["class_names"]) for output in about["outputs"]] == [
        ("labels", NAMES[1:]),
        ("pixels", NAMES),
    ]
    assert [output["shape"] for output in about["outputs"]] == [["batch", 3], ["batch", 4, 32, 32]]


def test_the_whole_network_is_exported_without_data(trained, tmp_path, monkeypatch):
    monkeypatch.setattr(tasks, "write_files", lambda *written: [written])
    reads = count_reads(monkeypatch)
    (written,) = export_model(export_parser().parse(["--checkpoint", str(trained[1]), "--output", str(tmp_path)]))
    assert reads == [str(trained[1])]
    network, images = restoring.restore_tasks(str(trained[1])).network, torch.randn(2, 3, 32, 32)
    assert all(torch.equal(own, its) for own, its in zip(network(images)[:2], written[0](images), strict=True))
    assert written[1] == tmp_path / "zoo_pvtv2_b0-tasks" and set(written[3]["widths"].values()) == {1}


BAD_EXPORT = [
    ("--budget 0.6", "good.pth was trained on a folder; give --data-dir DIR"),
    ("--budget 0.6 --data-dir other", "other has the classes a, b, c, d..., good.pth was trained on ground"),
    ("--budget 0.1 --data-dir size", "--budget 0.1: the smallest widths of this network"),
    ("--budget 2", "--budget: expected a number above 0 and at most 1, got 2"),
    ("--budget 0.6 --preference depth=1", "--preference: no task 'depth'"),
    ("--data-dir size", "--data-dir has no effect on the whole network: leave it out, or give a --budget below 1"),
    ("--model resnet18", "--model has no effect on good.pth: a run of `visionzoo multi-task` records its whole"),
    ("--img-size 64", "--img-size has no effect on good.pth"),
    ("--exit x", "--exit has no effect on good.pth"),
    ("--checkpoint misfit.pth", "cannot load misfit.pth into the network that it describes"),
    (
        "--checkpoint= --model zoo_pvtv2_b0 --random-weights --budget 0.5",
        "--budget is for checkpoints of `visionzoo multi-task`; give one by --checkpoint, or leave it out",
    ),
]


@pytest.mark.parametrize(("flags", "message"), BAD_EXPORT, ids=[flags for flags, _ in BAD_EXPORT])
def test_bad_input_of_its_export_is_one_message(place, capsys, flags, message):
    assert run_tool("export", "--checkpoint", "good.pth", "--format", "pt2", "--output", "o", *flags.split()) == 1
    said = capsys.readouterr().err
    assert message in said[said.rindex("error: ") :] and "Traceback" not in said


@pytest.mark.parametrize(
    ("tool", "flags"),
    [
        ("eval", "--checkpoint good.pth --data-dir other"),
        ("predict", "other/images/train --checkpoint good.pth"),
        ("train", "--initial-checkpoint good.pth --data-dir other"),
        ("train", "--pretrained-path good.pth --data-dir other"),
    ],
)
def test_other_commands_name_the_one_that_takes_its_checkpoint(place, capsys, tool, flags):
    known = ["--model", "zoo_pvtv2_b0", "--model-kwargs", *(f"{key}={value}" for key, value in BACKBONE.items())]
    if tool == "train":
        if not (place / "classes").exists():
            write_splits(place / "classes")
        flags = flags.replace("other", "classes") + " --img-size 32 --output o"
    assert run_tool(tool, *flags.split(), "--device", "cpu", *(known if tool == "train" else [])) == 1
    said = capsys.readouterr().err
    assert "good.pth is of a run of `visionzoo multi-task`" in said
    assert "`visionzoo multi-task --checkpoint good.pth` evaluates it" in said
    assert "here take a checkpoint of `visionzoo train`, or other weights" in said


def test_help_shows_the_decoder_as_it_is_given():
    said = " ".join(multi_task_parser().format_help().split())
    assert "'NAME KEY=VALUE' (default: edaformer)" in said and "{'type'" not in said


def test_rare_classes_weigh_more_and_absent_ones_nothing():
    weights = balanced_weights(torch.tensor([64, 16, 0]), 0.5)
    assert weights[2] == 0 and weights[1] == 2 * weights[0]
    assert float(weights @ torch.tensor([0.8, 0.2, 0.0]).double()) == pytest.approx(1)
    assert torch.equal(balanced_weights(torch.tensor([64, 16]), 0.0), torch.ones(2).double())


def test_images_and_masks_are_cropped_alike_and_repeat_themselves(scenes):
    batches = given(scenes, "").batches
    data_config = {"input_size": (3, 32, 32), "mean": (0.0, 0.0, 0.0), "std": (1.0, 1.0, 1.0)}
    images = MaskedImages(scenes, "train", 4, data_config, batches=batches, seed=3)
    plain = MaskedImages(scenes, "train", 4, data_config)
    for number in range(8):
        picture, mask = images[number]
        for label, color in enumerate(COLORS.values(), 1):
            if (mask == label).sum() > 40:
                mean = 255 * picture[:, mask == label].mean(1)
                assert (mean - torch.tensor(color)).abs().max() < 60
        assert torch.equal(picture, images[number][0]) and not torch.equal(picture, plain[number][0])
    images.pairs[0] = images.pairs[number]  # another place in the epoch, and another crop
    assert not torch.equal(picture, images[0][0])
    images.set_epoch(1)
    assert not torch.equal(picture, images[number][0])


@pytest.fixture(scope="module")
def place(scenes, trained, tmp_path_factory):
    """A folder with data sets that cannot be used; the tests run in it."""
    path = tmp_path_factory.mktemp("place")
    before = os.getcwd()
    os.chdir(path)
    for name, classes in {
        "no_names": None,
        "names": {"a": 1},
        "few": ["ground", "red"],
        "other": ["a", "b", "c", "d"],
    }.items():
        for split, seed in (("train", 0), ("validation", 1)):
            write_scenes(path / name, split, 8, seed)
        if classes is not None:
            (path / name / "classes.json").write_text(json.dumps(classes))
    for name in ("alone", "twice", "size", "color", "broken", "same", "unlabeled"):
        for split, seed in (("train", 0), ("validation", 1)):
            write_scenes(path / name, split, 8, seed)
        (path / name / "classes.json").write_text(json.dumps(NAMES))
    (path / "alone/annotations/train/3.png").unlink()
    Image.new("RGB", (40, 40)).save(path / "twice/images/train/3.webp")
    Image.new("L", (9, 9), 1).save(path / "size/annotations/train/3.png")
    Image.new("RGB", (40, 40)).save(path / "color/annotations/train/3.png")
    (path / "broken/annotations/validation/3.png").write_bytes(b"no image")
    for name, value in (("same", 1), ("unlabeled", 0)):
        for mask in (path / name / "annotations/train").iterdir():
            Image.new("L", (40, 40), value).save(mask)
    (path / "good.pth").write_bytes(trained[1].read_bytes())
    torch.save({"state_dict": {"weight": torch.zeros(1)}}, path / "other.pth")
    state = read_checkpoint(trained[1])
    torch.save({**state, "args": {**state["args"], "min_width": 7}}, path / "share.pth")
    torch.save({**state, "args": {**state["args"], "classifier_dim": 99}}, path / "misfit.pth")
    yield path
    os.chdir(before)
    assert not (path / "o").exists()  # what is refused leaves no run folder


TRAIN = "--img-size 32 -b 4 --epochs 1 --device cpu -j 0 --output o"
BAD = [
    ("", "which data? give --data-dir DIR (images/, annotations/ and classes.json), or --dataset visionzoo/scenes"),
    ("--data-dir few --dataset visionzoo/scenes", "got both"),
    ("--dataset visionzoo/digits", "unknown data set 'visionzoo/digits'; expected visionzoo/scenes"),
    ("--data-dir no_names", "cannot read no_names/classes.json"),
    ("--data-dir names", "names/classes.json: expected a list of the classes' names"),
    ("--data-dir few", "there are 2 classes, 1 to 2, and 0 for unlabeled"),
    ("--data-dir alone", "1 file has no counterpart in images/ or annotations/, such as 3"),
    ("--data-dir twice", " and 3.webp have one name; an image and its mask pair up by it: rename one"),
    ("--data-dir other --scale 0.9 0.1", "--scale: expected two numbers, the smaller one first, got 0.9 0.1"),
    ("--data-dir other --ratio 2 1", "--ratio: expected two numbers, the smaller one first, got 2.0 1.0"),
    ("--data-dir size", "size/annotations/train/3.png has 9 x 9 pixels, its image 40 x 40; make them alike"),
    ("--data-dir color", "color/annotations/train/3.png: expected one number of 8 bits a pixel"),
    ("--data-dir broken", "cannot use the mask broken/annotations/validation/3.png"),
    ("--data-dir same", "each class is in all or in none of the training images"),
    ("--data-dir unlabeled", "no pixel of unlabeled/annotations/train is labeled: all masks are 0"),
    ("--data-dir other --train-split trian", "no folder other/images/trian; did you mean train"),
    ("--data-dir other --train-split validation", "--train-split and --val-split are both 'validation'"),
    ("--data-dir other -b 9", "8 training images do not fill one batch of 9; give a smaller --batch-size"),
    ("--data-dir other --model resnet18 --decoder edaformer", "resnet18 has no layers that can be slimmed"),
    ("--data-dir other --model zoo_deit_t", "it is isotropic"),
    ("--data-dir other --model zoo_pvtv2", "unknown backbone 'zoo_pvtv2' (did you mean 'zoo_pvtv2_b"),
    ("--data-dir other --model maxvit_rmlp_pico_rw_256 --min-width 1", "does not take images of 32 x 32 pixels: "),
    ("--data-dir other --decoder unet", "unknown decoder 'unet'"),
    ("--data-dir other --min-width 0", "--min-width: expected a number above 0 and at most 1, got 0"),
    ("--data-dir other --class-balance 2", "--class-balance: expected a number at least 0 and at most 1, got 2"),
    ("--data-dir other --mixup 1", "unknown argument --mixup"),
    ("--data-dir other --slim-epoch 1", "--slim-epoch 1: the run ends before, after 1 epoch, so no"),
    ("--data-dir other --slim-epoch 2 --cooldown-epochs 1", "--slim-epoch 2: the run ends before, after 2 epochs, so"),
    ("--data-dir other --budget 0.5", "unknown argument --budget"),
    ("--checkpoint nowhere.pth", "no checkpoint at nowhere.pth"),
    ("--checkpoint other.pth", "other.pth is no checkpoint of a run of `visionzoo multi-task`"),
    ("--checkpoint share.pth", "share.pth: min_width: expected a number above 0 and at most 1, got 7"),
    ("--checkpoint misfit.pth", "cannot load misfit.pth into the network that it describes"),
    ("--checkpoint good.pth", "good.pth was trained on a folder; give --data-dir DIR"),
    ("--checkpoint good.pth --data-dir other", "other has the classes a, b, c, d..., good.pth was trained on ground"),
    ("--checkpoint good.pth --data-dir other --budget 0", "--budget: expected a number above 0 and at most 1, got 0"),
    ("--checkpoint good.pth --data-dir other --epochs 3", "unknown argument --epochs"),
    ("--checkpoint good.pth --preference depth=1", "--preference: no task 'depth'; there are segmentation, "),
    ("--checkpoint good.pth --preference segmentation=0", "--preference segmentation: expected a number above 0"),
    ("--checkpoint good.pth --data-dir size --budget 0.1", "--budget 0.1: the smallest widths of this network"),
    ("--checkpoint good.pth --data-dir size --split nope", "no folder size/images/nope; splits there: train, "),
]  # fmt: skip


@pytest.mark.parametrize(("flags", "message"), BAD, ids=[flags for flags, _ in BAD])
def test_bad_input_is_one_message(place, capsys, flags, message):
    common = "--device cpu" if "--checkpoint" in flags else TRAIN
    assert run_tool("multi_task", *common.split(), *flags.split()) == 1
    said = capsys.readouterr().err
    said = said[said.rindex("error: ") :]
    assert message in said
    assert "Traceback" not in said and len(said) < 2000
