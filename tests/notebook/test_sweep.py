"""Sweeps: what is refused, what a grid holds, the table; stopped, failed and started again.

The last test starts real kernels: a sweep that is stopped by Ctrl-C, and the same command again.
"""

import contextlib
import dataclasses
import io
import json
import os
import shutil
import signal
import statistics
import subprocess
import sys
import time
from pathlib import Path

import joblib
import nbformat
import pytest
from nbformat.v4 import new_code_cell, new_markdown_cell, new_notebook, new_output

from labutils import __main__ as cli
from labutils.notebook import batch, engine, parameters, sweep
from labutils.notebook.claims import MEDIA_TYPE

PARAMETERS = """\
epochs = 3
lr = 0.1
name = "a"
sizes = [[3], [10]]
depths = [2, 5, 10]
seeds = [0, 1, 2]
publish = True
"""


def make_notebook(project, source="pass", *, prose="Prose"):
    cells = [
        new_markdown_cell(prose),
        new_code_cell(PARAMETERS, metadata={"tags": ["parameters"]}),
        new_code_cell(source),
    ]
    kernel = {"name": "python3", "display_name": "Python 3", "language": "python"}
    path = project / "notebooks" / "1.1_demo.ipynb"
    path.parent.mkdir(parents=True, exist_ok=True)
    nbformat.write(new_notebook(cells=cells, metadata={"kernelspec": kernel}), path)
    return path


@pytest.fixture
def project(tmp_path, monkeypatch):
    for module in (batch, sweep, cli):
        monkeypatch.setattr(module, "project_dir", lambda: tmp_path)
    make_notebook(tmp_path)
    (tmp_path / "notebooks" / "full").mkdir()
    (tmp_path / "notebooks" / "full" / "1.1_demo.yaml").write_text("epochs: 60\npublish: true\n")
    return tmp_path


@pytest.fixture
def notebook(project):
    return project / "notebooks" / "1.1_demo.ipynb"


def finish(job, *, rows=(), headline="") -> None:
    """Leave what a notebook that was executed leaves."""
    bundle = {"rows": [], "headline": headline, "headline_rows": list(rows)}
    cell = new_code_cell("claims")
    cell.outputs = [new_output("display_data", data={MEDIA_TYPE: bundle})]
    mark = {"labutils": {"sweep": job.key}}
    job.output.parent.mkdir(parents=True, exist_ok=True)
    nbformat.write(new_notebook(cells=[cell], metadata=mark), job.output)


def row(*values, model="mlp", dataset="digits", seconds=2.0):
    return {"model": model, "dataset": dataset, "values": list(values), "seconds": seconds}


# What is refused


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            "-p epoch 3",
            "epoch = 3. Extra inputs are not permitted. Did you mean 'epochs'? Known: epochs, lr",
        ),
        ("-p name_s x", "1.1_demo: name_s = 'x'."),
        ("-p epochs 3,x", "epochs = 'x'. Input should be a valid integer."),
        ("-p epochs 3 -p seed 1,x", "seeds[0] = 'x'. Input should be a valid integer."),
        ("-p seeds 0,1", "seeds = 0. Input should be a valid list."),
        ("-p size 3,10", "sizes[0] = 3. Input should be a valid list."),
        ("-p epochs ,", "sweep: -p epochs ',' is no YAML"),
        ("-p epochs 3]", "sweep: -p epochs '3]' is no YAML"),
        ("-p seed 0 -p lr 0.1 -p seed 1", "give all values of seeds at once, like this: 2,5"),
        ("-p seed 0 -p seeds [1]", "give all values of seeds at once, like this: 2,5"),
        ("-p depth 2,2 -p seed 0", "depth=2, seed=0 comes twice"),
        ("-p lr 0.1,0.10", "lr=0.1 comes twice"),
        ("-p lr 1e-1,0.1", "lr=0.1 comes twice"),
        ("-p lr 1,1.0", "lr=1.0 comes twice"),
        ("-p seed 0 --out file", "file cannot be written"),
    ],
)
def test_what_cannot_work_is_refused_before_anything_runs(
    options, message, project, monkeypatch, capsys
):
    def start(*_, **__):
        pytest.fail("a process was started")

    monkeypatch.setattr(engine, "execute_all", start)
    monkeypatch.chdir(project)
    Path("file").touch()
    before = set(project.rglob("*"))
    assert cli.main(["sweep", "1.1", *options.split(" ")]) == 1
    captured = capsys.readouterr()
    assert message in captured.err
    assert captured.err.count("\n") == 1
    assert captured.out == ""
    assert set(project.rglob("*")) == before


