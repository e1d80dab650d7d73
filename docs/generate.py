"""What MkDocs adds to the pages of docs/: a page for each model family, the benchmarks, CONTRIBUTING and CHANGELOG.

A family's page is made of its docstring, the table of models, the parity table, benchmarks, exports, recipes. It is
a hook of mkdocs.yml; nothing is written to the repository.
"""

from __future__ import annotations

import csv
import os
import re
import sys
from collections import defaultdict
from collections.abc import Callable, Mapping
from functools import cache
from pathlib import Path
from typing import Any

import visionzoo  # noqa: F401  registers the families
from visionzoo.layers.gates import GATES
from visionzoo.layers.mixers import MIXERS
from visionzoo.layers.reducers import REDUCERS
from visionzoo.models._heads import HEADS
from visionzoo.models._registry import CLASSES, FAMILIES, VARIANTS
from visionzoo.text import markdown_table, some
from visionzoo_cli import COMMANDS

ROOT = Path(__file__).parents[1]
DOCS = ROOT / "docs"
OUTSIDE = ("CONTRIBUTING.md", "CHANGELOG.md", "SECURITY.md")  # pages beside docs/; links `../NAME` lead to them
NAME = re.compile(r"zoo_[a-z0-9_]+")


def on_config(config: Any) -> Any:
    """Put the families into the navigation, under the page of all models, and the benchmarks of each GPU."""
    sections = {title: pages for section in config.nav for title, pages in section.items()}
    sections["Models"].append({"Families": [{_title(name): f"families/{name}.md"} for name in sorted(FAMILIES)]})
    for path in sorted(ROOT.glob("benchmarks/*/report.md")):
        sections["Measurements"].append({f"Benchmarks: {path.parent.name}": path.relative_to(ROOT).as_posix()})
    return config


def on_files(files: Any, config: Any) -> Any:
    """Add the generated pages, and what stands beside docs/."""
    from mkdocs.structure.files import File

    for name in FAMILIES:
        files.append(File.generated(config, f"families/{name}.md", content=family_page(name)))
    for name in OUTSIDE:
        files.append(File.generated(config, name, abs_src_path=str(ROOT / name)))
    for path in sorted((ROOT / "benchmarks").rglob("*.*")):
        files.append(File.generated(config, path.relative_to(ROOT).as_posix(), abs_src_path=str(path)))
    return files


def on_page_markdown(markdown: str, page: Any, files: Any, **_: Any) -> str:
    """Lead links out of docs/ to the pages that `on_files` added, name other files; put in what pages ask for."""
    source = page.file.src_uri
    folder = ROOT if source in OUTSIDE else (DOCS / source).parent

    def lead(match: re.Match[str]) -> str:
        text, target, anchor = match.groups()
        path = Path(os.path.normpath(folder / target))
        if source not in OUTSIDE and (path.is_relative_to(DOCS) or not path.is_relative_to(ROOT)):
            return match[0]
        name = path.relative_to(DOCS if path.is_relative_to(DOCS) else ROOT).as_posix()
        if files.get_file_from_path(name) is None:
            return f"{text} (`{name}`)" if path.exists() else match[0]
        return f"[{text}]({os.path.relpath(name, Path(source).parent)}{anchor or ''})"

    markdown = re.sub(r"\[([^\]\n]+)\]\((?![a-z]+:)([^)#\s]+)(#[\w-]*)?\)", lead, markdown)
    return re.sub(r"<!-- ((?:list|summary) of \w+) -->\n[^\n]+", lambda match: LISTS[match[1]](), markdown)


def command_list() -> str:
    """Return a table of the commands."""
    return markdown_table(
        ("Command", "What it does"), [(f"`visionzoo {name}`", what) for name, what in COMMANDS.items()]
    )


def parity_summary() -> str:
    """Return how many records there are, and their largest error."""
    rows = parity_rows()
    worst = max(rows, key=lambda row: float(row["error"]))
    commits = {(row["source"], row["commit"]) for row in rows}
    models = {row["model"] for row in rows}
    return (
        f"{len(rows)} records of {len(models)} models, mixers and segmentors, from {len(commits)} commits of authors' "
        f"repositories. The largest relative error is {worst['error']} (`{worst['record']}`), "
        f"of {worst['allowed']} allowed."
    )


