"""Train models, or mixers in hosts, alike and compare accuracy, speed and memory; tools/compare.py is the command.

Each (model, seed) is a run of the training engine in a folder of its own, and its row of results.csv is written when it
is done: a comparison that was stopped continues, within a model too, when it is started again. A run that fails has a
row with its reason, is tried again by the next start, and does not end the others.
"""

from __future__ import annotations

import json
import os
import platform
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import timm
import torch

import visionzoo
from visionzoo.benchmark.comparison_report import draw, section, summarise, table
from visionzoo.benchmark.comparison_rows import OF_RUNS, Row, read_rows, write_rows
from visionzoo.benchmark.growth import GrowthJob, measure_growth
from visionzoo.benchmark.jobs import Failure, Task, devices, run_tasks
from visionzoo.benchmark.speeds import INFERENCE, inference_rate, loader_rate, measure_speed
from visionzoo.benchmark.timing import release
from visionzoo.engine.building import build_run, check_graphs
from visionzoo.engine.calling import prepare_compiler, try_images
from visionzoo.engine.checkpoints import LAST, make_folder, write_atomically
from visionzoo.engine.data import open_train_and_val
from visionzoo.engine.errors import UserError, closest, require
from visionzoo.engine.flags import PROBES, CompareConfig, ComparisonConfig, TrainConfig, train_parser
from visionzoo.engine.models import build_model, data_config
from visionzoo.engine.options import changed, key_values, settings
from visionzoo.engine.ownership import Claim
from visionzoo.engine.parallel import start_process
from visionzoo.engine.probing import choose_head
from visionzoo.engine.reporting import insert_between
from visionzoo.engine.run import Run
from visionzoo.engine.training import Training
from visionzoo.kernels.small_maps import device_name
from visionzoo.layers.mixers import MIXERS
from visionzoo.text import count_of, some

RESULTS, SPEEDS, GROWTH, PICTURE = "results.csv", "speeds.csv", "growth.csv", "results.png"
NOT_OF_THE_RECIPE = {
    *(
        "models",
        "hosts",
        "mixers",
        "variants",
        "seeds",
        "jobs",
        "write",
        "report",
        "config",
        "output",
        "experiment",
        "resume",
        "workers",
    ),
    *("model", "model_kwargs", "cache_images"),
}
NOT_OF_A_VARIANT = {*NOT_OF_THE_RECIPE, "seed", "data_dir", "dataset", "val_data_dir", "device"}
OWN = ("own", "none")  # mixers beside those of the table: the host's own, and none at all

Key = tuple[str, int]  # model, seed


@dataclass(frozen=True, slots=True)
class Job:
    """A run of a comparison.

    Attributes:
        config: of its training.
        spec: what tells it from others under the same name.
        host, mixer: their labels, empty where whole models are compared.
    """

    config: TrainConfig
    spec: str
    host: str = ""
    mixer: str = ""

    @property
    def experiment(self) -> str:
        """The name of its folder."""
        return self.config.run.experiment

    def other(self, **values: Any) -> Job:
        """Return it with other values of flags."""
        return replace(self, config=changed(self.config, **values))


def compare(config: CompareConfig) -> list[Row]:
    """Train and measure what `config` names (tools/compare.py); write the results and return a row for each model.

    Raises:
        UserError: the models are not named or do not work, the folder holds results of another recipe or is in use, or,
            when all else is done and written, some runs failed.
        Interrupted: by a signal; what is done is kept.
    """
    folder = Path(config.train.run.output or "output/compare") / (
        config.train.run.experiment or Path(config.train.config or "comparison").stem
    )
    runs = _runs(config, folder)
    _check(config, folder.name)
    if name := config.train.model.model:
        print(f"without effect: --model {name} (the models are those of --models, or of --hosts)")
    todo = _to_do(read_rows(folder / RESULTS, needed=OF_RUNS), runs)
    if config.comparison.report:
        return _compare(config, folder, runs)
    _try(runs, {model for model, _ in todo})
    if todo:
        open_train_and_val(changed(config.train, cache_images=""))  # what is wrong with the data is so for every run
    own = Claim(folder)  # of two that write to one folder, one would replace the other's rows
    try:
        if own.note:
            print(own.note)
        return _compare(config, folder, runs)
    finally:
        own.release()