def test_a_sweep_is_of_one_notebook(project, notebook, capsys):
    shutil.copy(notebook, notebook.with_name("1.1_other.ipynb"))
    for name in ("1.1", "all"):
        assert cli.main(["sweep", name, "-p", "seed", "0"]) == 1
        assert "is several notebooks. Give one, say 1.1_demo." in capsys.readouterr().err
    assert not (project / "build").exists()


def test_without_values_there_is_nothing_to_sweep(project, capsys):
    assert cli.main(["sweep", "1.1"]) == 2
    assert "Missing option '-p'" in capsys.readouterr().err
    with pytest.raises(ValueError, match="-p epochs '': give all values of epochs at once"):
        sweep.grid(project / "notebooks" / "1.1_demo.ipynb", [("epochs", "")])


def test_a_full_profile_is_checked_as_well(project, notebook):
    (project / "notebooks" / "full" / "1.1_demo.yaml").write_text("epochs: many\n")
    with pytest.raises(ValueError, match="epochs = 'many'"):
        sweep.grid(notebook, [("seed", "0")], full=True)


# What a grid holds


def test_a_grid_is_all_combinations_and_the_last_parameter_varies_fastest(project, notebook):
    jobs = sweep.grid(notebook, [("depth", "2,5"), ("seed", "0,1,2")])
    assert [job.parameters for job in jobs] == [
        {"depths": [depth], "seeds": [seed]} for depth in (2, 5) for seed in (0, 1, 2)
    ]
    assert jobs[3].label == "depth=5, seed=0"
    assert jobs[3].output == project / "build" / "sweeps" / "1.1_demo" / "depth=5,seed=0.ipynb"
    assert len({job.key for job in jobs}) == 6


def test_a_name_in_full_takes_values_as_they_are(notebook):
    jobs = sweep.grid(notebook, [("seeds", "[0, 1],[2]"), ("lr", "1,3e-2"), ("name", "a b,c")])
    assert jobs[0].parameters == {"seeds": [0, 1], "lr": 1.0, "name": "a b"}
    assert jobs[-1].parameters == {"seeds": [2], "lr": 0.03, "name": "c"}
    assert jobs[-1].output.name == "seeds=[2],lr=0.03,name=c.ipynb"
    nested = sweep.grid(notebook, [("size", "[3],[3, 10]")])
    assert [job.parameters for job in nested] == [{"sizes": [[3]]}, {"sizes": [[3, 10]]}]
    assert nested[1].output.name == "size=[3,10].ipynb"


def test_file_names_are_safe_short_and_all_different(notebook):
    values = ["folder:/some/where", "folder:/some_where", "../x", "a b", "a-b", "ä", "y" * 300]
    jobs = sweep.grid(notebook, [("name", ", ".join(f'"{value}"' for value in values))])
    names = [job.output.name for job in jobs]
    assert len(set(names)) == len(values)
    assert len({job.failed for job in jobs}) == len(values)
    for name in names:
        assert len(name) < 160
        assert set(name) <= set(
            "abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789_.,=+-[]%"
        )
    long = "y" * 300
    with pytest.raises(ValueError, match="comes twice, or begins with the same 150 characters"):
        sweep.grid(notebook, [("name", f"{long}, {long}y")])


def test_the_full_profile_is_the_ground_and_publishes_nothing(notebook):
    full = [job.parameters for job in sweep.grid(notebook, [("seed", "0")], full=True)]
    assert full == [{"epochs": 60, "publish": False, "seeds": [0]}]
    changed = sweep.grid(notebook, [("epochs", "1,2")], full=True)
    assert [job.parameters["epochs"] for job in changed] == [1, 2]
    assert sweep.grid(notebook, [("seed", "0")])[0].parameters == {"seeds": [0]}


def test_an_output_is_known_by_its_code_and_all_its_parameters(project, notebook):
    def key(**options):
        return sweep.grid(notebook, [("seed", "0")], **options)[0].key

    first = key()
    assert key(full=True) != first
    assert key(out=project / "elsewhere") == first
    make_notebook(project, prose="Other prose")
    assert key() == first
    make_notebook(project, "changed = True")
    assert key() != first


def test_another_version_of_the_package_makes_outputs_out_of_date(notebook, monkeypatch):
    (first,) = sweep.grid(notebook, [("seed", "0")])
    monkeypatch.setattr(sweep, "__version__", "9.9.9")
    (job,) = sweep.grid(notebook, [("seed", "0")])
    assert job.key != first.key


