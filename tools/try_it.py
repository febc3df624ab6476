"""The things to try at a notebook's end, tried: each change of parameters in the quick profile.

python tools/try_it.py            of all notebooks, or of those named: 1.1 2.3

Exit status 1 if a notebook fails; a claim may, which is what there is to find out. What changes
code, and what needs data of the reader's own, is listed: it is tried by hand.
"""

import ast
import re
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import nbformat

from labutils.base.files import project_dir
from labutils.data.sources import KNOWN
from labutils.notebook import batch, engine, parameters


def suggestions(notebook: Path) -> list[tuple[str, dict[str, Any]]]:
    """Text of each thing to try, and the parameters that it changes, none if it changes code."""
    cells = [c.source for c in nbformat.read(notebook, 4).cells if c.cell_type == "markdown"]
    known, found = parameters.of_notebook(notebook), []
    text = "".join(cell.partition("**Try it:**")[2] for cell in cells)
    for item in re.split(r"\s+(?=\d\. )", text.strip()):
        changes: dict[str, Any] = {}
        for code in re.findall("`([^`]+)`", item):
            changes |= _assigned(code)
        found.append((item, changes if changes.keys() <= known.keys() else {}))
    return found


def _assigned(code: str) -> dict[str, Any]:
    """Names and literals of `a = 1, b = [2]`; nothing for other code."""
    try:
        keywords = ast.parse(f"dict({code})", mode="eval").body.keywords
        return {keyword.arg: ast.literal_eval(keyword.value) for keyword in keywords}
    except (SyntaxError, ValueError):
        return {}


def try_all(notebooks: Sequence[Path]) -> bool:
    """Execute what changes parameters alone, into build/try_it/. Returns whether all ran."""
    folder, jobs, failures = project_dir() / "build" / "try_it", [], []
    for path in notebooks:
        for number, (text, changes) in enumerate(suggestions(path), start=1):
            own = "PATH" in str(changes) or changes.get("dataset") in KNOWN
            label = f"{path.stem}, {text}"
            if own or not changes:
                print(f"by hand: {label}")
                continue
            job = batch.prepare(path, folder, changes)
            output = job.output.with_stem(f"{path.stem}-{number}")
            failed = job.failed.with_name(output.name)
            jobs.append(replace(job, output=output, failed=failed, label=label))

    def ended(job: batch.Job, error: str | None, seconds: float) -> None:
        if error:
            failures.append(job)
        print(f"{job.label}\n  {error or batch.outcome(seconds, job.reported() or {})}", flush=True)

    return not engine.execute_all(jobs, ended) and not failures


if __name__ == "__main__":
    try:
        paths = [path for name in sys.argv[1:] or ["all"] for path in batch.find_notebooks(name)]
    except batch.NotebookError as error:
        sys.exit(str(error))
    sys.exit(not try_all(paths))
