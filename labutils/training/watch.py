"""How a run is watched: a live line, a log file, and mirrors in W&B and TensorBoard.

A mirror that fails costs one warning, one that hangs a minute; neither costs the run.
"""

from __future__ import annotations

import atexit
import io
import netrc
import os
import sys
import warnings
from collections.abc import Callable, Sequence
from concurrent.futures import Future, wait
from importlib.util import find_spec
from pathlib import Path
from threading import Thread
from typing import Any, NamedTuple
from urllib.parse import urlsplit

from tqdm import tqdm

from ..base.settings import first_line

PATIENCE = 60.0  # seconds that a mirror may take for one call

_wandb_offline = False  # set by the first failure, so that a sweep waits and warns only once


class Mirror(NamedTuple):
    """Somewhere else that sees a run."""

    name: str
    log: Callable[[dict[str, float]], Any]  # takes the row of an epoch
    close: Callable[[dict[str, float]], Any]  # takes the final numbers


def open_mirrors(
    track: str | Sequence[str] | None, *, name: str, key: str, folder: Path, settings: dict
) -> list[Mirror]:
    """Start the mirrors that track asks for.

    track: 'auto' is W&B when it is installed and WANDB_MODE is set or a login is stored, and
        nothing otherwise; a list of 'wandb' and 'tensorboard' asks for them by name; None or [] is
        nothing. W&B without a login, or out of reach, records offline, with one warning.
    Raises ValueError for another name, ModuleNotFoundError if the package is not installed.
    """
    if track == "auto":
        asked = os.environ.get("WANDB_MODE") or _wandb_login()
        track = ["wandb"] if asked and find_spec("wandb") else []
    mirrors: list[Mirror] = []
    starts = {"wandb": _wandb, "tensorboard": _tensorboard}
    wanted = [track] if isinstance(track, str) else list(track or [])
    for kind in wanted:
        if kind not in starts:
            allowed = f"'auto', None, or a list of {', '.join(starts)}"
            raise ValueError(f"train: track = {track!r} names {kind!r}. Allowed: {allowed}.")
        if find_spec(kind) is None:
            missing = f"{kind!r}, which is not installed. Run: pip install {kind}"
            raise ModuleNotFoundError(f"train: track names {missing}")
    for kind in wanted:
        mirrors += _try(kind, starts[kind], name, key, folder, settings)
    return mirrors


def log_row(mirrors: list[Mirror], row: dict[str, float]) -> None:
    """Show one finished epoch to all; a mirror that fails is taken off the list."""
    for mirror in list(mirrors):
        if not _try(mirror.name, mirror.log, row):
            mirrors.remove(mirror)


def close_mirrors(mirrors: list[Mirror], summary: dict[str, float]) -> None:
    """Give all the run's final numbers, those of its best epoch for example, and end them."""
    for mirror in mirrors:
        _try(mirror.name, mirror.close, summary)
    mirrors.clear()


def _try(name: str, call: Callable[..., Any], *args: Any) -> list[Any]:
    """[what the call returns], or [] after a warning if it fails or takes longer than PATIENCE."""
    try:
        return [_start(call, *args).result(PATIENCE)]
    except Exception as error:
        reason = first_line(error)
        if isinstance(error, TimeoutError):
            reason = f"no answer in {PATIENCE:g} s"
            _end_wandb(patience=0)
        problem = f"{name} stopped recording ({reason})"
        warnings.warn(f"{problem}. The run goes on, and its folder holds it all.", stacklevel=3)
        return []


def _start(call: Callable[..., Any], *args: Any) -> Future:
    """Call in a thread that Python does not wait for when it ends. Returns the future result."""
    future: Future = Future()

    def work() -> None:
        try:
            future.set_result(call(*args))
        except BaseException as error:  # a service fails in its own ways
            future.set_exception(RuntimeError(first_line(error)))

    Thread(target=work, daemon=True).start()
    return future


def _end_wandb(patience: float | None = None) -> None:
    """End W&B's service, by force if it hangs: Python would wait for it when it ends."""
    if "wandb" in sys.modules:
        import psutil

        ended = _start(sys.modules["wandb"].teardown)
        if not wait([ended], PATIENCE if patience is None else patience).done:
            for process in psutil.Process().children(recursive=True):
                if process.name() == "wandb-core":
                    process.kill()
            wait([ended], PATIENCE)


def _wandb_login() -> bool:
    if os.environ.get("WANDB_API_KEY"):
        return True
    try:
        host = urlsplit(os.environ.get("WANDB_BASE_URL") or "https://api.wandb.ai").netloc
        return netrc.netrc(os.environ.get("NETRC")).authenticators(host) is not None
    except (OSError, ValueError, netrc.NetrcParseError):
        return False


