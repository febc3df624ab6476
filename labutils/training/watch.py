"""How a run is watched: a live line, a log file, and mirrors in W&B and TensorBoard.

A mirror that fails costs one warning, never the run.
"""

from __future__ import annotations

import csv
import io
import netrc
import os
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

from ..base.files import atomic_write

if TYPE_CHECKING:
    import pandas as pd

import sys

from tqdm import tqdm

KINDS = ("wandb", "tensorboard")


Row = dict[str, float | int]


_wandb_offline = False  # set by the first failure, so that a sweep waits and warns only once


class History:
    """One row an epoch, in memory; `save` writes them all."""

    def __init__(self, rows: Sequence[Row] = ()) -> None:
        self.rows = [dict(row) for row in rows]

    def frame(self) -> pd.DataFrame:
        """The table, indexed by epoch from 1."""
        import pandas as pd

        frame = pd.DataFrame(self.rows)
        return frame.set_index("epoch") if len(frame) else frame

    def save(self, path: Path) -> None:
        text = io.StringIO()
        if self.rows:
            writer = csv.DictWriter(text, list(self.rows[0]), lineterminator="\n")
            writer.writeheader()
            writer.writerows(self.rows)
        with atomic_write(path) as file:
            file.write(text.getvalue().encode())

    @classmethod
    def load(cls, path: Path) -> History:
        """Raises ValueError if a line does not have a number for each column."""
        with path.open(newline="") as file:
            lines = list(csv.reader(file))
        return cls([_numbers(dict(zip(lines[0], line, strict=True))) for line in lines[1:]])


def _numbers(row: dict[str, str]) -> Row:
    return {name: (int if name == "epoch" else float)(value) for name, value in row.items()}


class Mirror:
    """Somewhere else that sees a run. Calls go to the backend until one fails."""

    def __init__(
        self,
        name: str,
        log: Callable[[Row], None],
        summarise: Callable[[dict[str, float]], None],
        close: Callable[[], None],
    ) -> None:
        self.name, self._calls = name, {"log": log, "summarise": summarise, "close": close}

    def _call(self, what: str, *args: Any) -> None:
        try:
            self._calls.get(what, lambda *_: None)(*args)
        # Whatever goes wrong in a remote service, the training it only watches must go on.
        except Exception as error:
            self._calls = {}
            warnings.warn(
                f"{self.name} stopped taking values ({error}). Training goes on; history.csv in "
                "the run directory holds everything.",
                stacklevel=2,
            )

    def log(self, row: Row) -> None:
        """One finished epoch."""
        self._call("log", row)

    def summarise(self, values: dict[str, float]) -> None:
        """Final numbers of the run, test metrics for example."""
        self._call("summarise", values)

    def close(self) -> None:
        self._call("close")


def open_mirrors(
    track: str | Sequence[str] | None,
    *,
    name: str,
    key: str,
    folder: Path,
    settings: dict[str, Any],
) -> list[Mirror]:
    """Start the mirrors that track asks for.

    track: 'auto' is W&B when WANDB_MODE is set or a login is stored, and nothing otherwise;
        a list of 'wandb' and 'tensorboard' asks for them by name; None or [] is nothing.
    W&B asked for without a login, or out of reach, falls back to its offline mode with one warning.
    Raises ValueError for another name, ModuleNotFoundError if the package is not installed.
    """
    if track == "auto":
        wanted = ["wandb"] if os.environ.get("WANDB_MODE") or _wandb_login() else []
    else:
        wanted = [track] if isinstance(track, str) else list(track or [])
    if unknown := [kind for kind in wanted if kind not in KINDS]:
        raise ValueError(
            f"train: track = {track!r} names {unknown[0]!r}. "
            f"Allowed: 'auto', None, or a list of {', '.join(KINDS)}."
        )
    start = {"wandb": _wandb, "tensorboard": _tensorboard}
    return [start[kind](name, key, folder, settings) for kind in wanted]


def _wandb_login() -> bool:
    if os.environ.get("WANDB_API_KEY"):
        return True
    try:
        host = urlsplit(os.environ.get("WANDB_BASE_URL") or "https://api.wandb.ai").netloc
        return netrc.netrc(os.environ.get("NETRC")).authenticators(host) is not None
    except (OSError, netrc.NetrcParseError):
        return False


