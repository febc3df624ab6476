"""The command line: python -m labutils run | sweep | data | results."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

import yaml

from .base.files import data_dir, project_dir

RUN_EXAMPLES = """\
examples:
  python -m labutils run all                           quick profile of every notebook, into build/
  python -m labutils run 1.1 -p epochs 3               with a parameter changed
  python -m labutils run 1.1 -p grid_widths "[3, 10]"  values are YAML
  python -m labutils run 1.1 --profile full            real data, into reports/; reuses runs
  python -m labutils run 1.1 --profile full -p retrain true     ... and trained from nothing
  python -m labutils run all --store                   refresh the outputs stored in notebooks/
A claim that fails in the quick profile, with no parameter changed, makes the command fail."""

SWEEP_EXAMPLES = """\
examples:
  python -m labutils sweep 1.1 -p seed 0,1,2                    a run for each value of `seeds`
  python -m labutils sweep 1.1 -p lr 0.003,0.01,0.03 -p seed 0,1,2 --jobs 3
                                                                nine runs, three at a time
  python -m labutils sweep 1.1 -p grid_widths "[3, 10],[64]"    values are YAML, here two lists
  python -m labutils sweep 1.1 --profile full -p epochs 20,40   the rest as in the full profile
Every run is a process and leaves its notebook in build/sweeps/; a table of all is printed at the
end. The same command again does only what is missing: failed, stopped, or changed since."""

DATA_EXAMPLES = """\
examples:
  python -m labutils data                              what is known, and where it is looked for
  python -m labutils data mnist cifar10                fetch if needed, check, print sizes
  python -m labutils data folder:~/my-images           check a folder of your own
Data sets are looked for under $LABUTILS_DATA (now {folder})."""

RESULTS_EXAMPLES = """\
example:
  python -m labutils results       rebuild reports/results.json and README.md from the reports"""


def main(arguments: list[str] | None = None) -> int:
    """Run one command; returns the exit status: 0, or 1 after an error or a failed claim.

    A sweep that is stopped returns 128 and the number of the signal, as shells do.
    """
    parser = argparse.ArgumentParser(
        prog="python -m labutils", description="Run notebooks, look after data, collect results."
    )
    commands = parser.add_subparsers(dest="command", required=True)
    shared = {"formatter_class": argparse.RawDescriptionHelpFormatter}

    run = commands.add_parser("run", help="execute notebooks", epilog=RUN_EXAMPLES, **shared)
    run.add_argument("notebook", help="number (1.1), name, or all")
    run.add_argument("--profile", choices=["quick", "full"], default="quick")
    run.add_argument(
        "-p", "--parameter", nargs=2, action="append", default=[], metavar=("NAME", "VALUE")
    )
    where = run.add_mutually_exclusive_group()
    where.add_argument("--out", type=Path, help="folder (default: build/, for full: reports/)")
    where.add_argument("--store", action="store_true", help="write into notebooks/ itself")
    run.set_defaults(action=_run)

    sweep = commands.add_parser(
        "sweep", help="run a notebook with many parameters", epilog=SWEEP_EXAMPLES, **shared
    )
    sweep.add_argument("notebook", help="number (1.1) or name")
    sweep.add_argument("--profile", choices=["quick", "full"], default="quick")
    sweep.add_argument(
        "-p",
        "--parameter",
        nargs=2,
        action="append",
        required=True,
        metavar=("NAME", "VALUES"),
        help="a parameter and its values, commas between; more than once: all combinations",
    )
    sweep.add_argument("--jobs", type=int, default=1, help="runs at a time (default: 1)")
    sweep.add_argument("--out", type=Path, help="folder (default: build/sweeps/NOTEBOOK/)")
    sweep.set_defaults(action=_sweep)

    epilog = DATA_EXAMPLES.format(folder=data_dir())
    data = commands.add_parser("data", help="find, fetch and check data", epilog=epilog, **shared)
    data.add_argument("names", nargs="*", metavar="NAME")
    data.set_defaults(action=_data)

    results = commands.add_parser(
        "results", help="collect results of the reports", epilog=RESULTS_EXAMPLES, **shared
    )
    results.set_defaults(action=_results)

    parsed = parser.parse_args(arguments)
    try:
        return parsed.action(parsed)
    except (RuntimeError, ValueError, OSError) as error:
        print(error, file=sys.stderr)
        return 1


def _run(parsed: argparse.Namespace) -> int:
    from .notebook import batch

    given: dict[str, Any] = {name: yaml.safe_load(value) for name, value in parsed.parameter}
    full = parsed.profile == "full"
    if parsed.store and (full or given):
        raise ValueError("run: --store keeps the quick profile as it is; leave out other options.")
    # Only the full profile as it stands makes a report; anything else is an experiment.
    report = full and parsed.out is None and set(given) <= {"retrain"}
    folder = parsed.out or project_dir() / ("reports" if report else "build")
    failures = 0
    for notebook in batch.find_notebooks(parsed.notebook):
        profile = batch.full_parameters(notebook, report=report) if full else {}
        parameters = {**profile, **given}
        output = notebook if parsed.store else folder / notebook.name
        if sys.stderr.isatty():
            print(f"{notebook.stem} → {output}", file=sys.stderr)
        try:
            outcome = batch.run_notebook(notebook, output, parameters)
        except batch.NotebookError as error:
            print(error, file=sys.stderr)
            failures += 1
            continue
        print(outcome, flush=True)
        failures += bool(outcome.failed) and not full and not given
    return int(failures > 0)


def _sweep(parsed: argparse.Namespace) -> int:
    from .notebook import batch, sweep

    notebooks = batch.find_notebooks(parsed.notebook)
    if parsed.notebook == "all" or len(notebooks) > 1:
        raise ValueError(
            f"sweep: {parsed.notebook!r} may be more than one notebook. Give one: "
            f"{', '.join(path.stem for path in notebooks)}."
        )
    full = parsed.profile == "full"
    points = sweep.grid(notebooks[0], parsed.parameter, full=full, out=parsed.out)
    return sweep.run(points, jobs=parsed.jobs)


def _data(parsed: argparse.Namespace) -> int:
    from .data.load import load_data
    from .data.sources import EMBEDDED, KNOWN

    if not parsed.names:
        for name in EMBEDDED:
            print(f"{name}: embedded")
        for name, known in KNOWN.items():
            places = [
                path for path in (f"{name}.npz", known.folder) if (data_dir() / path).exists()
            ]
            print(f"{name}: {places[0] if places else 'not here yet'}")
        print(f"Looked for in {data_dir()}. `python -m labutils data NAME` fetches and checks one.")
    for name in parsed.names:
        print(load_data(name, device="cpu"), flush=True)
    return 0


def _results(parsed: argparse.Namespace) -> int:
    from .notebook.batch import write_results

    rows = write_results(project_dir())
    print(f"{len(rows)} rows in reports/results.json and README.md")
    return 0


if __name__ == "__main__":
    sys.exit(main())
