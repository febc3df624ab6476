"""Notebooks in processes: their share of the machine, bad ends, and that nothing outlives them.

The first tests start processes that only pretend; the last ones kernels, workers and a scheduler.
"""

import contextlib
import dataclasses
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import joblib
import nbformat
import psutil
import pytest
import torch
from nbformat.v4 import new_code_cell, new_notebook

from labutils.notebook import batch, engine


@pytest.fixture
def jobs(tmp_path):
    return [
        batch.Job(
            notebook=tmp_path / "1.1_demo.ipynb",
            parameters={"seeds": [seed]},
            output=tmp_path / f"seed={seed}.ipynb",
            failed=tmp_path / "failed" / f"1.1_demo,seed={seed}.ipynb",
            label=f"seed={seed}",
        )
        for seed in range(4)
    ]


@pytest.fixture
def pretend(monkeypatch):
    """Have the processes of notebooks run a piece of code that starts no kernel."""
    started, popen = [], subprocess.Popen

    def use(code, number=None, count=1):
        """number: a signal that we get as soon as count processes are started."""

        def start(arguments, **options):
            started.append(popen([sys.executable, "-c", code, arguments[-1]], **options))
            if number and len(started) == count:
                os.kill(os.getpid(), number)
            return started[-1]

        monkeypatch.setattr(engine.subprocess, "Popen", start)
        return started

    return use


def execute(jobs, at_once=1, then=lambda: None):
    """The status, and what became of each job."""
    ends = {}

    def ended(job, error, seconds):
        ends[job] = error
        assert 0 <= seconds < 60
        then()

    return engine.execute_all(jobs, ended, at_once=at_once, scheduler=None), ends


@pytest.mark.parametrize(
    ("code", "error"),
    [
        ("pass", None),
        ("print('fine')", None),
        ("import sys; print('noise'); sys.exit('\fValueError: no\\nhelp')", "ValueError: no\nhelp"),
        ("print('noise'); 1 / 0", "ZeroDivisionError: division by zero"),
        ("import os; os._exit(3)", "exit status 3"),
        ("import os; os.kill(os.getpid(), 9)", "killed by SIGKILL"),
    ],
)
def test_the_end_of_a_process_is_told(code, error, jobs, pretend):
    pretend(code)
    assert execute(jobs[:1]) == (0, {jobs[0]: error})


def test_a_process_that_is_killed_is_tried_again(jobs, pretend, tmp_path):
    before = tmp_path / "before"
    started = pretend(
        f"import os, pathlib; before = pathlib.Path({str(before)!r})\n"
        "if not before.exists(): before.touch(); os.kill(os.getpid(), 9)"
    )
    assert execute(jobs[:1]) == (0, {jobs[0]: None})
    assert [process.returncode for process in started] == [-signal.SIGKILL, 0]


def test_a_process_that_is_killed_every_time_is_given_up(jobs, pretend):
    started = pretend("import os; os.kill(os.getpid(), 9)")
    execute(jobs[:1])
    assert len(started) == 1 + engine.RETRIES


def test_a_process_that_cannot_start_is_a_failure_of_its_notebook_only(jobs, monkeypatch):
    def start(*_, **__):
        raise OSError("no more processes")

    monkeypatch.setattr(engine.subprocess, "Popen", start)
    assert execute(jobs, 2) == (0, dict.fromkeys(jobs, "no more processes"))


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
@pytest.mark.parametrize("at_once", [1, 2])
def test_a_signal_ends_what_runs_and_nothing_goes_on(number, at_once, jobs, pretend):
    started = pretend("import time; time.sleep(60)", number, at_once)
    # Whatever the tests were started with, here the signals are those of a terminal.
    before = signal.signal(number, signal.default_int_handler)
    try:
        assert execute(jobs, at_once) == (128 + number, {})
        assert signal.getsignal(number) is signal.default_int_handler
    finally:
        signal.signal(number, before)
    # Dask may begin with another one while it cancels them all; that ends as well.
    assert {process.returncode for process in started} == {-signal.SIGKILL}
    assert at_once <= len(started) < len(jobs)


