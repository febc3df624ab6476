"""Executing notebooks: parameters checked first, outputs whole or untouched."""

import base64
import dataclasses
import io
import json

import nbformat
import numpy as np
import papermill
import pytest
from nbformat.v4 import new_code_cell, new_notebook, new_output
from PIL import Image

from labutils.notebook import batch, claims

PARAMETERS = 'epochs = 3  # passes\nlr = 0.1\nname = "a"\nwidths = [1, 2]\nfast = True\n'


@pytest.fixture
def project(tmp_path, monkeypatch):
    for folder in ("notebooks/full", "reports"):
        (tmp_path / folder).mkdir(parents=True)
    monkeypatch.setattr(batch, "project_dir", lambda: tmp_path)
    return tmp_path


@pytest.fixture
def make_notebook(project):
    def make(*sources: str, name: str = "1.1_demo"):
        cells = [new_code_cell(PARAMETERS, metadata={"tags": ["parameters"]})]
        cells += [new_code_cell(source) for source in sources]
        kernel = {"name": "python3", "display_name": "Python 3", "language": "python"}
        path = project / "notebooks" / f"{name}.ipynb"
        nbformat.write(new_notebook(cells=cells, metadata={"kernelspec": kernel}), path)
        return path

    return make


# A cell that shows claims shows those of the cells before it as well.
CLAIMS = f"""
from IPython.display import display
rows = []
def show(claim, verdict):
    rows.append({{"claim": claim, "evidence": f"{{epochs}}", "verdict": verdict}})
    bundle = {{"exercise": "1.1", "headline": f"{{epochs}} epochs", "rows": rows}}
    display({{{claims.MEDIA_TYPE!r}: bundle}}, raw=True)
"""


def test_a_notebook_runs_with_its_parameters_and_reports_its_claims(make_notebook, project):
    output = project / "build" / "1.1_demo.ipynb"
    path = make_notebook(
        CLAIMS,
        "show('Epochs are enough', 'fails' if epochs < 3 else 'holds')",
        "show('More would help', 'not settled')",
        "show('Two is a number', 'holds')",
        "'the end'",
    )
    job = batch.prepare(path, output.parent, {"epochs": 2})
    batch.execute(job)
    assert batch.outcome(33.6, job.reported()).splitlines() == [
        "34 s, 1 of 3 claims hold. 2 epochs",
        "  fails: Epochs are enough (2)",
        "  not settled: More would help (2)",
    ]
    text = output.read_text()
    assert str(project) not in text
    assert "papermill" not in json.loads(text)["metadata"]
    assert list(output.parent.rglob("*.ipynb")) == [output]


def test_a_failing_cell_is_named_and_the_earlier_output_stays(make_notebook, project):
    output = project / "reports" / "1.1_demo.ipynb"
    output.write_text("the earlier report")
    with pytest.raises(batch.NotebookError, match=r"^cell 2 failed: ZeroDivisionError") as error:
        batch.execute(batch.prepare(make_notebook("1 / 0"), output.parent, {}))
    assert output.read_text() == "the earlier report"
    kept = project / "build" / "failed" / output.name
    assert str(kept) in str(error.value)
    assert "ZeroDivisionError" in kept.read_text()
    assert list(output.parent.iterdir()) == [output]


def test_a_kernel_that_dies_is_an_error_like_others(make_notebook, project):
    output = project / "reports" / "1.1_demo.ipynb"
    output.write_text("the earlier report")
    with pytest.raises(batch.NotebookError, match=r"^its kernel died.*batch_size"):
        batch.execute(batch.prepare(make_notebook("import os; os._exit(1)"), output.parent, {}))
    assert output.read_text() == "the earlier report"
    assert (project / "build" / "failed" / output.name).exists()


def test_a_kernel_that_starts_too_slowly_is_not_said_to_lack_memory(
    make_notebook, project, monkeypatch
):
    def execute_notebook(*_, **__):
        raise RuntimeError("Kernel didn't respond in 60 seconds")

    monkeypatch.setattr(papermill, "execute_notebook", execute_notebook)
    with pytest.raises(RuntimeError, match="didn't respond in 60 seconds"):
        batch.execute(batch.prepare(make_notebook("1"), project / "reports", {}))


def test_an_output_can_carry_a_mark_and_failures_a_name_of_their_own(make_notebook, project):
    output, failed = project / "build" / "1.1_demo.ipynb", project / "kept" / "mine.ipynb"
    path = make_notebook("1 / fast")
    job = batch.Job(path, {"fast": False}, output, failed, "label", key="abc")
    with pytest.raises(batch.NotebookError, match=f"What ran is in {failed}"):
        batch.execute(job)
    assert failed.exists()
    assert not output.exists()
    batch.execute(dataclasses.replace(job, parameters={}))
    assert nbformat.read(output, 4).metadata["labutils"] == {"sweep": "abc"}
    assert not failed.exists()


def test_parameters_that_do_not_fit_are_refused_before_anything_runs(make_notebook, project):
    output = project / "build" / "1.1_demo.ipynb"
    with pytest.raises(ValueError, match=r"^run: 1\.1_demo: epoch = 3\. .* Did you mean 'epochs'"):
        batch.prepare(make_notebook("1 / 0"), output.parent, {"epoch": 3})
    with pytest.raises(ValueError, match=r"^run: 1\.1_demo: epochs = 'many'\."):
        batch.prepare(make_notebook("1 / 0"), output.parent, {"epochs": "many"})
    assert not output.parent.exists()


