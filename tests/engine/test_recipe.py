"""Each part of timm's recipe does what it says, and a YAML of timm's own train script runs."""

import math

import pytest
import torch
from engine.helpers import TINY, UPDATES, learned, rows
from PIL import Image

from visionzoo.engine.building import build_run
from visionzoo.engine.calling import prepare_compiler
from visionzoo.engine.checkpoints import read_checkpoint
from visionzoo.engine.errors import UserError
from visionzoo.engine.evaluation import evaluate_checkpoint
from visionzoo.engine.flags import train_parser
from visionzoo.engine.parallel import Process
from visionzoo.engine.prediction import predict
from visionzoo.engine.trained_flags import eval_parser, predict_parser
from visionzoo.engine.training import Training, train

CPU = Process(torch.device("cpu"))
PLAIN = {"no_aug": True, "drop_path": 0.0, "epochs": 1}  # nothing random
SMALL = {"model": "zoo_poolformer_s12", "model_kwargs": {"depths": [1, 1], "embed_dims": [8, 16]}}  # quick to compile


def last(tmp_path, name):
    return learned(tmp_path / "output" / name)


def close(one, two, **tolerances):
    for name in one["state_dict"]:
        torch.testing.assert_close(one["state_dict"][name], two["state_dict"][name], **tolerances)


