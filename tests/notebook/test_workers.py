"""Runs in processes: their share of the machine, what is said of a bad end, and how they stop."""

import os
import signal
import subprocess
import sys
import time

import joblib
import pytest
import torch

from labutils.notebook import workers


@pytest.fixture
def points(tmp_path):
    return [
        workers.Point(
            notebook=tmp_path / "1.1_demo.ipynb",
            parameters={"seeds": [seed]},
            output=tmp_path / f"seed={seed}.ipynb",
            failed=tmp_path / "failed" / f"1.1_demo,seed={seed}.ipynb",
            key="key",
            label=f"seed={seed}",
            varied={"seed": seed},
        )
        for seed in range(4)
    ]


@pytest.fixture
def pretend(monkeypatch):
    """Have the processes of points run a piece of code that starts no notebook."""
    started, popen = [], subprocess.Popen

    def use(code):
        def start(arguments, **options):
            started.append(popen([sys.executable, "-c", code, arguments[-1]], **options))
            return started[-1]

        monkeypatch.setattr(workers.subprocess, "Popen", start)
        return started

    return use


@pytest.mark.parametrize(
    ("code", "error"),
    [
        ("pass", None),
        ("print('fine')", None),
        ("import sys; sys.exit('ValueError: no')", "ValueError: no"),
        ("print('noise'); 1 / 0", "ZeroDivisionError: division by zero"),
        ("import os; os._exit(3)", "exit status 3"),
        ("import os; os.kill(os.getpid(), 9)", "killed by SIGKILL"),
    ],
)
def test_the_end_of_a_process_is_told_in_a_line(code, error, points, pretend):
    pretend(code)
    [(point, found, seconds)] = workers.start(points[:1], 1, [])
    assert (point, found) == (points[0], error)
    assert 0 < seconds < 60


def test_a_failure_says_where_what_ran_is_kept(points, pretend):
    pretend("import sys; sys.exit('ValueError: no')")
    points[1].failed.parent.mkdir()
    points[1].failed.touch()
    errors = {point: error for point, error, _ in workers.start(points[:2], 2, [])}
    assert errors[points[0]] == "ValueError: no"
    assert errors[points[1]] == f"ValueError: no; see {points[1].failed}"


def test_a_process_that_cannot_start_is_a_failure_of_its_run_only(points, monkeypatch):
    def start(*_, **__):
        raise OSError("no more processes")

    monkeypatch.setattr(workers.subprocess, "Popen", start)
    errors = [error for _, error, _ in workers.start(points, 2, [])]
    assert errors == ["no more processes"] * 4


@pytest.mark.parametrize("jobs", [1, 2])
def test_a_stop_ends_what_runs_and_starts_nothing_more(jobs, points, pretend):
    started = pretend("import time; time.sleep(60)")
    stop = []
    before = signal.signal(signal.SIGALRM, lambda *_: stop.append(signal.SIGINT))
    signal.setitimer(signal.ITIMER_REAL, 0.5)
    try:
        ends = list(workers.start(points, jobs, stop))
    finally:
        signal.signal(signal.SIGALRM, before)
    assert {point for point, *_ in ends} == set(points)
    assert None not in {error for _, error, _ in ends}
    assert [process.returncode for process in started] == [-signal.SIGINT] * jobs


def test_a_process_that_does_not_listen_is_killed(points, pretend, monkeypatch, tmp_path):
    monkeypatch.setattr(workers, "GRACE", 0.3)
    ready = tmp_path / "ready"
    started = pretend(
        "import pathlib, signal, time; signal.signal(signal.SIGINT, signal.SIG_IGN); "
        f"pathlib.Path({str(ready)!r}).touch(); time.sleep(60)"
    )

    class Stop(list):
        def __bool__(self):
            return ready.exists()

    [(_, error, _)] = workers.start(points[:1], 1, Stop())
    assert error == "killed by SIGKILL"
    assert started[0].returncode == -signal.SIGKILL


def test_signals_are_collected_and_ignored_ones_stay_ignored():
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with workers.signals() as caught:
            for number in (signal.SIGHUP, signal.SIGTERM, signal.SIGINT):
                os.kill(os.getpid(), number)
                time.sleep(0.01)
        assert caught == [signal.SIGTERM, signal.SIGINT]
        assert signal.getsignal(signal.SIGHUP) is signal.SIG_IGN
    finally:
        signal.signal(signal.SIGHUP, before)


def test_workers_share_the_cores_unless_the_user_says_otherwise(monkeypatch):
    monkeypatch.setattr(joblib, "cpu_count", lambda: 8)
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    assert [worker["OMP_NUM_THREADS"] for worker in workers.environments(3)] == ["2"] * 3
    assert [worker["OMP_NUM_THREADS"] for worker in workers.environments(9)] == ["1"] * 9
    monkeypatch.setenv("OMP_NUM_THREADS", "5")
    assert [worker["OMP_NUM_THREADS"] for worker in workers.environments(2)] == ["5"] * 2


@pytest.mark.parametrize(
    ("count", "visible", "expected"),
    [
        (0, None, [None, None, None]),
        (1, None, [None, None, None]),
        (1, "3", ["3", "3", "3"]),
        (2, None, ["0", "1", "0"]),
        (4, None, ["0", "1", "2"]),
        (2, "5,GPU-1a2b", ["5", "GPU-1a2b", "5"]),
        (2, "5,7,-1,6", ["5", "7", "5"]),
    ],
)
def test_workers_get_a_gpu_each_where_there_are_several(count, visible, expected, monkeypatch):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: count)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    if visible:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    found = [worker.get("CUDA_VISIBLE_DEVICES") for worker in workers.environments(3)]
    assert found == expected
