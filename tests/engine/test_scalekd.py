"""ScaleKD: its loss is the authors', any student learns by it from any fitting teacher, and a stopped run continues."""

import re

import pytest
import timm
import torch
from engine.helpers import TINY, UPDATES, assert_same, learned, rows
from engine.test_graphs import tapes
from engine.two import in_two_processes
from golden import Record, relative_error
from recipes.gates import some
from recipes.scalekd import CLASSES, Classifier, labels, student_maps
from torch import nn
from torch.nn.parallel import DistributedDataParallel

import visionzoo
from visionzoo.engine.building import build_run
from visionzoo.engine.checkpoints import read_checkpoint
from visionzoo.engine.errors import UserError
from visionzoo.engine.flags import train_parser
from visionzoo.engine.options import changed
from visionzoo.engine.parallel import Process, start_process
from visionzoo.engine.scalekd import Perception, ScaleKDTask, logit_loss
from visionzoo.engine.training import Training, train
from visionzoo.graphs import make_capturable
from visionzoo.layers.mimicking import CrossAttentionProjector, frequency_loss, spatial_loss
from visionzoo.models._registry import TINY as TINY_FORMS

LEVIT = {"depths": [1, 1, 1], "embed_dims": [16, 24, 32], "num_heads": [1, 1, 1], "key_dim": 8}
DEIT = {"depth": 3, "embed_dim": 24, "num_heads": 2, "patch_size": 8, "img_size": 32}
SWIN = {"depths": [1, 1], "embed_dims": [8, 16], "num_heads": [1, 1]}
SCALEKD = {"kd_distill_type": "scalekd", "kd_temperature": 1.0, "task_loss_weight": 0.5}
RECORDED = {
    "vit": (
        "zoo_deit_t",
        {**DEIT, "depth": 12, "embed_dim": 16, "mlp_ratio": 2.0, "img_size": 24, "class_token": False},
    ),
    "swin": ("zoo_swin_t", {"depths": (1, 1, 2, 2), "embed_dims": (8, 16, 32, 64), "num_heads": (1, 1, 2, 4)}),
}
TEACHER = [  # mmcls's names to the first authors'
    (r"^backbone\.", ""),
    (r"^patch_embed\.projection\.", "patch_embed.proj."),
    (r"^layers\.(\d+)\.ln", r"blocks.\1.norm"),
    (r"^layers\.", "blocks."),
    (r"^(ln1|norm3)\.", "norm."),
    (r"^stages\.", "layers."),
    (r"\.w_msa\.", "."),
    (r"\.ffn\.layers\.0\.0\.", ".mlp.fc1."),
    (r"\.ffn\.layers\.1\.", ".mlp.fc2."),
    (r"^head\.fc\.linear\.", "head."),
]
LEARNED = [  # the distiller's names to ours
    (r"^student\.head\.fc\.", "student.classifier."),
    (r"^distill_losses\.loss_fmd_s3\.", "projection.0."),
    (r"^distill_losses\.loss_fmd_s4\.", "projection.1."),
    (r"\.projector_0\.", ".spatial."),
    (r"\.projector_1\.", ".frequency."),
    (r"\.proj_pos\.0\.", ".query_proj."),
    (r"\.proj_student\.0\.", ".conv."),
    (r"\.proj_student\.1\.", ".bn."),
    (r"\.pos_embed$", ".positions"),
    (r"\.pos_attention\.", "."),
    (r"\.ffn\.layers\.0\.0\.", ".mlp.fc1."),
    (r"\.ffn\.layers\.1\.", ".mlp.fc2."),
    (r"\.query\.weight$", ".query"),
]
UNFELT = (  # by softmax, by batch norm, and where the mean is taken away at the end
    "pos_attention.k.bias",
    "proj_student.0.bias",
    "loss_fmd_s4.projector_1.ffn.layers.1.bias",
)


def renamed(name, patterns):
    for pattern, replacement in patterns:
        name = re.sub(pattern, replacement, name)
    return name


class Drawn(nn.Module):
    """A student that is two drawn maps, and a linear layer on the mean of the last."""

    num_classes, in_chans = CLASSES, 3
    feature_info = [{"reduction": 16}, {"reduction": 32}]

    def __init__(self):
        super().__init__()
        self.maps = student_maps()
        self.classifier = Classifier(self.maps[-1].shape[1])

    def forward_intermediates(self, image, indices, norm):
        return self.maps[-1], [self.maps[i] for i in indices]

    def forward_head(self, last):
        return self.classifier(last)


