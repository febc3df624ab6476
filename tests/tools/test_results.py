"""The tables say what the reports found, and are rebuilt from them alone."""

import json
from pathlib import Path

import nbformat
import pytest
from nbformat.v4 import new_code_cell, new_notebook

from labutils.notebook import batch, claims
from tools import results


@pytest.fixture
def project(tmp_path):
    for folder in ("notebooks", "reports"):
        (tmp_path / folder).mkdir()
    return tmp_path


def row(**changes):
    return {
        "exercise": "1.1",
        "model": "mlp-3",
        "dataset": "mnist",
        "metric": "accuracy",
        "split": "test",
        "mean": 81.234,
        "std": 0.5,
        "n": 3,
        "published": 69.92,
        "target": 79.0,
        "params": 12345,
        "seconds": 10.0,
        "device": "a processor",
    } | changes


def write_report(project, rows, headline="", verdicts=()) -> None:
    cell = new_code_cell("claims")
    bundle = {"rows": [{"verdict": verdict} for verdict in verdicts], "headline": headline}
    data = {claims.MEDIA_TYPE: bundle | {"headline_rows": rows}}
    cell.outputs = [nbformat.v4.new_output("display_data", data=data)]
    nbformat.write(new_notebook(cells=[cell]), project / "reports" / "1.1_mlp.ipynb")


def write_pages(project) -> None:
    for page, *tables in (
        ("README.md", "findings"),
        ("notebooks/README.md", "findings"),
        ("reports/README.md", "findings", "results"),
    ):
        blocks = [f"<!-- {table} -->\nSTALE\n<!-- /{table} -->\n" for table in tables]
        (project / page).write_text("".join(["before\n", *blocks, "after\n"]))


def test_results_are_rebuilt_from_the_reports_alone(project):
    write_report(project, [row(), row(model="mlp-10", target=94.5, mean=94.0, published=None)])
    write_pages(project)
    (project / "reports" / "results.json").write_text('[{"model": "gone"}]')
    results.write(project)
    stored = json.loads((project / "reports" / "results.json").read_text())
    assert [item["model"] for item in stored] == ["mlp-3", "mlp-10"]
    assert stored[0]["report"] == "reports/1.1_mlp.ipynb"
    assert stored[0]["command"].startswith("python -m labutils run 1.1 --profile full")
    table = (project / "reports" / "README.md").read_text()
    assert table.startswith("before\n")
    assert table.endswith("after\n")
    assert "STALE" not in table
    assert "**81.23**\u00a0±\u00a00.50 | 3 | 69.92 | 79 reached | 12,345" in table
    assert "**94.00**\u00a0±\u00a00.50 | 3 | – | 94.5 **missed**" in table


def test_findings_say_which_notebook_has_no_report_yet(project):
    rows = [row(), row(model="mlp-9", published=90.0, mean=91.0, n=1), row(published=None)]
    write_report(project, rows, headline="99 %", verdicts=("holds", "fails", "holds"))
    for name, title in (
        ("1.1_mlp", "# 1.1 Does capacity pay?"),
        ("1.2_res", "# 1.2 Why?\nBecause"),
    ):
        cells = [nbformat.v4.new_markdown_cell(title)]
        nbformat.write(new_notebook(cells=cells), project / "notebooks" / f"{name}.ipynb")
    first, second = results.findings(project).splitlines()[2:]
    known = "[1.1](notebooks/1.1_mlp.ipynb) | Does capacity pay? | [99 %](reports/1.1_mlp.ipynb)"
    assert first == f"| {known} | 2 / 0 / 1 | mlp-9: 90 | **91.00** (n = 1) |"
    assert second == "| [1.2](notebooks/1.2_res.ipynb) | Why? | not made yet | – | – | – |"


def test_an_index_shows_the_key_figure_of_a_notebook_that_has_one_and_its_hours(project):
    for name, seconds in (("1.1_a", 3600), ("1.1_b", 1800), ("1.10_c", 9e9)):
        card = project / "models" / f"{name}.json"
        card.parent.mkdir(exist_ok=True)
        card.write_text(json.dumps({"info": {"seconds": seconds}}))
    for name, text in (("1.1_a", "# 1.1 A?\n![Width](../images/a.png)"), ("1.2_b", "# 1.2 B?")):
        cells = [nbformat.v4.new_markdown_cell(text)]
        nbformat.write(new_notebook(cells=cells), project / "notebooks" / f"{name}.ipynb")
    first, second = results.findings(project, index=True).splitlines()[2:]
    figure = '<img src="../images/a.png" alt="Width" width="240">'
    nothing = "not made yet | –"
    assert first == f"| [1.1](../notebooks/1.1_a.ipynb) | A? | {nothing} | 1.5 h | {figure} |"
    assert second == f"| [1.2](../notebooks/1.2_b.ipynb) | B? | {nothing} | – | – |"


def test_findings_of_a_report_without_claims(project):
    cells = [nbformat.v4.new_markdown_cell("# 1.1 Why?")]
    for folder in ("notebooks", "reports"):
        nbformat.write(new_notebook(cells=cells), project / folder / "1.1_why.ipynb")
    assert "| [no claim](reports/1.1_why.ipynb) | 0 / 0 / 0 | – | – |" in results.findings(project)


def test_rows_for_sweeps_alone_and_single_values_stay_out_of_the_results(project):
    shown = row(values=[80.0, 81.0, 82.0], headline=True)
    write_report(project, [shown, row(model="mlp-depth2", values=[50.0], headline=False)])
    [found] = results.collect(project / "reports")
    assert found["model"] == "mlp-3"
    assert set(found) == {*row(), "command", "report"}


def test_a_single_run_has_no_deviation():
    one, three = results.markdown_table(
        [{**row(), "report": "r", "n": n, "std": 0.0} for n in (1, 3)]
    ).splitlines()[2:]
    assert "±" not in one
    assert "±\u00a00.00" in three


@pytest.mark.parametrize(
    "text",
    [
        "no place for a table",
        "<!-- findings -->\nno end",
        "no begin\n<!-- /findings -->",
        "<!-- /findings -->\nswapped\n<!-- findings -->",
        "<!-- /findings -->\nswapped\n<!-- findings -->\nand again\n<!-- /findings -->",
    ],
)
def test_a_readme_without_markers_in_order_is_left_alone(text, project):
    write_report(project, [row()])
    write_pages(project)
    (project / "README.md").write_text(text)
    with pytest.raises(batch.NotebookError, match="README"):
        results.write(project)
    assert (project / "README.md").read_text() == text
    assert not (project / "reports" / "results.json").exists()


@pytest.mark.parametrize("text", ["", "{half a noteb", "[]", "{}", '{"cells": 3}'])
def test_a_damaged_report_is_named(text, project):
    write_report(project, [row()])
    write_pages(project)
    (project / "reports" / "1.2_other.ipynb").write_text(text)
    with pytest.raises(batch.NotebookError, match=r"reports/1\.2_other\.ipynb is no notebook"):
        results.write(project)
    assert not (project / "reports" / "results.json").exists()


def test_the_published_tables_say_what_the_reports_found():
    root = Path(__file__).resolve().parents[2]
    rows = results.collect(root / "reports")
    assert rows
    assert json.loads((root / "reports" / "results.json").read_text()) == rows
    assert results.markdown_table(rows) in (root / "reports" / "README.md").read_text()
    assert results.findings(root) in (root / "README.md").read_text()
    for folder in ("notebooks", "reports"):
        assert results.findings(root, index=True) in (root / folder / "README.md").read_text()
    for row in rows:
        assert (root / row["report"]).exists()