def test_a_folder_that_cannot_be_written_is_named_before_the_notebook_runs(make_notebook, project):
    (project / "file").touch()
    job = batch.prepare(make_notebook("1 / 0"), project / "file" / "out", {})
    wanted = rf"{project}/file/out cannot be written .*--out"
    with pytest.raises(batch.NotebookError, match=wanted):
        batch.execute(job)
    assert not job.failed.exists()
    (project / "build").touch()
    job = batch.prepare(make_notebook("1 / 0"), project / "out", {})
    with pytest.raises(
        batch.NotebookError, match=r"build/failed cannot .*Make it writable"
    ) as caught:
        batch.execute(job)
    assert "--out" not in str(caught.value)


def test_what_a_cell_prints_is_one_output_however_slowly_it_comes(make_notebook, project):
    path = make_notebook("import time\nprint('one', flush=True)\ntime.sleep(1)\nprint('two')")
    job = batch.prepare(path, project / "build", {})
    batch.execute(job)
    [printed] = batch.read(job.output).cells[-1].outputs
    assert printed.text == "one\ntwo\n"


def test_a_notebook_that_names_no_kernel_runs_in_this_python(make_notebook, project):
    path = make_notebook("print(epochs)")
    notebook = nbformat.read(path, 4)
    del notebook.metadata["kernelspec"]
    nbformat.write(notebook, path)
    job = batch.prepare(path, project / "build", {"epochs": 2})
    batch.execute(job)
    assert batch.read(job.output).cells[-1].outputs[0].text == "2\n"


def test_notebooks_are_found_by_number_name_and_all(make_notebook):
    first, second = make_notebook(name="1.1_demo"), make_notebook(name="1.2_other")
    assert batch.find_notebooks("1.1") == batch.find_notebooks("1.1_demo") == [first]
    assert batch.find_notebooks("all") == [first, second]
    with pytest.raises(batch.NotebookError, match=r"no notebook '1\.3'.*1\.1_demo, 1\.2_other"):
        batch.find_notebooks("1.3")


def test_a_missing_full_profile_or_parameters_cell_is_named(make_notebook, project):
    path = make_notebook()
    with pytest.raises(batch.NotebookError, match=r"no full profile .*1\.1_demo\.yaml"):
        batch.full_parameters(path)
    (project / "notebooks" / "full" / "1.1_demo.yaml").write_text("epochs: 9\n")
    assert batch.full_parameters(path) == {"epochs": 9}
    (project / "notebooks" / "full" / "1.1_demo.yaml").write_text("epochs: 9\npublish: true\n")
    assert batch.full_parameters(path) == {"epochs": 9, "publish": False}
    assert batch.full_parameters(path, report=True) == {"epochs": 9, "publish": True}
    (project / "notebooks" / "full" / "1.1_demo.yaml").write_text("epochs: [9\n")
    with pytest.raises(ValueError, match=r"1\.1_demo\.yaml is no YAML"):
        batch.full_parameters(path)
    for text in ("", "- 9\n"):
        (project / "notebooks" / "full" / "1.1_demo.yaml").write_text(text)
        with pytest.raises(batch.NotebookError, match=r"1\.1_demo\.yaml holds .*NAME: VALUE"):
            batch.full_parameters(path)
    nbformat.write(new_notebook(), path)
    with pytest.raises(ValueError, match="no cell tagged 'parameters'"):
        batch.prepare(path, path.parent, {})
    path.write_text('{"a":')
    with pytest.raises(batch.NotebookError, match=rf"^{path} is no notebook"):
        batch.prepare(path, path.parent, {})


def test_a_number_is_not_the_beginning_of_another(make_notebook):
    first, tenth = make_notebook(name="1.1_demo"), make_notebook(name="1.10_more")
    assert batch.find_notebooks("1.1") == [first]
    assert batch.find_notebooks("1.10") == [tenth]


def test_large_pictures_become_jpegs_and_small_ones_stay_as_they_are():
    def png(pixels):
        file = io.BytesIO()
        Image.fromarray(pixels).save(file, "png")
        return base64.b64encode(file.getvalue()).decode()

    noise = np.random.default_rng(0).normal(128, 12, (300, 400, 4)).astype(np.uint8)
    noise[..., 3] = 255
    large, small = png(noise), png(noise[:9, :9])
    outputs = [new_output("display_data", {"image/png": picture}) for picture in (large, small)]
    notebook = new_notebook(cells=[new_code_cell(outputs=outputs)])
    batch.clean(notebook)
    shrunk, kept = (output.data for output in notebook.cells[0].outputs)
    assert kept == {"image/png": small}
    assert list(shrunk) == ["image/jpeg"]
    assert len(shrunk["image/jpeg"]) < len(large) / 2
    seen = np.asarray(Image.open(io.BytesIO(base64.b64decode(shrunk["image/jpeg"]))))
    assert np.abs(seen.astype(int) - noise[..., :3]).mean() < 8  # of 255; noise is the worst
    noise[:100, :, 3] = 0
    output = new_output("display_data", {"image/png": png(noise)})
    batch.clean(new_notebook(cells=[new_code_cell(outputs=[output])]))
    seen = np.asarray(Image.open(io.BytesIO(base64.b64decode(output.data["image/jpeg"]))))
    assert seen[:90].mean() > 250  # white, as the page behind it
