"""Notebooks without a person: run one through papermill, collect what reports found."""

from __future__ import annotations

import ast
import os
import re
import shutil
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import nbformat
import yaml

from ..base.files import atomic_write, project_dir, write_json
from ..base.settings import suggestion
from .claims import MEDIA_TYPE

FLOAT = re.compile(r"[-+]?\d+(\.\d*)?[eE][-+]?\d+")
KIND_NAMES = {bool: "true or false", int: "a whole number", float: "a number", str: "text"}


class NotebookError(RuntimeError):
    """A notebook does not exist, cannot take its parameters, or a cell of it failed."""


@dataclass(frozen=True)
class Outcome:
    """What an executed notebook reported of itself."""

    notebook: str
    seconds: float
    claims: list[dict[str, Any]]
    headline: str

    @classmethod
    def of(cls, notebook: str, seconds: float, said: Mapping[str, Any]) -> Outcome:
        """said: what its Claims hold, as `reported` finds it."""
        return cls(notebook, seconds, said.get("rows", []), said.get("headline", ""))

    @property
    def failed(self) -> list[dict[str, Any]]:
        return [claim for claim in self.claims if not claim["holds"]]

    def __str__(self) -> str:
        held = len(self.claims) - len(self.failed)
        lines = [
            f"{self.notebook}: {self.seconds:.0f} s, {held} of {len(self.claims)} claims hold. "
            f"{self.headline}"
        ]
        lines += [f"  fails: {claim['claim']} ({claim['evidence']})" for claim in self.failed]
        return "\n".join(lines)


def find_notebooks(name: str) -> list[Path]:
    """Notebooks by name, number ('1.1') or 'all', in order.

    Raises NotebookError if there is none.
    """
    known = sorted((project_dir() / "notebooks").glob("*.ipynb"))
    found = [
        path
        for path in known
        if name in ("all", path.stem, path.name) or path.stem.startswith(f"{name}_")
    ]
    if not found:
        raise NotebookError(
            f"run: no notebook {name!r}. Known: all, {', '.join(path.stem for path in known)}."
        )
    return found


def parameters_of(notebook: Path) -> dict[str, Any]:
    """Names and default values of the cell tagged `parameters`."""
    for cell in nbformat.read(notebook, as_version=4).cells:
        if "parameters" in cell.metadata.get("tags", []):
            return {
                target.id: ast.literal_eval(statement.value)
                for statement in ast.parse(cell.source).body
                if isinstance(statement, ast.Assign)
                for target in statement.targets
                if isinstance(target, ast.Name)
            }
    raise NotebookError(f"run: {notebook.name} has no cell tagged 'parameters'.")


def check_parameters(notebook: Path, given: Mapping[str, Any]) -> dict[str, Any]:
    """Refuse unknown names and values of another type before anything runs. Returns the values.

    Raises NotebookError naming the parameter and those that the notebook has.
    """
    known, values = parameters_of(notebook), {}
    for name, value in given.items():
        if name not in known:
            raise NotebookError(
                f"run: {notebook.stem} has no parameter {name!r}.{suggestion(name, known)} "
                f"It has: {', '.join(known)}."
            )
        try:
            values[name] = _fit(value, known[name])
        except TypeError:
            kind = type(known[name])
            wanted = KIND_NAMES.get(kind, f"a {kind.__name__}")
            if kind is list and isinstance(value, list):
                wanted += f", every item {KIND_NAMES.get(type(known[name][0]), 'a list')}"
            raise NotebookError(
                f"run: {notebook.stem}: {name} = {value!r}. Give {wanted}, like its default "
                f"{known[name]!r}."
            ) from None
    return values


def _fit(value: Any, like: Any) -> Any:
    """The value as the kind of like, and items of a list as its items; TypeError if it is not."""
    kind = type(like)
    if kind is float and (
        type(value) is int or (isinstance(value, str) and FLOAT.fullmatch(value))
    ):
        return float(value)  # YAML takes 1e-3 for text
    if not isinstance(value, kind) or isinstance(value, bool) != (kind is bool):
        raise TypeError
    if kind is list and len({type(item) for item in like}) == 1:
        return [_fit(item, like[0]) for item in value]
    return value


def full_parameters(notebook: Path, *, report: bool = False) -> dict[str, Any]:
    """The full profile of a notebook. Raises NotebookError if it has none.

    report: False for an experiment, which publishes nothing.
    """
    path = notebook.parent / "full" / f"{notebook.stem}.yaml"
    if not path.exists():
        raise NotebookError(f"run: {notebook.stem} has no full profile ({path} is missing).")
    parameters = yaml.safe_load(path.read_text())
    if not report and "publish" in parameters:
        parameters["publish"] = False
    return parameters


