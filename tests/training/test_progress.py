"""Where a bar is shown, what it says, and the log that can be followed."""

import os
import re
import sys
import termios
import tty
from contextlib import ExitStack, suppress
from types import ModuleType, SimpleNamespace

import IPython
import pytest
from IPython import display as ipython_display

from labutils.training import progress
from labutils.training.progress import Progress, say, warn, watched

ROW = {
    "epoch": 3,
    "train_loss": 0.1234,
    "train_accuracy": 0.9567,
    "val_loss": 0.2345,
    "val_accuracy": 0.9432,
    "images_per_second": 12345.6,
}
# Epoch, both losses, accuracy, time left and speed, each with its name.
EVERYTHING = (
    r"epoch 3/20, loss 0\.123 \(val 0\.234\), val accuracy 94\.3 %\s+"
    r"\|.*\| [\d:]+ left, [\d.]+[kMGT]? images/s"
)


@pytest.fixture(autouse=True)
def no_kernel(monkeypatch):
    monkeypatch.delitem(sys.modules, "ipykernel", raising=False)


@pytest.fixture
def terminal(monkeypatch):
    """Make stderr a terminal of so many columns; returns a function that reads its screen."""
    with ExitStack() as stack:

        def make(columns):
            outside, inside = os.openpty()
            stack.callback(os.close, outside)
            tty.setraw(inside)
            termios.tcsetwinsize(inside, (50, columns))
            monkeypatch.setattr(
                sys, "stderr", stack.enter_context(os.fdopen(inside, "w", 1, "utf-8"))
            )

            def read():
                os.set_blocking(outside, False)
                parts = []
                with suppress(BlockingIOError):
                    while True:
                        parts.append(os.read(outside, 4096))
                return b"".join(parts).decode()

            return read

        yield make
        monkeypatch.undo()


@pytest.fixture
def notebook(monkeypatch):
    """Pretend that JupyterLab started this kernel; returns everything that was displayed."""
    shown = []
    handle = SimpleNamespace(update=lambda bundle, raw: shown.append(bundle))

    def display(bundle, *, raw, display_id):
        assert raw
        assert display_id
        shown.append(bundle)
        return handle

    monkeypatch.setitem(sys.modules, "ipykernel", ModuleType("ipykernel"))
    monkeypatch.setenv("JPY_SESSION_NAME", "1.1_mlp.ipynb")
    monkeypatch.setattr(ipython_display, "display", display)
    return shown


@pytest.fixture
def train(tmp_path):
    def train(name="mlp-64", *, done=0, show=True, row=ROW):
        progress = Progress(name, total=1000, done=done, log=tmp_path / "train.log", show=show)
        progress.step(100)
        progress.epoch(row, 20)
        progress.step(50)
        progress.close()

    return train


@pytest.mark.parametrize("tty", [True, False])
@pytest.mark.parametrize("kernel", [True, False])
@pytest.mark.parametrize("session", ["", "1.1_mlp.ipynb"])
def test_a_kernel_is_watched_in_jupyterlab_only_and_a_script_on_a_terminal(
    monkeypatch, tty, kernel, session
):
    monkeypatch.setattr(sys, "stderr", SimpleNamespace(isatty=lambda: tty))
    monkeypatch.setenv("JPY_SESSION_NAME", session)
    if kernel:
        monkeypatch.setitem(sys.modules, "ipykernel", ModuleType("ipykernel"))
    expected = ("notebook" if session else None) if kernel else ("terminal" if tty else None)
    assert watched() == expected


def test_the_log_can_be_followed_while_training_goes_on(tmp_path):
    log = tmp_path / "train.log"
    progress = Progress("mlp-64", total=1000, done=0, log=log, show=False)
    for epoch in (1, 2):
        progress.epoch(ROW | {"epoch": epoch}, 20)
        assert log.read_text().endswith(
            f"\nepoch {epoch}/20, loss 0.1234 train 0.2345 val, "
            "accuracy 95.67 % train 94.32 % val, 12,346 images/s\n"
        )
    progress.note("finished all 20 epochs")
    lines = log.read_text().splitlines()
    assert (lines[0], lines[-1]) == (
        "mlp-64: starts at image 0 of 1,000",
        "finished all 20 epochs",
    )
    assert len(lines) == 4
    progress.close()


