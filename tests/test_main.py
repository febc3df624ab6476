"""The command line: what it prints, what it refuses, its exit status."""

import json
import signal
import subprocess
import sys

import pytest

from labutils import __main__ as cli
from labutils.notebook import batch, engine, parameters


@pytest.fixture
def executed(tmp_path, monkeypatch):
    """Commands that would execute a notebook record how, and report one claim that fails."""
    calls = []
    notebook = tmp_path / "notebooks" / "1.1_demo.ipynb"
    profile = notebook.parent / "full" / "1.1_demo.yaml"
    profile.parent.mkdir(parents=True)
    profile.write_text("epochs: 60\nretrain: false\npublish: true\n")
    known = {"epochs": 3, "widths": [3], "retrain": True, "publish": False}
    rows = [{"claim": "c", "evidence": "e", "verdict": "fails"}]

    def execute_all(jobs, ended, *, at_once=None, scheduler=None):
        for job in jobs:
            calls.append((job.label, job.output, job.parameters, at_once, scheduler))
            ended(job, None, 1.0)
        return 0

    for module in (batch, cli):
        monkeypatch.setattr(module, "project_dir", lambda: tmp_path)
    monkeypatch.setattr(batch, "find_notebooks", lambda name: [notebook])
    monkeypatch.setattr(parameters, "of_notebook", lambda path: known)
    monkeypatch.setattr(batch.Job, "reported", lambda job: {"rows": rows, "headline": "headline"})
    monkeypatch.setattr(engine, "execute_all", execute_all)
    return calls


def test_quick_goes_to_build_and_a_failed_claim_fails_the_command(executed, tmp_path, capsys):
    assert cli.main(["run", "1.1"]) == 1
    output = tmp_path / "build" / "1.1_demo.ipynb"
    assert executed == [("1.1_demo", output, {}, None, None)]
    shown = capsys.readouterr().out
    assert shown == "1.1_demo: 1 s, 0 of 1 claims hold. headline\n  fails: c (e)\n"


def test_a_claim_that_is_not_settled_does_not_fail_the_command(executed, monkeypatch, capsys):
    rows = [{"claim": "c", "evidence": "e", "verdict": "not settled"}]
    monkeypatch.setattr(batch.Job, "reported", lambda job: {"rows": rows, "headline": ""})
    assert cli.main(["run", "1.1"]) == 0
    assert "  not settled: c (e)\n" in capsys.readouterr().out


def test_values_are_yaml_and_exploring_never_fails_on_a_claim(executed):
    assert cli.main(["run", "1.1", "-p", "epochs", "3", "-p", "widths", "[3, 10]"]) == 0
    assert executed[0][2] == {"epochs": 3, "widths": [3, 10]}


def test_full_goes_to_reports_with_its_yaml_and_overrides(executed, tmp_path):
    assert cli.main(["run", "1.1", "--profile", "full", "-p", "retrain", "True"]) == 0
    assert executed[0][1] == tmp_path / "reports" / "1.1_demo.ipynb"
    assert executed[0][2] == {"epochs": 60, "retrain": True, "publish": True}


def test_an_experiment_with_the_full_profile_is_no_report(executed, tmp_path):
    assert cli.main(["run", "1.1", "--profile", "full", "-p", "epochs", "3"]) == 0
    assert cli.main(["run", "1.1", "--profile", "full", "--out", str(tmp_path / "x")]) == 0
    assert [call[1].parent.name for call in executed] == ["build", "x"]
    assert [call[2]["publish"] for call in executed] == [False, False]


def test_notebooks_run_side_by_side_here_or_on_a_cluster(executed):
    for options in ([], ["--jobs", "4"], ["--scheduler", "tcp://host:8786"]):
        cli.main(["run", "all", *options])
    assert [call[3] for call in executed] == [None, 4, None]
    assert [call[4] for call in executed] == [None, None, "tcp://host:8786"]


