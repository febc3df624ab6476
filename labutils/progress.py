"""A live bar where somebody watches, and a log file that can be followed everywhere."""

from __future__ import annotations

import io
import os
import sys
from pathlib import Path

from tqdm import tqdm

_LINE = "{desc} |{bar}| {remaining} left, {rate_fmt}"


class _NotebookBar(tqdm):
    """tqdm in one updated text output: widgets would stay in the saved notebook, and GitHub
    renders no notebook that holds their state."""

    def __init__(self, **kwargs) -> None:
        from IPython.display import display

        self._handle = display({"text/plain": ""}, raw=True, display_id=True)
        # Two lines: together they would be wider than the output of a notebook.
        shape = _LINE.replace(" |{bar}", "\n|{bar:40}")
        super().__init__(file=io.StringIO(), ascii=False, **kwargs | {"bar_format": shape})

    def display(self, msg: str | None = None, pos: int | None = None) -> None:
        self._handle.update({"text/plain": msg or str(self)}, raw=True)


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
