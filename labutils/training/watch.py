"""How a run is watched: a live line, a log file, and mirrors in W&B and TensorBoard.

A mirror that fails costs one warning, not the run.
"""

import functools
import io
import netrc
import os
import sys
import warnings
from collections.abc import Callable
from contextlib import suppress
from importlib.util import find_spec
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from tqdm import tqdm

from ..base.settings import first_line

Mirror = Callable[[dict[str, float], bool], None]  # takes numbers, and whether they are final


def open_mirrors(run: Any, track: list[str]) -> dict[str, Mirror]:
    """Start the mirrors of a Run. track: 'wandb', 'tensorboard', 'auto', or several, or none.

    'auto' is W&B where it is installed and WANDB_MODE is set or a login is stored, else nothing.
    Without a login or a network, W&B records offline.
    """
    if "auto" in track and (os.environ.get("WANDB_MODE") or _wandb_login()) and find_spec("wandb"):
        track = [*track, "wandb"]
    started = {kind: _try(kind, start, run) for kind, start in MIRRORS.items() if kind in track}
    return {kind: mirror for kind, found in started.items() for mirror in found}


def show_mirrors(mirrors: dict[str, Mirror], row: dict[str, float], final: bool = False) -> None:
    """Show all of them some numbers; one that fails is shown no more."""
    for name, mirror in list(mirrors.items()):
        if not _try(name, mirror, row, final) or final:
            del mirrors[name]


def _try(name: str, call: Callable[..., Any], *args: Any) -> list[Any]:
    """[what the call returns], or [] after a warning if it fails."""
    try:
        return [call(*args)]
    except Exception as error:  # a service fails in its own ways
        problem = f"{name} stopped recording ({first_line(error)})"
        warnings.warn(f"{problem}. The run goes on, and its folder holds it all.", stacklevel=3)
        return []


def _wandb_login() -> bool:
    url = os.environ.get("WANDB_BASE_URL") or "https://api.wandb.ai"
    with suppress(OSError, ValueError, netrc.NetrcParseError):
        if netrc.netrc(os.environ.get("NETRC")).authenticators(urlsplit(url).netloc):
            return True
    return bool(os.environ.get("WANDB_API_KEY"))


def _wandb(run: Any) -> Mirror:
    # Without this W&B greets on stderr, which would stay in a saved notebook.
    os.environ.setdefault("WANDB_SILENT", "true")
    import wandb

    options = {"name": run.name, "resume": "allow", "dir": str(run.path), "config": run.info}
    options["project"] = os.environ.get("WANDB_PROJECT", "labutils")
    options["settings"] = wandb.Settings(silent=True, console="off", init_timeout=30)
    mode = os.environ.get("WANDB_MODE") or "online"
    try:
        # Going online without a login would make W&B ask for one.
        if mode not in ("offline", "dryrun", "disabled") and not _wandb_login():
            raise ConnectionError("no login found")
        record = wandb.init(id=run.key, mode=mode, **options)
    except Exception as error:
        os.environ["WANDB_MODE"] = "offline"  # a sweep waits and warns only once
        # Another id than the key, which resumes a record: W&B still holds the one that failed.
        record = wandb.init(id=f"{run.key}-offline", mode="offline", **options)
        problem = f"W&B is out of reach ({first_line(error)}): runs are recorded offline"
        remedy = "To send them: `wandb login`, then `wandb sync` on the folder wandb of each"
        warnings.warn(f"{problem}. {remedy}.", stacklevel=2)

    def show(numbers, final):
        (record.summary.update if final else record.log)(numbers)
        if final:
            record.finish()

    return show


def _tensorboard(run: Any) -> Mirror:
    from torch.utils.tensorboard import SummaryWriter

    writer = SummaryWriter(str(run.path / "tensorboard"))
    writer.add_text("settings", "\n".join(f"- {k}: {v}" for k, v in run.info.items()))

    def show(numbers, final):
        for name in numbers.keys() - {"epoch"}:
            writer.add_scalar(name, numbers[name], numbers.get("epoch"))
        if final:
            writer.close()

    return show


MIRRORS = {"wandb": _wandb, "tensorboard": _tensorboard}

_output: tuple[Any, Any] = (None, None)  # the cell that showed a line last, and its output's handle


def say(text: str) -> None:
    """Print a line about a run; a notebook's cell, even of fifty runs, shows only the latest.

    No widget: it would stay in the saved notebook, and GitHub renders none that holds one.
    """
    global _output
    ipython = sys.modules.get("IPython")
    shell = ipython and ipython.get_ipython()
    if not shell:
        print(text)
    elif shell.execution_count == _output[0]:
        _output[1].update({"text/plain": text}, raw=True)
    else:
        handle = ipython.display.display({"text/plain": text}, raw=True, display_id=True)
        _output = shell.execution_count, handle


@functools.cache
def warn(text: str) -> None:
    """Print it, but once a session. Python's own warnings go to stderr, which notebooks store."""
    print(text)  # said, it would be gone with the next line


class _NotebookBar(tqdm):
    """tqdm in the cell's text output, on two lines: one would be wider than a notebook."""

    def display(self, msg=None, pos=None):
        say(msg or str(self))


def watched() -> str | None:
    """'notebook' in a kernel of JupyterLab (not of papermill), 'terminal' on a terminal or None."""
    if "ipykernel" in sys.modules:
        return "notebook" if os.environ.get("JPY_SESSION_NAME") else None
    return "terminal" if sys.stderr.isatty() else None


class Progress:
    """Counts images of one training; `epoch` adds the latest scores to the bar and the log."""

    def __init__(self, name: str, *, total: int, done: int, log: Path, show: bool) -> None:
        where = watched() if show else None
        described = f"{name}: continues" if done else name
        settings = {"desc": described, "total": total, "initial": done, "unit": " images"}
        shape, kind = "{desc} |{bar}| {remaining} left, {rate_fmt}", tqdm
        if where == "notebook":
            kind, shape = _NotebookBar, shape.replace(" |{bar}", "\n|{bar:40}")
            settings |= {"file": io.StringIO(), "ascii": False}
        self._bar = kind(bar_format=shape, unit_scale=True, disable=where is None, **settings)
        self.step = self._bar.update  # takes a number of images
        self._name, self._scores, self._log = name, "", log.open("a", buffering=1)
        self.note(f"{name}: {'continues' if done else 'starts'} at image {done:,} of {total:,}")

    def epoch(self, row: dict[str, float], epochs: int) -> None:
        # Short, so that a line of 100 columns holds it beside the bar.
        scores = f"epoch {row['epoch']}/{epochs}, loss {row['train_loss']:.3f} "
        scores += f"(val {row['val_loss']:.3f}), val accuracy {100 * row['val_accuracy']:.1f} %"
        self._scores = f"; {scores}"
        self._bar.set_description_str(f"{self._name}: {scores}", refresh=False)
        self.note(f"{scores}, {row['images_per_second']:,.0f} images/s")

    def note(self, text: str) -> None:
        self._log.write(f"{text}\n")

    def end(self, reason: str) -> None:
        """Show why it ended in place of the time that would be left."""
        self.note(reason)
        self._bar.bar_format = "{desc}"  # a narrow window cuts its end
        self._bar.set_description_str(f"{self._name}: {reason}{self._scores}")

    def close(self) -> None:
        self._log.close()
        self._bar.close()