def _wandb(name: str, key: str, folder: Path, settings: dict[str, Any]) -> Mirror:
    global _wandb_offline
    # Without this W&B greets on stderr, which would stay in a saved notebook.
    os.environ.setdefault("WANDB_SILENT", "true")
    import wandb

    mode = os.environ.get("WANDB_MODE") or "online"
    local = mode in ("offline", "dryrun", "disabled")
    # Going online without a login would make W&B ask for one.
    if not local and not _wandb_offline and not _wandb_login():
        _wandb_offline = True
        warnings.warn(
            "W&B: no login found, so runs are recorded offline in a folder wandb inside of each. "
            "To send them: `wandb login`, then `wandb sync` on that folder.",
            stacklevel=4,
        )

    def start(mode: str, run_id: str) -> Any:
        return wandb.init(
            project=os.environ.get("WANDB_PROJECT", "labutils"),
            name=name,
            # The key makes a resumed run continue its own record instead of opening another.
            id=run_id,
            resume="allow",
            dir=str(folder),
            config=settings,
            mode=mode,
            settings=wandb.Settings(silent=True, console="off", init_timeout=30),
        )

    run = None
    if local or not _wandb_offline:
        try:
            run = start(mode, key)
        # A service can fail in its own words; the run that it would only watch goes on.
        except Exception as error:
            _wandb_offline = True
            warnings.warn(
                f"W&B is out of reach ({error}), so runs are recorded offline from now on, in a "
                "folder wandb inside of each. To send them later: `wandb sync` on that folder.",
                stacklevel=4,
            )
    # Another id, because W&B still holds the one whose start failed.
    run = run or start("offline", f"{key}-offline")
    return Mirror("W&B", run.log, run.summary.update, run.finish)


def _tensorboard(name: str, key: str, folder: Path, settings: dict[str, Any]) -> Mirror:
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            "train: track names 'tensorboard', which is not installed. Run: pip install tensorboard"
        ) from error
    writer = SummaryWriter(str(folder / "tensorboard"))
    writer.add_text("settings", "\n".join(f"- {k}: {v}" for k, v in settings.items()))

    def log(row: Row) -> None:
        for column, value in row.items():
            if column != "epoch":
                writer.add_scalar(column, value, row["epoch"])

    def summarise(values: dict[str, float]) -> None:
        for label, value in values.items():
            writer.add_scalar(label, value)

    return Mirror("TensorBoard", log, summarise, writer.close)


_LINE = "{desc} |{bar}| {remaining} left, {rate_fmt}"


class _CellText:
    """One updated text output a notebook cell: a cell that trains fifty runs shows the latest.

    Widgets would stay in the saved notebook, and GitHub renders no notebook that holds their state.
    """

    def __init__(self) -> None:
        self._cell, self._runs, self._handle = None, 0, None

    def next_run(self) -> None:
        """Start the text of another run, in the cell's output if it has one."""
        from IPython import display, get_ipython

        cell = getattr(get_ipython(), "execution_count", None)
        if cell is None or cell != self._cell:
            self._cell, self._runs = cell, 0
            self._handle = display.display({"text/plain": ""}, raw=True, display_id=True)
        self._runs += 1

    def show(self, text: str) -> None:
        number = f"run {self._runs}, " if self._runs > 1 else ""
        self._handle.update({"text/plain": number + text}, raw=True)


_cell_text = _CellText()


def say(text: str) -> None:
    """One line about a run: in the cell's updated output in a notebook, else printed."""
    ipython = sys.modules.get("IPython")
    if ipython is None or ipython.get_ipython() is None:
        print(text)
    else:
        _cell_text.next_run()
        _cell_text.show(text)


_warned: set[str] = set()


def warn(text: str) -> None:
    """Say it, but once a session. Python's own warnings go to stderr, which notebooks store."""
    if text not in _warned:
        _warned.add(text)
        say(text)


class _NotebookBar(tqdm):
    """tqdm in the cell's text output."""

    def __init__(self, **kwargs) -> None:
        _cell_text.next_run()
        # Two lines: together they would be wider than the output of a notebook.
        shape = _LINE.replace(" |{bar}", "\n|{bar:40}")
        super().__init__(file=io.StringIO(), ascii=False, **kwargs | {"bar_format": shape})

    def display(self, msg: str | None = None, pos: int | None = None) -> None:
        _cell_text.show(msg or str(self))


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
        place = watched() if show else None
        kind = {"notebook": _NotebookBar, "terminal": tqdm}.get(place)
        self._bar = kind and kind(
            desc=name, total=total, initial=done, unit=" images", unit_scale=True, bar_format=_LINE
        )
        self._name, self._log = name, log.open("a", buffering=1)
        self.note(f"{name}: {'continues' if done else 'starts'} at image {done:,} of {total:,}")

    def step(self, images: int) -> None:
        if self._bar is not None:
            self._bar.update(images)

    def epoch(self, row: dict, epochs: int) -> None:
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


def log_row(mirrors: list[Mirror], row: Row) -> None:
    for mirror in mirrors:
        mirror.log(row)


def close_mirrors(mirrors: list[Mirror], summary: dict[str, float]) -> None:
    for mirror in mirrors:
        if summary:
            mirror.summarise(summary)
        mirror.close()
