"""A live bar where somebody watches, and a log file that can be followed everywhere."""

from __future__ import annotations

import io
import os
import sys
from pathlib import Path

from tqdm import tqdm

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


_said: set[str] = set()


def warn(text: str) -> None:
    """Say it, but once a session. Python's own warnings go to stderr, which notebooks store."""
    if text not in _said:
        _said.add(text)
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
