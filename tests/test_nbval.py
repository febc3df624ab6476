"""The notebooks as a regression check: numbers within a tolerance pass, anything else fails."""

import os
import re
import subprocess
import sys
from pathlib import Path

import nbformat
import pytest
from nbformat.v4 import new_code_cell, new_notebook, new_output

ROOT = Path(__file__).resolve().parent.parent
NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))
REPORTS = sorted((ROOT / "reports").glob("*.ipynb"))


def stored(source: str, text: str, **metadata):
    """A code cell with the output it printed when it was stored."""
    cell = new_code_cell(source, execution_count=1, metadata=metadata)
    cell.outputs = [new_output("stream", name="stdout", text=text)]
    return cell


CASES = {
    "same text": (stored("print('acc 97.50 %')", "acc 97.50 %\n"), True),
    "inside the tolerance": (stored("print('acc 97.50 %')", "acc 96.60 %\n"), True),
    "accuracy lost": (stored("print('acc 94.50 %')", "acc 97.50 %\n"), False),
    "accuracy gained": (stored("print('acc 97.50 %')", "acc 94.50 %\n"), False),
    "changed text": (stored("print('accuracy 97.50 %')", "acc 97.50 %\n"), False),
    "changed unit": (stored("print('acc 97.50')", "acc 97.50 %\n"), False),
    "number gone": (stored("print('acc')", "acc 97.50 %\n"), False),
    "count changed": (stored("print('3 of 4 claims')", "4 of 4 claims\n"), False),
    "version text changed": (stored("print('v2.1.3')", "v2.1.4\n"), False),
    "time masked": (stored("print('took 9.7 s')", "took 0.4 s\n"), True),
    "at the end of a sentence": (stored("print('It is 97.5.')", "It is 97.0.\n"), True),
    "columns padded": (stored("print('a  9.99')", "a 10.01\n"), True),
    "cell sets a wider one": (
        stored("print('acc 94.50 %')", "acc 97.50 %\n", nbval={"atol": 5.0}),
        True,
    ),
    "cell sets a narrower one": (
        stored("print('acc 97.50 %')", "acc 97.40 %\n", nbval={"atol": 0.0, "rtol": 0.0}),
        False,
    ),
    "inside the tolerance, but a large share": (
        stored("print('loss 2.9')", "loss 1.2\n", nbval={"atol": 12.0, "cap": 0.4}),
        False,
    ),
    "inside the tolerance and the share": (
        stored(
            "print('loss 1.6, acc 40.0')", "loss 1.2, acc 50.0\n", nbval={"atol": 12.0, "cap": 0.4}
        ),
        True,
    ),
    "inside the share, but not the tolerance": (
        stored("print('acc 37.5')", "acc 50.0\n", nbval={"atol": 12.0, "rtol": 0.0, "cap": 0.4}),
        False,
    ),
    "output gone": (stored("pass", "acc 97.50 %\n"), False),
    "cell fails": (stored("print(1 / 0)", "1.0\n"), False),
}


@pytest.fixture(scope="module")
def outcomes(tmp_path_factory):
    """nbval's verdict on each case: one notebook of all cases, in a project of its own."""
    folder = tmp_path_factory.mktemp("project")
    (folder / "tests").mkdir()
    for name in ("conftest.py", "tests/nbval_sanitize.cfg"):
        (folder / name).write_text((ROOT / name).read_text())
    kernel = {"name": "python3", "display_name": "Python 3", "language": "python"}
    cells = [cell for cell, _ in CASES.values()]
    nbformat.write(
        new_notebook(cells=cells, metadata={"kernelspec": kernel}), folder / "cases.ipynb"
    )
    command = [sys.executable, "-m", "pytest", "--nbval", "-v", "-p", "no:cacheprovider"]
    done = subprocess.run(
        [*command, "--rootdir", str(folder), str(folder / "cases.ipynb")],
        capture_output=True,
        text=True,
        cwd=folder,
        env={**os.environ, "COLUMNS": "200"},
    )
    found = re.findall(r"Cell (\d+) (PASSED|FAILED)", done.stdout)
    assert len(found) == len(CASES), done.stdout
    return [verdict == "PASSED" for _, verdict in found]


@pytest.mark.parametrize("case", CASES)
def test_stored_outputs_are_compared_with_a_tolerance(outcomes, case):
    assert outcomes[list(CASES).index(case)] is CASES[case][1]


def test_the_notebooks_are_all_here():
    assert [path.stem.partition("_")[0] for path in NOTEBOOKS] == ["1.1", "1.2", "1.3"]


@pytest.mark.parametrize(
    "path", NOTEBOOKS + REPORTS, ids=lambda path: f"{path.parent.name}/{path.name}"
)
def test_a_stored_notebook_is_executed_clean_and_free_of_this_machine(path):
    text = path.read_text()
    notebook = nbformat.reads(text, as_version=4)
    nbformat.validate(notebook)
    code = [cell for cell in notebook.cells if cell.cell_type == "code"]
    assert all(cell.execution_count for cell in code)
    assert "widgets" not in notebook.metadata
    assert notebook.metadata.kernelspec.name == "python3"
    for cell in code:
        assert all(output.get("name") != "stderr" for output in cell.outputs), cell.source
        assert all("\r" not in output.get("text", "") for output in cell.outputs)
    for place in (f"{ROOT}/", "/tmp/", "/home/", "/root/", "/Users/"):
        assert place not in text
    assert path.stat().st_size < 2_000_000


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.name)
def test_a_notebook_has_the_anatomy_that_readers_know(path):
    notebook = nbformat.read(path, as_version=4)
    first = notebook.cells[0]
    assert first.cell_type == "markdown"
    assert re.match(r"# \d\.\d .+\n", first.source)
    assert "**Question:**" in first.source
    assert f"../reports/{path.name}" in first.source
    parameters = notebook.cells[1]
    assert parameters.metadata.tags == ["parameters"]
    for line in parameters.source.splitlines():
        assert re.fullmatch(r"\w+ = .+  # .+", line), f"no comment: {line}"
    for cell in notebook.cells:
        if cell.cell_type == "code":
            assert len(cell.source.splitlines()) <= 27, cell.source
    headings = re.findall(r"^## (.+)$", "\n".join(c.source for c in notebook.cells), re.MULTILINE)
    assert headings[-2:] == ["Claims", "What it means"]


@pytest.mark.parametrize("path", REPORTS, ids=lambda path: path.name)
def test_a_report_is_its_notebook_with_other_parameters(path):
    report = nbformat.read(path, as_version=4)
    notebook = nbformat.read(ROOT / "notebooks" / path.name, as_version=4)
    tags = [cell.metadata.get("tags", []) for cell in report.cells]
    injected = [number for number, names in enumerate(tags) if "injected-parameters" in names]
    assert injected == [2]
    del report.cells[2]
    assert [cell.source for cell in report.cells] == [cell.source for cell in notebook.cells]
