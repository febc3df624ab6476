"""Notebooks side by side, each in a process of its own; Dask says which worker takes which.

On one machine the scheduler and its workers are threads in here; those of a cluster share our file
system. A worker holds the standard input of the process open. When that ends, because the notebook
is not wanted any more or the worker was killed, so does the process, and then its kernel.
"""

import json
import logging
import os
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from pathlib import Path

import joblib

from ..base.settings import first_line
from .batch import Job, NotebookError, execute

RETRIES = 2  # more tries for a notebook whose process was killed
SENT = ("LABUTILS_DATA", "LABUTILS_RUNS", "LABUTILS_MODELS", "WANDB_MODE")  # to other machines
MARK = "\f"  # where in what a process prints its error begins
LOCAL = {  # a scheduler and workers in this process, which nobody reaches from another machine
    "threads_per_worker": 1,
    "processes": False,
    "memory_limit": 0,
    "dashboard_address": "127.0.0.1:0",  # Dask opens a port even for none
    "worker_dashboard_address": "127.0.0.1:0",
    "scheduler_kwargs": {"dashboard": False},
}

Ended = Callable[[Job, str | None, float], None]  # a job, its error if there was one, its seconds


def execute_all(
    jobs: Sequence[Job], ended: Ended, *, at_once: int | None = None, scheduler: str | None = None
) -> int:
    """Execute notebooks; one that fails does not keep the others from it. ended: called for each.

    at_once: how many, by default one a GPU, or one a core where there is none. scheduler: address
        of one whose workers decide that; what LABUTILS_DATA and the like say goes there too.
    Returns 0, or 128 + the signal's number after Ctrl-C or a kill.
    Raises OSError if there is no scheduler at the address.
    """
    if not jobs:
        return 0
    from distributed import Client, LocalCluster

    from ..base.device import gpus, signals  # brings torch, which the processes can spare

    at_once = min(at_once or len(gpus()) or joblib.cpu_count(), len(jobs))
    logging.getLogger("distributed").setLevel(logging.CRITICAL + 1)  # we say what matters
    shares = [] if scheduler else machine_shares(at_once)
    with ExitStack() as stack:
        stop = stack.enter_context(signals(signal.SIGINT, signal.SIGTERM, signal.SIGHUP))
        cluster = scheduler or stack.enter_context(LocalCluster(n_workers=at_once, **LOCAL))
        try:
            client = stack.enter_context(Client(cluster, timeout=10))
        except (OSError, ValueError) as error:
            problem = f"--scheduler {cluster} cannot be reached ({first_line(error)})"
            hint = "Give the address that `dask scheduler` prints, tcp://HOST:8786 say"
            raise OSError(f"{problem}. {hint}.") from None
        own = {name: os.environ[name] for name in SENT if name in os.environ}
        options = {"shares": shares, "own": own, "pure": False, "retries": RETRIES}
        futures = client.map(_execute_apart, jobs, **options)
        waiting = dict(zip(futures, jobs))
        stack.callback(lambda: client.cancel(list(waiting)))
        while waiting and not stop:
            time.sleep(0.1)
            for future in [future for future in waiting if future.done()]:
                try:
                    error, seconds = future.result()
                except Exception as failure:  # killed too often, or Dask is gone
                    error, seconds = first_line(failure), 0.0
                ended(waiting.pop(future), error, seconds)
    return 128 + stop[0] if stop else 0


def machine_shares(at_once: int) -> list[dict[str, str]]:
    """What the notebooks of each worker see of this machine: cores, and one GPU where there are."""
    from ..base.device import gpus

    threads, count = str(max(1, joblib.cpu_count() // at_once)), len(gpus())
    shares = [{"OMP_NUM_THREADS": threads, **os.environ} for _ in range(at_once)]
    visible = os.environ.get("CUDA_VISIBLE_DEVICES") or ",".join(map(str, range(count)))
    for number, share in enumerate(shares if count > 1 else []):
        share["CUDA_VISIBLE_DEVICES"] = visible.split(",")[number % count]
    return shares


def _execute_apart(
    job: Job, shares: Sequence[dict[str, str]], own: dict[str, str]
) -> tuple[str | None, float]:
    """What a worker does: a notebook in a process. Returns its error and its seconds.

    Raises ChildProcessError if the process was killed, so that Dask tries again.
    """
    from distributed import get_worker

    worker, started = get_worker(), time.monotonic()
    task = worker.state.tasks[worker.get_current_task()]
    command = [sys.executable, "-m", "labutils.notebook.engine", json.dumps(vars(job), default=str)]
    env = shares[worker.name] if shares else {**os.environ, **own}
    options = {"env": env, "stdin": subprocess.PIPE}
    with tempfile.TemporaryFile("w+", errors="replace") as log:
        # In a session of its own, so that Ctrl-C in a terminal reaches us alone.
        options |= {"stdout": log, "stderr": log, "start_new_session": True}
        with subprocess.Popen(command, **options) as process:
            # The state changes when the task is cancelled or the client that wants it is gone.
            while process.poll() is None and task.state == "executing":
                time.sleep(0.1)
            process.kill()  # if it is still there; its kernel ends itself when it misses its parent
        log.seek(0)
        text = log.read().rstrip()
    status, seconds = process.returncode, time.monotonic() - started
    if status < 0:
        raise ChildProcessError(f"killed by {signal.Signals(-status).name}")
    error = text.rpartition(MARK if MARK in text else "\n")[2].strip()
    return (error or f"exit status {status}") if status else None, seconds


def _end_with_standard_input() -> None:
    os.read(0, 1)
    os._exit(1)


if __name__ == "__main__":  # what the process does
    threading.Thread(target=_end_with_standard_input, daemon=True).start()
    # A kernel below a cell of JupyterLab would otherwise believe that somebody watches it.
    os.environ.pop("JPY_SESSION_NAME", None)
    job = json.loads(sys.argv[1])
    try:
        execute(Job(**job | {name: Path(job[name]) for name in ("notebook", "output", "failed")}))
    except NotebookError as error:
        sys.exit(f"{MARK}{error}")