def test_an_error_of_our_own_leaves_no_process_behind(jobs, pretend):
    started = pretend(
        "import sys, json; json.loads(sys.argv[1])['label'] == 'seed=0' or sys.stdin.read(1)"
    )

    def then():
        raise BrokenPipeError

    with pytest.raises(BrokenPipeError):
        execute(jobs[:2], 2, then)
    assert sorted(process.returncode for process in started) == [-signal.SIGKILL, 0]


def test_nothing_listens_beyond_this_machine_and_nothing_is_left(jobs, pretend, tmp_path, capfd):
    pretend("pass")
    (tmp_path / "here").mkdir()
    hosts = set()

    def then():
        connections = psutil.Process().net_connections()
        hosts.update(item.laddr.ip for item in connections if item.status == "LISTEN")

    with contextlib.chdir(tmp_path / "here"):
        execute(jobs, 2, then)
    assert hosts <= {"127.0.0.1"}
    assert list((tmp_path / "here").iterdir()) == []
    assert capfd.readouterr() == ("", "")


def test_workers_share_the_cores_unless_the_user_says_otherwise(monkeypatch):
    monkeypatch.setattr(joblib, "cpu_count", lambda: 8)
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    assert [share["OMP_NUM_THREADS"] for share in engine.machine_shares(3)] == ["2"] * 3
    assert [share["OMP_NUM_THREADS"] for share in engine.machine_shares(9)] == ["1"] * 9
    monkeypatch.setenv("OMP_NUM_THREADS", "5")
    assert [share["OMP_NUM_THREADS"] for share in engine.machine_shares(2)] == ["5"] * 2


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
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    if visible:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    found = [share.get("CUDA_VISIBLE_DEVICES") for share in engine.machine_shares(3)]
    assert found == expected


def test_by_default_there_is_a_notebook_for_each_core_but_no_more_than_there_are(jobs, monkeypatch):
    seen = []
    monkeypatch.setattr(engine, "machine_shares", lambda at_once: seen.append(at_once) or 1 / 0)
    monkeypatch.setattr(joblib, "cpu_count", lambda: 2)
    for at_once in (None, 1, 3, 40):
        with pytest.raises(ZeroDivisionError):
            engine.execute_all(jobs, print, at_once=at_once)
    assert seen == [2, 1, 3, 4]
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)  # all share it
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    with pytest.raises(ZeroDivisionError):
        engine.execute_all(jobs, print)
    assert seen[-1] == 1
    assert engine.execute_all([], print) == 0


def test_a_scheduler_that_is_not_there_is_an_error(jobs):
    for address in ("tcp://127.0.0.1:9", "foo"):
        with pytest.raises(OSError, match=rf"^--scheduler {address} cannot be .* Give the address"):
            engine.execute_all(jobs, print, at_once=1, scheduler=address)


# Real kernels, workers and schedulers. Seed 1 hangs as long as a file `hang` is there.

SOURCE = """
import os, time
from pathlib import Path

folder, seed = Path({folder!r}), seeds[0]
with (folder / f"seed{{seed}}").open("a") as file:
    file.write(f"{{os.getpid()}}\\n")
while seed == 1 and (folder / "hang").exists():
    time.sleep(0.1)
(folder / "runs").write_text(os.environ.get("LABUTILS_RUNS", ""))
print(seed, sum(range(seed + 10)))
"""


@dataclasses.dataclass
class Project:
    """A folder with labutils and a notebook, and the commands that were started in it."""

    folder: Path
    processes: list

    def start(self, *arguments, **options):
        process = subprocess.Popen(
            [sys.executable, "-m", *arguments],
            cwd=self.folder,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            start_new_session=True,
            **options,
        )
        self.processes.append(process)
        return process

    def sweep(self, *options, **more):
        return self.start("labutils", "sweep", "1.1", "-p", "seed", "0,1,2", *options, **more)

    def kernels(self, seed, count):
        """The processes of the first kernels of a seed, as soon as there are so many."""
        path = self.folder / f"seed{seed}"
        wait_for(lambda: path.exists() and path.read_text().count("\n") >= count)
        return [int(line) for line in path.read_text().split()]

    def outputs(self, folder="build/sweeps/1.1_demo"):
        found = {}
        for path in sorted((self.folder / folder).glob("*.ipynb")):
            found[path.name] = nbformat.read(path, as_version=4).cells[-1].outputs[0].text
        return found