def recorded_teacher(name, record):
    model = timm.create_model(RECORDED[name][0], num_classes=CLASSES, **RECORDED[name][1])
    state = {}
    for key, value in record.state_dict().items():
        if key.startswith("teacher."):
            key = renamed(key.removeprefix("teacher."), TEACHER)
            if ".downsample." in key:  # mmcv unfolds maps, channel by channel; the first authors join four maps
                value = value.unflatten(-1, (-1, 4))[..., [0, 2, 1, 3]].transpose(-1, -2).flatten(-2)
            state[key] = value
    state.pop("cls_token", None)
    visionzoo.load_weights(model, state)
    return model.double().eval().requires_grad_(False)


def make_task(student, teacher, size, **options):
    options = {"temperature": 1.0, "feature_loss_weight": 1.0, "task_loss_weight": 0.5, **options}
    return ScaleKDTask(student, teacher, input_size=size, criterion=nn.CrossEntropyLoss(), verbose=False, **options)


@pytest.mark.parametrize("name", RECORDED)
def test_the_whole_loss_and_its_gradients_are_the_authors(name):
    """Through the teacher's later parts, with queries of the first map's views for the second's."""
    record = Record(f"scalekd/{name}")
    teacher, student, image = recorded_teacher(name, record), Drawn().double(), record.image()
    student.pretrained_cfg = teacher.pretrained_cfg  # images are for both as they are
    task = make_task(student, teacher, tuple(image.shape[1:]))
    module = task.trainable_module
    own = {renamed(key, LEARNED): value for key, value in record.state_dict().items()}
    state = module.state_dict()
    module.load_state_dict({key: own[key].reshape(value.shape) for key, value in state.items()})
    logits, last = task.perception.see(image)
    module.train()
    result = task(image, labels())
    result["loss"].backward()
    expected = record.arrays
    entropy = -(logits.softmax(1) * logits.log_softmax(1)).sum(1).mean()  # that the authors' loss of logits has beside
    found = {
        "teacher_logits": logits,
        "teacher_map": some(last.permute(0, 3, 1, 2)),
        "ori_loss": 0.5 * result["task_loss"],
        "loss_kd": 0.5 * (result["kd_loss"] + entropy),
        **{f"grad_map{i}": x.grad for i, x in enumerate(student.maps)},
    }
    parts = sum(expected[key] for key in ("loss_s3", "loss_s3_alt", "loss_s4", "loss_s4_alt"))
    assert relative_error(result["feature_loss"].detach(), parts) <= record.tolerance()
    total = parts + expected["ori_loss"] + expected["loss_kd"]
    assert relative_error((result["loss"] + 0.5 * entropy).detach(), total) <= record.tolerance()
    compared = 0
    for key, value in expected.items():
        if key.startswith("grad/"):
            found[key] = module.get_parameter(renamed(key.removeprefix("grad/"), LEARNED)).grad
        elif key not in found:
            continue
        mine, theirs = some(found[key].detach(), 64 if "grad" in key else 512).numpy(), value.reshape(-1)
        if abs(theirs).max() < 1e-13:
            assert abs(mine).max() < 1e-13 and key.endswith(UNFELT)
        else:
            assert relative_error(mine, theirs) <= record.tolerance(), key
        compared += 1
    assert compared == len(expected) - 4
    assert sum(key.startswith("grad/") for key in expected) == sum(1 for _ in module.parameters())