def test_a_continued_run_adds_to_its_log(train, tmp_path):
    train(show=False)
    before = (tmp_path / "train.log").read_text()
    train(done=500, show=False)
    after = (tmp_path / "train.log").read_text()
    assert after.startswith(before + "mlp-64: continues at image 500 of 1,000\n")


def test_the_terminal_bar_says_everything_in_100_columns(train, terminal, capsys):
    read = terminal(100)
    train()
    last = read().rstrip("\n").split("\r")[-1]
    assert re.fullmatch(f"mlp-64: {EVERYTHING}", last)
    assert capsys.readouterr().out == ""


@pytest.mark.parametrize("columns", [40, 80, 100, 200])
@pytest.mark.parametrize("name", ["m", "a-run-with-a-name-of-45-letters-and-some-more"])
def test_the_terminal_bar_stays_on_its_line(train, terminal, columns, name):
    read = terminal(columns)
    train(name, row=ROW | {"epoch": 1000, "train_loss": 1234.5, "val_loss": 1234.5})
    *lines, after = read().replace("\n", "\r").split("\r")
    assert 1 < max(len(line) for line in lines) <= columns
    assert after == ""


def test_in_80_columns_the_time_left_still_fits(train, terminal):
    read = terminal(80)
    train()
    assert " left" in read().split("\r")[-1]


def test_the_notebook_bar_says_everything_in_lines_of_100_columns(train, notebook, capsys):
    train("a-run-with-a-name-of-30-letters")
    texts = [bundle["text/plain"] for bundle in notebook]
    assert re.fullmatch(f"a-run-with-a-name-of-30-letters: {EVERYTHING}", texts[-1])
    assert max(len(line) for text in texts for line in text.split("\n")) <= 100
    assert capsys.readouterr() == ("", "")


def test_the_notebook_bar_leaves_nothing_that_a_saved_notebook_should_not_hold(train, notebook):
    train()
    assert len(notebook) > 1
    assert {kind for bundle in notebook for kind in bundle} == {"text/plain"}
    assert not any("\r" in bundle["text/plain"] for bundle in notebook)


def test_a_continued_bar_starts_where_the_run_was(train, notebook):
    train(done=850)
    bars = [re.search(r"\|(.*)\|", b["text/plain"]) for b in notebook if b["text/plain"]]
    first, last = (bar[1].count("█") / len(bar[1]) for bar in (bars[0], bars[-1]))
    assert first == pytest.approx(0.85, abs=0.03)
    assert last == 1


def test_no_bar_where_nobody_watches(train, terminal, monkeypatch, capsys):
    train()
    assert capsys.readouterr() == ("", "")
    read = terminal(100)
    monkeypatch.setitem(sys.modules, "ipykernel", ModuleType("ipykernel"))
    train()
    assert read() == ""
    assert capsys.readouterr().out == ""


def test_show_false_prints_nothing(train, terminal, notebook, capsys):
    read = terminal(100)
    train(show=False)
    assert read() == ""
    assert notebook == []
    assert capsys.readouterr().out == ""


def test_the_runs_of_one_cell_share_one_output(train, notebook, monkeypatch):
    shell = SimpleNamespace(execution_count=7)
    monkeypatch.setattr(IPython, "get_ipython", lambda: shell)
    train()
    train()
    say("loaded")
    assert [bundle["text/plain"] for bundle in notebook].count("") == 1
    assert notebook[-1] == {"text/plain": "run 3, loaded"}
    shell.execution_count = 8
    say("loaded")
    assert [bundle["text/plain"] for bundle in notebook].count("") == 2
    assert notebook[-1] == {"text/plain": "loaded"}


def test_a_warning_is_given_once(capsys, monkeypatch):
    monkeypatch.setattr(progress, "_said", set())
    for text in ("slow", "odd", "slow"):
        warn(text)
    assert capsys.readouterr() == ("slow\nodd\n", "")
