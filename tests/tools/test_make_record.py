"""Records can be made again: each has its recipe, and the tool that runs it says what is wrong."""

import json
import re
import subprocess
import sys

import make_record
import numpy as np
import pytest
import torch
from golden import RECORDS, Record
from recipes import FAMILIES, Recipe, Source, nhwc, recipes, stages, tokens

NAMES = sorted(str(path.relative_to(RECORDS).with_suffix("")) for path in RECORDS.glob("*/*.json"))
RECIPES = [(family, name, recipe) for family in FAMILIES for name, recipe in recipes(family).items()]


@pytest.mark.parametrize("name", NAMES)
def test_each_record_has_its_recipe_and_says_whose_code_it_is(name):
    family, record = name.split("/")
    recipe, meta = recipes(family)[record], Record(name).meta
    assert recipe.source == Source(meta["repository"], meta["commit"], meta["license"])
    assert recipe.image == tuple(meta["input_shape"])


@pytest.mark.parametrize(("family", "name", "recipe"), RECIPES, ids=[f"{f}/{n}" for f, n, _ in RECIPES])
def test_each_recipe_names_repository_commit_and_license(family, name, recipe):
    assert re.fullmatch(r"https://github\.com/[\w.-]+/[\w.-]+", recipe.source.repository)
    assert re.fullmatch(r"[0-9a-f]{40}|PyPI \S+ \d+\.\d+\.\d+", recipe.source.commit)
    assert recipe.source.license


AUTHORS = """
import torch
from elsewhere import Tokens, register
from .parts import block

@register("net")
class Net(torch.nn.Module):
    def __init__(self, width=8):
        super().__init__()
        self.stem = torch.nn.Conv2d(3, width, 4, 4)
        self.blocks = torch.nn.Sequential(block(width), block(width))
        self.norm = torch.nn.BatchNorm2d(width)
        self.never = torch.nn.Linear(2, 2)
        self.more = torch.nn.Parameter(torch.zeros(5))
        self.head = torch.nn.Linear(width, 5)
        self.register_buffer("index", torch.arange(width))

    def train(self, mode=True):
        super().train(mode)
        if not mode:  # as LeViT keeps its biases
            self.kept = self.head.bias * 2 + self.more.detach()

    def forward(self, x):
        x = self.norm(self.blocks(self.stem(x))[:, self.index])
        return self.head(x.mean((2, 3))) + self.kept
"""
PARTS = """
import torch

def block(width):
    return torch.nn.Sequential(torch.nn.Conv2d(width, width, 3, padding=1), torch.nn.ReLU(inplace=True))
"""


def git(folder, *arguments):
    identity = ("-c", "user.name=A", "-c", "user.email=a@example.org")
    command = ["git", "-C", folder, *identity, *arguments]
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()


@pytest.fixture
def clone(tmp_path):
    """Return a folder as the authors publish it: a package, a dependency that is nowhere, one commit."""
    folder = tmp_path / "clone"
    (folder / "code" / "models").mkdir(parents=True)
    (folder / "code" / "models" / "__init__.py").write_text("raise RuntimeError('not needed')")
    (folder / "code" / "models" / "net.py").write_text(AUTHORS)
    (folder / "code" / "models" / "parts.py").write_text(PARTS)
    git(folder, "init", "--quiet")
    git(folder, "add", "--all")
    git(folder, "commit", "--quiet", "--message", "all")
    return folder


@pytest.fixture
def authors(clone, monkeypatch):
    """Return a function that replaces the recipes of a family by one for the clone, changed by its arguments."""

    def define(**changes):
        given = {
            "source": Source("https://github.com/a/net", git(clone, "rev-parse", "HEAD"), "MIT"),
            "file": "models/net.py",
            "factory": "Net",
            "root": "code",
            "image": (2, 3, 16, 16),
            "features": ("stem", "blocks"),
            "constants": ("index",),
            "stand_ins": {"elsewhere": {}},
        }
        monkeypatch.setattr(make_record, "recipes", lambda family: {"net": Recipe(**(given | changes))})

    return define


def run(*arguments):
    return make_record.main(["swin", *map(str, arguments)])


