"""A grid of a notebook's parameters: what it has, what of it is missing, and a table of the scores.

What is finished is kept, so that the same command started again executes only what is missing.
"""

import itertools
import json
import sys
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from urllib.parse import quote

import pandas as pd

from .. import __version__
from ..base.files import atomic_write, digest, project_dir
from . import batch, engine, parameters
from .batch import Job

# Columns of the table; a name with a space or a bracket is that of no parameter.
TITLES = {"model": "model name", "dataset": "data set"}
TITLES |= {"values": "accuracy (%)", "seconds": "seconds a run"}


def grid(
    notebook: Path, axes: Iterable[tuple[str, str]], *, full: bool = False, out: Path | None = None
) -> list[Job]:
    """All combinations of the values of the axes; the last one varies fastest.

    axes: (parameter, its values as YAML with commas between); `seed` makes `seeds` lists of one.
    Raises ValueError or NotebookError for names and values that do not fit.
    """
    known = parameters.of_notebook(notebook)
    profile = batch.full_parameters(notebook) if full else {}
    names, choices = {}, []
    for name, text in axes:
        single = name not in known and isinstance(known.get(f"{name}s"), list)
        target = f"{name}s" if single else name
        owner = f"sweep: -p {name} {text!r}"
        values = parameters.from_yaml(f"[{text}]", owner=owner)
        if target in names or not values:
            raise ValueError(f"{owner}: give all values of {target} at once, like this: 2,5,10.")
        names[target] = name
        choices.append([[value] for value in values] if single else values)

    code = [cell.source for cell in batch.read(notebook).cells if cell.cell_type == "code"]
    folder = (out or project_dir() / "build" / "sweeps" / notebook.stem).resolve()
    jobs: dict[str, Job] = {}
    for chosen in itertools.product(*choices):
        given = {**profile, **dict(zip(names, chosen))}
        values = parameters.check(given, known, owner=f"sweep: {notebook.stem}")
        varied = {}
        for target, name in names.items():
            value = values[target] if name == target else values[target][0]
            varied[name] = value if isinstance(value, str) else json.dumps(value)
        label = ", ".join(f"{name}={text}" for name, text in varied.items())
        file = f"{quote(label.replace(', ', ','), safe=',=+[]')[:150]}.ipynb"
        if file in jobs:
            raise ValueError(f"sweep: {label} comes twice, or begins with the same 150 characters.")
        failed = project_dir() / "build" / "failed" / f"{notebook.stem},{file}"
        key = digest([__version__, code, values])
        jobs[file] = Job(notebook, values, folder / file, failed, label, key, varied)
    return list(jobs.values())


def run(jobs: Sequence[Job], *, at_once: int = 1, scheduler: str | None = None) -> int:
    """Execute what is missing of a grid; print progress and the table. See engine.execute_all.

    Returns the exit status: 0, 1 if a notebook failed, 128 + the signal's number after a signal.
    """
    total, path, failures = len(jobs), jobs[0].output.with_name("table.csv"), []
    batch.require_writable(path.parent)
    finished = [job for job in jobs if job.reported() is not None]
    missing = [job for job in jobs if job not in finished]
    where = f"on {scheduler}" if scheduler else f"{at_once} at a time"
    print(f"{jobs[0].notebook.stem}: {total} combinations, {len(missing)} missing, {where}")
    for number, job in enumerate(finished, start=1):
        print(f"[{number}/{total}] {job.label}: already there", flush=True)

    def ended(job: Job, error: str | None, seconds: float) -> None:
        (failures if error else finished).append(job)
        line = f"FAILED: {error}" if error else batch.outcome(seconds, job.reported() or {})
        kept = f"; see {job.failed}" if error and job.failed.exists() else ""
        done = len(finished) + len(failures)
        print(f"[{done}/{total}] {job.label}: {line.splitlines()[0]}{kept}", flush=True)

    status = engine.execute_all(missing, ended, at_once=at_once, scheduler=scheduler)
    bundles = {job: bundle for job in jobs if (bundle := job.reported()) is not None}
    if not status and len(scores := table(bundles)):
        with atomic_write(path) as file:
            file.write(scores.to_csv(index=False).encode())
        print(f"{scores.to_string(index=False)}\nwritten to {path}")
    elif not status and bundles:
        path.unlink(missing_ok=True)
        print("No table, because no run recorded a score with Claims.targets.")
    if status or failures:
        line = f"{len(bundles)} of {total} are done. The same command does the others."
        print(line, file=sys.stderr)
    return status or int(bool(failures))


def table(bundles: Mapping[Job, Mapping]) -> pd.DataFrame:
    """Mean, sample deviation (NaN if n = 1) and n of the test accuracies of each model, in percent.

    Those of all runs that differ in nothing but their seeds are pooled. bundles: what was reported.
    """
    rows = []
    for job, bundle in bundles.items():
        for row in bundle.get("headline_rows", []):
            rows.append({**job.varied, **{TITLES[name]: row[name] for name in TITLES}})
    if not rows:
        return pd.DataFrame()
    scores = pd.DataFrame(rows).explode("accuracy (%)").astype({"accuracy (%)": float})
    pooled = ("seed", "seeds", "accuracy (%)", "seconds a run")
    groups = scores.groupby([name for name in scores if name not in pooled], sort=False)
    numbers = groups["accuracy (%)"].agg(["mean", "std", "size"])
    numbers.columns = ["mean (%)", "std (%)", "runs (n)"]
    numbers["seconds a run"] = groups["seconds a run"].mean()
    return numbers.round(3).reset_index()
