"""The command line: what it prints, what it refuses, its exit status."""

import pytest

from labutils import __main__ as cli
from labutils.notebook import batch


@pytest.fixture
def outcome(tmp_path, monkeypatch):
    """Commands that would run a notebook record how, and report one claim that fails."""
    calls = []
    notebook = tmp_path / "notebooks" / "1.1_demo.ipynb"
    profile = notebook.parent / "full" / "1.1_demo.yaml"
    profile.parent.mkdir(parents=True)
    profile.write_text("epochs: 60\nretrain: false\npublish: true\n")

    def run(notebook, output, parameters):
        calls.append((notebook.stem, output, parameters))
        claim = {"claim": "c", "evidence": "e", "holds": False}
        return batch.Outcome(notebook.stem, 1.0, [claim], "headline")

    monkeypatch.setattr(cli, "project_dir", lambda: tmp_path)
    monkeypatch.setattr(batch, "find_notebooks", lambda name: [notebook])
    monkeypatch.setattr(batch, "run_notebook", run)
    return calls


def test_quick_goes_to_build_and_a_failed_claim_fails_the_command(outcome, tmp_path, capsys):
    assert cli.main(["run", "1.1"]) == 1
    assert outcome == [("1.1_demo", tmp_path / "build" / "1.1_demo.ipynb", {})]
    assert "fails: c (e)" in capsys.readouterr().out


def test_values_are_yaml_and_exploring_never_fails_on_a_claim(outcome):
    assert cli.main(["run", "1.1", "-p", "epochs", "3", "-p", "widths", "[3, 10]"]) == 0
    assert outcome[0][2] == {"epochs": 3, "widths": [3, 10]}


def test_full_goes_to_reports_with_its_yaml_and_overrides(outcome, tmp_path):
    assert cli.main(["run", "1.1", "--profile", "full", "-p", "retrain", "True"]) == 0
    assert outcome[0][1] == tmp_path / "reports" / "1.1_demo.ipynb"
    assert outcome[0][2] == {"epochs": 60, "retrain": True, "publish": True}


def test_an_experiment_with_the_full_profile_is_no_report(outcome, tmp_path):
    assert cli.main(["run", "1.1", "--profile", "full", "-p", "epochs", "3"]) == 0
    assert cli.main(["run", "1.1", "--profile", "full", "--out", str(tmp_path / "x")]) == 0
    assert [call[1].parent.name for call in outcome] == ["build", "x"]
    assert [call[2]["publish"] for call in outcome] == [False, False]


def test_a_notebook_that_fails_does_not_keep_the_others_from_running(
    outcome, tmp_path, monkeypatch, capsys
):
    def run(notebook, output, parameters):
        outcome.append(notebook.stem)
        raise batch.NotebookError(f"{notebook.stem} failed")

    paths = [tmp_path / "1.1_a.ipynb", tmp_path / "1.2_b.ipynb"]
    monkeypatch.setattr(batch, "find_notebooks", lambda name: paths)
    monkeypatch.setattr(batch, "run_notebook", run)
    assert cli.main(["run", "all"]) == 1
    assert outcome == ["1.1_a", "1.2_b"]
    assert capsys.readouterr().err == "1.1_a failed\n1.2_b failed\n"


def test_store_writes_into_the_notebook_itself_and_takes_no_parameters(outcome, tmp_path, capsys):
    cli.main(["run", "1.1", "--store"])
    assert outcome[0][1] == tmp_path / "notebooks" / "1.1_demo.ipynb"
    assert cli.main(["run", "1.1", "--store", "-p", "epochs", "3"]) == 1
    assert "--store" in capsys.readouterr().err


def test_data_lists_what_is_here_and_checks_what_is_named(write_npz, capsys):
    path = write_npz("mnist", train=60)
    assert cli.main(["data"]) == 0
    shown = capsys.readouterr().out
    for name in "digits", "shapes10", "shapes100", "scenes10":
        assert f"{name}: embedded\n" in shown
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


@pytest.mark.parametrize("command", ["run", "sweep", "data", "results"])
def test_help_teaches_by_example(command, capsys):
    with pytest.raises(SystemExit) as stop:
        cli.main([command, "--help"])
    assert stop.value.code == 0
    assert f"python -m labutils {command}" in capsys.readouterr().out