def test_a_notebook_that_fails_does_not_keep_the_others_from_running(
    executed, tmp_path, monkeypatch, capsys
):
    def execute_all(jobs, ended, **_):
        for job in jobs:
            ended(job, "killed by SIGKILL", 1.0)
        return 0

    paths = [tmp_path / "1.1_a.ipynb", tmp_path / "1.2_b.ipynb", tmp_path / "1.3_c.ipynb"]
    monkeypatch.setattr(batch, "find_notebooks", lambda name: paths)
    monkeypatch.setattr(engine, "execute_all", execute_all)
    monkeypatch.setattr(
        parameters, "of_notebook", lambda path: {"epochs": 3} if "1.2" not in path.name else {}
    )
    assert cli.main(["run", "all", "-p", "epochs", "4"]) == 1
    errors = capsys.readouterr().err.splitlines()
    assert errors[0].startswith("run: 1.2_b: epochs = 4. Extra inputs are not permitted.")
    assert errors[1:] == ["1.3_c: killed by SIGKILL", "1.1_a: killed by SIGKILL"]


def test_notebooks_are_stored_by_executing_them_in_place(executed, tmp_path):
    cli.main(["run", "1.1", "--out", str(tmp_path / "notebooks")])
    assert executed[0][1] == tmp_path / "notebooks" / "1.1_demo.ipynb"


def test_what_is_stopped_says_so(executed, monkeypatch, capsys):
    monkeypatch.setattr(engine, "execute_all", lambda *_, **__: 143)
    assert cli.main(["run", "1.1"]) == 143
    assert capsys.readouterr().err == "Stopped. What has finished is kept.\n"


def test_a_value_that_is_no_yaml_is_one_line(executed, capsys):
    assert cli.main(["run", "1.1", "-p", "epochs", "[1"]) == 1
    shown = capsys.readouterr().err
    assert shown.startswith("-p epochs '[1' is no YAML: ")
    assert shown.count("\n") == 1
    assert executed == []


def test_a_parameter_that_comes_twice_is_refused(executed, capsys):
    assert cli.main(["run", "1.1", "-p", "epochs", "1", "-p", "epochs", "2"]) == 1
    assert capsys.readouterr().err.startswith("run: -p epochs comes twice")
    assert executed == []


def test_a_date_that_does_not_exist_is_no_yaml(executed, capsys):
    assert cli.main(["run", "1.1", "-p", "epochs", "2020-13-45"]) == 1
    assert capsys.readouterr().err.startswith("-p epochs '2020-13-45' is no YAML: month must be")


@pytest.mark.parametrize(
    "arguments",
    [
        ["fly"],
        ["run"],
        ["run", "1.1", "--jobs", "0"],
        ["sweep", "1.1", "-p", "a", "1", "--jobs", "-2"],
    ],
)
def test_a_command_that_is_not_understood_has_a_status_of_its_own(arguments, executed, capsys):
    assert cli.main(arguments) == 2
    captured = capsys.readouterr()
    assert "Usage: python -m labutils" in captured.err
    assert captured.out == ""
    assert executed == []


def test_data_lists_what_is_here_and_checks_what_is_named(write_npz, capsys):
    path = write_npz("mnist", train=60)
    assert cli.main(["data"]) == 0
    shown = capsys.readouterr().out
    assert "embedded: digits, shapes10, shapes100, scenes10\n" in shown
    assert "mnist: mnist.npz" in shown
    assert "cifar10: not here yet" in shown
    assert str(path.parent) in shown
    assert cli.main(["data", "digits"]) == 0
    assert "digits from scikit-learn load_digits" in capsys.readouterr().out


def test_errors_are_one_message_without_a_traceback(capsys):
    assert cli.main(["data", "minst"]) == 1
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.startswith("load_data: unknown data set 'minst'. Did you mean 'mnist'?")
    assert "Traceback" not in captured.err


@pytest.mark.parametrize("command", ["run", "sweep", "data", "cam"])
def test_help_teaches_by_example(command, capsys):
    assert cli.main([command, "--help"]) == 0
    assert f"  python -m labutils {command}" in capsys.readouterr().out


def test_ctrl_c_is_one_line():
    code = (
        "import sys, signal; signal.signal(signal.SIGINT, signal.default_int_handler); "
        "from labutils import __main__ as cli, data; import labutils.data.load as load; "
        "load.load_data = lambda *_, **__: print('here', flush=True) or signal.pause(); "
        "sys.exit(cli.main(['data', 'mnist']))"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    assert process.stdout.readline() == "here\n"
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 130
    assert err.split("\n") == ["", "Stopped. What has finished is kept.", ""]


def test_the_command_line_does_not_import_what_it_may_not_need():
    code = "import sys, json; import labutils.__main__, labutils.notebook.engine; "
    code += "print(json.dumps([name in sys.modules for name in ('dask', 'distributed', 'torch')]))"
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert json.loads(found.stdout) == [False, False, False]
