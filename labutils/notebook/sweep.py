"""A grid of runs of one notebook: which runs, what is missing, and the scores of all in one table.

How they run is up to `workers`. What has finished is kept, so the same command started again runs
only what is missing.
"""

from __future__ import annotations

import itertools
import json
import re
import signal
import sys
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import nbformat
import yaml

from ..base.files import atomic_write, digest, project_dir
from . import batch, workers
from .workers import Point

if TYPE_CHECKING:
    import pandas as pd

COLUMNS = {"model", "dataset", "accuracy", "accuracy (%)", "mean", "std", "n", "seconds"}


def grid(
    notebook: Path, axes: Iterable[tuple[str, str]], *, full: bool = False, out: Path | None = None
) -> list[Point]:
    """All combinations of the values of the axes; the last one varies fastest.

    axes: (parameter, its values as YAML with commas between); `seed` makes `seeds` lists of one.
    Raises ValueError or NotebookError for names and values that do not fit.
    """
    known = batch.parameters_of(notebook)
    base = batch.check_parameters(notebook, batch.full_parameters(notebook) if full else {})
    choices: dict[str, list[tuple[str, Any, Any]]] = {}
    for name, text in axes:
        single = name not in known and type(known.get(f"{name}s")) is list
        target = f"{name}s" if single else name
        if target in choices:
            raise ValueError(f"sweep: {target} is given twice. Give all its values at once.")
        values = [[value] if single else value for value in _values(name, text)]
        values = [batch.check_parameters(notebook, {target: value})[target] for value in values]
        choices[target] = [(name, value[0] if single else value, value) for value in values]

    cells = nbformat.read(notebook, as_version=4).cells
    code = [cell.source for cell in cells if cell.cell_type == "code"]
    build = project_dir() / "build"
    folder = (out or build / "sweeps" / notebook.stem).resolve()
    points: dict[str, Point] = {}
    for chosen in itertools.product(*choices.values()):
        parameters = base | {target: value for target, (_, _, value) in zip(choices, chosen)}
        varied = {name: shown for name, shown, _ in chosen}
        label = ", ".join(f"{name}={_text(value)}" for name, value in varied.items())
        file = f"{_slug(label)}.ipynb"
        if file in points:
            raise ValueError(f"sweep: {label} comes twice. Give every value once.")
        points[file] = Point(
            notebook=notebook,
            parameters=parameters,
            output=folder / file,
            failed=build / "failed" / f"{notebook.stem},{file}",
            key=digest([code, parameters]),
            label=label,
            varied=varied,
        )
    return list(points.values())


def _values(name: str, text: str) -> list[Any]:
    try:
        values = yaml.safe_load(f"[{text}]")
    except yaml.YAMLError:
        values = []
    if not values:
        raise ValueError(
            f"sweep: {name} = {text!r} is no list of values. Give them with commas between, lists "
            f'in brackets: -p {name} 2,5,10 or -p {name} "[3, 10],[64]".'
        )
    return values


def _text(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value)


def _slug(label: str) -> str:
    """The label as a file name; one that had to change gets a digest that tells it from others."""
    name = label.replace(", ", ",")
    safe = re.sub(r"[^\w.,=+\[\]-]", "-", name, flags=re.ASCII)[:120]
    return safe if safe == name else f"{safe}-{digest(name)}"


def run(points: Sequence[Point], *, jobs: int = 1) -> int:
    """Run the points that are missing, at most jobs at a time; print progress and the table.

    Returns the exit status: 0, 1 if a run failed, 128 + the signal's number after Ctrl-C or a kill.
    Raises ValueError if jobs is not positive.
    """
    if jobs < 1:
        raise ValueError(f"sweep: jobs = {jobs}. Give how many runs to do at a time, 1 or more.")
    total, folder = len(points), points[0].output.parent
    folder.mkdir(parents=True, exist_ok=True)
    said = {point: found for point in points if (found := point.said()) is not None}
    missing = [point for point in points if point not in said]
    jobs = min(jobs, len(missing) or 1)
    print(f"{points[0].notebook.stem}: {total} runs, {len(missing)} missing, {jobs} at a time")
    for number, point in enumerate(said, start=1):
        print(f"[{number}/{total}] {point.label}: already there")
    sys.stdout.flush()
    with workers.signals() as stop:
        ends = workers.start(missing, jobs, stop)
        try:
            failures = _follow(ends, said, total, stop)
        except BaseException:  # standard output is closed, say: then nothing goes on unseen
            stop.append(signal.SIGTERM)
            list(ends)
            raise
    if stop:
        line = f"Stopped: {len(said)} of {total} runs are done. The same command does the others."
    else:
        in_order = {point: said[point] for point in points if point in said}
        _show(table(in_order), folder / "table.csv")
        line = f"{failures} of {total} runs failed. The same command tries them again."
    if stop or failures:
        print(line, file=sys.stderr)
    return 128 + stop[0] if stop else int(failures > 0)


def _follow(
    ends: Iterable[workers.Ended],
    said: dict[Point, dict[str, Any]],
    total: int,
    stop: Sequence[int],
) -> int:
    """Print a line for each run that ends, and add what it said. Returns how many failed."""
    failures = 0
    for point, error, seconds in ends:
        if error is None:
            said[point] = point.said() or {}
            line = str(batch.Outcome.of(point.label, seconds, said[point])).splitlines()[0]
        elif stop:
            continue
        else:
            failures += 1
            line = f"{point.label}: FAILED: {error}"
        print(f"[{len(said) + failures}/{total}] {line}", flush=True)
    return failures


def table(said: Mapping[Point, Mapping[str, Any]]) -> pd.DataFrame:
    """Mean, sample deviation (NaN if n = 1) and n of the test accuracies of each model, in percent.

    Those of all runs that differ in nothing but their seeds are pooled. said: what the Claims hold.
    """
    import pandas as pd

    rows, names = [], []
    for point, found in said.items():
        grid_values = {
            f"{name} (parameter)" if name in COLUMNS else name: _text(value)
            for name, value in point.varied.items()
            if name not in ("seed", "seeds")
        }
        names = [*grid_values, "model", "dataset"]
        for row in found.get("headline_rows", []):
            kept = {name: row[name] for name in ("model", "dataset", "seconds")}
            rows += [{**grid_values, **kept, "accuracy": value} for value in row["values"]]
    if not rows:
        return pd.DataFrame()
    pooled = pd.DataFrame(rows).groupby(names, sort=False)
    found = pooled["accuracy"].agg(["mean", "std", "size"]).rename(columns={"size": "n"})
    return found.assign(seconds=pooled["seconds"].mean()).round(3).reset_index()


def _show(found: pd.DataFrame, path: Path) -> None:
    if found.empty:
        path.unlink(missing_ok=True)
        print("No table, because no run recorded a score with Claims.record.")
        return
    with atomic_write(path) as file:
        file.write(found.to_csv(index=False).encode())
    spread = ["–" if n == 1 else f"{std:.2f}" for n, std in zip(found["n"], found["std"])]
    found["std"] = [f"{mean:.2f} ± {std}" for mean, std in zip(found["mean"], spread)]
    found = found.drop(columns="mean").rename(columns={"std": "accuracy (%)"})
    print(f"{found.to_string(index=False)}\nwritten to {path}")