def reference(classes: Mapping[str, Any]) -> str:
    """Return the arguments of classes that are built by name, for mkdocstrings."""
    parts = []
    for name, cls in sorted(classes.items()):
        options = (
            f"    options:\n      heading: {name}\n      toc_label: {name}\n      heading_level: 3\n      members: []"
        )
        parts.append(f"::: {cls.__module__}.{cls.__qualname__}\n{options}")
    return "\n\n".join(parts)


def family_list() -> str:
    """Return a table of the families with links to their pages."""
    rows = []
    for name in sorted(FAMILIES):
        models = [model_rows()[model] for model in FAMILIES[name]]
        weights = sum(row[5] != "—" for row in models)
        rows.append((f"[{_title(name)}](families/{name}.md)", len(models), weights or "—", models[0][6]))
    return markdown_table(("Family", "Models", "With public weights", "License"), rows)


def family_page(name: str) -> str:
    """Return the page of a family, in Markdown."""
    models = FAMILIES[name]
    module = f"visionzoo.models.{name}"
    doc = (sys.modules[module].__doc__ or "").strip()
    classes = dict.fromkeys(CLASSES[model].__name__ for model in models if CLASSES[model].__module__ == module)
    parts = [
        f"# {_title(name)}",
        _prose(doc),
        "## Models",
        _models(models),
        "## Parity with the authors' code",
        _parity(models),
        "## Measured speed",
        _benchmarks(models),
        "## Exported files",
        _exports(models),
        "## Recipes",
        _recipes(models),
        "## Arguments",
        "Pass them to `timm.create_model`, beside those of [every model](../guides/mixers.md).",
        *(f"::: {module}.{cls}\n    options:\n      heading_level: 3\n      members: []" for cls in classes),
    ]
    return "\n\n".join(parts) + "\n"


def _models(models: list[str]) -> str:
    header = ("Model", "Params (M)", "GMACs", "Input", "Top-1 (%)", "Weights", "License", "Source of the numbers")
    notes = [f"- `{m}`: {_prose(VARIANTS[m].no_weights)}." for m in models if VARIANTS[m].no_weights]
    return "\n\n".join(
        [
            "Parameters are counted; GMACs and top-1 on ImageNet-1k are those that the named source publishes.",
            markdown_table(header, [model_rows()[model] for model in models]),
            *(["Why there are no weights:", "\n".join(notes)] if notes else []),
        ]
    )


def _parity(models: list[str]) -> str:
    rows = [row for row in parity_rows() if row["model"] in models]
    if not rows:
        return "There is no record of authors' code for this family; what it is checked against stands above."
    table = [
        (
            f"`{row['record'].rpartition('/')[2]}`",
            f"`{row['model']}`",
            f"[{row['source'].removeprefix('https://github.com/')}]({row['source']}) at `{row['commit']}`",
            row["arrays"],
            row["error"],
            row["allowed"],
        )
        for row in rows
    ]
    header = ("Record", "Model", "Authors' code", "Arrays", "Largest relative error", "Allowed")
    return f"{markdown_table(header, table)}\n\n[How this is measured](../parity.md)."


def _benchmarks(models: list[str]) -> str:
    short = {model.removeprefix("zoo_") for model in models}
    tables: dict[str, list[tuple[str, ...]]] = defaultdict(list)
    for row in benchmark_rows():
        case, _, kind = row["case"].partition("/")
        if case in short and row["status"] == "ok" and row["measure"] != "agreement":
            machine = f"{row['gpu']}, torch {row['torch']}, triton {row['triton']}, timm {row['timm']}"
            speed = f"{float(row['images_per_second']):,.0f}" if row["images_per_second"] else "—"
            what = (f"`zoo_{case}`", kind, row["implementation"], row["shape"], row["dtype"])
            tables[machine].append((*what, f"{float(row['median_ms']):.2f}", speed))
    if not tables:
        return "Not measured yet: `visionzoo benchmark models` measures models on a GPU."
    header = ("Model", "Case", "Implementation", "Images", "Precision", "Median (ms)", "Images/s")
    return "\n\n".join(f"{machine}:\n\n{markdown_table(header, rows)}" for machine, rows in tables.items())


