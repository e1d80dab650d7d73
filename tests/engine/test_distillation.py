"""Learning from a teacher: every way learns and continues when stopped; teachers that cannot teach are refused."""

import pytest
import timm
import torch
from engine.helpers import UPDATES, assert_same, learned, rows, write_images
from timm.models import save_for_hf

from visionzoo.engine.building import build_run
from visionzoo.engine.checkpoints import read_checkpoint
from visionzoo.engine.errors import UserError
from visionzoo.engine.models import _unreachable
from visionzoo.engine.parallel import Process
from visionzoo.engine.training import train

LEVIT = {"depths": [1, 1, 1], "embed_dims": [16, 24, 32], "num_heads": [1, 1, 1], "key_dim": 8}
STUDENT = {"model": "zoo_levit_128s", "model_kwargs": LEVIT, "drop_path": 0.0}
TOKEN = {"kd_distill_type": "token", "kd_token_distill_type": "hard", "task_loss_weight": 0.5}
WAYS = {
    "token-hard": TOKEN,
    "token-soft": {**TOKEN, "kd_token_distill_type": "soft", "kd_temperature": 2.0},
    "logit": {"kd_distill_type": "logit"},
    "feature": {"kd_distill_type": "feature", "distill_loss_weight": 2.0},
}


@pytest.fixture
def distil(make_args, trained):
    """Arguments of a student of the trained BiFormer."""

    def make(**changes):
        return make_args(**{**STUDENT, "kd_checkpoint": str(trained[0] / "model_best.pth.tar"), **changes})

    return make


@pytest.mark.parametrize("way", WAYS)
def test_the_loss_falls_and_the_colours_are_learned(distil, tmp_path, way, capsys):
    result = train(distil(epochs=8, **WAYS[way]))
    table = rows(tmp_path / "output/run")
    assert float(table[-1]["train_loss"]) < 0.9 * float(table[0]["train_loss"])
    assert result["best_metric"] > 80  # of three classes
    assert "distilling from" in capsys.readouterr().out


@pytest.mark.parametrize("mean", [None, [0.3]], ids=["alike", "renormalized"])
def test_gray_images_are_learned_from_a_teacher_of_gray_images(make_args, tmp_path, mean):
    gray = {**STUDENT, "in_chans": 1, "epochs": 1, "max_steps": 1}
    train(make_args(**gray, experiment="teacher"))
    train(make_args(**gray, mean=mean, kd_checkpoint=str(tmp_path / "output/teacher/last.pth.tar")))
    prepared = read_checkpoint(tmp_path / "output/run/last.pth.tar")["data_config"]
    assert len(prepared["mean"]) == len(prepared["std"]) == 1


def test_a_teacher_of_another_input_size_is_said_with_both_sizes(distil, capsys):
    small = {"epochs": 1, "max_steps": 1}
    train(distil(**small, experiment="alike"))
    assert "sees the student's" not in capsys.readouterr().out
    train(distil(**small, img_size=64))
    assert "(logit); its own input is 32 x 32 pixels, it sees the student's 64 x 64\n" in capsys.readouterr().out


def test_the_classifier_of_bare_weights_says_how_many_classes_a_teacher_has(make_args, tmp_path, capsys):
    torch.save(timm.create_model("test_convnext", num_classes=3).state_dict(), tmp_path / "bare.pth")
    teacher = {"kd_model_name": "test_convnext", "kd_checkpoint": str(tmp_path / "bare.pth")}
    train(make_args(**STUDENT, **teacher, epochs=1, max_steps=1))
    assert "bare.pth: its classifier has 3 rows, so the model gets 3 classes" in capsys.readouterr().out
    torch.save(timm.create_model("test_convnext", num_classes=4).state_dict(), tmp_path / "bare.pth")
    with pytest.raises(UserError, match="the teacher has 4 classes, the student 3"):
        train(make_args(**STUDENT, **teacher, epochs=1))


def test_both_heads_learn_and_the_teacher_does_not(distil, trained, tmp_path):
    run = build_run(distil(**TOKEN), Process(torch.device("cpu")))
    assert isinstance(run.task, timm.task.TokenDistillationTask)
    assert (run.task.task_loss_weight, run.task.distill_loss_weight) == (0.5, 0.5)
    teacher = read_checkpoint(trained[0] / "model_best.pth.tar")["state_dict_ema"]
    before = {name: value.clone() for name, value in run.trainable.state_dict().items()}
    train(distil(**TOKEN, epochs=1, experiment="other"))
    after = read_checkpoint(tmp_path / "output/other/last.pth.tar")["state_dict"]
    assert before.keys() == after.keys()  # nothing of the teacher is in the student's checkpoint
    for name in ("head.fc.weight", "head.fc_dist.weight"):
        assert not torch.equal(before[name], after[name])
    run.trainable.train()
    run.task(torch.randn(4, 3, 32, 32), torch.tensor([0, 1, 2, 0]))["loss"].backward()
    assert_same(dict(run.task.teacher.model.state_dict()), dict(teacher))  # its batch norms saw no image
    assert all(p.grad is None for p in run.task.teacher.parameters())


