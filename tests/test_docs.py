"""Every ```python and ```bash block of README.md, CONTRIBUTING.md and docs/ runs, page by page, in an empty folder.

What stands in a comment before a block says otherwise: `<!-- heavy: REASON -->` leaves it to --full, and
`<!-- not run: REASON -->` names what this machine lacks; pytest counts those as skipped. Their flags and syntax are
checked all the same. Weights that a block would download are stood in for by zeros, as if they lay in the cache.
"""

import ast
import contextlib
import io
import itertools
import os
import re
import shlex
import subprocess
import sys
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import huggingface_hub
import pytest
import timm
import torch
from PIL import Image
from safetensors.torch import save_file

import visionzoo  # noqa: F401  registers the families
import visionzoo_cli
from visionzoo.engine import UserError
from visionzoo.engine.flags import compare_parser, train_parser

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").rglob("*.md"))]
FENCE = re.compile(r"(?:^<!-- (not run|heavy): ([^>]+) -->\n+)?^```(\w*)[^\n]*\n(.*?)^```$", re.M | re.S)
INDENTED = re.compile(r"^    (?:visionzoo|python|pip|make|torchrun|srun|import|from) .*", re.M)
COMMAND = re.compile(r"^(?:[A-Z_]+=\S+ )*(?:\S*torchrun [^\n]*?-m )?visionzoo ([a-z][\w-]*)(.*)$", re.M)
LANGUAGES = {"python", "bash", "yaml", "text"}
WEIGHTS = ["zoo_davit_t", "zoo_shvit_s1"]  # whose published weights the pages load


@dataclass(frozen=True)
class Block:
    """A block of code: its language and text, and why it does not run in the default suite."""

    page: str
    line: int
    mark: str
    reason: str
    language: str
    text: str


def blocks(page):
    text = page.read_text(encoding="utf-8")
    for match in FENCE.finditer(text):
        line = text.count("\n", 0, match.start(4)) + 1
        yield Block(str(page.relative_to(ROOT)), line, match[1] or "", match[2] or "", match[3], match[4])


BLOCKS = [block for page in PAGES for block in blocks(page)]
YAML = re.compile(r"^cat > (\S+\.ya?ml) <<'EOF'\n(.*?)^EOF$", re.M | re.S)  # files that bash blocks write
FILES = [(block.page, name, text) for block in BLOCKS for name, text in YAML.findall(block.text)]
RUNNABLE = [block for block in BLOCKS if block.language in ("python", "bash")]


@pytest.fixture(scope="module")
def shared(tmp_path_factory):
    """A cache for data and weights: every page finds what an earlier one has written."""
    folder = tmp_path_factory.mktemp("docs")
    for name in WEIGHTS:
        cfg = timm.get_pretrained_cfg(name)
        snapshot = folder / "hub" / f"models--{cfg.hf_hub_id.replace('/', '--')}" / "snapshots" / ("0" * 40)
        snapshot.mkdir(parents=True)
        (snapshot.parents[1] / "refs").mkdir()
        (snapshot.parents[1] / "refs/main").write_text("0" * 40)
        with torch.device("meta"):
            model = timm.create_model(name)
        save_file(
            {k: torch.zeros(v.shape, dtype=v.dtype) for k, v in model.state_dict().items()},
            snapshot / "model.safetensors",
        )
    commands = folder / "bin"
    commands.mkdir()
    (commands / "visionzoo").write_text(f'#!/bin/sh\nexec {sys.executable} -m visionzoo "$@"\n')
    (commands / "visionzoo").chmod(0o755)
    return folder


@pytest.fixture
def stranger(shared, tmp_path, monkeypatch):
    """An empty folder with a photo, and the surroundings of someone who has installed the package."""
    Image.effect_noise((320, 240), 90).convert("RGB").save(tmp_path / "photo.jpg")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("VISIONZOO_CACHE", str(shared / "cache"))
    monkeypatch.setenv("HF_HUB_CACHE", str(shared / "hub"))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    monkeypatch.setenv(
        "PATH", f"{shared / 'bin'}{os.pathsep}{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    )
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(shared / "hub"))
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    return tmp_path


def run_python(block, namespace, folder):
    path = folder / f"block_{block.line}.py"  # a file, as Triton reads the sources of kernels
    path.write_text("\n" * (block.line - 1) + block.text)
    exec(compile(path.read_text(), str(path), "exec"), namespace)


def run_bash(block, whole):
    """Run the lines in turn: commands of ours in this process, which has imported torch, others in a shell."""
    lines = block.text.replace("\\\n", " ").splitlines()
    for ours, group in itertools.groupby(lines, lambda line: not whole and is_command(line)):
        if ours:
            for line in group:
                code = run_command(shlex.split(line, comments=True)[1:])
                assert code in (0, None), f"{block.page}:{block.line}: {line}"
        else:
            script = block.text if whole else "\n".join(group)
            done = subprocess.run(["bash", "-euo", "pipefail", "-c", script], capture_output=True, text=True)
            assert done.returncode == 0, f"{block.page}:{block.line}\n{done.stdout}\n{done.stderr}"


def is_command(line):
    """Whether a line is one of our commands and needs no shell."""
    return line.startswith("visionzoo ") and not set("|<>$*&;`") & set(line)


def run_command(argv):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["visionzoo", *argv])
        try:
            visionzoo_cli.main()
        except SystemExit as ended:
            return ended.code
    return 0