def test_the_view_of_frequencies_is_the_cosine_transform_without_its_first_coefficient():
    x = torch.randn(2, 4, 5, 3, dtype=torch.float64)

    def without_mean(x):
        for axis in (1, 2):  # each transform by its definition
            n = torch.arange(x.shape[axis], dtype=torch.float64)
            basis = torch.cos(torch.pi / len(n) * (n + 0.5) * n[:, None])
            x = torch.tensordot(x, basis, ([axis], [1])).movedim(-1, axis)
        x[:, 0, 0] = 0
        for axis in (1, 2):
            n = torch.arange(x.shape[axis], dtype=torch.float64)
            basis = torch.cos(torch.pi / len(n) * (n + 0.5) * n[:, None]) * 2 / len(n)
            basis[0] /= 2
            x = torch.tensordot(x, basis, ([axis], [0])).movedim(-1, axis)
        return x

    y = torch.randn_like(x)
    torch.testing.assert_close(frequency_loss(x, y), spatial_loss(without_mean(x), without_mean(y)))
    assert frequency_loss(x + 3, x) < 1e-12 < spatial_loss(x + 3, x)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (
            lambda: CrossAttentionProjector(8, 10, (2, 2), (2, 2), num_heads=4),
            "must divide out_dim=10, got num_heads=4",
        ),
        (lambda: CrossAttentionProjector(8, 16, (0, 2), (2, 2)), r"must be positive, .* size=\(0, 2\)"),
        (
            lambda: CrossAttentionProjector(8, 16, (2, 2), (2, 2))(torch.zeros(1, 8, 3, 2)),
            r"expected a map \[B, 8, 2, 2\]",
        ),
        (
            lambda: CrossAttentionProjector(8, 16, (2, 2), (2, 2), own_query=False)(torch.zeros(1, 8, 2, 2)),
            "pass query=",
        ),
        (lambda: spatial_loss(torch.zeros(1, 2, 2, 3), torch.zeros(1, 2, 2, 4)), "two maps .* of one shape"),
        (lambda: Perception(nn.Linear(2, 2)), "the teacher is a Linear; its later parts must be blocks of tokens"),
    ],
)
def test_wrong_arguments_are_named(call, message):
    with pytest.raises(ValueError, match=message):
        call()


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("zoo_crossvit_t", "the teacher is a CrossViT; its later parts must be blocks of tokens or stages of maps"),
        ("zoo_iared2_deit_s", "the teacher leaves tokens out in its later blocks"),
        ("zoo_tnt_s", "the later parts of a TNT do not take a map by itself, they need pixels, memories or other"),
        ("zoo_memory_vit_t", "the later parts of a MemoryViT do not take a map by itself, they need pixels, memories"),
        ("zoo_karat_t_g3b", "the teacher's later parts do not take a map by itself: KolmogorovArnoldMixer: expected 1"),
    ],
)
def test_a_teacher_whose_later_parts_need_more_than_a_map_is_refused(name, message):
    student = timm.create_model("zoo_levit_128s", num_classes=3, **LEVIT)
    teacher = timm.create_model(name, num_classes=3, **TINY_FORMS[name]).eval().requires_grad_(False)
    with pytest.raises(ValueError, match=message):
        make_task(student, teacher, (3, 64, 64))


@pytest.mark.parametrize(("blocks", "expected"), [(2, "its block 0, then 1"), (6, "its block 4, then 5")])
def test_a_quarter_of_the_teachers_blocks_and_the_last_take_part(blocks, expected):
    assert Perception(timm.create_model("zoo_deit_t", **{**DEIT, "depth": blocks})).describe() == expected
    twelve = Perception(timm.create_model("zoo_deit_t", **{**DEIT, "depth": 12}))
    assert (list(twelve.first), twelve.last) == ([8, 9, 10], 11)


STUDENTS = {
    "zoo_levit_128s": LEVIT,
    "zoo_deit_t": DEIT,
    "zoo_poolformer_s12": {"depths": [1, 1], "embed_dims": [8, 16]},
    "test_resnet": {},
}
TEACHERS = {
    "zoo_deit_t": DEIT,
    "zoo_swin_t": SWIN,
    "vit_tiny_patch16_224": {"depth": 3, "embed_dim": 24, "num_heads": 2, "patch_size": 8, "img_size": 32},
}


@pytest.mark.parametrize("student", STUDENTS)
@pytest.mark.parametrize("teacher", TEACHERS)
def test_any_student_learns_from_any_teacher_which_does_not(student, teacher):
    size = (40, 32) if "zoo" in teacher and student != "zoo_levit_128s" else (32, 32)
    torch.manual_seed(0)
    own = timm.create_model(student, num_classes=3, **STUDENTS[student])
    theirs = timm.create_model(teacher, num_classes=3, **TEACHERS[teacher]).eval().requires_grad_(False)
    task = make_task(own, theirs, (3, *size))
    image = torch.randn(4, 3, *size)
    task.trainable_module.train()
    task(image, torch.tensor([0, 1, 2, 0]))["loss"].backward()
    assert all(p.grad is not None for p in task.trainable_module.parameters())
    assert all(p.grad is None for p in theirs.parameters()) and not theirs.training
    own.eval()
    logits, _ = task.trainable_module(image, task.perception)
    torch.testing.assert_close(logits, own(image))  # the student's own


@pytest.fixture(scope="module")
def vit_run(images, tmp_path_factory):
    """The checkpoint of a trained ViT."""
    output = tmp_path_factory.mktemp("teacher")
    parser = train_parser()
    parser.set_defaults(**{**TINY, "model": "zoo_deit_t", "model_kwargs": DEIT, "lr": 3e-3, "epochs": 4})
    parser.set_defaults(data_dir=str(images), output=str(output), experiment="vit")
    train(parser.parse_with_config([]))
    return output / "vit/last.pth.tar"


@pytest.fixture
def distil(make_args, vit_run):
    """Arguments of a student of the trained ViT."""

    def make(**changes):
        return make_args(**{**SCALEKD, "kd_checkpoint": str(vit_run), **changes})

    return make