def _exports(models: list[str]) -> str:
    rows = [
        (
            f"`{row['model']}`",
            {"onnx": "ONNX", "pt2": "torch.export", "aoti": "AOTInductor"}[row["format"]],
            row["input"],
            row["axes"],
            f"{row['error']} of {row['spread']}" if row["error"] else "no file",
        )
        for row in export_rows()
        if row["model"] in models
    ]
    if not rows:
        return "Not measured yet; see [exports](../export.md)."
    header = ("Model", "Format", "Input", "Dynamic axes", "Largest error of a logit, of their spread")
    return f"{markdown_table(header, rows)}\n\n[What these numbers are](../export.md)."


def _recipes(models: list[str]) -> str:
    found = [(task, path, about) for task, path, about, names in recipes() if names & set(models)]
    if not found:
        return "None of its own."
    lines = [f"- {task}: `{path.stem}`. {_prose(about)}" for task, path, about in found]
    return "\n".join(
        [*lines, "", "`visionzoo train NAME` runs one, `visionzoo configs --paths` says where its file is."]
    )


@cache
def model_rows() -> dict[str, list[str]]:
    """Return the rows of the table in docs/models.md, by the model."""
    lines = (DOCS / "models.md").read_text(encoding="utf-8").splitlines()
    whole = {line.split("`")[1]: line for line in lines if line.startswith("| `zoo_")}
    if missing := VARIANTS.keys() - whole.keys():
        raise SystemExit(f"docs/models.md lacks {some(sorted(missing))}: `make table` writes its rows")
    return {name: [cell.strip() for cell in line.strip("|").split(" | ")] for name, line in whole.items()}


@cache
def parity_rows() -> list[dict[str, str]]:
    """Return the rows of docs/parity.csv."""
    return _csv(DOCS / "parity.csv")


@cache
def export_rows() -> list[dict[str, str]]:
    """Return the rows of docs/export.csv."""
    return _csv(DOCS / "export.csv")


@cache
def benchmark_rows() -> list[dict[str, str]]:
    """Return what was measured of models, on every GPU."""
    return [row for path in sorted(ROOT.glob("benchmarks/*/models.csv")) for row in _csv(path)]


@cache
def recipes() -> list[tuple[str, Path, str, set[str]]]:
    """Return the recipes: task, file, its first sentence, the models that it names."""
    found = []
    for path in sorted((ROOT / "configs").glob("*/*.*")):
        if path.suffix in (".yaml", ".py"):
            text = path.read_text(encoding="utf-8")
            about = re.sub(r"\s*\n(# ?)?", " ", text.lstrip('#" \n')).strip()
            first = re.split(r"(?<=\.)\s", about)[0].rstrip('"')
            ran = " Not run here." if "Not run here" in text else ""
            found.append((path.parent.name.capitalize(), path, first + ran, set(NAME.findall(text))))
    return found


def _csv(path: Path) -> list[dict[str, str]]:
    with path.open(newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


@cache
def _title(name: str) -> str:
    """Return the name that begins the docstring, or the class's where that is a whole title."""
    doc = (sys.modules[f"visionzoo.models.{name}"].__doc__ or "").splitlines()[0]
    title = re.split(r"[:,.]", doc)[0]
    if short := re.search(r"\((\w+)\)$", title):
        return short[1]
    title = title.split(" for ")[0]
    return title if len(title) <= 26 else CLASSES[FAMILIES[name][0]].__name__


LINK = re.compile(r"(https?://[^\s,;)>\]]*[^\s,;)>\].])")


def _prose(doc: str) -> str:
    """Return a docstring as Markdown: brackets and angles are text, addresses are links; code stays as it is."""
    parts = doc.split("`")
    return "`".join(_linked(part) if i % 2 == 0 else part for i, part in enumerate(parts))


def _linked(text: str) -> str:
    return "".join(f"<{p}>" if LINK.fullmatch(p) else re.sub(r"([\[\]<>*_])", r"\\\1", p) for p in LINK.split(text))


LISTS: dict[str, Callable[[], str]] = {  # by the comment in the page, which leads a line for who reads it unbuilt
    "list of families": family_list,
    "list of commands": command_list,
    "list of mixers": lambda: reference(MIXERS),
    "list of gates": lambda: reference(GATES),
    "list of reducers": lambda: reference(REDUCERS),
    "list of heads": lambda: reference(HEADS),
    "summary of parity": parity_summary,
}