@pytest.mark.parametrize(
    "change",
    [{"grad_checkpointing": True}, {"channels_last": True}, {"torchcompile": "aot_eager"}],
    ids=lambda change: next(iter(change)),
)
def test_what_saves_memory_or_time_learns_the_same(make_args, tmp_path, change):
    few = {**PLAIN, **(SMALL if "torchcompile" in change else {})}
    train(make_args(experiment="plain", opt="sgd", **few))
    train(make_args(experiment="other", opt="sgd", **few, **change))
    one, other = last(tmp_path, "plain"), last(tmp_path, "other")
    assert one["state_dict"].keys() == other["state_dict"].keys()  # the names of the plain model
    close(one, other, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("channels_last", [True, False])
def test_inductor_leaves_channels_last_models_alone(make_args, channels_last):
    with torch._inductor.config.patch(layout_optimization=True):
        prepare_compiler(make_args(torchcompile="inductor", channels_last=channels_last).model)
        assert torch._inductor.config.layout_optimization != channels_last


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_mixed_precision_learns_nearly_the_same(make_args, tmp_path, dtype):
    train(make_args(experiment="plain", opt="sgd", lr=1e-3, **PLAIN))
    result = train(make_args(experiment="mixed", opt="sgd", lr=1e-3, amp=True, amp_dtype=dtype, **PLAIN))
    one, other = last(tmp_path, "plain"), last(tmp_path, "mixed")
    assert ("amp_scaler" in other) == (dtype == "float16")
    assert all(value.dtype == torch.float32 for value in other["state_dict"].values() if value.is_floating_point())
    assert result["train_loss"] == pytest.approx(one["losses"][0] / one["losses"][1], rel=0.02)
    assert result["train_loss"] != one["losses"][0] / one["losses"][1]
    close(one, other, rtol=0.1, atol=0.02)


def gradients_at_the_step(args):
    """Run a training of one update; return the gradients that its optimizer saw, and the parameters."""
    run = build_run(args, CPU)
    seen, step = {}, run.optimizer.step

    def record(*rest, **more):
        seen.update({name: p.grad.clone() for name, p in run.trainable.named_parameters()})
        return step(*rest, **more)

    run.optimizer.step = record
    Training(run)._start_bar()
    Training(run).fit()
    return seen


def test_gradients_are_clipped_by_norm_value_and_adaptively(make_args):
    options = dict(PLAIN, max_steps=1)
    free = gradients_at_the_step(make_args(experiment="free", **options))
    norm = math.sqrt(sum(float(g.square().sum()) for g in free.values()))
    clipped = gradients_at_the_step(make_args(experiment="norm", clip_grad=norm / 3, **options))
    for name, gradient in clipped.items():
        torch.testing.assert_close(gradient, free[name] / 3, rtol=1e-4, atol=1e-8)
    limit = float(max(g.abs().max() for g in free.values())) / 2
    clipped = gradients_at_the_step(make_args(experiment="value", clip_grad=limit, clip_mode="value", **options))
    for name, gradient in clipped.items():
        torch.testing.assert_close(gradient, free[name].clamp(-limit, limit))
    clipped = gradients_at_the_step(make_args(experiment="agc", clip_grad=1e-3, clip_mode="agc", **options))
    assert torch.equal(clipped["head.fc.weight"], free["head.fc.weight"])  # the classifier is left out
    weight = next(name for name, gradient in free.items() if gradient.ndim == 2 and "blocks" in name)
    assert float(clipped[weight].norm()) < 0.5 * float(free[weight].norm())


@pytest.mark.parametrize("sched", ["cosine", "none"])
def test_layer_decay_gives_early_layers_less(make_args, sched):
    run = build_run(make_args(layer_decay=0.5, lr=1.0, sched=sched), CPU)
    names = {id(parameter): name for name, parameter in run.trainable.named_parameters()}
    scales = {names[id(p)]: group["lr"] for group in run.optimizer.param_groups for p in group["params"]}
    assert scales["head.fc.weight"] == 1.0
    assert scales["stem.0.conv.weight"] < scales["stages.0.blocks.0.norm1.weight"] < scales["norm.weight"] <= 1.0
    ratio = scales["stages.1.blocks.0.norm1.weight"] / scales["stages.0.blocks.0.norm1.weight"]
    assert math.log2(ratio) == int(math.log2(ratio)) >= 1


def test_warm_up_lets_the_average_follow_at_first(make_args, tmp_path):
    train(make_args(experiment="long", model_ema=True, model_ema_decay=0.9999, **PLAIN))
    train(make_args(experiment="warm", model_ema=True, model_ema_decay=0.9999, model_ema_warmup=True, **PLAIN))

    def distance(name):
        state = last(tmp_path, name)
        return float((state["state_dict"]["head.fc.weight"] - state["state_dict_ema"]["head.fc.weight"]).norm())

    assert 0 < distance("warm") < 0.7 * distance("long")


def test_images_are_mixed_erased_and_augmented(make_args):
    run = build_run(make_args(mixup=1.0, cutmix=1.0, reprob=1.0, aa="rand-m9-mstd0.5-inc1", smoothing=0.0), CPU)
    batches = list(Training(run)._remaining_batches())
    targets = torch.cat([targets for _, _, targets in batches])
    assert targets.shape[1] == 3 and torch.allclose(targets.sum(1), torch.ones(len(targets)))
    assert (targets.max(1).values < 0.999).any()
    assert run.loader.random_erasing.probability == 1.0
    assert "RandAugment" in str(run.train_set.transform)


@pytest.mark.parametrize(
    ("model", "kwargs"),
    [
        ("zoo_pvt_t", {"depths": [1] * 4, "embed_dims": [8, 16, 16, 16], "num_heads": [1] * 4}),  # tables of positions
        ("zoo_swin_t", {"depths": [1] * 4, "embed_dims": [8, 16, 16, 16], "num_heads": [1] * 4}),  # windows
        ("zoo_biformer_t", {"depths": [1, 1], "embed_dims": [8, 16], "topks": [1, -2], "regions": 2}),
    ],
    ids=["pvt", "swin", "biformer"],
)
def test_a_run_goes_on_at_another_resolution(make_args, tmp_path, model, kwargs):
    first = {"model": model, "model_kwargs": kwargs, "epochs": 1}
    train(make_args(experiment="small", **first))
    start = str(tmp_path / "output/small/last.pth.tar")
    result = train(make_args(experiment="large", initial_checkpoint=start, **{**first, "img_size": 48}))
    assert math.isfinite(result["train_loss"])
    assert read_checkpoint(tmp_path / "output/large/last.pth.tar")["data_config"]["input_size"] == (3, 48, 48)


def test_gates_are_added_to_a_trained_model(make_args, trained, tmp_path, capsys):
    start = str(trained[0] / "model_best.pth.tar")
    gated = {"model_kwargs": {**TINY["model_kwargs"], "gates": [{"type": "cbam", "reduction": 4}, "eca"]}}
    train(make_args(initial_checkpoint=start, epochs=1, **gated))
    assert "missing: stages.0.blocks.0.branch_gate." in capsys.readouterr().out
    trained_names = last(tmp_path, "run")["state_dict"]
    assert any(".branch_gate." in name for name in trained_names)
    with pytest.raises(UserError, match="does not fit BiFormer"):
        train(make_args(initial_checkpoint=start, epochs=1, model_kwargs={**gated["model_kwargs"], "topks": [1, 4]}))


def test_linear_probing_changes_the_classifier_alone(make_args, trained, tmp_path):
    start = str(trained[0] / "model_best.pth.tar")
    with pytest.raises(UserError, match="features of random weights"):
        train(make_args(freeze=True))
    train(make_args(freeze=True, initial_checkpoint=start, epochs=1))
    before, after = read_checkpoint(start)["state_dict_ema"], last(tmp_path, "run")["state_dict"]
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert changed == {"head.fc.weight", "head.fc.bias"}  # nor have batch norms seen a thing
    run = build_run(make_args(freeze=True, initial_checkpoint=start, experiment="x"), CPU)
    assert sum(len(group["params"]) for group in run.optimizer.param_groups) == 2


def test_synchronised_batch_norm_without_gpus_is_refused(make_args):
    with pytest.raises(UserError, match="needs GPUs"):
        build_run(make_args(sync_bn=True), Process(torch.device("cpu"), distributed=True))


# Hyper-parameters as people publish them for timm's train script.
YAMLS = {
    "a1-like": "aa: rand-m7-mstd0.5-inc1\namp: true\namp_dtype: bfloat16\namp_impl: native\naug_repeats: 0.0\n"
    "bce_loss: true\nbce_target_thresh: 0.2\nbatch_size: 8\nclip_grad: null\nclip_mode: norm\ncutmix: 1.0\n"
    "decay_rate: 0.1\ndrop_path: 0.05\nepochs: 1\nlr: 5.0e-03\nmixup: 0.2\nopt: lamb\nreprob: 0.0\nsched: cosine\n"
    "smoothing: 0.0\nwarmup_epochs: 0\nwarmup_lr: 1.0e-05\nweight_decay: 0.02\nworker_seeding: all\nfuser: ''\n"
    "torchscript: false\nno_prefetcher: false\npatience_epochs: 10\ncooldown_epochs: 0\nmodel_ema: false\n"
    "split_bn: false\naug_splits: 0\njsd_loss: false\nresplit: false\ntta: 0\nlocal_rank: 0\nsync_bn: false\n",
    "fine-tune": "data: null\nmodel_kwargs: {}\nlayer-decay: 0.7\nopt: adamw\nopt-betas: [0.9, 0.98]\nopt_eps: 1e-6\n"
    "lr_base: 5e-4\nlr_base_size: 512\nlr_base_scale: linear\nsched-on-updates: true\nepochs: 1\nwarmup_epochs: 0\n"
    "model-ema: true\nmodel-ema-decay: 0.998\nmodel-ema-warmup: true\nclip-grad: 1.0\ngrad_accum_steps: 2\n"
    "batch-size: 4\ntrain_crop_mode: rkrc\nscale: [0.8, 1.0]\nreprob: 0.25\nmean: [0.5, 0.5, 0.5]\n"
    "std: [0.5, 0.5, 0.5]\nnaflex_loader: false\nnaflex_train_seq_lens: [128, 256]\nmodel_dtype: null\n"
    "device_modules: null\nhead_init_scale: null\n",
    "old": "native_amp: false\napex_amp: false\nprefetcher: true\ndistributed: false\nworld_size: 1\nrank: 0\n"
    "drop_connect: null\nepochs: 1\nopt: rmsproptf\nopt_eps: .001\nsched: step\ndecay_epochs: 2.4\ndecay_rate: 0.97\n"
    "warmup_epochs: 0\nbatch_size: 8\nlr: .048\nweight_decay: 1e-5\nmodel_ema_force_cpu: false\nremode: pixel\n",
}


@pytest.mark.parametrize("name", YAMLS)
def test_a_yaml_of_timms_train_script_runs_unchanged(images, tmp_path, name):
    path = tmp_path / "timm.yaml"
    path.write_text(YAMLS[name])
    flags = ["--data-dir", str(images), "--output", str(tmp_path), "--experiment", "run", "--img-size", "32"]
    flags += ["--device", "cpu", "-j", "0", "--model", "test_convnext"]
    result = train(train_parser().parse_with_config(["--config", str(path), *flags]))
    assert math.isfinite(result["train_loss"])
    args = train_parser().parse_with_config([str(tmp_path / "run/args.yaml"), "--experiment", "again"])  # and our own
    assert args.optimizer == train_parser().parse_with_config([str(path)]).optimizer


@pytest.fixture
def labelled(images, tmp_path):
    """Pictures of two halves, each of a color: both colors are labels; grey ones have none."""
    colours = {"blue": (30, 30, 220), "green": (30, 220, 30), "red": (220, 30, 30)}
    for split, count in (("train", 32), ("validation", 12)):
        folder = tmp_path / "labelled" / split
        (folder / "pictures").mkdir(parents=True)
        lines = ["image,labels"]
        for number in range(count):
            labels = [[], ["red"], ["blue", "red"], ["green", "blue"]][number % 4]
            picture = Image.new("RGB", (40, 40), (128, 128, 128))
            for place, label in enumerate(labels):
                picture.paste(colours[label], (0, 20 * place, 40, 20 * place + 20))
            picture.save(folder / "pictures" / f"{number}.png")
            lines.append(f"pictures/{number}.png,{';'.join(labels)}")
        (folder / "labels.csv").write_text("\n".join(lines) + "\n")
    return tmp_path / "labelled"


def test_images_with_several_labels_are_learned_evaluated_and_predicted(make_args, labelled, tmp_path):
    options = dict(data_dir=str(labelled), multi_label=True, no_aug=True, epochs=12, model_ema=True)
    result = train(make_args(**options, model_ema_decay=0.5))
    table = rows(tmp_path / "output/run")
    assert float(table[-1]["train_loss"]) < 0.5 * float(table[0]["train_loss"])
    assert result["best_metric"] > 90 and result["best_metric"] == max(float(row["eval_map"]) for row in table)
    assert "eval_top1" not in table[0] and float(table[-1]["raw_map"]) > 90
    best = str(tmp_path / "output/run/model_best.pth.tar")
    args = eval_parser().parse(["--checkpoint", best, "--device", "cpu", "-j", "0", "-b", "5", "--recorded-data"])
    found = evaluate_checkpoint(args)
    assert found["map"] == pytest.approx(result["best_metric"], abs=1e-3) and "top1" not in found
    picture = str(labelled / "validation/pictures/2.png")
    flags = [picture, "--checkpoint", best, "--device", "cpu", "--output", str(tmp_path / "p"), "--topk", "3"]
    classes = {c["name"]: c["probability"] for c in predict(predict_parser().parse(flags))[0]["classes"]}
    assert classes["blue"] + classes["red"] > 1.0 > 2 * classes["green"]  # probabilities of their own


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda table: table.unlink(), "needs a table of labels in the split's folder"),
        (lambda table: table.write_text("a,b\n1,2\n"), "expected a header `image,labels`"),
        (lambda table: table.write_text("image,labels\nnowhere.png,red\n"), "1 image is not there, such as nowhere"),
        (lambda table: table.write_text(table.read_text() + "pictures/0.png,red\n"), "is listed twice: pictures/0.png"),
        (lambda table: table.write_text("image,labels\npictures/0.png,pink\n"), "not trained on"),
    ],
    ids=["none", "header", "image", "twice", "label"],
)
def test_tables_of_labels_that_cannot_be_are_refused(make_args, labelled, spoil, message):
    spoil(labelled / "validation/labels.csv")
    with pytest.raises(UserError, match=message):
        train(make_args(data_dir=str(labelled), multi_label=True))


def test_unreadable_images_of_several_labels_are_passed_over(make_args, labelled, tmp_path):
    (labelled / "validation/pictures/1.png").write_bytes(b"")
    with pytest.raises(UserError, match=r"cannot use the image .*validation/pictures/1\.png"):
        train(make_args(data_dir=str(labelled), multi_label=True, epochs=1, experiment="strict"))
    result = train(make_args(data_dir=str(labelled), multi_label=True, epochs=1, skip_bad_images=True))
    assert result["updates"] == UPDATES and math.isfinite(result["eval_map"])


def test_a_model_is_told_which_epoch_begins(make_args, monkeypatch):
    """Lambda ViT's attention fades out by it, in the moving average too."""
    told = []
    monkeypatch.setattr("visionzoo.models.lambda_vit.LambdaViT.set_epoch", lambda self, epoch: told.append(epoch))
    small = {"depth": 2, "embed_dim": 8, "num_heads": 1, "removed": [], "fading": [0]}
    train(make_args(model="zoo_lambda_vit_t_024", model_kwargs=small, model_ema=True))
    assert told == [0, 0, 1, 1]