def test_what_is_finished_is_told_from_what_is_not(project, notebook):
    job = sweep.grid(notebook, [("seed", "0")])[0]
    assert job.reported() is None
    finish(job, headline="fine")
    assert job.reported()["headline"] == "fine"
    assert dataclasses.replace(job, key="another").reported() is None
    job.output.write_text("{half a noteb")
    assert job.reported() is None
    nbformat.write(new_notebook(), job.output)
    assert job.reported() is None


@pytest.mark.parametrize("text", ["[]", "3", "{}", '"x"', '{"cells": 3}', '{"metadata": []}'])
def test_an_output_of_odd_json_is_missing(text, notebook):
    job = sweep.grid(notebook, [("seed", "0")])[0]
    finish(job)
    job.output.write_text(text)
    assert job.reported() is None


# The table


def test_values_are_pooled_over_seeds_and_apart_for_all_else(notebook):
    jobs = sweep.grid(notebook, [("depth", "2,5"), ("seed", "0,1,2")])
    values = [90.5, 91.25, 93.0, 70.0, 71.5, 69.125]
    bundles = {
        job: {"headline_rows": [row(value), row(value / 2, model="linear", seconds=1.0)]}
        for job, value in zip(jobs, values)
    }
    table = sweep.table(bundles)
    numbers = ["mean (%)", "std (%)", "runs (n)", "seconds a run"]
    assert list(table.columns) == ["depth", "model name", "data set", *numbers]
    assert list(zip(table["depth"], table["model name"])) == [
        ("2", "mlp"),
        ("2", "linear"),
        ("5", "mlp"),
        ("5", "linear"),
    ]
    for place, pooled in ((0, values[:3]), (2, values[3:])):
        assert table["mean (%)"][place] == pytest.approx(statistics.fmean(pooled), abs=1e-3)
        assert table["std (%)"][place] == pytest.approx(statistics.stdev(pooled), abs=1e-3)
    assert list(table["runs (n)"]) == [3, 3, 3, 3]
    assert list(table["seconds a run"]) == [2.0, 1.0, 2.0, 1.0]


def test_seconds_are_those_of_a_run_not_of_a_notebook(notebook):
    first, second = sweep.grid(notebook, [("seeds", "[0, 1, 2],[3]")])
    bundles = {
        first: {"headline_rows": [row(1.0, 2.0, 3.0, seconds=10.0)]},
        second: {"headline_rows": [row(4.0, seconds=30.0)]},
    }
    found = sweep.table(bundles).loc[0, ["mean (%)", "runs (n)", "seconds a run"]]
    assert found.tolist() == [2.5, 4, 15.0]


def test_a_parameter_may_have_the_name_of_a_column(notebook, monkeypatch):
    known = {"model": "a", "size": 1, "mean": 1, "dataset": "digits"}
    monkeypatch.setattr(parameters, "of_notebook", lambda _: known)
    axes = [("model", "a,b"), ("size", "1,2"), ("mean", "3"), ("dataset", "digits")]
    table = sweep.table({job: {"headline_rows": [row(1.0)]} for job in sweep.grid(notebook, axes)})
    assert list(table["model"]) == ["a", "a", "b", "b"]
    assert list(table["model name"]) == ["mlp"] * 4
    assert list(table["size"]) == ["1", "2", "1", "2"]
    assert list(table["runs (n)"]) == [1, 1, 1, 1]


def test_the_table_is_printed_and_written(project, notebook, capsys):
    jobs = sweep.grid(notebook, [("depth", "2,5"), ("seed", "0,1")])
    for job, value in zip(jobs[:3], (90.0, 91.0, 70.0)):
        finish(job, rows=[row(value)])
    finish(jobs[3])
    assert sweep.run(jobs) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "1.1_demo: 4 combinations, 0 missing, 1 at a time"
    assert lines[4] == "[4/4] depth=5, seed=1: already there"
    assert lines[6].split() == ["2", "mlp", "digits", "90.5", "0.707", "2", "2.0"]
    assert lines[7].split() == ["5", "mlp", "digits", "70.0", "NaN", "1", "2.0"]
    path = project / "build" / "sweeps" / "1.1_demo" / "table.csv"
    assert lines[8] == f"written to {path}"
    assert path.read_text().splitlines() == [
        "depth,model name,data set,mean (%),std (%),runs (n),seconds a run",
        "2,mlp,digits,90.5,0.707,2,2.0",
        "5,mlp,digits,70.0,,1,2.0",
    ]


