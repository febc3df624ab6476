"""Notebooks side by side, each in a process of its own; Dask says which worker takes which.

On one machine the scheduler and its workers are threads in here; those of a cluster share our file
system. A worker starts a process for each notebook and holds its standard input open. When that
ends, because the notebook is not wanted any more or because the worker was killed, the process ends
its kernel and itself.
"""

from __future__ import annotations

import json
import logging
import os
import queue
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext, suppress
from pathlib import Path
from typing import TYPE_CHECKING

import joblib

from ..base.settings import first_line
from .batch import Job, NotebookError, execute

if TYPE_CHECKING:
    import distributed

GRACE = 15  # seconds a process has to end in; with a busy kernel it takes about six
RETRIES = 2  # more tries for a notebook whose process was killed
MARK = "\f"  # where in what a process prints its error begins

Ended = Callable[[Job, str | None, float], None]  # a job, its error if there was one, its seconds


def execute_all(
    jobs: Sequence[Job], ended: Ended, *, at_once: int | None = None, scheduler: str | None = None
) -> int:
    """Execute notebooks; one that fails does not keep the others from it. ended: called for each.

    at_once: how many side by side, by default one a core. scheduler: address of one whose workers
    decide that instead.
    Returns 0, or 128 + the signal's number after Ctrl-C or a kill.
    Raises OSError if there is no scheduler at the address.
    """
    if not jobs:
        return 0
    import distributed

    at_once = min(at_once or joblib.cpu_count(), len(jobs))
    logging.getLogger("distributed").setLevel(logging.CRITICAL + 1)  # we say what matters
    shares = [] if scheduler else machine_shares(at_once)
    done: queue.SimpleQueue[distributed.Future] = queue.SimpleQueue()
    with (
        signals() as stop,
        nullcontext(scheduler) if scheduler else local_cluster(at_once) as cluster,
        distributed.Client(cluster, timeout=10) as client,
    ):
        waiting = {}
        for job in jobs:
            future = client.submit(_execute_apart, job, shares, pure=False, retries=RETRIES)
            future.add_done_callback(done.put)
            waiting[future] = job
        try:
            while waiting and not stop:
                with suppress(queue.Empty):
                    future = done.get(timeout=0.2)
                    ended(waiting.pop(future), *_result(future))
        finally:
            client.cancel(list(waiting))
    return 128 + stop[0] if stop else 0


def local_cluster(workers: int) -> distributed.LocalCluster:
    """A scheduler and workers in this process, which nobody reaches from another machine."""
    import distributed

    return distributed.LocalCluster(
        n_workers=workers,
        threads_per_worker=1,
        processes=False,
        memory_limit=0,
        dashboard_address="127.0.0.1:0",  # Dask opens a port even for none
        worker_dashboard_address="127.0.0.1:0",
        scheduler_kwargs={"dashboard": False},
        silence_logs=False,
    )


@contextmanager
def signals() -> Iterator[list[int]]:
    """Collect what would end this process; a signal that is ignored, as by nohup, stays so."""
    numbers = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
    before = {number: signal.getsignal(number) for number in numbers}
    caught: list[int] = []
    for number, handler in before.items():
        if handler is not signal.SIG_IGN:
            signal.signal(number, lambda number, _: caught.append(number))
    try:
        yield caught
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def machine_shares(at_once: int) -> list[dict[str, str]]:
    """What the notebooks of each worker see of this machine: cores, and one GPU where there are."""
    import torch

    threads = str(max(1, joblib.cpu_count() // at_once))
    shares = [{"OMP_NUM_THREADS": threads, **os.environ} for _ in range(at_once)]
    count = torch.cuda.device_count()
    if count > 1:
        visible = os.environ.get("CUDA_VISIBLE_DEVICES") or ",".join(map(str, range(count)))
        for number, share in enumerate(shares):
            share["CUDA_VISIBLE_DEVICES"] = visible.split(",")[number % count]
    return shares


def _result(future) -> tuple[str | None, float]:
    try:
        return future.result()
    except Exception as error:  # the process or its worker was killed too often, or Dask is gone
        return first_line(error), 0.0


def _execute_apart(job: Job, shares: Sequence[dict[str, str]]) -> tuple[str | None, float]:
    """What a worker does: a notebook in a process. Returns its error and its seconds.

    Raises ChildProcessError if the process was killed, so that Dask tries again.
    """
    from distributed import get_worker

    worker, started = get_worker(), time.monotonic()
    task = worker.state.tasks[worker.get_current_task()]
    with tempfile.TemporaryFile("w+", errors="replace") as log:
        process = subprocess.Popen(
            [sys.executable, "-m", "labutils.notebook.engine", json.dumps(vars(job), default=str)],
            env=shares[worker.name] if shares else None,
            stdin=subprocess.PIPE,
            stdout=log,
            stderr=log,
            start_new_session=True,  # Ctrl-C in a terminal reaches us alone
        )
        with process.stdin:
            # The state changes when the task is cancelled or the client that wants it is gone.
            while process.poll() is None and task.state == "executing":
                time.sleep(0.1)
        try:
            process.wait(GRACE)
        except subprocess.TimeoutExpired:
            process.kill()  # its kernel ends itself when it misses its parent
            process.wait()
        log.seek(0)
        text = log.read()
    if process.returncode < 0:
        raise ChildProcessError(f"killed by {signal.Signals(-process.returncode).name}")
    if process.returncode == 0:
        return None, time.monotonic() - started
    error = text.rpartition(MARK)[2] if MARK in text else text.strip().rpartition("\n")[2]
    return error.strip() or f"exit status {process.returncode}", time.monotonic() - started


def _main(job: dict) -> None:
    """What the process does."""
    signal.signal(signal.SIGINT, signal.default_int_handler)  # may be ignored, as by nohup
    threading.Thread(target=_end_with_standard_input, daemon=True).start()
    # A kernel below a JupyterLab terminal would otherwise believe that somebody watches it.
    os.environ.pop("JPY_SESSION_NAME", None)
    paths = {name: Path(job[name]) for name in ("notebook", "output", "failed")}
    try:
        execute(Job(**job | paths))
    except NotebookError as error:
        sys.exit(f"{MARK}{error}")


def _end_with_standard_input() -> None:
    os.read(0, 1)  # not by sys.stdin, whose lock would be held when Python ends
    signal.pthread_kill(threading.main_thread().ident, signal.SIGINT)
    time.sleep(GRACE)  # nobody may be left who would kill us
    os._exit(1)


if __name__ == "__main__":
    _main(json.loads(sys.argv[1]))