def run_notebook(
    notebook: Path,
    output: Path,
    parameters: Mapping[str, Any],
    *,
    failed: Path | None = None,
    metadata: Mapping[str, Any] | None = None,
) -> Outcome:
    """Execute a notebook into output, which is replaced only when every cell ran.

    failed: where to keep what ran when a cell fails; default: build/failed/. metadata: added to
    that of the output.
    Raises NotebookError for parameters that do not fit, or if a cell fails.
    """
    import papermill
    from nbclient.exceptions import DeadKernelError
    from traitlets.config import Config

    parameters = check_parameters(notebook, parameters)
    output.parent.mkdir(parents=True, exist_ok=True)
    failed = failed or project_dir() / "build" / "failed" / output.name
    failed.unlink(missing_ok=True)
    # A kernel below a JupyterLab terminal would otherwise believe that somebody watches it.
    watched = os.environ.pop("JPY_SESSION_NAME", None)
    started = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="labutils-run-") as folder:
        draft = Path(folder) / output.name
        try:
            papermill.execute_notebook(
                notebook,
                draft,
                parameters,
                progress_bar=sys.stderr.isatty(),
                # Kernels warn on the terminal when what they send is not encrypted.
                config=Config(KernelManager={"transport_encryption": "auto"}),
            )
        except papermill.PapermillExecutionError as error:
            failed.parent.mkdir(parents=True, exist_ok=True)
            shutil.move(draft, failed)
            raise NotebookError(
                f"run: {notebook.stem} failed in cell {error.exec_count}: {error.ename}: "
                f"{error.evalue}\nWhat ran is in {failed}; {output.name} is as it was."
            ) from None
        except DeadKernelError:
            raise NotebookError(
                f"run: {notebook.stem}: its kernel died, as it does when memory runs out or "
                f"compiled code crashes. Try a smaller batch_size; {output.name} is as it was."
            ) from None
        finally:
            if watched is not None:
                os.environ["JPY_SESSION_NAME"] = watched
        finished = clean(nbformat.read(draft, as_version=4))
    finished.metadata.update(metadata or {})
    with atomic_write(output) as file:
        file.write(nbformat.writes(finished).encode() + b"\n")
    return Outcome.of(notebook.stem, time.monotonic() - started, reported(finished))


def clean(notebook: nbformat.NotebookNode) -> nbformat.NotebookNode:
    """Drop what differs from run to run or names this machine: paths, times, widget state."""
    for name in ("papermill", "widgets"):
        notebook.metadata.pop(name, None)
    for number, cell in enumerate(notebook.cells):
        cell["id"] = f"cell-{number}"
        for name in ("papermill", "execution", "collapsed", "scrolled"):
            cell.metadata.pop(name, None)
        if not cell.metadata.get("tags", True):
            del cell.metadata["tags"]
    return notebook


def reported(notebook: nbformat.NotebookNode) -> dict[str, Any]:
    """What the Claims of an executed notebook hold; empty if it showed none."""
    for cell in notebook.cells:
        for output in cell.get("outputs", []):
            if MEDIA_TYPE in output.get("data", {}):
                return output["data"][MEDIA_TYPE]
    return {}


def collect(folder: Path) -> list[dict[str, Any]]:
    """Headline rows of all reports in a folder, each with the command that measures it again."""
    rows = []
    for path in sorted(folder.glob("*.ipynb")):
        said = reported(nbformat.read(path, as_version=4))
        number = path.stem.partition("_")[0]
        command = f"python -m labutils run {number} --profile full -p retrain true"
        for row in said.get("headline_rows", []):
            if row.get("headline", True):
                row = {name: row[name] for name in row if name not in ("values", "headline")}
                rows.append({**row, "command": command, "report": f"{folder.name}/{path.name}"})
    return rows


def write_results(root: Path) -> list[dict[str, Any]]:
    """Rebuild reports/results.json, and the results table of README.md between its markers."""
    rows = collect(root / "reports")
    write_json(root / "reports" / "results.json", rows)
    readme = root / "README.md"
    begin, end = "<!-- results -->", "<!-- /results -->"
    text = readme.read_text()
    if begin not in text or end not in text:
        raise NotebookError(f"results: README.md lacks the markers {begin} and {end}.")
    table = f"{begin}\n{markdown_table(rows)}\n{end}"
    text = re.sub(f"{begin}.*?{end}", lambda _: table, text, flags=re.DOTALL)
    with atomic_write(readme) as file:
        file.write(text.encode())
    return rows


def markdown_table(rows: Sequence[Mapping[str, Any]]) -> str:
    """Headline rows as a table for people; a missed target is shown as missed."""
    lines = [
        "| exercise | model | data | test accuracy (%), mean ± std | runs | published | target | "
        "parameters | time a run |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        number = row["exercise"]
        target = "–" if row["target"] is None else f"{row['target']:g}"
        if row["target"] is not None:
            target += " reached" if row["mean"] >= row["target"] else " **missed**"
        published = "–" if row["published"] is None else f"{row['published']:g}"
        deviation = f" ± {row['std']:.2f}" if row["n"] > 1 else ""
        lines.append(
            f"| [{number}]({row['report']}) | {row['model']} | {row['dataset']} | "
            f"**{row['mean']:.2f}**{deviation} | {row['n']} | {published} | {target} | "
            f"{row['params']:,} | {row['seconds']:g} s |"
        )
    return "\n".join(lines)