def _compare(config: CompareConfig, folder: Path, runs: dict[Key, Job]) -> list[Row]:
    """Do what is not done yet, unless only a report is asked for, and lay out the results."""
    report = config.comparison.report
    _keep_recipe(config, folder)
    rows = read_rows(folder / RESULTS, needed=OF_RUNS)
    todo = _to_do(rows, runs)
    for number, key in enumerate([] if report else runs, 1):
        if key not in todo:
            print(f"{key[0]} ({number} of {len(runs)}): done before")
    todo = [] if report else todo
    if config.train.data.cache_images and todo:
        open_train_and_val(config.train)  # here, once, before many runs do it at a time
    apart = _apart(config) or (report and (folder / SPEEDS).exists())
    for probes in (False, True):  # a probe begins where its model's training has ended
        call = _train if apart else _train_and_measure
        tasks = {key: (call, runs[key]) for key in todo if _is_probe(key[0]) == probes}
        _run(tasks, rows, folder / RESULTS, config.comparison.jobs, of=runs)
    wanted = [row for key in runs for row in rows if _key(row) == key]
    trained = [row for row in wanted if row["status"] == "ok"]
    speeds, growth = [], []
    if apart:
        speeds = _measured(config, "model", _first_seeds(runs, trained), folder / SPEEDS, _measure_speed)
        own = config.comparison
        mixers = {
            m["label"]: GrowthJob(config.train, _spec(m), own.growth_tokens, own.growth_dim)
            for m in _labelled("--mixers", own.mixers)
            if _is_real(m)
        }
        growth = _measured(config, "mixer", mixers, folder / GROWTH, measure_growth)
    models = summarise(wanted, speeds, growth)
    if report and not trained:
        raise UserError(f"--report: none of {count_of(len(runs), 'run')} is done in {folder}")
    measured = any(row["train_images_per_second"] for row in models)
    if measured:
        draw(models, folder / PICTURE)
    if trained:
        print(table(models))
    if report and (missing := len(runs) - len(trained)):
        print(f"not done yet: {missing} of {count_of(len(runs), 'run')}; start the command without --report to do them")
    if config.comparison.write and trained:
        target = Path(config.comparison.write)
        for name, lines in ((folder.name, wanted), (f"{folder.name}_models", models if apart else [])):
            if lines:
                write_rows(lines, target.with_name(f"{name}.csv"))
        if measured:
            draw(models, target.with_name(f"{folder.name}.png"))
        text = _written(target, folder.name, section(models, wanted, config, folder.name, len(runs)))
        write_atomically(target, lambda file: file.write(text.encode()))
    print(f"results in {folder}{f', and in {config.comparison.write}' if config.comparison.write and trained else ''}")
    failed = [row for row in [*wanted, *speeds, *growth] if row["status"] != "ok"]
    if failed:
        names = (f"{row.get('model') or row.get('mixer')} ({row['reason']})" for row in failed)
        raise UserError(
            f"{len(failed)} of the runs and measurements failed: {some(names, 5)}. {folder} has all reasons"
        )
    return models


def _runs(config: CompareConfig, folder: Path) -> dict[Key, Job]:
    """Return the arguments of each run."""
    seeds = config.comparison.seeds or [config.train.device.seed]
    if len(set(seeds)) < len(seeds):
        raise UserError(f"--seeds: expected numbers, each once, got {config.comparison.seeds}")
    if bool(config.comparison.hosts) != bool(config.comparison.mixers) or (
        config.comparison.hosts and config.comparison.models
    ):
        raise UserError("expected --models, or --hosts and --mixers, which are all put into each of the hosts")
    models: dict[str, Job] = {}
    for spec in config.comparison.models:
        name, *options = spec.split() or [""]
        kwargs = {**config.train.model.model_kwargs, **key_values(options, f"--models {spec!r}")}
        models[spec] = Job(changed(config.train, model=name, model_kwargs=kwargs), spec)
    if not (models or config.comparison.hosts):
        raise UserError(
            "nothing to compare: give --models NAME ..., or --hosts and --mixers (--model is for training one)"
        )
    if len(models) < len(config.comparison.models):
        raise UserError(f"--models: expected names, each once, got {config.comparison.models}")
    if config.comparison.variants:
        if config.comparison.hosts:
            raise UserError("--variants are of --models; leave --hosts and --mixers out")
        models = _varied(models, config.comparison.variants)
    for host in _labelled("--hosts", config.comparison.hosts):
        for mixer in _labelled("--mixers", config.comparison.mixers):
            kwargs = {**config.train.model.model_kwargs, **{k: v for k, v in _spec(host).items() if k != "type"}}
            if mixer["type"] != "own":
                kwargs["mixers"] = _spec(mixer)
            spec = json.dumps([_spec(host), _spec(mixer)])
            train = changed(config.train, model=host["type"], model_kwargs=kwargs)
            models[f"{host['label']}/{mixer['label']}"] = Job(train, spec, host["label"], mixer["label"])
    runs: dict[Key, Job] = {}
    apart = _apart(config)
    for seed in seeds:
        for name, own in models.items():
            experiment = name.replace(" ", ",").replace("/", ",") + (f",seed={seed}" if config.comparison.seeds else "")
            run = own.other(seed=seed, output=str(folder), experiment=experiment, resume="auto", no_curves=apart)
            runs[name, seed] = run
            for probe in config.comparison.probes:
                key = (f"{name} + {probe}", seed)
                if key in runs:
                    raise UserError(f"--probes: expected names, each once, got {config.comparison.probes}")
                runs[key] = _probe_job(run, probe, config)
    return runs


