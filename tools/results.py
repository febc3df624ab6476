"""What the reports found: reports/results.json, and the tables of the three READMEs.

python tools/results.py
"""

import json
import re
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from labutils.base.files import atomic_write, project_dir, write_json
from labutils.notebook.batch import NotebookError, read, reported


def collect(folder: Path) -> list[dict[str, Any]]:
    """Headline rows of all reports in a folder, each with the command that measures it again."""
    rows = []
    for path in sorted(folder.glob("*.ipynb")):
        number = path.stem.partition("_")[0]
        command = f"python -m labutils run {number} --profile full -p retrain true"
        for row in _headlines(reported(read(path))):
            kept = {key: row[key] for key in row if key not in ("values", "headline")}
            rows.append({**kept, "command": command, "report": f"{folder.name}/{path.name}"})
    return rows


def _headlines(bundle: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The rows that belong into the results: not those that a sweep alone pools."""
    return [row for row in bundle.get("headline_rows", []) if row.get("headline", True)]


def write(root: Path) -> list[dict[str, Any]]:
    """Rebuild them all from the reports; returns the rows of results.json."""
    rows, index, pages = collect(root / "reports"), findings(root, index=True), {}
    for page, name, table in (
        ("README.md", "findings", findings(root)),
        ("notebooks/README.md", "findings", index),
        ("reports/README.md", "findings", index),
        ("reports/README.md", "results", markdown_table(rows)),
    ):
        path = root / page
        pages[path] = _fill(path, pages.get(path) or path.read_text(), name, table)
    write_json(root / "reports" / "results.json", rows)
    for path, text in pages.items():
        with atomic_write(path) as file:
            file.write(text.encode())
    return rows


def _fill(page: Path, text: str, name: str, table: str) -> str:
    """The text of a page with a table between its markers; NotebookError if it has none."""
    before, begin, rest = text.partition(f"<!-- {name} -->")
    _, end, after = rest.partition(f"<!-- /{name} -->")
    if not end or end in before:
        markers = f"<!-- {name} --> and then <!-- /{name} -->"
        raise NotebookError(f"results: {page} needs {markers}.")
    return f"{before}{begin}\n{table}\n{end}{after}"


def findings(root: Path, *, index: bool = False) -> str:
    """A line for each notebook, as a table: its question, and what its report found.

    Beside them, the best published result of the exercise and ours of the same model. index: these
    give way to the time of all trainings and the key figure, for a page in a folder.
    """
    head = "| exercise | question | what the report found | claims: hold / not settled / fail |"
    # GitHub shrinks a picture to what its column's words leave it.
    more = (
        f" all trainings | key figure{50 * '&nbsp;'} |"
        if index
        else " best published (%) | ours (%) |"
    )
    lines, home = [head + more, "|---" * 6 + "|"], "../" * index
    for path in sorted((root / "notebooks").glob("*.ipynb")):
        first = "".join(read(path).cells[0].source)  # which JSON keeps in lines
        number, _, question = first.splitlines()[0].removeprefix("# ").partition(" ")
        report, found, held = root / "reports" / path.name, "not made yet", "–"
        published = ours = "–"
        if report.exists():
            bundle = reported(read(report))
            verdicts = [claim["verdict"] for claim in bundle.get("rows", [])]
            held = " / ".join(str(verdicts.count(v)) for v in ("holds", "not settled", "fails"))
            found = f"[{bundle.get('headline') or 'no claim'}]({home}reports/{path.name})"
            if rows := [row for row in _headlines(bundle) if row["published"]]:
                best = max(rows, key=lambda row: (row["published"], row["mean"]))
                published = f"{best['model']}: {best['published']:g}"
                ours = f"{_mean(best)} (n = {best['n']})"
        pair = [published, ours]
        if index:
            figure = re.search(r"!\[(.*)\]\((.*)\)", first)
            picture = f'<img src="{figure[2]}" alt="{figure[1]}" width="240">' if figure else "–"
            pair = [_hours(root / "models", number), picture]
        link = f"[{number}]({home}notebooks/{path.name})"
        lines.append(f"| {' | '.join([link, question, found, held, *pair])} |")
    return "\n".join(lines)


def _hours(folder: Path, number: str) -> str:
    """How long the published runs of an exercise were trained, one after the other."""
    cards = [json.loads(path.read_text()) for path in folder.glob(f"{number}_*.json")]
    return f"{sum(card['info']['seconds'] for card in cards) / 3600:.1f} h" if cards else "–"


def _mean(row: Mapping[str, Any]) -> str:
    deviation = f"\u00a0±\u00a0{row['std']:.2f}" if row["n"] > 1 else ""
    return f"**{row['mean']:.2f}**{deviation}"


def markdown_table(rows: Sequence[Mapping[str, Any]]) -> str:
    """Headline rows as a table for people; a missed target is shown as missed."""
    head = "| exercise | model | data | test accuracy (%), mean ± std | runs | published | target "
    lines = [f"{head}| parameters | time a run |", "|---" * 9 + "|"]
    for row in rows:
        report = f"[{row['exercise']}]({Path(row['report']).name})"
        published = "–" if row["published"] is None else f"{row['published']:g}"
        reached = row["target"] and row["mean"] >= row["target"] - 1e-9
        verdict = "reached" if reached else "**missed**"
        target = "–" if row["target"] is None else f"{row['target']:g} {verdict}"
        lines.append(
            f"| {report} | {row['model']} | {row['dataset']} | "
            f"{_mean(row)} | {row['n']} | {published} | {target} | "
            f"{row['params']:,} | {row['seconds']:g} s |"
        )
    return "\n".join(lines)


if __name__ == "__main__":
    try:
        print(f"{len(write(project_dir()))} rows in reports/results.json and its table")
    except NotebookError as error:
        sys.exit(str(error))