def _wandb(name: str, key: str, folder: Path, settings: dict) -> Mirror:
    global _wandb_offline
    # Without this W&B greets on stderr, which would stay in a saved notebook.
    os.environ.setdefault("WANDB_SILENT", "true")
    import wandb

    # The key makes a resumed run continue its own record instead of opening another.
    options = {"name": name, "resume": "allow", "dir": str(folder), "config": settings}
    options["project"] = os.environ.get("WANDB_PROJECT", "labutils")
    options["settings"] = wandb.Settings(silent=True, console="off", init_timeout=30)
    mode = os.environ.get("WANDB_MODE") or "online"
    local = mode in ("offline", "dryrun", "disabled")
    run = trouble = None
    # Going online without a login would make W&B ask for one.
    if not local and not _wandb_offline and not _wandb_login():
        trouble = "no login found"
    elif local or not _wandb_offline:
        try:
            run = wandb.init(id=key, mode=mode, **options)
        except Exception as error:
            trouble = f"it is out of reach ({first_line(error)})"
    # Another id, because W&B still holds the one whose start failed.
    run = run or wandb.init(id=f"{key}-offline", mode="offline", **options)
    # Registered last, it comes before W&B's own, which waits for the service without end.
    atexit.unregister(_end_wandb)
    atexit.register(_end_wandb)
    if trouble:
        _wandb_offline = True
        problem = f"W&B: {trouble}, so runs are recorded offline from now on, in a folder wandb"
        remedy = "To send them: `wandb login`, then `wandb sync` on that folder."
        warnings.warn(f"{problem} inside of each. {remedy}", stacklevel=2)

    def close(summary: dict[str, float]) -> None:
        run.summary.update(summary)
        run.finish()

    return Mirror("W&B", run.log, close)


def _tensorboard(name: str, key: str, folder: Path, settings: dict) -> Mirror:
    from torch.utils.tensorboard import SummaryWriter

    writer = SummaryWriter(str(folder / "tensorboard"))
    writer.add_text("settings", "\n".join(f"- {k}: {v}" for k, v in settings.items()))

    def log(row: dict[str, float]) -> None:
        for column, value in row.items():
            if column != "epoch":
                writer.add_scalar(column, value, row["epoch"])

    def close(summary: dict[str, float]) -> None:
        for label, value in summary.items():
            writer.add_scalar(label, value)
        writer.close()

    return Mirror("TensorBoard", log, close)


_LINE = "{desc} |{bar}| {remaining} left, {rate_fmt}"
_output: tuple[Any, Any] = (None, None)  # the cell that showed a line last, and its output's handle
_warned: set[str] = set()


def say(text: str) -> None:
    """One line about a run: printed, but in a notebook as the one output that each cell updates.

    A cell that trains fifty runs shows the latest. Widgets would stay in the saved notebook, and
    GitHub renders no notebook that holds their state.
    """
    global _output
    ipython = sys.modules.get("IPython")
    if ipython is None or ipython.get_ipython() is None:
        print(text)
        return
    cell, handle = ipython.get_ipython().execution_count, _output[1]
    if handle is not None and cell == _output[0]:
        handle.update({"text/plain": text}, raw=True)
    else:
        handle = ipython.display.display({"text/plain": text}, raw=True, display_id=True)
        _output = cell, handle


def warn(text: str) -> None:
    """Say it, but once a session. Python's own warnings go to stderr, which notebooks store."""
    if text not in _warned:
        _warned.add(text)
        say(text)


class _NotebookBar(tqdm):
    """tqdm in the cell's text output."""

    def __init__(self, **settings: Any) -> None:
        # Two lines: together they would be wider than the output of a notebook.
        shape = _LINE.replace(" |{bar}", "\n|{bar:40}")
        super().__init__(file=io.StringIO(), ascii=False, **settings | {"bar_format": shape})

    def display(self, msg: str | None = None, pos: int | None = None) -> None:
        say(msg or str(self))


def watched() -> str | None:
    """'notebook' in a kernel that JupyterLab started, 'terminal' on a terminal, else None.

    Kernels of papermill and nbval lack JPY_SESSION_NAME; a bar there would only fill the output.
    """
    if "ipykernel" in sys.modules:
        return "notebook" if os.environ.get("JPY_SESSION_NAME") else None
    return "terminal" if sys.stderr.isatty() else None


class Progress:
    """Counts images of one training; `epoch` adds the latest scores to the bar and the log."""

    def __init__(self, name: str, *, total: int, done: int, log: Path, show: bool) -> None:
        kind = {"notebook": _NotebookBar, "terminal": tqdm}.get(watched() if show else None)
        self._bar = kind and kind(
            desc=name, total=total, initial=done, unit=" images", unit_scale=True, bar_format=_LINE
        )
        self._name, self._log = name, log.open("a", buffering=1)
        self.note(f"{name}: {'continues' if done else 'starts'} at image {done:,} of {total:,}")

    def step(self, images: int) -> None:
        if self._bar is not None:
            self._bar.update(images)

    def epoch(self, row: dict[str, float], epochs: int) -> None:
        self.note(
            f"epoch {row['epoch']}/{epochs}, loss {row['train_loss']:.4f} train "
            f"{row['val_loss']:.4f} val, accuracy {100 * row['train_accuracy']:.2f} % train "
            f"{100 * row['val_accuracy']:.2f} % val, {row['images_per_second']:,.0f} images/s"
        )
        if self._bar is not None:
            # Short, so that a line of 100 columns holds it beside the bar.
            scores = (
                f"epoch {row['epoch']}/{epochs}, loss {row['train_loss']:.3f} "
                f"(val {row['val_loss']:.3f}), val accuracy {100 * row['val_accuracy']:.1f} %"
            )
            self._bar.set_description_str(f"{self._name}: {scores}", refresh=False)

    def note(self, text: str) -> None:
        self._log.write(f"{text}\n")

    def close(self) -> None:
        self._log.close()
        if self._bar is not None:
            self._bar.close()
