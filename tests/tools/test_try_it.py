"""What the notebooks suggest to try: which parameters it changes, and that they take the values."""

from pathlib import Path

import nbformat
import pytest
from nbformat.v4 import new_code_cell, new_markdown_cell, new_notebook

from labutils.notebook import batch
from tools import try_it

NOTEBOOKS = sorted((Path(__file__).resolve().parents[2] / "notebooks").glob("*.ipynb"))


@pytest.fixture
def notebook(tmp_path):
    def write(text, code="pass"):
        cells = [
            new_code_cell("epochs = 1\nwidths = [3]", metadata={"tags": ["parameters"]}),
            new_markdown_cell(f"**Limits.** `epochs = 9`\n\n**Try it:** {text}"),
            new_code_cell(code),
        ]
        path = tmp_path / "9.9_test.ipynb"
        kernel = {"kernelspec": {"name": "python3", "display_name": "", "language": "python"}}
        nbformat.write(new_notebook(cells=cells, metadata=kernel), path)
        return path

    return write


def test_a_suggestion_is_its_text_and_the_parameters_it_changes(notebook):
    path = notebook(
        "1. `epochs = 2, widths = [3, 4]`: longer? 2. `epochs = 3` and `widths = []`: why? "
        "3. `lr=0.1` in the call of `lab.recipe`: what then? 4. `python -m labutils sweep`: and?"
    )
    texts, changes = zip(*try_it.suggestions(path))
    assert [text[:2] for text in texts] == ["1.", "2.", "3.", "4."]
    assert texts[1] == "2. `epochs = 3` and `widths = []`: why?"
    assert changes == ({"epochs": 2, "widths": [3, 4]}, {"epochs": 3, "widths": []}, {}, {})


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_every_notebook_suggests_changes_that_its_parameters_take(path, tmp_path):
    found = try_it.suggestions(path)
    assert len(found) >= 3
    assert [text[:2] for text, _ in found] == [f"{n}." for n in range(1, len(found) + 1)]
    for _, changes in found:
        batch.prepare(path, tmp_path, changes)


def test_what_fails_is_said_and_what_needs_a_hand_is_listed(
    notebook, capsys, tmp_path, monkeypatch
):
    for module in (try_it, batch):
        monkeypatch.setattr(module, "project_dir", lambda: tmp_path)
    path = notebook("1. `epochs = 0`: none? 2. `epochs = 2`: two? 3. `x = 1`: code?", "1 / epochs")
    assert not try_it.try_all([path])
    shown = capsys.readouterr().out
    assert "by hand: 9.9_test, 3. `x = 1`: code?" in shown
    assert "1. `epochs = 0`: none?\n  cell 3 failed: ZeroDivisionError" in shown
    assert "2. `epochs = 2`: two?\n  " in shown
    assert [path.name for path in (tmp_path / "build/try_it").iterdir()] == ["9.9_test-2.ipynb"]