def test_a_record_is_the_authors_model_on_the_weights_and_image_of_golden(clone, authors, tmp_path, capsys):
    authors(stress=(("stem.weight", 3.0),))
    assert run("--authors", clone, "--records", tmp_path) == 0
    record = Record(str(tmp_path / "swin" / "net"))
    assert record.meta["num_params"] == 3 * 8 * 16 + 8 + 2 * (8 * 8 * 9 + 8) + 2 * 8 + 2 * 2 + 2 + 8 * 5 + 5 + 5
    assert record.meta["unused_parameters"] == ["never.weight", "never.bias"]
    assert (record.meta["commit"], record.meta["license"]) == (git(clone, "rev-parse", "HEAD"), "MIT")
    assert record.meta["stand_ins"] == ["elsewhere"]
    kinds = {name: kind for name, _, kind in record.meta["state"]}
    assert (kinds["index"], kinds["norm.running_var"], kinds["stem.bias"]) == ("const", "stat", "param")

    state = record.state_dict()
    x = torch.conv2d(record.image(), state["stem.weight"].double(), state["stem.bias"].double(), stride=4)
    feature = x.contiguous().flatten().numpy()
    places = np.random.RandomState(x.numel()).randint(0, x.numel(), 512)
    np.testing.assert_allclose(record.arrays["feat0"], feature[places], rtol=1e-13)
    for i in (0, 1):
        x = torch.conv2d(x, *(state[f"blocks.{i}.0.{n}"].double() for n in ("weight", "bias")), padding=1).relu()
    mean, var, weight, bias = (state[f"norm.{n}"].double() for n in ("running_mean", "running_var", "weight", "bias"))
    x = torch.nn.functional.batch_norm(x, mean, var, weight, bias)
    head, bias = state["head.weight"].double(), state["head.bias"].double()
    np.testing.assert_allclose(
        record.arrays["logits"], x.mean((2, 3)) @ head.T + 3 * bias + state["more"].double(), rtol=1e-12
    )

    stressed, state = record.state_dict(stress=True), record.state_dict()
    assert stressed.pop("stem.weight").equal(state.pop("stem.weight") * 3)
    assert all(value.equal(state[name]) for name, value in stressed.items())
    x = torch.conv2d(
        record.image(), record.state_dict(stress=True)["stem.weight"].double(), state["stem.bias"].double(), stride=4
    )
    np.testing.assert_allclose(record.arrays["stress_feat0"], x.flatten().numpy()[places], rtol=1e-12)
    assert run("--authors", clone, "--records", tmp_path, "--check") == 0
    assert "logits 0.0e+00" in capsys.readouterr().out


def test_what_is_known_of_a_record_stays_and_its_numbers_are_never_replaced(clone, authors, tmp_path, capsys):
    authors()
    run("--authors", clone, "--records", tmp_path)
    path = tmp_path / "swin" / "net"
    meta = json.loads(path.with_suffix(".json").read_text())
    path.with_suffix(".json").write_text(json.dumps({**meta, "notes": ["a quirk"], "license": "unknown"}))
    assert run("--authors", clone, "--records", tmp_path) == 0
    assert json.loads(path.with_suffix(".json").read_text()) == {**meta, "notes": ["a quirk"]}

    arrays = Record(str(path)).arrays
    arrays["logits"] = arrays["logits"] * (1 + 1e-11)
    np.savez(path.with_suffix(".npz"), **arrays)
    written = path.with_suffix(".npz").read_bytes()
    capsys.readouterr()
    assert run("--authors", clone, "--records", tmp_path) == 1
    assert "not the record's numbers: logits." in capsys.readouterr().err
    assert path.with_suffix(".npz").read_bytes() == written


def test_gradients_are_kept_where_a_recipe_takes_them(clone, authors, tmp_path):
    def gradient(model, image):
        weight = model.head.weight
        return {"logits": (logits := model(image)), "grad": torch.autograd.grad(logits.sum(), weight)[0]}

    authors(run=gradient, gradients=True)
    assert run("--authors", clone, "--records", tmp_path) == 0
    arrays = Record(str(tmp_path / "swin" / "net")).arrays
    assert arrays["grad"].shape == (5, 8) and np.ptp(arrays["grad"], axis=0).max() == 0 < np.abs(arrays["grad"]).min()

    zeros = {"run": lambda model, image: {key: value * 0 for key, value in gradient(model, image).items()}}
    authors(gradients=True, **zeros)  # which have no relative error
    (tmp_path / "zeros").mkdir()
    for arguments in ((), ("--check",)):
        assert run("--authors", clone, "--records", tmp_path / "zeros", *arguments) == 0


