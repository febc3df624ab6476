"""A grid of a notebook's parameters: what it has, what of it is missing, and a table of the scores.

What is finished is kept, so that the same command started again executes only what is missing.
"""

from __future__ import annotations

import itertools
import json
import re
import sys
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..base.files import atomic_write, digest, project_dir
from . import batch, engine, parameters
from .batch import Job

if TYPE_CHECKING:
    import pandas as pd

COLUMNS = {"model", "dataset", "accuracy", "accuracy (%)", "mean", "std", "n", "seconds"}


def grid(
    notebook: Path, axes: Iterable[tuple[str, str]], *, full: bool = False, out: Path | None = None
) -> list[Job]:
    """All combinations of the values of the axes; the last one varies fastest.

    axes: (parameter, its values as YAML with commas between); `seed` makes `seeds` lists of one.
    Raises ValueError or NotebookError for names and values that do not fit.
    """
    owner, known = f"sweep: {notebook.stem}", parameters.of_notebook(notebook)
    profile = batch.full_parameters(notebook) if full else {}
    base = parameters.check(profile, known, owner=owner)
    choices: dict[str, list[tuple[str, Any, Any]]] = {}
    for name, text in axes:
        single = name not in known and type(known.get(f"{name}s")) is list
        target = f"{name}s" if single else name
        if target in choices:
            raise ValueError(f"sweep: {target} is given twice. Give all its values at once.")
        choices[target] = []
        for value in _values(name, text):
            given = {target: [value] if single else value}
            fitting = parameters.check(given, known, owner=owner)[target]
            choices[target].append((name, fitting[0] if single else fitting, fitting))

    cells = batch.read(notebook).cells
    code = [cell.source for cell in cells if cell.cell_type == "code"]
    build = project_dir() / "build"
    folder = (out or build / "sweeps" / notebook.stem).resolve()
    jobs: dict[str, Job] = {}
    for chosen in itertools.product(*choices.values()):
        values = base | {target: value for target, (_, _, value) in zip(choices, chosen)}
        varied = {name: shown for name, shown, _ in chosen}
        label = ", ".join(f"{name}={_text(value)}" for name, value in varied.items())
        file = f"{_slug(label)}.ipynb"
        if file in jobs:
            raise ValueError(f"sweep: {label} comes twice. Give every value once.")
        failed = build / "failed" / f"{notebook.stem},{file}"
        key = digest([code, values])
        jobs[file] = Job(notebook, values, folder / file, failed, label, key, varied)
    return list(jobs.values())


def _values(name: str, text: str) -> list[Any]:
    owner = f"sweep: -p {name} {text!r}"
    values = parameters.from_yaml(f"[{text}]", owner=owner)
    if not values:
        raise ValueError(f"{owner} is no list of values. Give them with commas between: 2,5,10.")
    return values


def _text(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value)


def _slug(label: str) -> str:
    """The label as a file name; one that had to change gets a digest that tells it from others."""
    name = label.replace(", ", ",")
    safe = re.sub(r"[^\w.,=+\[\]-]", "-", name, flags=re.ASCII)[:120]
    return safe if safe == name else f"{safe}-{digest(name)}"


def run(jobs: Sequence[Job], *, at_once: int = 1, scheduler: str | None = None) -> int:
    """Execute what is missing of a grid; print progress and the table. See engine.execute_all.

    Returns the exit status: 0, 1 if a notebook failed, 128 + the signal's number after a signal.
    """
    total, folder = len(jobs), jobs[0].output.parent
    folder.mkdir(parents=True, exist_ok=True)
    finished = [job for job in jobs if job.reported() is not None]
    missing = [job for job in jobs if job not in finished]
    at_once = min(at_once, len(missing) or 1)
    where = f"on {scheduler}" if scheduler else f"{at_once} at a time"
    print(f"{jobs[0].notebook.stem}: {total} combinations, {len(missing)} missing, {where}")
    for number, job in enumerate(finished, start=1):
        print(f"[{number}/{total}] {job.label}: already there", flush=True)
    failures = []

    def ended(job: Job, error: str | None, seconds: float) -> None:
        if error is None:
            finished.append(job)
            line = batch.outcome(job.label, seconds, job.reported() or {})
        else:
            failures.append(job)
            line = f"{job.label}: FAILED: {error}"
        kept = f"; see {job.failed}" if error and job.failed.exists() else ""
        done = len(finished) + len(failures)
        print(f"[{done}/{total}] {line.splitlines()[0]}{kept}", flush=True)

    status = engine.execute_all(missing, ended, at_once=at_once, scheduler=scheduler)
    bundles = {job: bundle for job in jobs if (bundle := job.reported()) is not None}
    if status:
        line = f"Stopped: {len(bundles)} of {total} are done. The same command does the others."
    else:
        _show(table(bundles), folder / "table.csv")
        line = f"{len(failures)} of {total} failed. The same command tries them again."
    if status or failures:
        print(line, file=sys.stderr)
    return status or int(bool(failures))


def table(bundles: Mapping[Job, Mapping[str, Any]]) -> pd.DataFrame:
    """Mean, sample deviation (NaN if n = 1) and n of the test accuracies of each model, in percent.

    Those of all runs that differ in nothing but their seeds are pooled. bundles: what was reported.
    """
    import pandas as pd

    rows, names = [], []
    for job, bundle in bundles.items():
        grid_values = {
            f"{name} (parameter)" if name in COLUMNS else name: _text(value)
            for name, value in job.varied.items()
            if name not in ("seed", "seeds")
        }
        names = [*grid_values, "model", "dataset"]
        for row in bundle.get("headline_rows", []):
            kept = {name: row[name] for name in ("model", "dataset", "seconds")}
            rows += [{**grid_values, **kept, "accuracy": value} for value in row["values"]]
    if not rows:
        return pd.DataFrame()
    pooled = pd.DataFrame(rows).groupby(names, sort=False)
    scores = pooled["accuracy"].agg(["mean", "std", "size"]).rename(columns={"size": "n"})
    return scores.assign(seconds=pooled["seconds"].mean()).round(3).reset_index()


def _show(scores: pd.DataFrame, path: Path) -> None:
    if scores.empty:
        path.unlink(missing_ok=True)
        print("No table, because no run recorded a score with Claims.record.")
        return
    with atomic_write(path) as file:
        file.write(scores.to_csv(index=False).encode())
    spread = ["–" if n == 1 else f"{std:.2f}" for n, std in zip(scores["n"], scores["std"])]
    scores["std"] = [f"{mean:.2f} ± {std}" for mean, std in zip(scores["mean"], spread)]
    scores = scores.drop(columns="mean").rename(columns={"std": "accuracy (%)"})
    print(f"{scores.to_string(index=False)}\nwritten to {path}")
