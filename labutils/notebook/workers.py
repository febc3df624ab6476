"""Runs of notebooks in processes of their own: side by side, each with its share of the machine.

Nothing here knows which runs make a sweep, or what becomes of their results.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from queue import SimpleQueue
from typing import Any

import joblib
import nbformat
import torch

from ..base.settings import first_line
from . import batch

GRACE = 15  # seconds a process has to end in; with a busy kernel it takes about six


@dataclass(frozen=True, eq=False)
class Point:
    """One run of a grid."""

    notebook: Path
    parameters: Mapping[str, Any]  # all that the notebook is given
    output: Path
    failed: Path  # where what ran is kept if a cell fails
    key: str  # of code and parameters: an output with another one is out of date
    label: str
    varied: Mapping[str, Any]  # the parameters that the grid sets, under the names it was given

    def said(self) -> dict[str, Any] | None:
        """What its Claims hold, or None if this run is not finished."""
        try:
            output = nbformat.read(self.output, as_version=4)
        except (FileNotFoundError, ValueError):
            return None
        fresh = output.get("metadata", {}).get("labutils", {}).get("sweep") == self.key
        return batch.reported(output) if fresh else None


Ended = tuple[Point, str | None, float]  # a run, its error if there was one, its seconds


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


def start(points: Sequence[Point], jobs: int, stop: Sequence[int]) -> Iterator[Ended]:
    """Run points in processes of their own; each comes out as it ends."""
    free: SimpleQueue[dict[str, str]] = SimpleQueue()
    for environment in environments(jobs):
        free.put(environment)

    def work(point: Point) -> Ended:
        environment, started = free.get(), time.monotonic()
        try:
            error = "stopped" if stop else _execute(point, environment, stop)
        except OSError as problem:
            error = first_line(problem)
        finally:
            free.put(environment)
        return point, error, time.monotonic() - started

    # Threads are enough to wait for processes, and leave it to us how those are ended.
    parallel = joblib.Parallel(n_jobs=jobs, backend="threading", return_as="generator_unordered")
    return parallel(joblib.delayed(work)(point) for point in points)


def environments(jobs: int) -> list[dict[str, str]]:
    """What the runs of each worker see: a share of the cores, and one GPU where there are more."""
    threads = str(max(1, joblib.cpu_count() // jobs))
    found = [{"OMP_NUM_THREADS": threads, **os.environ} for _ in range(jobs)]
    count = torch.cuda.device_count()
    if count > 1:
        visible = os.environ.get("CUDA_VISIBLE_DEVICES") or ",".join(map(str, range(count)))
        for number, environment in enumerate(found):
            environment["CUDA_VISIBLE_DEVICES"] = visible.split(",")[number % count]
    return found


def _execute(point: Point, environment: Mapping[str, str], stop: Sequence[int]) -> str | None:
    """Run one point. Returns the first line of its error, None if there was none."""
    with tempfile.TemporaryFile("w+", errors="replace") as log:
        process = subprocess.Popen(
            [
                sys.executable,
                "-m",
                "labutils.notebook.workers",
                json.dumps(vars(point), default=str),
            ],
            env=environment,
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=log,
            start_new_session=True,  # Ctrl-C in a terminal reaches us alone, and we pass it on
        )
        while process.poll() is None and not stop:
            time.sleep(0.1)
        if stop:
            process.send_signal(signal.SIGINT)
            try:
                process.wait(GRACE)
            except subprocess.TimeoutExpired:
                process.kill()  # its kernel ends itself when it misses its parent
                process.wait()
        log.seek(0)
        lines = [line for line in log.read().split("\n") if line.strip()]
    if process.returncode == 0:
        return None
    if process.returncode < 0:
        return f"killed by {signal.Signals(-process.returncode).name}"
    error = lines[-1] if lines else f"exit status {process.returncode}"
    return f"{error}; see {point.failed}" if point.failed.exists() else error


def _main(job: Mapping[str, Any]) -> None:
    """What the process of a point does."""
    notebook, output, failed = (Path(job[name]) for name in ("notebook", "output", "failed"))
    mark = {"labutils": {"sweep": job["key"]}}
    try:
        batch.run_notebook(notebook, output, job["parameters"], failed=failed, metadata=mark)
    except batch.NotebookError as error:
        sys.exit(first_line(error).removeprefix("run: "))


if __name__ == "__main__":
    _main(json.loads(sys.argv[1]))
