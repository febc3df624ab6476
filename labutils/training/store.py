"""How the run store is written: killed at any moment, it holds what was there or what is new."""

import errno
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

from filelock import FileLock, Timeout
from torch import Tensor

from ..base.files import models_dir, runs_dir
from ..data.tensors import ImageData
from . import cards
from .cards import RunError
from .runs import Run, folders
from .watch import say

# What a disk says while a file is written, without the file's name.
_DISK = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EIO)


@contextmanager
def store_lock(key: str) -> Iterator[None]:
    """Held while a run or a record is made: a second process says that it waits, and does.

    Raises RunError if that cannot be written.
    """
    lock = runs_dir() / ".locks" / f"{key}.lock"
    try:
        lock.parent.mkdir(parents=True, exist_ok=True)
        try:
            held = FileLock(lock).acquire(timeout=0)
        except Timeout:
            say("another process computes the same: waiting for it")
            held = FileLock(lock).acquire()
        with held:
            yield
    except OSError as error:
        named = error.filename is not None
        ours = named and Path(str(error.filename)).is_relative_to(runs_dir())
        if not ours and (named or error.errno not in _DISK):
            raise  # of a network that reads a file of its own, or asks a server, say
        problem = f"train: cannot write to {runs_dir()} ({error.strerror or error})"
        raise RunError(f"{problem}. Free space or set LABUTILS_RUNS, then go on.") from error


def open_part(name: str, key: str) -> Path:
    """The folder of an unfinished run: one that is there, under whatever name, or a new one."""
    part = next(runs_dir().glob(f"*-{key}.part"), runs_dir() / f"{name}-{key}.part")
    part.mkdir(parents=True, exist_ok=True)
    # What a kill in the middle of a write has left; nobody else writes under the lock.
    for stray in part.glob(".*.tmp"):
        stray.unlink()
    return part


def finish(run: Run, weights: dict[str, Tensor]) -> None:
    """Put a run in place of an older one: killed at any moment, it leaves one of the two."""
    cards.save_weights(run.weights, weights)
    _write_card(run.path / "card.json", run, run.weights, command=None)
    for older in folders(run.key):
        # What a kill in an earlier replacement has left, perhaps half removed.
        for aside in folders(f"{run.key}.old"):
            shutil.rmtree(aside)
        older.rename(older.with_name(f"{older.name}.old"))
    run.path = run.path.rename(run.path.with_name(f"{run.name}-{run.key}"))
    for aside in folders(f"{run.key}.old"):
        shutil.rmtree(aside)


def publish(run: Run, *, weights: bool, command: str, half: ImageData | None = None) -> Path:
    """Copy a finished run into models/: its card, and its weights if asked for. Returns the card.

    It replaces a card of the same key; what is published already keeps its weights and command.
    command: what measures the numbers again. half: the run's data if weights are to be float16,
    off by at most 0.1 % or 3e-8; the card then has the scores of these, measured on it.
    Raises RunError for an unfinished run, weights that are gone, or one too large for float16;
    ValueError for a name that is no file name or a key not its own.
    """
    run.require_finished()
    path = models_dir() / f"{run.name}-{run.key}.json"
    cards.require_own(path.stem, run.name, run.key, run.info)
    own, stored = run.own_card(), path.with_suffix(".safetensors")
    fresh = stored
    if weights:
        run.require_model()
    if weights and run.path != path:
        if not (own and run.weights.exists()):
            problem, remedy = f"{run.weights} is gone", "Train again with retrain=True"
            if run.path.is_dir():
                problem += "; another run of the same settings has replaced it"
                remedy = "Give every run its own settings, a seed say"
            raise RunError(f"{run.name}: {problem}. {remedy}.")
        if own["weights"] != cards.sha256(run.weights):
            problem = f"{run.weights} is not what was stored with its card"
            raise RunError(f"{run.name}: {problem}. Train again with retrain=True.")
        # Measured before anything is replaced, since it takes a while and may be interrupted.
        if half is not None:
            run.require_trained_on(half)
            rounded = {
                name: run.measure(half, tta=name == "test_flip", half=True) for name in run.scores
            }
            run = replace(run, scores=rounded)
        fresh = stored.with_suffix(".new")
        cards.copy_weights(run.weights, fresh, half=half is not None)
    kept = weights or run.path == path
    if run.path == path and own:
        command = own["command"]
    try:
        _write_card(path, run, fresh if kept else None, command)
        if fresh != stored:
            fresh.replace(stored)
    finally:
        if fresh != stored:  # the card was not written
            fresh.unlink(missing_ok=True)
    if not kept:
        stored.unlink(missing_ok=True)
    for older in {*models_dir().glob(f"*-{run.key}.json")} - {path}:
        older.unlink()
        older.with_suffix(".safetensors").unlink(missing_ok=True)
    return path


def _write_card(path: Path, run: Run, weights: Path | None, command: str | None) -> None:
    written = cards.sha256(weights) if weights and weights.exists() else None
    card = {"name": run.name, "key": run.key, "digest": None, "weights": written}
    card |= {"command": command, "test": None}
    card |= {name: found.values() for name, found in run.scores.items()}
    card |= {"info": run.info, "history": {k: [row[k] for row in run.rows] for k in run.rows[0]}}
    cards.write(path, card)