def test_the_losses_fall_and_are_logged(distil, tmp_path, capsys):
    result = train(distil(epochs=5, no_curves=True))
    table = rows(tmp_path / "output/run")
    for name in ("train_loss", "train_feature_loss", "train_kd_loss"):
        assert float(table[-1][name]) < 0.9 * float(table[0][name])
    assert result["best_metric"] > 80  # of three classes
    said = capsys.readouterr().out
    assert "zoo_biformer_t: 0.01 M parameters" in said  # the projectors are not counted
    assert (
        "(scalekd)" in said
        and "ScaleKD: the student's features 0 and 1, through the teacher's parts: its block 1" in said
    )


def test_an_interrupted_run_is_the_one_that_ran_through(distil, tmp_path):
    options = {"epochs": 2, "model_ema": True, "model_ema_decay": 0.5, "no_curves": True}
    train(distil(experiment="straight", **options))
    train(distil(experiment="stopped", max_steps=UPDATES + 1, **options))
    train(distil(experiment="stopped", resume="auto", **options))
    straight, stopped = (tmp_path / "output" / name for name in ("straight", "stopped"))
    assert_same(learned(straight), learned(stopped))
    for key in ("task_state", "task_state_ema"):
        one, two = (read_checkpoint(folder / "last.pth.tar")[key] for folder in (straight, stopped))
        assert len(one["projection"]) > 60 and "1.frequency.mlp.fc2.bias" in one["projection"]
        assert_same(one["projection"], two["projection"])
    names = read_checkpoint(straight / "last.pth.tar")["state_dict"]
    assert not any("projection" in name or "teacher" in name for name in names)  # the model as it is without


def trained_in_a_process(args):
    """Train in one of several processes, as usual and by recordings; return what is learned beside the student."""
    process, found = start_process(args.device.device), []
    for graphs in (False, True):
        with pytest.MonkeyPatch.context() as patch:
            tapes(patch)
            run = build_run(changed(args, cuda_graphs=graphs, experiment=str(graphs)), process)
            make_capturable(run.optimizer)  # the same arithmetic
            Training(run).fit()
        assert isinstance(run.trainable, DistributedDataParallel) is not graphs
        found.append({name: value.tolist() for name, value in run.task.get_task_state()["projection"].items()})
    return found


@pytest.mark.slow
def test_several_processes_have_one_projector(distil):
    options = {"batch_size": 4, "opt": "sgd", "val_split": "", "dist_bn": "", "epochs": 1, "no_curves": True}
    (one, graphs), (two, _) = in_two_processes(trained_in_a_process, distil(**options))
    assert one == graphs
    assert {name for name in one if one[name] != two[name]} == {name for name in one if "running" in name}


def test_the_weight_of_the_features_counts(distil):
    losses = []
    for weight in (0.0, 2.0):
        run = build_run(distil(kd_feature_weight=weight, experiment=str(weight)), Process(torch.device("cpu")))
        run.trainable.train()
        torch.manual_seed(0)
        losses.append(run.task(torch.randn(4, 3, 32, 32), torch.tensor([0, 1, 2, 0])))
    none, twice = losses
    torch.testing.assert_close(none["loss"], 0.5 * none["task_loss"] + 0.5 * none["kd_loss"])
    torch.testing.assert_close(twice["loss"], none["loss"] + 2 * none["feature_loss"])


def test_logits_are_compared_in_float32_under_autocast_too():
    logits, target = torch.randn(2, 4, 10, generator=torch.Generator().manual_seed(0)).bfloat16().unbind(0)
    expected = logit_loss(logits.float(), target.float(), 1.0)
    with torch.autocast("cpu", torch.bfloat16):
        torch.testing.assert_close(logit_loss(logits, target, 1.0), expected)


def test_a_compiled_student_learns_alike(distil, tmp_path):
    options = {"epochs": 1, "max_steps": 2, "val_split": "", "no_curves": True}
    train(distil(experiment="plain", **options))
    train(distil(experiment="compiled", torchcompile="eager", **options))
    plain, compiled = (read_checkpoint(tmp_path / "output" / name / "last.pth.tar") for name in ("plain", "compiled"))
    for name, value in plain["state_dict"].items():
        torch.testing.assert_close(compiled["state_dict"][name], value)
    assert compiled["task_state"]["projection"].keys() == plain["task_state"]["projection"].keys()


@pytest.mark.parametrize(
    ("change", "messages"),
    [
        (
            {"model": "zoo_poolformer_s12", "model_kwargs": {"depths": [1], "embed_dims": [8]}},
            ["--kd-distill-type scalekd with zoo_poolformer_s12", "the student has 1 stage or block, expected two"],
        ),
        ({"img_size": 40, "input_size": None, "in_chans": 1}, ["does not take the student's images, (1, 40, 40)"]),
    ],
)
def test_what_cannot_be_is_refused_before_the_first_step(distil, change, messages):
    with pytest.raises(UserError) as error:
        train(distil(**change))
    for message in messages:
        assert message in str(error.value)