def test_modules_of_the_clone_and_stand_ins_are_gone_afterwards(clone, authors, tmp_path):
    authors()
    before = set(sys.modules), list(sys.path), torch.get_default_dtype()
    run("--authors", clone, "--records", tmp_path)
    assert not {name for name in set(sys.modules) - before[0] if name.split(".")[0] in ("models", "elsewhere")}
    assert (sys.path, torch.get_default_dtype()) == before[1:]


WRONG = {  # what is wrong: changes of the recipe, what the message says
    "another commit": (
        {"source": Source("https://github.com/a/net", "0" * 40, "MIT")},
        r"no clone is at 0{40} of .*git",
    ),
    "a release": (
        {"source": Source("https://x", "PyPI net 1.2.3", "MIT")},
        r"no release of net.*pip install net==1.2.3",
    ),
    "file": ({"file": "models/other.py"}, r"has no file code/models/other\.py, which the recipe names"),
    "factory": ({"factory": "Other"}, r"net\.py has no Other, which the recipe names"),
    "import": ({"stand_ins": {}}, r"does not import: No module named 'elsewhere'\. Install .* stand-in"),
    "buffer": ({"constants": ()}, r"buffer index is not a statistic of a norm: .*`constants`"),
    "module": ({"features": ("stem", "trunk")}, r"the model has no module trunk, whose output the recipe keeps"),
}


@pytest.mark.parametrize("wrong", WRONG)
def test_what_is_wrong_with_clone_or_recipe_is_said(wrong, clone, authors, tmp_path, capsys):
    changes, message = WRONG[wrong]
    authors(**changes)
    assert run("--authors", clone, "--records", tmp_path) == 1
    assert re.search(message, capsys.readouterr().err)
    assert not (tmp_path / "swin").exists()


def test_a_model_that_is_not_the_records_is_refused(clone, authors, tmp_path, capsys):
    authors()
    run("--authors", clone, "--records", tmp_path)
    own = Record(str(tmp_path / "swin" / "net")).meta["num_params"]
    authors(kwargs={"width": 4})
    assert run("--authors", clone, "--records", tmp_path, "--check") == 1
    assert re.search(rf"has 536 parameters, the record {own:,}", capsys.readouterr().err)
    authors(features=("stem",))
    assert run("--authors", clone, "--records", tmp_path, "--check") == 1
    assert "the recipe gives logits, feat0, but not the record's feat1" in capsys.readouterr().err
    authors(image=(1, 3, 16, 16))
    assert run("--authors", clone, "--records", tmp_path, "--check") == 1
    assert "logits has shape (1, 5), in the record (2, 5)" in capsys.readouterr().err


def test_a_missing_clone_or_record_is_said(clone, authors, tmp_path, capsys):
    authors()
    assert run("--authors", tmp_path / "nowhere", "--records", tmp_path) == 1
    assert "nowhere: no such folder. Get it with: git clone https://github.com/a/net" in capsys.readouterr().err
    assert run("--authors", tmp_path, "--records", tmp_path) == 1
    assert "no commit (not a git repository)" in capsys.readouterr().err
    assert run("--authors", clone, "--records", tmp_path, "--check", "--only", "net") == 1
    assert "to check: run without --check to make it" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["swim"], "no recipes for swim; did you mean swin?"),
        (["swin", "--only", "swin_x"], "swin has no recipe swin_x; it has swin_t"),
    ],
)
def test_names_that_are_none_are_said(arguments, message, tmp_path, capsys):
    with pytest.raises(SystemExit):
        make_record.main([*arguments, "--authors", str(tmp_path)])
    assert message in capsys.readouterr().err


def test_layouts_make_maps():
    image = torch.zeros(1, 3, 30, 50)
    assert tokens(torch.zeros(1, 8 * 13, 5), image).shape == (1, 5, 8, 13)
    values = torch.arange(8 * 13 * 5).view(1, 8 * 13, 5)
    assert tokens(values, image)[0, 2, 3, 4] == values[0, 3 * 13 + 4, 2]
    assert nhwc(values.view(1, 8, 13, 5), image).equal(tokens(values, image))
    with pytest.raises(ValueError, match="7 tokens are no map of a picture of 30x50"):
        tokens(torch.zeros(1, 7, 5), image)
    assert stages("block{}.{last}", (2, 3), first=1) == ("block1.1", "block2.2")