def wait_for(condition, seconds=180):
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.05)


def gone(*numbers):
    return lambda: not any(psutil.pid_exists(number) for number in numbers)


@pytest.fixture
def real(tmp_path):
    folder = tmp_path.resolve() / "project"
    (folder / "notebooks").mkdir(parents=True)
    shutil.copytree(Path(engine.__file__).parents[1], folder / "labutils")
    (folder / "hang").touch()
    cells = [
        new_code_cell("seeds = [0, 1, 2]", metadata={"tags": ["parameters"]}),
        new_code_cell(SOURCE.format(folder=str(folder))),
    ]
    kernel = {"name": "python3", "display_name": "Python 3", "language": "python"}
    notebook = new_notebook(cells=cells, metadata={"kernelspec": kernel})
    nbformat.write(notebook, folder / "notebooks" / "1.1_demo.ipynb")
    project = Project(folder, [])
    yield project
    for process in project.processes:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.communicate()


def test_a_killed_process_is_tried_again_and_a_killed_sweep_leaves_nothing(real):
    killed = real.sweep("--jobs", "2")
    [kernel] = real.kernels(1, 1)
    process = psutil.Process(kernel).ppid()
    os.kill(process, signal.SIGKILL)
    again = real.kernels(1, 2)
    wait_for(gone(process, kernel))

    process = psutil.Process(again[1]).ppid()
    killed.kill()
    killed.wait()
    wait_for(gone(process, *again))

    (real.folder / "hang").unlink()
    out, err = real.sweep("--jobs", "2").communicate(timeout=180)
    assert err == ""
    assert "missing, 2 at a time" in out.splitlines()[0]
    assert list(real.outputs().values()) == ["0 45\n", "1 55\n", "2 66\n"]


def start_cluster(real):
    """The address of a scheduler, and its two workers."""
    address_file = real.folder / "scheduler.json"
    options = ["--scheduler-file", str(address_file), "--host", "127.0.0.1", "--no-dashboard"]
    real.start("distributed.cli.dask_scheduler", *options, "--port", "0")
    wait_for(address_file.exists)
    command = ["distributed.cli.dask_worker", *options, "--nthreads", "1"]
    workers = [real.start(*command, "--local-directory", str(real.folder)) for _ in range(2)]
    return json.loads(address_file.read_text())["address"], workers


def test_a_cluster_goes_on_when_a_worker_is_killed_and_stops_when_nobody_waits(real):
    address, _ = start_cluster(real)
    stopped = real.sweep("--scheduler", address)
    [kernel] = real.kernels(1, 1)
    stopped.send_signal(signal.SIGINT)
    out, err = stopped.communicate(timeout=180)
    assert stopped.returncode == 130
    assert out.splitlines()[0] == f"1.1_demo: 3 combinations, 3 missing, on {address}"
    assert "The same command does the others.\nStopped." in err
    wait_for(gone(kernel))

    lost = real.sweep("--scheduler", address)
    kernel = real.kernels(1, 2)[1]
    lost.kill()
    wait_for(gone(kernel))

    mine = {**os.environ, "LABUTILS_RUNS": "my runs"}
    last = real.sweep("--scheduler", address, env=mine)
    kernel = psutil.Process(real.kernels(1, 3)[2])
    process = kernel.parent()
    process.parent().kill()  # the worker
    real.kernels(1, 4)
    wait_for(gone(kernel.pid, process.pid))
    (real.folder / "hang").unlink()
    assert last.wait(180) == 0
    assert (real.folder / "runs").read_text() == "my runs"  # not what the worker was started with

    serial = real.sweep("--out", "serial")
    assert serial.wait(180) == 0
    assert real.outputs() == real.outputs("serial")
    assert len(real.outputs()) == 3