def test_without_any_score_there_is_a_line_and_no_table(project, notebook, capsys):
    jobs = sweep.grid(notebook, [("seed", "0")])
    finish(jobs[0])
    stale = jobs[0].output.with_name("table.csv")
    stale.write_text("of an earlier grid")
    assert sweep.run(jobs) == 0
    assert "no run recorded a score with Claims.targets" in capsys.readouterr().out
    assert not stale.exists()


# Progress and ends, with an engine that only pretends


def test_lines_tell_success_failure_and_what_was_there(project, notebook, monkeypatch, capsys):
    jobs = sweep.grid(notebook, [("seed", "0,1,2")])
    finish(jobs[1])
    jobs[0].failed.parent.mkdir(parents=True)
    jobs[0].failed.touch()

    def execute_all(missing, ended, *, at_once, scheduler):
        assert ([job.label for job in missing], at_once) == (["seed=0", "seed=2"], 7)
        ended(missing[0], "ValueError: no\nand more", 3.0)
        finish(missing[1], headline="95 %")
        ended(missing[1], None, 61.7)
        return 0

    monkeypatch.setattr(engine, "execute_all", execute_all)
    assert sweep.run(jobs, at_once=7) == 1
    captured = capsys.readouterr()
    assert captured.out.splitlines()[:4] == [
        "1.1_demo: 3 combinations, 2 missing, 7 at a time",
        "[1/3] seed=1: already there",
        f"[2/3] seed=0: FAILED: ValueError: no; see {jobs[0].failed}",
        "[3/3] seed=2: 62 s, 0 of 0 claims hold. 95 %",
    ]
    assert captured.err == "2 of 3 are done. The same command does the others.\n"


def test_a_grid_that_failed_keeps_the_table_of_an_earlier_one(notebook, monkeypatch, capsys):
    jobs = sweep.grid(notebook, [("seed", "0")])
    table = jobs[0].output.with_name("table.csv")
    table.parent.mkdir(parents=True)
    table.write_text("earlier")

    def execute_all(missing, ended, **_):
        ended(missing[0], "ValueError: no", 1.0)
        return 0

    monkeypatch.setattr(engine, "execute_all", execute_all)
    assert sweep.run(jobs) == 1
    assert table.read_text() == "earlier"
    assert "No table" not in capsys.readouterr().out


def test_what_is_stopped_says_how_to_go_on(notebook, monkeypatch, capsys):
    jobs = sweep.grid(notebook, [("seed", "0,1,2")])

    def execute_all(missing, ended, **_):
        finish(missing[1])
        ended(missing[1], None, 1.0)
        finish(missing[2])  # ended while the others were stopped
        return 143

    monkeypatch.setattr(engine, "execute_all", execute_all)
    assert sweep.run(jobs) == 143
    captured = capsys.readouterr()
    assert captured.out.splitlines()[1:] == ["[1/3] seed=1: 1 s, 0 of 0 claims hold. "]
    assert captured.err == "2 of 3 are done. The same command does the others.\n"


# Real kernels: seed 0 is quick, seed 1 fails as long as a file `fail` is there, seed 2 hangs as
# long as `hang` is there and does not listen to interrupts.

SOURCE = """
import os, time
from pathlib import Path
from IPython.display import display

folder, seed = Path({folder!r}), seeds[0]
seen = f"{{os.getpid()}} {{os.environ['OMP_NUM_THREADS']}} {{epochs}}"
(folder / f"kernel{{seed}}").write_text(seen)
if seed == 1 and (folder / "fail").exists():
    raise ValueError("unlucky\\nseed")
while seed == 2 and (folder / "hang").exists():
    try:
        time.sleep(0.1)
    except KeyboardInterrupt:
        pass
row = {{"model": "mlp", "dataset": "none", "values": [90.0 + seed], "seconds": 1.0}}
bundle = {{"rows": [], "headline": f"seed {{seed}}", "headline_rows": [row]}}
display({{"application/vnd.labutils+json": bundle}}, raw=True)
"""
COMMAND = ["sweep", "1.1", "-p", "seed", "0,1,2", "-p", "epochs", "4", "--jobs", "2"]


@dataclasses.dataclass
class Start:
    """What one start of the command did."""

    status: int
    out: list[str]
    err: str
    files: list[str]
    kernels: dict[int, list[str]]  # seed -> process id, threads and epochs of its kernel
    alive: list[int]  # kernels still there a minute later