def run_page(page, folder, whole=False):
    namespace = {"__name__": "page"}
    for block in (b for b in RUNNABLE if b.page == page and b.mark != "not run" and (whole or b.mark != "heavy")):
        run_python(block, namespace, folder) if block.language == "python" else run_bash(block, whole)


def pages_with(*marks):
    return sorted({block.page for block in RUNNABLE if block.mark in marks})


@pytest.mark.parametrize("page", pages_with(""))
def test_the_blocks_of_a_page_run_in_turn(page, stranger):
    run_page(page, stranger)


@pytest.mark.full
@pytest.mark.parametrize("page", pages_with("heavy"))
def test_the_heavy_blocks_of_a_page_run_too(page, stranger):
    run_page(page, stranger, whole=True)


@pytest.mark.parametrize("block", [pytest.param(b, id=f"{b.page}:{b.line}") for b in RUNNABLE if b.mark == "not run"])
def test_a_block_that_cannot_run_here_is_counted(block):
    pytest.skip(block.reason)


@cache
def flags(command, chosen):
    """Return the flags of a command, by its help; `chosen` are words by which it takes others."""
    out = io.StringIO()
    with contextlib.redirect_stdout(out):
        run_command([command, *chosen, "--help"])
    return set(re.findall(r"(?<!\S)(--?[a-z][\w-]*)", out.getvalue()))


@pytest.mark.parametrize("page", sorted({block.page for block in RUNNABLE}))
def test_flags_and_syntax_are_right_in_every_block(page):
    """Also where it does not run."""
    for block in (block for block in RUNNABLE if block.page == page):
        if block.language == "python":
            ast.parse(block.text)
            continue
        for command, rest in COMMAND.findall(block.text.replace("\\\n", " ")):
            command = visionzoo_cli.ALIASES.get(command, command)
            assert command in visionzoo_cli.COMMANDS, f"{page}: visionzoo {command}"
            words = shlex.split(rest.split("#")[0].split("|")[0])
            chosen = ("model.py",) if any(word.endswith(".py") or "_zoo-" in word for word in words) else ()
            if command == "multi-task" and "--checkpoint" in words:
                chosen = ("--checkpoint", "x")
            named = {word.partition("=")[0] for word in words if re.fullmatch(r"--[a-z][\w-]*(=.*)?", word)}
            assert named <= flags(command, chosen), (
                f"{page}: visionzoo {command} has no {named - flags(command, chosen)}"
            )


@pytest.mark.parametrize(("page", "name", "text"), FILES)
def test_yaml_is_taken_by_the_command_that_the_page_gives_it_to(page, name, text, tmp_path):
    path = tmp_path / name
    path.write_text(text, encoding="utf-8")
    uses = "".join(block.text.replace("\\\n", " ") for block in BLOCKS if block.page == page)
    if re.search(rf"--dataset {re.escape(name)}\b", uses):
        description = pytest.importorskip("visionzoo.openmmlab.description")
        task = "segmentation" if "masks:" in text else "detection"
        assert description.read_description(path, task)["root"]
    else:
        commands = re.findall(rf"visionzoo (\w+) {re.escape(name)}\b", uses)
        assert commands, f"{page}: no command takes {name}"
        for command in commands:
            parser = {"train": train_parser, "compare": compare_parser}[command]()
            parser.parse_with_config([str(path)])


def test_yaml_with_an_unknown_key_is_refused(tmp_path):
    with pytest.raises(UserError, match="modle"):
        test_yaml_is_taken_by_the_command_that_the_page_gives_it_to(
            "docs/guides/train.md", "routed.yaml", "modle: zoo_poolformer_s12\n", tmp_path
        )


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_code_stands_in_fences_of_a_known_language(page):
    assert not INDENTED.findall(page.read_text(encoding="utf-8"))
    assert {block.language for block in BLOCKS if block.page == str(page.relative_to(ROOT))} <= LANGUAGES


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_and_pictures_are_there_and_pictures_are_small(page):
    generated = {ROOT / "docs/families"}
    for target in re.findall(r"\]\(([^)#\s]+)(?:#[\w-]*)?\)", FENCE.sub("", page.read_text(encoding="utf-8"))):
        if not re.match(r"[a-z]+:", target):
            path = (page.parent / target).resolve()
            assert path.exists() or path.parent in generated, f"{page.name}: {target}"
            if path.suffix in (".png", ".jpg"):
                assert path.stat().st_size < 300_000 or "benchmarks" in path.parts, target


def test_a_block_that_fails_is_noticed(tmp_path):
    for text in ("raise ValueError", "assert 1 == 2"):
        with pytest.raises((ValueError, AssertionError)):
            run_python(Block("x", 1, "", "", "python", text), {}, tmp_path)
    with pytest.raises(AssertionError):
        run_bash(Block("x", 1, "", "", "bash", "false\n"), False)
    with pytest.raises(AssertionError):
        run_bash(Block("x", 1, "", "", "bash", "visionzoo models zoo_nothing\n"), False)


BUILT = re.compile(r"^(?::::|<!-- (?:list|summary) of)", re.M)  # what the site has there, and a forge does not show


@pytest.mark.parametrize("page", [page for page in PAGES if BUILT.search(page.read_text())], ids=lambda page: page.name)
def test_a_page_whose_content_is_made_at_build_says_so(page):
    text = page.read_text()
    assert "built site" in text and "`make docs`" in text
    for line in re.findall(r"<!-- (?:list|summary) of \w+ -->\n([^\n]*)", text):
        assert "built site" in line, f"{page.name}: nothing stands for what the site has here"