@pytest.mark.parametrize("way", ["token-hard", "feature"])
def test_an_interrupted_distillation_is_the_one_that_ran_through(distil, tmp_path, way):
    options = {**WAYS[way], "epochs": 3, "model_ema": True, "model_ema_decay": 0.5}
    train(distil(experiment="straight", **options))
    train(distil(experiment="stopped", max_steps=UPDATES + 2, **options))
    train(distil(experiment="stopped", resume="auto", **options))
    straight, stopped = tmp_path / "output/straight", tmp_path / "output/stopped"
    assert_same(learned(straight), learned(stopped))
    for key in ("task_state", "task_state_ema"):
        one, two = (read_checkpoint(folder / "last.pth.tar").get(key) for folder in (straight, stopped))
        assert (one is not None) == (way == "feature")  # the projection onto the teacher's width
        if one is not None:
            assert_same(one["projection"], two["projection"])


def test_the_teacher_sees_images_as_it_was_trained_on_them(distil, trained):
    """Whatever mean and deviation the student's images are normalized by."""
    run = build_run(distil(mean=[0.2, 0.3, 0.4], std=[0.5, 0.6, 0.7]), Process(torch.device("cpu")))
    image = torch.rand(2, 3, 32, 32)
    theirs = read_checkpoint(trained[0] / "model_best.pth.tar")["data_config"]

    def normalized(mean, std):
        return (image - torch.tensor(mean).view(1, 3, 1, 1)) / torch.tensor(std).view(1, 3, 1, 1)

    seen = run.task.teacher.normalize_input(
        normalized(run.config.input.mean, run.config.input.std), run.task.student_mean, run.task.student_std
    )
    torch.testing.assert_close(seen, normalized(theirs["mean"], theirs["std"]))


def test_a_teacher_may_be_any_model_with_published_weights(distil, tmp_path):
    model = timm.create_model("test_resnet", num_classes=3)
    save_for_hf(model, str(tmp_path / "teacher"), safe_serialization=True)
    run = build_run(
        distil(kd_checkpoint="", kd_model_name=f"local-dir:{tmp_path / 'teacher'}"), Process(torch.device("cpu"))
    )
    assert_same(dict(run.task.teacher.model.state_dict()), dict(model.state_dict()))


def test_without_a_teacher_nothing_is_distilled(make_args):
    run = build_run(make_args(**STUDENT, **TOKEN, kd_model_name=""), Process(torch.device("cpu")))
    assert type(run.task) is timm.task.ClassificationTask


def test_advice_on_a_teacher_s_weights_is_of_its_own_flags(distil, trained, tmp_path, monkeypatch):
    torch.save(read_checkpoint(trained[0] / "model_best.pth.tar")["state_dict"], tmp_path / "bare.pth")
    ours = "give a run of `visionzoo train` by --kd-checkpoint, or a file of weights, its model by --kd-model-name"
    with pytest.raises(UserError, match=rf"bare.pth .*: which model\? {ours}$"):
        train(distil(kd_checkpoint=str(tmp_path / "bare.pth")))

    def offline(*_args):
        raise _unreachable("zoo_deit_t", ConnectionError("refused"))

    monkeypatch.setattr("visionzoo.engine.distillation.restore", offline)
    with pytest.raises(UserError, match=rf"the weights of zoo_deit_t are .*without HF_HUB_OFFLINE, or {ours}$"):
        train(distil(kd_checkpoint="", kd_model_name="zoo_deit_t"))


@pytest.mark.parametrize(
    ("change", "messages"),
    [
        (
            {"kd_checkpoint": "", "kd_model_name": "zoo_biformer_x"},
            ["the teacher zoo_biformer_x", "did you mean"],
        ),
        ({"kd_checkpoint": "", "kd_model_name": "zoo_biformer_t"}, ["the teacher zoo_biformer_t", "no weights for"]),
        ({"kd_checkpoint": "nowhere.pth"}, ["the teacher nowhere.pth", "no checkpoint at nowhere.pth"]),
        ({"kd_model_name": "zoo_poolformer_s12"}, ["the teacher zoo_poolformer_s12 of", "cannot load"]),
        ({"in_chans": 1}, ["does not take the student's images, (1, 32, 32)", "another --img-size"]),
        ({**TOKEN, "model_kwargs": {**LEVIT, "distilled": False}}, ["--kd-distill-type token", "distilled=True"]),
        (
            {**TOKEN, "model": "zoo_poolformer_s12", "model_kwargs": {"depths": [1], "embed_dims": [8]}},
            ["--kd-distill-type token with zoo_poolformer_s12", "has one classifier and cannot learn"],
        ),
    ],
)
def test_a_teacher_that_cannot_teach_is_refused_before_the_first_step(distil, change, messages):
    with pytest.raises(UserError) as error:
        train(distil(**change))
    for message in messages:
        assert message in str(error.value)


def test_a_teacher_of_other_classes_is_refused_but_for_its_features(distil, tmp_path):
    for split, seed in (("train", 0), ("validation", 1)):
        write_images(tmp_path / "data" / split, per_class=4, seed=seed)
        (tmp_path / "data" / split / "red").rename(tmp_path / "data" / split / "crimson")
    options = {"data_dir": str(tmp_path / "data"), "epochs": 1}
    with pytest.raises(UserError, match="number 1 is 'green' there and 'crimson' here"):
        train(distil(**options))
    for split in ("train", "validation"):
        for image in (tmp_path / "data" / split / "crimson").iterdir():
            image.unlink()
        (tmp_path / "data" / split / "crimson").rmdir()
    with pytest.raises(UserError, match="the teacher has 3 classes, the student 2; fine-tune the teacher"):
        train(distil(**options))
    assert train(distil(**options, kd_distill_type="feature"))["updates"] == 1
