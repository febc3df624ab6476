"""What is shown of a run, and its mirrors: never in the way, never asking for anything."""

import io
import os
import re
import sys
import termios
import tty
import warnings
from contextlib import ExitStack, suppress
from types import ModuleType, SimpleNamespace

import IPython
import pytest
from IPython import display as ipython_display

import labutils as lab
from labutils.training import watch
from labutils.training.watch import (
    Progress,
    open_mirrors,
    say,
    show_mirrors,
    warn,
    watched,
)

ROW = {"epoch": 1, "train_loss": 0.5, "val_loss": 0.123456789}


@pytest.fixture(autouse=True)
def nobody_to_ask(monkeypatch, tmp_path):
    """Whoever asks a question fails; nothing of W&B's is written outside of the test's folder."""
    monkeypatch.setattr(sys, "stdin", io.StringIO())
    sys.stdin.close()
    monkeypatch.delenv("WANDB_BASE_URL", raising=False)
    for name in ("CONFIG", "CACHE", "DATA"):
        monkeypatch.setenv(f"WANDB_{name}_DIR", str(tmp_path / name))


@pytest.fixture
def start(tmp_path):
    def start(track):
        named = {"name": "mlp-64", "key": "abc", "path": tmp_path, "info": {"lr": 0.1}}
        return open_mirrors(SimpleNamespace(**named), track)

    return start


@pytest.fixture
def fake_wandb(monkeypatch):
    """wandb.init without a backend: .calls keeps what it was given; online it has no network."""
    import wandb

    seen = SimpleNamespace(calls=[], rows=[], summary={}, finished=0)

    class Run:
        log = seen.rows.append
        summary = seen.summary

        def finish(self):
            seen.finished += 1

    def init(**arguments):
        seen.calls.append(arguments)
        if arguments["mode"] == "online":
            raise wandb.errors.CommError("no route to host")
        return Run()

    monkeypatch.setattr(wandb, "init", init)
    return seen