def started(folder, status, out, err):
    files = sorted(path.name for path in (folder / "build/sweeps/1.1_demo").iterdir())
    kernels = {}
    for path in sorted(folder.glob("kernel*")):
        kernels[int(path.name[-1])] = path.read_text().split()
        path.unlink()
    deadline = time.monotonic() + 60  # a kernel looks every second whether its parent is there
    while alive := [pid for pid, *_ in kernels.values() if Path(f"/proc/{pid}").exists()]:
        if time.monotonic() > deadline:
            break
        time.sleep(0.1)
    return Start(status, out.splitlines(), err, files, kernels, alive)


def start_again(folder):
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        status = cli.main(COMMAND)
    return started(folder, status, out.getvalue(), err.getvalue())


def start_and_interrupt(folder):
    """The command as a user starts it in a terminal, Ctrl-C when only seed 2 is still busy."""
    shutil.copytree(Path(cli.__file__).parent, folder / "labutils")  # its project is the folder
    (folder / "tmp").mkdir()
    environment = {**os.environ, "TMPDIR": str(folder / "tmp")}
    environment.pop("OMP_NUM_THREADS", None)
    process = subprocess.Popen(
        [sys.executable, "-m", "labutils", *COMMAND],
        cwd=folder,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    try:
        lines = [process.stdout.readline() for _ in range(3)]
        deadline = time.monotonic() + 120
        while not (folder / "kernel2").exists() and time.monotonic() < deadline:
            time.sleep(0.05)
        os.killpg(process.pid, signal.SIGINT)
        rest, err = process.communicate(timeout=120)
    finally:
        process.kill()
    return started(folder, process.returncode, "".join([*lines, rest]), err)


def test_a_sweep_is_stopped_goes_on_and_then_has_nothing_left_to_do(tmp_path, monkeypatch):
    folder = tmp_path.resolve()
    make_notebook(folder, SOURCE.format(folder=str(folder)))
    failed = folder / "build" / "failed" / "1.1_demo,seed=1,epochs=4.ipynb"
    notebooks = [f"seed={seed},epochs=4.ipynb" for seed in range(3)]
    (folder / "fail").touch()
    (folder / "hang").touch()

    first = start_and_interrupt(folder)
    assert first.status == 130
    assert first.out[0] == "1.1_demo: 3 combinations, 3 missing, 2 at a time"
    lines = {line.split("]")[1].split(",")[0].strip(): line for line in first.out[1:]}
    assert set(lines) == {"seed=0", "seed=1"}
    assert lines["seed=0"].endswith(" s, 0 of 0 claims hold. seed 0")
    assert "FAILED: cell 3 failed: ValueError: unlucky; see " in lines["seed=1"]
    assert lines["seed=1"].endswith(str(failed))
    assert "unlucky" in failed.read_text()
    assert first.err.splitlines() == [
        "1 of 3 are done. The same command does the others.",
        "Stopped. What has finished is kept.",
    ]
    assert first.files == notebooks[:1]
    assert list((folder / "tmp").glob("labutils-run-*")) == []
    share = str(max(1, joblib.cpu_count() // 2))
    assert {seed: seen[1:] for seed, seen in first.kernels.items()} == {
        seed: [share, "4"] for seed in range(3)
    }
    assert first.alive == []

    (folder / "fail").unlink()
    (folder / "hang").unlink()
    for module in (batch, sweep, cli):
        monkeypatch.setattr(module, "project_dir", lambda: folder)
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    second, third = start_again(folder), start_again(folder)
    assert second.out[:2] == [
        "1.1_demo: 3 combinations, 2 missing, 2 at a time",
        "[1/3] seed=0, epochs=4: already there",
    ]
    assert {seed: seen[1:] for seed, seen in second.kernels.items()} == {
        seed: ["1", "4"] for seed in (1, 2)
    }
    assert third.kernels == {}
    assert (second.status, second.err) == (third.status, third.err) == (0, "")
    assert second.files == third.files == [*notebooks, "table.csv"]
    assert not failed.exists()
    mean, std = statistics.fmean([90, 91, 92]), statistics.stdev([90, 91, 92])
    row = ["4", "mlp", "none", f"{mean:.1f}", f"{std:.1f}", "3", "1.0"]
    assert second.out[-2].split() == third.out[-2].split() == row

    metadata = json.loads((folder / "build/sweeps/1.1_demo" / notebooks[2]).read_text())["metadata"]
    assert set(metadata["labutils"]) == {"sweep"}
    assert "papermill" not in metadata