def _varied(models: Mapping[str, Job], variants: Sequence[Mapping[str, Any]]) -> dict[str, Job]:
    """Return the runs of models, each under the flags of each variant, by model and name of the variant.

    Raises:
        UserError: a name is given twice, or what a variant has is no flag of training or one that the comparison sets.
    """
    parser = train_parser()
    varied: dict[str, Job] = {}
    for variant in variants:
        label, given = variant["type"], _spec({**variant, "label": ""})
        del given["type"]
        flags = parser.typed(given, f"--variants {label}")
        if taken := sorted(NOT_OF_A_VARIANT & flags.keys()):
            raise UserError(f"--variants {label}: {', '.join(taken)} is of the whole comparison; leave it out")
        for name, job in models.items():
            key = f"{name} {label}"
            if key in varied:
                raise UserError(f"--variants: {label!r} is there twice; give each another name")
            varied[key] = replace(job.other(**flags), spec=json.dumps([job.spec, given]))
    return varied


def _apart(config: CompareConfig) -> bool:
    """Whether speeds are measured apart from the trainings."""
    return bool(config.comparison.hosts) or config.comparison.jobs is not None


def _labelled(flag: str, parts: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Return parts with a label each: the given one, else name and options.

    Raises:
        UserError: a label is given twice, or cannot be a part of a folder's name.
    """
    labelled: list[dict[str, Any]] = []
    for part in parts:
        own = ",".join([part["type"], *(f"{k}={v}".replace(" ", "") for k, v in _spec(part).items() if k != "type")])
        label = part.get("label", own)
        if not isinstance(label, str) or not re.fullmatch(r"[^\s/\\]+", label) or label[0] in ".-":
            raise UserError(f"{flag}: expected a label without spaces and slashes, got {label!r}; pass label=NAME")
        if label in (other["label"] for other in labelled):
            raise UserError(f"{flag}: {label!r} is there twice; give each its label=NAME")
        labelled.append({**part, "label": label})
    return labelled


def _spec(part: Mapping[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in part.items() if name != "label"}


def _is_real(mixer: Mapping[str, Any]) -> bool:
    return mixer["type"] not in OWN


def _is_probe(model: str) -> bool:
    return " + " in model


def _key(row: Row) -> Key:
    return row["model"], int(row["seed"])


def _probe_job(trained: Job, probe: str, config: CompareConfig) -> Job:
    """Return the run of a probe of a model, which begins where its training ended."""
    name, *options = probe.split() or [""]
    if name not in PROBES:
        raise UserError(f"--probes: expected some of {', '.join(PROBES)}, got {probe!r}{closest(name, PROBES)}")
    return trained.other(
        freeze=True,
        probe=name,
        head_kwargs=key_values(options, f"--probes {probe!r}"),
        initial_checkpoint=str(Path(trained.config.run.output) / trained.experiment / LAST),
        pretrained=False,
        experiment=f"{trained.experiment},{probe.replace(' ', ',')}",
        epochs=config.comparison.probe_epochs or config.train.schedule.epochs,
    )


def _check(config: CompareConfig, name: str) -> None:
    """Find before hours of training what would stop it, or what comes behind it."""
    own, usual = config.comparison, ComparisonConfig()
    if not own.hosts and (own.growth_tokens != usual.growth_tokens or own.growth_dim != usual.growth_dim):
        raise UserError(
            "--growth-tokens and --growth-dim are of --hosts and --mixers; give these too, or leave them out"
        )
    if own.probe_epochs and not own.probes:
        raise UserError("--probe-epochs is of --probes; give these too, or leave it out")
    if config.train.run.resume not in ("", "auto"):
        raise UserError("a comparison continues what its own folder holds; leave --resume out")
    if config.train.fit.probe or config.train.fit.head_kwargs:
        raise UserError("a comparison takes probes and their options by --probes; leave --probe and --head-kwargs out")
    if int(os.environ.get("WORLD_SIZE", 1)) > 1 or not config.train.splits.val_split:
        raise UserError("a comparison is not distributed and validates: start it without torchrun, with --val-split")
    if config.comparison.growth_tokens[0] > config.comparison.growth_tokens[1]:
        smallest, largest = config.comparison.growth_tokens
        raise UserError(f"--growth-tokens: expected the smaller number first, got {smallest} {largest}")
    if config.comparison.write:
        _written(Path(config.comparison.write), name, "")
    process = start_process(devices(config.train.device.device)[0])
    if not config.comparison.report:
        prepare_compiler(config.train.model)
        if config.train.fit.cuda_graphs:
            check_graphs(config.train, process)


def _to_do(rows: list[Row], runs: dict[Key, Job]) -> list[Key]:
    """Return which runs are not done; rows of earlier versions get what they lack.

    Raises:
        UserError: a row is of a model with the same name and other options, or there are two of a run.
    """
    todo = dict.fromkeys(runs)
    for row in rows:
        row.setdefault("seed", next((seed for model, seed in runs if model == row["model"]), 0))
        row.setdefault("status", "ok")
        run = runs.get(_key(row))
        if run is not None and row["status"] == "ok":
            if row.get("spec", run.spec) != run.spec:
                raise UserError(
                    f"{row['model']} was done with {row['spec']}, and now is {run.spec}; give it another label, or "
                    "name another --experiment"
                )
            if _key(row) not in todo:
                raise UserError(f"{RESULTS} has two rows of {row['model']}, seed {row['seed']:g}; remove one of them")
            del todo[_key(row)]
    return list(todo)


def _try(runs: dict[Key, Job], models: set[str]) -> None:
    """Build each of the models and show it a blank image, on the CPU.

    Raises:
        UserError: some do not work; it names them all.
    """
    wrong = []
    tried = set()
    for (name, _), run in runs.items():
        if name not in models or name in tried:
            continue
        tried.add(name)
        model = replace(run.config.model, pretrained=False)
        try:
            if run.mixer and (mixer := model.model_kwargs.get("mixers", {"type": "own"})["type"]) not in (
                *OWN,
                *MIXERS,
            ):
                raise UserError(f"unknown mixer {mixer!r}{closest(mixer, [*MIXERS, *OWN])}")
            model = choose_head(run.config.fit, model)
            built = build_model(model, run.config.input)
            try_images(built, model.name, data_config(model, run.config.input, built)["input_size"])
        except (UserError, ValueError) as error:
            wrong.append(str(error) if len(models) == 1 or not run.mixer else f"{name}: {error}")
    if wrong:
        raise UserError("\n".join(dict.fromkeys(wrong)))


def _keep_recipe(config: CompareConfig, folder: Path) -> None:
    """Write down the recipe, or compare it with that of the results that are there."""
    yaml, path = require("yaml"), folder / "recipe.yaml"
    recipe = {name: value for name, value in settings(config).items() if name not in NOT_OF_THE_RECIPE}
    recipe["model_kwargs"] = config.train.model.model_kwargs
    if path.exists():
        try:
            before = yaml.safe_load(path.read_text(encoding="utf-8"))
        except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
            raise UserError(f"cannot read {path}: {error}") from error
        if not isinstance(before, Mapping):
            raise UserError(f"{path}: expected a mapping of flags to values, got {before!r}; name another --experiment")
        changed = [name for name in recipe if name in before and recipe[name] != before[name]]
        if changed and _begun(folder):
            differences = ", ".join(f"{name} {before[name]!r} instead of {recipe[name]!r}" for name in changed)
            raise UserError(f"{folder} holds a comparison with {differences}; name another --experiment")
    make_folder(folder)
    write_atomically(path, lambda file: file.write(yaml.safe_dump(recipe, sort_keys=False).encode()))


def _begun(folder: Path) -> bool:
    """Whether there is a result, or a checkpoint of one, which another recipe would be mixed with."""
    rows = read_rows(folder / RESULTS, needed=OF_RUNS)
    return any(row.get("status", "ok") == "ok" for row in rows) or any(folder.glob("*/*.pth.tar"))


def _run(
    tasks: Mapping[Any, Task], rows: list[Row], path: Path, jobs: int | None, of: Sequence[Any] | Mapping[Any, Any]
) -> None:
    """Run tasks; each result becomes a row of the file and replaces what an earlier start left of it."""
    numbers = {key: number for number, key in enumerate(of, 1)}
    done = 0

    def keep(key: Any, result: Row | Failure) -> None:
        nonlocal done
        done += 1
        spec = tasks[key][1].spec
        names = {"model": key[0], "seed": key[1]} if isinstance(key, tuple) else {}
        if path.name != RESULTS:
            names = {"mixer": key} if path.name == GROWTH else {"model": key}
        row = {**names, "spec": spec}
        if isinstance(result, Failure):
            row |= {"status": "failed", "reason": result.reason}
        else:
            row |= {"status": "ok", "reason": "", **result}
        same = [i for i, other in enumerate(rows) if all(other.get(name) == value for name, value in names.items())]
        for index in reversed(same):
            del rows[index]
        rows.append(row)
        write_rows(rows, path)
        what = names.get("model") or names["mixer"]
        end = f"failed: {row['reason']}" if row["status"] == "failed" else "done"
        seed = f", seed {names['seed']}" if "seed" in names else ""
        print(f"{what} ({numbers[key]} of {len(numbers)}){seed}: {end}, {done} of {len(tasks)}", flush=True)

    if tasks:
        run_tasks(tasks, keep, jobs=jobs, logs=path.parent / "logs")


def _first_seeds(runs: dict[Key, Job], trained: list[Row]) -> dict[str, Job]:
    """Return for each model that is trained one of its runs."""
    models = {row["model"] for row in trained}
    return {name: run for (name, _), run in reversed(runs.items()) if name in models}


def _measured(
    config: CompareConfig,
    what: str,
    things: Mapping[str, Any],
    path: Path,
    call: Callable[[Any], Row],
) -> list[Row]:
    """Return the rows of measurements, one at a time on each device, after doing those that are missing."""
    rows = read_rows(path, what)
    specs = {name: own.spec for name, own in things.items()}
    done = {row[what] for row in rows if row["status"] == "ok" and row["spec"] == specs.get(row[what])}
    missing = () if config.comparison.report else [name for name in things if name not in done]
    tasks: dict[Any, Task] = {name: (call, things[name]) for name in missing}
    jobs = (
        None
        if config.comparison.jobs is None
        else min(config.comparison.jobs, len(devices(config.train.device.device)))
    )
    _run(tasks, rows, path, jobs, of=things)
    return [row for name, spec in specs.items() for row in rows if row[what] == name and row["spec"] == spec]


def _train(job: Job) -> Row:
    """Train a model; speeds are measured apart, while nothing else runs."""
    return _trained_row(job, _trained(job))


def _train_and_measure(job: Job) -> Row:
    """Train a model and measure it."""
    run = _trained(job)
    assert run.reporter is not None
    last = run.reporter.rows[-1]
    model = run.task.get_eval_model()
    assert model is not None
    return _trained_row(job, run) | {
        "train_images_per_second": float(last["images_per_second"]),  # of the last epoch, with its loading
        "loader_images_per_second": loader_rate(run),
        "inference_images_per_second": inference_rate(model, run.config, run.data_config["input_size"], INFERENCE),
        "peak_memory_mib": float(last["peak_memory_mib"]) if "peak_memory_mib" in last else None,
    }


def _measure_speed(job: Job) -> Row:
    return measure_speed(job.config)


def _trained(job: Job) -> Run:
    print(f"{job.experiment}:", flush=True)
    release()  # what the run before held on the device, and its compiled code
    run = build_run(job.config, start_process(job.config.device.device))
    Training(run).fit()
    return run


def _trained_row(job: Job, run: Run) -> Row:
    assert run.reporter is not None
    last = run.reporter.rows[-1]
    return {
        "host": job.host,
        "mixer": job.mixer,
        "params_m": sum(p.numel() for p in run.student.parameters()) / 1e6,
        "trained_m": sum(p.numel() for p in run.student.parameters() if p.requires_grad) / 1e6,
        "top1": float(last["eval_top1"]),
        "seconds": sum(float(row["seconds"]) for row in run.reporter.rows),
        "epochs": run.num_epochs,
        "device": device_name(run.process.device),
        "torch": torch.__version__,
        "timm": timm.__version__,
        "visionzoo": visionzoo.__version__,
        "python": platform.python_version(),
    }


def _written(path: Path, name: str, content: str) -> str:
    begin, end = f"<!-- {name}: written by tools/compare.py -->", f"<!-- end of {name} -->"
    try:
        return insert_between(path.read_text(encoding="utf-8"), begin, end, content)
    except OSError as error:
        remedy = f"give a page that has the lines {begin!r} and {end!r}"
        raise UserError(f"--write {path}: {error.strerror}; {remedy}") from error
    except UserError as error:
        raise UserError(f"--write {path}: {error}") from error