def test_tensorboard_can_read_what_was_logged(start, tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    mirrors = start(["tensorboard"])
    show_mirrors(mirrors, ROW)
    show_mirrors(mirrors, ROW | {"epoch": 2, "val_loss": 0.0625})
    show_mirrors(mirrors, {"test_accuracy": 0.75}, final=True)
    events = EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    found = [(event.step, event.value) for event in events.Scalars("val_loss")]
    assert found == [(1, pytest.approx(0.123456789)), (2, 0.0625)]
    assert set(events.Tags()["scalars"]) == {"train_loss", "val_loss", "test_accuracy"}
    assert events.Scalars("test_accuracy")[0].value == 0.75
    assert b"lr: 0.1" in events.Tensors("settings/text_summary")[0].tensor_proto.string_val[0]


def test_tensorboard_keeps_the_summary_of_a_run_whose_folder_gets_another_name(digits, recwarn):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    model = lab.MLP(digits.num_features, [4], digits.num_classes)
    run = lab.train(model, digits, lab.TrainConfig(epochs=1), track="tensorboard")
    events = EventAccumulator(str(run.path / "tensorboard")).Reload()
    assert events.Scalars("best/val_loss")[0].value == pytest.approx(run.best("val_loss"))
    assert not [w for w in recwarn if "stopped recording" in str(w.message)]


@pytest.mark.parametrize("kind", ["tensorboard", "wandb"])
def test_a_mirror_that_is_not_installed_is_named_and_costs_no_run(start, monkeypatch, kind):
    monkeypatch.delitem(sys.modules, "torch.utils.tensorboard", raising=False)
    monkeypatch.setitem(sys.modules, kind, None)
    with pytest.warns(UserWarning, match=f"{kind} stopped recording .*{kind}.*The run goes on"):
        assert start([kind]) == {}


def test_auto_may_stand_beside_another(start, monkeypatch):
    monkeypatch.delenv("WANDB_MODE", raising=False)
    assert list(start(["auto", "tensorboard"])) == ["tensorboard"]


@pytest.mark.parametrize("track", [["auto"], []])
@pytest.mark.parametrize("netrc", [None, "machine example.org login me password x", "nonsense {"])
def test_without_a_login_nothing_is_mirrored_or_imported(
    start, tmp_path, monkeypatch, track, netrc
):
    if netrc:
        (tmp_path / "netrc").write_text(netrc)
    for name in ("wandb", "tensorboard", "torch.utils.tensorboard"):
        monkeypatch.setitem(sys.modules, name, None)
    assert start(track) == {}


@pytest.mark.parametrize(
    ("variables", "netrc"),
    [
        ({"WANDB_API_KEY": "0" * 40}, ""),
        ({}, "machine api.wandb.ai login user password 0\n"),
        ({"WANDB_BASE_URL": "https://wandb.lab.org"}, "machine wandb.lab.org login me password 0"),
    ],
)
def test_a_login_without_network_falls_back_to_offline_with_one_warning(
    start, fake_wandb, tmp_path, monkeypatch, variables, netrc
):
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    (tmp_path / "netrc").write_text(netrc)
    with pytest.warns(UserWarning, match="no route to host.*offline.*wandb sync") as caught:
        mirrors = start(["auto"])
    assert len(caught) == 1
    assert [call["mode"] for call in fake_wandb.calls] == ["online", "offline"]
    show_mirrors(mirrors, ROW)
    show_mirrors(mirrors, {"test_loss": 0.5}, final=True)
    assert (fake_wandb.rows, fake_wandb.summary) == ([ROW], {"test_loss": 0.5})
    assert fake_wandb.finished == 1


@pytest.mark.parametrize("mode", ["offline", "disabled"])
def test_auto_follows_wandb_mode_and_says_nothing(start, fake_wandb, tmp_path, monkeypatch, mode):
    monkeypatch.setenv("WANDB_MODE", mode)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert len(start(["auto"])) == 1
    (call,) = fake_wandb.calls
    assert (call["mode"], call["dir"]) == (mode, str(tmp_path))
    # The same id and resume, so that a continued run continues its record.
    assert (call["id"], call["resume"], call["config"]) == ("abc", "allow", {"lr": 0.1})


def test_disabling_wandb_is_followed_after_it_was_out_of_reach(start, fake_wandb, monkeypatch):
    monkeypatch.setenv("WANDB_API_KEY", "0" * 40)
    with pytest.warns(UserWarning, match="out of reach"):
        start(["auto"])
    monkeypatch.setenv("WANDB_MODE", "disabled")
    start(["auto"])
    assert [call["mode"] for call in fake_wandb.calls] == ["online", "offline", "disabled"]


def test_the_second_run_without_network_neither_tries_nor_warns_again(
    start, fake_wandb, monkeypatch
):
    monkeypatch.setenv("WANDB_API_KEY", "0" * 40)
    with pytest.warns(UserWarning, match="out of reach"):
        start(["auto"])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        start(["auto"])
    assert [call["mode"] for call in fake_wandb.calls] == ["online", "offline", "offline"]


def test_online_mode_without_a_login_does_not_ask_for_one(start, fake_wandb, monkeypatch):
    monkeypatch.setenv("WANDB_MODE", "online")
    with pytest.warns(UserWarning, match="no login found.*offline.*wandb login") as caught:
        start(["auto"])
    assert len(caught) == 1
    assert [call["mode"] for call in fake_wandb.calls] == ["offline"]


def test_wandb_asked_for_by_name_without_a_login_records_offline(start, tmp_path):
    import wandb

    with pytest.warns(UserWarning, match="no login found.*offline.*wandb sync") as caught:
        mirrors = start(["wandb"])
    assert len(caught) == 1
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        show_mirrors(mirrors, ROW)
        show_mirrors(mirrors, {"test_loss": 0.987654321}, final=True)
    # W&B writes from a process of its own; this waits until it has ended.
    wandb.teardown()
    (record,) = (tmp_path / "wandb").glob("offline-run-*-abc*/*.wandb")
    assert b"0.123456789" in record.read_bytes()
    assert b"0.987654321" in record.read_bytes()


def test_disabled_wandb_takes_everything_and_keeps_nothing(start, tmp_path, monkeypatch):
    monkeypatch.setenv("WANDB_MODE", "disabled")
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        mirrors = start(["auto"])
        show_mirrors(mirrors, ROW)
        show_mirrors(mirrors, {"test_loss": 0.5}, final=True)
    assert not list(tmp_path.rglob("*.wandb"))


def test_a_mirror_that_fails_midway_warns_once_and_is_left_alone():
    seen = []

    def show(row, final):
        seen.append(row)
        if len(seen) == 2:
            raise ConnectionError("gone")

    mirrors = {"Cloud": show}
    show_mirrors(mirrors, ROW)
    with pytest.warns(UserWarning, match=r"Cloud stopped recording \(gone\)") as caught:
        show_mirrors(mirrors, ROW)
    assert len(caught) == 1
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        show_mirrors(mirrors, ROW)
        show_mirrors(mirrors, {"a": 1.0}, final=True)
    assert len(seen) == 2


@pytest.mark.parametrize("error", [KeyError("a"), AssertionError()])
def test_a_mirror_that_cannot_close_costs_one_warning_and_others_are_closed(error):
    def fail(summary, final):
        raise error

    closed = []
    mirrors = {"Cloud": fail, "Board": lambda *shown: closed.append(shown)}
    with pytest.warns(UserWarning, match=r"Cloud stopped recording .*holds it all"):
        show_mirrors(mirrors, {"a": 1.0}, final=True)
    assert closed == [({"a": 1.0}, True)]


@pytest.mark.parametrize(
    ("variables", "netrc"),
    [
        ({"WANDB_MODE": "offline", "WANDB_PROJECT": "a/b"}, b""),
        ({"WANDB_MODE": "garbage"}, b""),
        ({"WANDB_BASE_URL": "http://[", "WANDB_MODE": "online"}, b""),
        ({"WANDB_BASE_URL": "http://["}, b""),
        ({"WANDB_MODE": "online"}, b"machine api.wandb.ai login \xff\xfe password \xe9\n"),
        ({}, b"machine api.wandb.ai login \xff\xfe password \xe9\n"),
    ],
)
def test_nothing_in_the_environment_lets_a_mirror_fail_a_training(
    start, tmp_path, monkeypatch, variables, netrc
):
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    (tmp_path / "netrc").write_bytes(netrc)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        mirrors = start(["auto"])
        show_mirrors(mirrors, ROW)
        show_mirrors(mirrors, {"test_loss": 0.5}, final=True)
    assert len([w for w in caught if issubclass(w.category, UserWarning)]) <= 1


EPOCH = {
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


class Shown(list):
    """All that was displayed; .outputs: what each new output of a cell began with."""

    def __init__(self):
        super().__init__()
        self.outputs = []


@pytest.fixture
def shell(monkeypatch):
    shell = SimpleNamespace(execution_count=7)
    monkeypatch.setattr(IPython, "get_ipython", lambda: shell)
    return shell


@pytest.fixture
def notebook(monkeypatch, shell):
    """Pretend that JupyterLab started this kernel; returns everything that was displayed."""
    shown = Shown()
    handle = SimpleNamespace(update=lambda bundle, raw: shown.append(bundle))

    def display(bundle, *, raw, display_id):
        assert raw
        assert display_id
        shown.append(bundle)
        shown.outputs.append(bundle)
        return handle

    monkeypatch.setitem(sys.modules, "ipykernel", ModuleType("ipykernel"))
    monkeypatch.setenv("JPY_SESSION_NAME", "1.1_mlp.ipynb")
    monkeypatch.setattr(ipython_display, "display", display)
    monkeypatch.setattr(watch, "_output", (None, None))
    return shown


@pytest.fixture
def train(tmp_path):
    def train(name="mlp-64", *, done=0, show=True, row=EPOCH):
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
        progress.epoch(EPOCH | {"epoch": epoch}, 20)
        assert log.read_text().endswith(
            f"\nepoch {epoch}/20, loss 0.123 (val 0.234), val accuracy 94.3 %, 12,346 images/s\n"
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
    train(name, row=EPOCH | {"epoch": 1000, "train_loss": 1234.5, "val_loss": 1234.5})
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


def test_a_continued_bar_says_so_until_there_is_more_to_say(train, notebook):
    train(done=850)
    texts = [bundle["text/plain"] for bundle in notebook if bundle["text/plain"]]
    assert texts[0].startswith("mlp-64: continues\n")
    assert texts[-1].startswith("mlp-64: epoch")


@pytest.mark.parametrize("where", ["notebook", "terminal"])
def test_a_run_that_ends_early_says_why_and_not_what_is_left(request, where, tmp_path):
    shown = request.getfixturevalue(where)
    read = shown(80) if where == "terminal" else lambda: shown[-1]["text/plain"]
    progress = Progress("mlp-64", total=1000, done=0, log=tmp_path / "train.log", show=True)
    progress.step(400)
    progress.epoch(EPOCH, 20)
    progress.end("stagnation: no better val_loss for 5 epochs")
    progress.close()
    last = read().strip().split("\r")[-1]
    assert re.fullmatch(r"mlp-64: stagnation: no better val_loss for 5 epochs; epoch 3/20.*", last)
    assert (
        (tmp_path / "train.log")
        .read_text()
        .endswith("\nstagnation: no better val_loss for 5 epochs\n")
    )


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


def test_the_runs_of_one_cell_share_one_output(train, notebook, shell):
    train()
    train()
    say("loaded")
    assert len(notebook.outputs) == 1
    assert notebook[-1] == {"text/plain": "loaded"}
    shell.execution_count = 8
    say("loaded too")
    assert len(notebook.outputs) == 2
    assert notebook[-1] == {"text/plain": "loaded too"}


def test_a_warning_stays_beside_the_line_of_a_run(notebook, capsys):
    warn.cache_clear()
    say("mlp-64: epoch 1")
    warn("odd")
    say("mlp-64: epoch 2")
    assert capsys.readouterr().out == "odd\n"
    assert [bundle["text/plain"] for bundle in notebook] == ["mlp-64: epoch 1", "mlp-64: epoch 2"]


def test_a_warning_is_given_once(capsys):
    warn.cache_clear()
    for text in ("slow", "odd", "slow"):
        warn(text)
    assert capsys.readouterr() == ("slow\nodd\n", "")
