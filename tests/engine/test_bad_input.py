"""What cannot work is refused in one message that says what was expected, what came and what to do; by the commands."""

import os
import pickle
import shlex
import shutil

import pytest
import timm
import torch
from engine.helpers import run_tool, truncate, write_images, write_pickle_that_runs, write_splits
from PIL import Image

TRAIN = (
    "--model test_convnext --data-dir d --img-size 32 -b 4 --epochs 1 --warmup-epochs 0 --device cpu -j 0 --output o"
)


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A folder with data sets, configs and checkpoints, good and bad ones; the tests run in it."""
    path = tmp_path_factory.mktemp("place")
    before = os.getcwd()
    os.chdir(path)
    torch.set_num_threads(1)
    write_splits(path / "d")
    assert run_tool("train", *TRAIN.split(), "--experiment", "good") == 0
    for name, text in FILES.items():
        (path / name).parent.mkdir(parents=True, exist_ok=True)
        (path / name).write_bytes(text if isinstance(text, bytes) else text.encode())
    write_images(path / "strange", per_class=1, seed=0)
    (path / "strange/red").rename(path / "strange/crimson")
    (path / "flat").mkdir()
    Image.new("RGB", (9, 9)).save(path / "flat/a.png")
    (path / "empty").mkdir()
    good = torch.load("o/good/last.pth.tar")
    shutil.copy("o/good/last.pth.tar", "cut.pth")
    truncate(path / "cut.pth")
    write_pickle_that_runs(path / "code.pth", path / "witness")
    torch.save({"state_dict": {"weight": torch.zeros(1)}}, "other.pth")
    torch.save(torch.zeros(3), "tensor.pth")
    vit = timm.create_model("test_vit3", num_classes=3).state_dict()
    torch.save({"state_dict": vit, "args": {"model": "test_vit3", "num_classes": 3}}, "vit.pth")
    torch.save({**good, "epoch": "three"}, "epoch.pth")
    shutil.copy("o/good/last.pth.tar", "good.pth")
    torch.save({"state_dict": {"x": torch.zeros(1)}, "args": {"model": "zoo_pvtv2_b0", "decoder": []}}, "tasks.pth")
    dense = {"backbone.stem.weight": torch.zeros(1), "bbox_head.fc.weight": torch.zeros(1)}
    torch.save({"meta": {"epoch": 1}, "state_dict": dense}, "detector.pth")
    torch.save({name: value for name, value in good.items() if name != "optimizer"}, "without.pth")
    torch.save({**good, "state_dict": {**good["state_dict"], "head.fc.bias": torch.zeros(2)}}, "misfit.pth")
    yield path
    os.chdir(before)
    assert not (path / "witness").exists()
    assert [run.name for run in (path / "o").iterdir()] == ["good"]  # what is refused leaves no run folder


FILES = {
    "none.yaml": "",
    "list.yaml": "- epochs",
    "open.yaml": "epochs: [",
    "key.yaml": "batchsize: 3",
    "type.yaml": "epochs: ten",
    "range.yaml": "lr: -1",
    "twice.yaml": "epochs: 1\nepochs: 2",
    "code.yaml": "!!python/object/apply:os.mkdir [witness]",
    "binary.yaml": b"\xff\xfe\xfa",
    "other.txt": "cat\ndog\n",
    "file.txt": "no image",
    "map.pkl": pickle.dumps({"red": 0}),
    "false.tar": "no tar",
    "zero.pth": "",
    "table/train/labels.csv": "name,class\na.png,1\n",
    "missing/train/labels.csv": "image,labels\na.png,red\n",
}

OPTIONS = [
    ("--mixers full", "unknown argument --mixers; it is an argument of the model: --model-kwargs mixers=VALUE"),
    ("--epoch 3", "unknown argument --epoch; did you mean --epochs"),
    ("--epochs three", "argument --epochs: invalid int value: 'three'"),
    ("--epochs 0", "argument --epochs: expected a number at least 1, got 0"),
    ("-b 0", "--batch-size: expected a number at least 1, got 0"),
    ("-b 100", "12 training images do not fill one batch of 100 on 1 device(s); give a smaller --batch-size"),
    ("-b 3 --mixup 1", "mixup and cutmix need an even --batch-size, got 3"),
    ("-j -1", "--workers: expected a number at least 0, got -1"),
    ("--lr nan", "argument --lr: expected a number at least 0, got nan"),
    ("--img-size 0", "argument --img-size: expected a number at least 1, got 0"),
    ("--num-classes 5", "num_classes is 5, the data set has 3 classes (blue, green, red)"),
    ("--in-chans 5", "the model takes 5 channels (--in-chans, --input-size), images of mode L have 1"),
    ("--input-img-mode XYZ", "--input-img-mode: expected one of L, LA, RGB"),
    ("--grad-accum-steps 0", "argument --grad-accum-steps: expected a number at least 1"),
    ("--model-kwargs depths=[1] --model-kwargs dims=[8]", "--model-kwargs is given twice; put all its values behind"),
    ("--scale 0.5 1 --scale=0.1", "--scale is given twice; put all its values behind one"),
    ("--drop-path 2", "argument --drop-path: expected a number at least 0 and at most 1, got 2"),
    ("--smoothing 1", "argument --smoothing: expected a number at least 0 and below 1, got 1"),
    ("--layer-decay 0", "argument --layer-decay: expected a number above 0 and at most 1, got 0"),
    ("--scale 0.9 0.1", "--scale: expected two numbers, the smaller one first, got 0.9 0.1"),
    ("--ratio 1", "--ratio: expected two numbers"),
    ("--aa nonsense", "Unknown AA policy nonsense"),
    ("--interpolation cubic", "argument --interpolation: invalid choice: 'cubic'"),
    ("--mean 0.5 0.5", "--mean: expected 1 or 3 numbers, one per channel, got 2"),
    ("--std 0 0 0", "argument --std: expected a number above 0, got 0"),
    ("--opt nope", "cannot make the optimizer opt='nope'"),
    ("--opt adamw --opt-betas 0.9", "cannot make the optimizer opt='adamw': --opt-betas: expected 2, got 1"),
    ("--opt adamw --opt-betas 0.9 0.8 0.7", "--opt-betas: expected 2, got 3"),
    ("--opt adan --opt-betas 0.9 0.8", "--opt-betas: expected 3, got 2"),
    ("--opt muon --opt-betas 0.9", "--opt-betas: expected 2, got 1"),
    ("--opt-kwargs nope=1", "cannot make the optimizer opt='sgd': SGD.__init__() got an unexpected keyword"),
    ("--opt-kwargs nope", "expected key=value, got 'nope'"),
    ("--sched wave", "argument --sched: invalid choice: 'wave'"),
    ("--lr-noise 0.9 0.1", "--lr-noise: expected one or two shares, rising, got 0.9 0.1"),
    ("--lr-noise 0.1 0.2 0.3", "--lr-noise: expected one or two shares, rising, got 0.1 0.2 0.3"),
    ("--lr-noise 0.1 --lr-noise-pct 0", "argument --lr-noise-pct: expected a number above 0, got 0"),  # for ever
    ("--decay-milestones 5 3", "--decay-milestones: expected epochs, rising, got 5 3"),
    ("--decay-milestones -5", "argument --decay-milestones: expected a number at least 1, got -5"),
    ("--start-epoch 1", "--start-epoch 1: the run ends before, after 1 epoch"),
    ("--in-chans 3 --input-size 1 32 32", "--in-chans 3 together with --input-size of 1 channel; give the same, or"),
    ("--crop-pct 100", "argument --crop-pct: expected a number at least 0.01 and at most 10.0, got 100"),
    ("--interpolation random", "argument --interpolation: invalid choice: 'random'"),
    ("--seed -1", "argument --seed: expected a number at least 0"),
    ("--device gpu", "unknown device"),
    ("--device meta", "device 'meta' cannot compute"),
    ("--amp --amp-dtype float8", "argument --amp-dtype: invalid choice: 'float8'"),
    ("--torchcompile nope", "--torchcompile: expected one of"),
    ("--torchcompile-mode default", "--torchcompile-mode default is of --torchcompile, which is not given"),
    ("--torchcompile --torchcompile-mode nope", "--torchcompile-mode: expected one of default"),
    ("--aug-repeats 3", "--aug-repeats needs several processes"),
    ("--crop-padding 32", "--crop-padding: expected fewer pixels than the input's 32, got 32"),
    ("--crop-padding 4 --train-crop-mode rkrc", "--crop-padding does not go with --train-crop-mode rkrc"),
    ("--fsdp", "start several by torchrun"),
    ("--cuda-graphs", "--cuda-graphs: only launches on a CUDA device can be recorded, this is cpu"),
    ("--aux-weight balance=1", "--aux-weight balance=1: test_convnext as built has no exits and no terms"),
    ("--aux-weight balance", "--aux-weight: expected NAME=W, got 'balance'"),
    ("--freeze", "--freeze trains only the classifier, on features of random weights"),
    ("--freeze-layers 0=1", "--freeze-layers freezes 1 layer of random weights at epoch 0; give --pretrained"),
    ("--relaxed-attention 2", "argument --relaxed-attention: expected a number at least 0 and at most 1, got 2"),
    (
        "--relaxed-attention 0.1",
        "test_convnext has 0 mixers of this package, and none that it can change; it can change",
    ),
    ("--relaxed-attention-std 0.1", "--relaxed-attention-std 0.1 is drawn around --relaxed-attention: give that too"),
    ("--subsample-attention 0", "argument --subsample-attention: expected a number above 0 and at most 1, got 0"),
    ("--subsample-attention 0.5", "--subsample-attention: test_convnext has 0 mixers of this package, and none that"),
    ("--quantize weights=2", "--quantize: activations missing; give both, as weights=4 activations=4"),
    ("--quantize", "argument --quantize: expected at least one argument"),
    ("--quantize 4 4", "--quantize: expected key=value, got '4'"),
    (
        "--quantize weights=2 activations=2 bits=3",
        "--quantize: expected weights, activations, weight_quantizer, repara",
    ),
    ("--quantize weights=1 activations=2", "--quantize: test_convnext: weights: expected 2 to 8 bits, got 1"),
    ("--quantize weights=2 activations=two", "--quantize: test_convnext: activations: expected 2 to 8 bits, got 'two'"),
    ("--quantize weights=2 activations=2 weight_quantizer=dorefa", "expected one of statsq, lsq, got 'dorefa'"),
    ("--quantize weights=2 activations=2 reparameterize=yes", "reparameterize: expected True or False, got 'yes'"),
    (
        "--quantize weights=2 activations=2 reparameterize=True",
        "--quantize: test_convnext: reparameterize: the model has 0 mixers, and none whose queries and keys are",
    ),
    ("--quantize-anneal 1", "--quantize-anneal is the end of a training with --quantize: give that too"),
    ("--quantize-margin 0", "argument --quantize-margin: expected a number above 0 and at most 0.5, got 0"),
    (
        "--quantize weights=2 activations=2 --quantize-anneal 1",
        "--quantize-anneal 1: the run has 1 epoch, and weights have to learn before; give fewer, or as many --cooldown",
    ),
    (
        "--quantize weights=8 activations=8 --quantize-anneal 1 --epochs 2",
        "--quantize-anneal: no weight that learns is quantized by StatsQ, of less than 8 bits; give --quantize w",
    ),
    (
        "--quantize weights=2 activations=2 --quantize-anneal 1 --epochs 2 --freeze --initial-checkpoint "
        "o/good/last.pth.tar",
        "--quantize-anneal: no weight that learns is quantized by StatsQ, of less than 8 bits; leave --freeze out",
    ),
    ("--kd-feature-weight -1", "argument --kd-feature-weight: expected a number at least 0, got -1"),
    ("--kd-distill-type scaled", "argument --kd-distill-type: invalid choice: 'scaled'"),
    ("--kd-distill-type scalekd", "--kd-distill-type scalekd learns from a teacher: give --kd-checkpoint or"),
    ("--freeze-layers 1=x", "--freeze-layers: expected EPOCH=COUNT, whole numbers from 0, got count 'x'"),
    ("--freeze-layers 1=1 1=2", "--freeze-layers: 1 is given twice; keep one"),
    ("--freeze-layers 900=1", "--freeze-layers 900=1: the run ends before, after"),
    ("--quantize weights=4 activations=4 weights=2", "--quantize: weights is given twice; keep one"),
    ("--freeze-layers 2", "--freeze-layers: expected EPOCH=N, got '2'"),
    ("--freeze-layers 1=99", "--freeze-layers 1=99: test_convnext has"),
    ("--freeze-layers 0=1 --freeze --initial-checkpoint o/good/last.pth.tar", "--freeze leaves only the classifier"),
]
MODELS = [
    ("--model zoo_biformer", "unknown model 'zoo_biformer'; did you mean zoo_biformer_t"),
    ("--model zoo_davit_t.nope", "Published weights: zoo_davit_t.msft_in1k"),
    ("--model local-dir:empty --pretrained", "no weights for local-dir:empty: Config file not found"),
    ("--model qqqqq", "unknown model 'qqqqq'; `visionzoo models` lists those of the zoo, timm.list_models() all"),
    (
        "--model-kwargs mixers={type:",
        "--model-kwargs mixers={type:: expected a mapping or a list in brackets; in a",
    ),
    ("--model-kwargs nope=1", "test_convnext does not take --model-kwargs {'nope': 1}"),
    ("--bn-momentum 0.2", "test_convnext does not take one of the flags: "),
    ("--model test_vit3", "test_vit3 does not take images of 32 x 32 pixels: Input height (32) doesn't match model"),
    ("--model test_vit3", "the model's own is 160 x 160. To build it for these: --model-kwargs img_size=32"),
    ("--model inception_v3", "inception_v3 does not take images of 32 x 32 pixels: "),
    ("--model test_resnet -b 1", "pixels one by one: Expected more than 1 value per channel when training, got"),
    ("--img-size 10000000", "test_convnext does not take images of 10000000 x 10000000 pixels: "),
    ("--gp=", "--gp '': without pooling a model has logits for each place; name a pooling, or leave it out"),
    ("--gp nope", "cannot build test_convnext: Invalid pool type: nope"),
    ("--kd-checkpoint nowhere", "the teacher nowhere (--kd-model-name, --kd-checkpoint): no checkpoint at nowhere"),
    ("--kd-distill-type scalekd --kd-checkpoint o/good/last.pth.tar", "the teacher is a ConvNeXt; its later parts"),
]
DATA = [
    ("--data-dir nowhere", "no data at nowhere"),
    ("--data-dir empty", "Found 0 images in subfolders of empty"),
    ("--data-dir flat --val-split=", "images lie beside the folders of the classes: 1 in flat"),
    ("--data-dir file.txt", "expected a folder or a .tar of class folders, got file.txt"),
    ("--data-dir false.tar", "cannot open the 'train' split of false.tar"),
    ("--data-dir d/train", "training and validation would read the same images, d/train"),
    ("--train-split nope", "no 'nope' split in d; its folders are train, val"),
    ("--val-data-dir strange", "1 class of the evaluated images was not trained on: crimson; the training had blue"),
    ("--dataset cifar10", "unknown data set 'cifar10'; expected torch/..., hfds/..."),
    ("--dataset torch/nope", "Unknown torchvision dataset nope"),
    ("--dataset visionzoo/digits", "comes with visionzoo, and the images in d would not be read; leave --data-dir out"),
    ("--dataset visionzoo/nope", "unknown embedded data set 'visionzoo/nope'; there is visionzoo/digits"),
    ("--class-map nowhere.txt", "cannot read the class map nowhere.txt"),
    ("--class-map other.txt", "other.txt names none of the folders in d/train, which are blue, green, red"),
    ("--class-map map.pkl", "--class-map: expected a .txt of class names"),
    ("--multi-label", "--multi-label needs a table of labels in the split's folder: d/train/labels.csv"),
    ("--multi-label --data-dir table", "labels.csv: expected a header `image,labels` and a row for each image, got"),
    ("--multi-label --data-dir missing", "labels.csv: 1 image is not there, such as a.png"),
]
CONFIGS = [
    ("nowhere.yaml", "cannot read the config nowhere.yaml: "),
    ("empty", "expected a YAML file, got the folder empty"),
    ("none.yaml", "none.yaml: expected a mapping of flag names to values, got NoneType"),
    ("list.yaml", "list.yaml: expected a mapping of flag names to values, got list"),
    ("open.yaml", "open.yaml is not YAML"),
    ("key.yaml", "key.yaml: unknown key 'batchsize'; did you mean batch_size"),
    ("type.yaml", "type.yaml: epochs: expected int, got 'ten'"),
    ("range.yaml", "range.yaml: lr: expected a number at least 0, got -1"),
    ("twice.yaml", "twice.yaml: given twice: epochs"),
    ("code.yaml", "code.yaml is not YAML: could not determine a constructor for the tag"),
    ("binary.yaml", "cannot read the config binary.yaml"),
    ("key.yaml -c type.yaml", "two configs: key.yaml and --config type.yaml; give one"),
]
CHECKPOINTS = [
    ("--initial-checkpoint nowhere.pth", "no checkpoint at nowhere.pth"),
    ("--pretrained-path nowhere.pth", "no checkpoint at nowhere.pth (--pretrained-path)"),
    ("--initial-checkpoint tensor.pth", "tensor.pth holds a Tensor, expected a state_dict"),
    ("--initial-checkpoint other.pth", "cannot load other.pth into ConvNeXt"),
    ("--initial-checkpoint other.pth", '"stem.0.weight", "stem.0.bias", "stem.1.weight" and '),
    ("--initial-checkpoint misfit.pth", "size mismatch for head.fc.bias"),
    ("--initial-checkpoint code.pth", "code.pth is refused"),
    ("--resume code.pth", "code.pth is refused"),
    ("--resume cut.pth", "cannot be read as a checkpoint, it is damaged or cut short"),
    ("--resume other.pth", "other.pth holds no training state; to start from its weights use --initial-checkpoint"),
    ("--resume misfit.pth", "misfit.pth does not fit this run of test_convnext"),
    ("--resume epoch.pth", "epoch.pth records epoch='three', expected 0 to 1,000,000,000"),
    ("--resume without.pth", "without.pth lacks 'optimizer'; --no-resume-opt loads only its weights"),
    ("--resume o/good/last.pth.tar --model test_vit", "is a checkpoint of test_convnext, this run is of test_vit"),
    ("--resume o/good/last.pth.tar --opt adamw", "was trained by opt='sgd', this run has 'adamw'"),
    ("--resume auto", "give the name, or --resume FILE"),
    ("--experiment good", "o/good holds a run already; continue it by --resume auto"),
    ("--output file.txt", "cannot make the folder file.txt/"),
]
NO_CLASSIFIERS = {
    "tasks.pth": "tasks.pth is of a run of `visionzoo multi-task`",
    "detector.pth": "`visionzoo predict|eval|view|export CONFIG.py ... --checkpoint detector.pth`",
    "detector.pth --model test_vit": "detector.pth is of a detector or segmentor, not of a classifier",
    "zero.pth": "zero.pth (0 bytes) cannot be read as a checkpoint, it is damaged or cut short: it is empty. Copy",
    "o/good": "o/good is a folder without model.safetensors; name one of its files, ",
}
OTHERS = [
    ("eval", "", "which model?"),
    ("eval", "--model test_vitt", "unknown model 'test_vitt'; did you mean test_vit"),
    ("eval", "--model test_vit", "test_vit has no weights: give --checkpoint or --pretrained"),
    ("eval", "--checkpoint cut.pth", "it is damaged or cut short"),
    ("eval", "--checkpoint o/good/last.pth.tar --data-dir strange", "not trained on: crimson"),
    ("eval", "--checkpoint vit.pth --data-dir d --img-size 64", "test_vit3 does not take images of 64 x 64 pixels"),
    ("predict", "d/train --checkpoint vit.pth --img-size 64", "test_vit3 does not take images of 64 x 64 pixels"),
    ("eval", "--checkpoint o/good/last.pth.tar --recorded-data --split nope", "no 'nope' split in d"),
    ("eval", "--checkpoint o/good/last.pth.tar --results-file file.txt/x.json", "cannot make the folder file.txt"),
    ("eval", "--checkpoint o/good/last.pth.tar --data-dir d --exits", "expected a model of the zoo"),
    ("predict", "nowhere.png --checkpoint o/good/last.pth.tar", "no images at nowhere.png; known endings are"),
    ("predict", "d/train --checkpoint o/good/last.pth.tar --budget 0", "--budget: expected a number above 0, got 0"),
    ("predict", "file.txt --checkpoint o/good/last.pth.tar", "cannot use the image file.txt"),
    ("predict", "d/train --checkpoint o/good/last.pth.tar --class-names other.txt", "has 3 classes, other.txt names 2"),
    ("predict", "d/train --checkpoint o/good/last.pth.tar --output file.txt", "cannot make the folder file.txt"),
    *(
        (tool, f"{more} --checkpoint vit.pth --pretrained", "--pretrained together with --checkpoint; give one")
        for tool, more in (("eval", "--data-dir d"), ("predict", "d/train"), ("view", "d --save v"), ("export", ""))
    ),
    ("eval", "--model test_vit --pretrained --no-ema", "--no-ema chooses among the weights of a --checkpoint"),
    ("eval", "--checkpoint vit.pth --data-dir d --calibration-share 0.3", "--calibration-share is of --exits; give"),
    ("eval", "--checkpoint good.pth --data-dir d --torchcompile-mode default", "is of --torchcompile, which is not"),
    ("predict", "d --checkpoint good.pth --channels-last", "--channels-last; it belongs to `visionzoo eval`"),
    ("predict", "d --checkpoint good.pth --torchcompile", "--torchcompile; it belongs to `visionzoo eval`"),
    ("view", "d --checkpoint good.pth --torchcompile-mode x", "--torchcompile-mode; it belongs to `visionzoo eval`"),
    ("attention", "d --checkpoint good.pth --channels-last", "--channels-last; it belongs to `visionzoo eval`"),
    ("registers", "d --checkpoint good.pth --channels-last", "--channels-last; it belongs to `visionzoo eval`"),
    ("fit_hashes", "d --checkpoint good.pth --channels-last", "--channels-last; it belongs to `visionzoo eval`"),
    ("sparse_rate", "d --checkpoint good.pth --channels-last", "--channels-last; it belongs to `visionzoo eval`"),
    *(
        (tool, f"d --checkpoint {file}", words)
        for tool in ("predict", "view")
        for file, words in NO_CLASSIFIERS.items()
    ),
    *(
        (tool, f"{more} --checkpoint good.pth {flags}", message)
        for tool, more in (("eval", "--data-dir d"), ("predict", "d/train"), ("view", "d --save v"), ("export", ""))
        for flags, message in (
            ("--mean 0.5 0.5", "--mean: expected 1 or 3 numbers, one per channel, got 2"),
            ("--img-size 32 --input-size 3 64 64", "--img-size 32 together with --input-size 3 64 64; give one"),
        )
    ),
    ("export", "--model test_vit --random-weights --img-size 32 --input-size 3 64 64", "--img-size 32 together with"),
    ("export", "--checkpoint good.pth --format onnx --format pt2", "--format is given twice; put all its values behi"),
    ("export", "--checkpoint good.pth --opset 18 --format pt2", "--opset is of ONNX, and --format pt2 writes none"),
    ("export", "--checkpoint good.pth --input-img-mode XYZ", "--input-img-mode: expected one of L, LA, RGB"),
    *(
        (
            tool,
            f"{more} --checkpoint good.pth --amp-dtype bfloat16",
            "--amp-dtype bfloat16 is of --amp; give that too, or",
        )
        for tool, more in (("eval", "--data-dir d"), ("predict", "d/train"), ("view", "d --save v"))
    ),
    ("eval", "--checkpoint good.pth --data-dir d --num-samples 2", "--num-samples is the length of a split that is"),
    (
        "compare",
        "--models test_vit --growth-dim 8",
        "--growth-tokens and --growth-dim are of --hosts and --mixers; give",
    ),
    ("compare", "--models test_vit --probe-epochs 8", "--probe-epochs is of --probes; give these too, or leave it out"),
    ("compare", "--models test_vit --resume good.pth", "a comparison continues what its own folder holds; leave --res"),
    ("predict", "'' --checkpoint good.pth", "an image without a name: expected a file, a folder or a pattern, got ''"),
    ("view", "'' --checkpoint good.pth --save v", "an image without a name: expected a file, a folder or a pattern"),
    ("predict", "d/train --checkpoint o/good/last.pth.tar --topk 0", "--topk: expected a number at least 1, got 0"),
]
ALL = [("train", *case) for case in OPTIONS + MODELS + DATA + CONFIGS + CHECKPOINTS] + OTHERS


@pytest.mark.parametrize(("tool", "flags", "message"), ALL, ids=[f"{tool} {flags}" for tool, flags, _ in ALL])
def test_bad_input_is_one_message(place, capsys, tool, flags, message):
    common = {"train": TRAIN, "eval": "--device cpu -j 0"}.get(tool, "--device cpu")
    assert run_tool(tool, *common.split(), *shlex.split(flags)) == 1
    said = capsys.readouterr().err
    said = said[said.rindex("error: ") :]  # behind the bars of progress and the words of libraries
    assert message in said
    assert "Traceback" not in said and len(said) < 2000


def test_more_batches_of_an_update_than_an_epoch_has_are_stated(place, capsys):
    assert run_tool("train", *TRAIN.split(), "--grad-accum-steps", "4", "--output", "stated") == 0
    assert "--grad-accum-steps 4: an epoch has 3 batches, which make one smaller update" in capsys.readouterr().out
