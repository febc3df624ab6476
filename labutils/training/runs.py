"""The run store: finished runs found again by key, in the runs folder or among the published ones.

A run is a folder NAME-KEY in the runs folder; NAME-KEY.part while it is unfinished. A published run
is models/NAME-KEY.json, its card, with or without models/NAME-KEY.safetensors beside it.
"""

from __future__ import annotations

import copy
import json
import shutil
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from filelock import FileLock, Timeout
from torch import nn

from ..base.files import atomic_write, models_dir, runs_dir, write_json
from ..data.tensors import ImageData
from ..evaluation import metrics
from .watch import History, close_mirrors, open_mirrors

if TYPE_CHECKING:
    import pandas as pd


_SCORES = ("test", "test_flip")  # what Run.test measures, by the name it is stored under


class RunError(RuntimeError):
    """A run cannot be started, stored, continued or used."""


@dataclass(eq=False)
class Run:
    """One training: what went in, what came out.

    model holds the weights of the best epoch; None for a published run that is its card alone.
    info: model spec, config, data, versions, device, precision, compiled, seconds, epochs,
    best_epoch, stop_reason.
    """

    name: str
    key: str
    info: dict[str, Any]
    rows: list[dict[str, float]]
    path: Path  # the run's folder, or the card of a published run
    model: nn.Module | None = None
    stored: bool = False  # found in the store, not trained by this call
    track: Any = None  # what train was asked to mirror to; test metrics go there too
    _scores: dict[str, metrics.Metrics] = field(default_factory=dict, repr=False)

    @property
    def history(self) -> pd.DataFrame:
        """One row an epoch, indexed from 1: losses, accuracies, lr, images_per_second, seconds."""
        return History(self.rows).frame()

    @property
    def seconds(self) -> float:
        return self.info["seconds"]

    @property
    def epochs(self) -> int:
        return len(self.rows)

    @property
    def stop_reason(self) -> str:
        return self.info["stop_reason"]

    def best(self, column: str) -> float:
        """A column of the history at the best epoch, whose weights were kept.

        Raises RunError if the run was interrupted before its first epoch ended.
        """
        if not self.info["best_epoch"]:
            raise RunError(f"{self.name}: {self.stop_reason} before the first epoch ended.")
        return self.rows[self.info["best_epoch"] - 1][column]

    def test(self, data: ImageData, *, tta: bool = False) -> metrics.Metrics:
        """Metrics on the test split, measured once and stored with the run.

        In the precision of its training, where it can be had. tta: as for predict, stored apart.
        Raises RunError if the run was trained on other data, or has neither metrics nor weights.
        """
        if data.fingerprint != self.info["data"]["fingerprint"]:
            raise RunError(
                f"{self.name}: trained on data {self.info['data']['fingerprint']}, asked to test "
                f"on {data.fingerprint}. Load the data with the same name, val_size and seed."
            )
        name = "test_flip" if tta else "test"
        if name not in self._scores:
            # A copy with the stored weights: the caller may have gone on changing the model.
            model = copy.deepcopy(self.require_model())
            if self.weights.exists():
                load_weights(model, self.weights)
            precision = self.info.get("precision", "float32")
            found = metrics.evaluate(model, data.test, precision=precision, tta=tta)
            self._scores[name] = found
            # An unfinished run goes on in this folder, and its weights will be others.
            if self.path.is_dir() and self.stop_reason != "interrupted":
                with disk_errors(self.name, self.path):
                    write_json(self.path / f"{name}.json", asdict(found))
                self._mirror({f"{name}/loss": found.loss, f"{name}/accuracy": found.accuracy})
        return self._scores[name]

    def _mirror(self, values: dict[str, float]) -> None:
        named = {"name": self.name, "key": self.key, "folder": self.path}
        close_mirrors(open_mirrors(self.track, **named, settings=self.info), values)

    @property
    def weights(self) -> Path:
        """Where the weights of the best epoch are, if they are stored."""
        if self.path.is_dir():
            return self.path / "best.safetensors"
        return self.path.with_suffix(".safetensors")

    def require_model(self) -> nn.Module:
        """The model with its best weights. Raises RunError where only the card was published."""
        if self.model is None:
            raise RunError(
                f"{self.name}: only the card of this run is published ({self.path.name}), "
                "not its weights. Call train with retrain=True to have them."
            )
        return self.model

    def __str__(self) -> str:
        made = f"{self.info['finished']} on {self.info['device']}, torch {self.info['torch']}"
        origin = f"loaded, trained {made}" if self.stored else "trained"
        if not self.rows:
            return f"{self.name}: {self.stop_reason} in the first epoch"
        return (
            f"{self.name}: {origin}; {self.epochs} epochs, {self.seconds:.1f} s, "
            f"val accuracy {100 * self.best('val_accuracy'):.2f} % at epoch "
            f"{self.info['best_epoch']}; {self.stop_reason}"
        )


def find(key: str, model: nn.Module) -> Run | None:
    """The finished run with this key, its weights loaded into model; None if there is none.

    Raises RunError if it is there but damaged.
    """
    # A kill in the middle of settle leaves the older run as the only finished one.
    folders = _folders(key) or _folders(f"{key}.old")
    cards = list(models_dir().glob(f"*-{key}.json"))
    place = next(iter(folders + cards), None)
    if place is None:
        return None
    try:
        run = _read_folder(place, key) if place.is_dir() else _read_card(place)
        if run.epochs != run.info["epochs"]:
            raise ValueError(f"its history has {run.epochs} of {run.info['epochs']} epochs")
        if place.is_dir() or run.weights.exists():
            load_weights(model, run.weights)
            run.model = model
    # Text that is valid JSON but of another shape fails as whatever Python makes of it.
    except (OSError, ValueError, LookupError, TypeError, AttributeError, RuntimeError) as error:
        raise RunError(
            f"the stored run {place} is damaged ({type(error).__name__}: {error}). "
            "Remove it, or call train with retrain=True to replace it."
        ) from error
    return run


def _folders(ending: str) -> list[Path]:
    return [path for path in runs_dir().glob(f"*-{ending}") if path.is_dir()]


def _read_folder(place: Path, key: str) -> Run:
    info = json.loads((place / "run.json").read_text())
    paths = {name: place / f"{name}.json" for name in _SCORES}
    stored = {name: json.loads(path.read_text()) for name, path in paths.items() if path.exists()}
    return Run(
        name=place.name.rpartition(f"-{key}")[0],
        key=key,
        info=info,
        rows=History.load(place / "history.csv").rows,
        path=place,
        stored=True,
        _scores=_from_json(stored),
    )


def _read_card(place: Path) -> Run:
    card = json.loads(place.read_text())
    columns = card["history"]
    return Run(
        name=card["name"],
        key=card["key"],
        info=card["info"],
        rows=[dict(zip(columns, values)) for values in zip(*columns.values())],
        path=place,
        stored=True,
        _scores=_from_json(card),
    )


def _from_json(stored: dict[str, Any]) -> dict[str, metrics.Metrics]:
    found = {name: stored[name] for name in _SCORES if stored.get(name) is not None}
    return {name: metrics.Metrics.from_json(values) for name, values in found.items()}


@contextmanager
def disk_errors(owner: str, folder: Path) -> Iterator[None]:
    """Say of an OSError inside of the block who could not write where, and what to do."""
    try:
        yield
    except OSError as error:
        raise RunError(
            f"{owner}: cannot write to {folder} ({error.strerror or error}). What was saved before "
            "is whole. Free space or set LABUTILS_RUNS to a folder that can be written, then go on."
        ) from error


@contextmanager
def store_lock(key: str) -> Iterator[None]:
    """Held while a run is trained, so that a second process waits for it instead of repeating it.

    Raises OSError if the runs folder cannot be written.
    """
    locks = runs_dir() / ".locks"
    locks.mkdir(parents=True, exist_ok=True)
    lock = FileLock(locks / f"{key}.lock")
    try:
        lock.acquire(timeout=0)
    except Timeout:
        if sys.stderr.isatty():
            print(f"another process trains run {key}: waiting for it", file=sys.stderr)
        lock.acquire()
    try:
        yield
    finally:
        lock.release()


def settle(part: Path) -> Path:
    """Rename NAME-KEY.part to NAME-KEY, in place of an older run there. Returns the new path."""
    place = part.with_name(part.name.removesuffix(".part"))
    key = place.name.rpartition("-")[2]
    for path in _folders(key):
        aside = path.with_name(f"{path.name}.old")
        # A kill during an earlier replacement may have left one behind, half removed.
        if aside.exists():
            shutil.rmtree(aside)
        path.rename(aside)
    part.rename(place)
    for aside in _folders(f"{key}.old"):
        shutil.rmtree(aside)
    return place


def publish(run: Run, *, weights: bool, command: str, half: bool = False) -> Path:
    """Copy a finished run into models/: its card, and its weights if asked for. Returns the card.

    command: what measures the card's numbers again. half: store the weights as float16, which takes
    half the space and changes each by less than a thousandth of itself, or by 3e-8 if it is tiny;
    the card keeps the metrics of the weights as they were.
    Raises RunError for an unfinished run, where weights are asked for and there are none, or where
    one is too large for float16.
    """
    if run.stop_reason == "interrupted":
        raise RunError(
            f"{run.name}: interrupted runs are not published. Train it to the end first."
        )
    card = models_dir() / f"{run.name}-{run.key}.json"
    if weights:
        run.require_model()
        if not run.weights.exists():
            raise RunError(
                f"{run.name}: {run.weights} is gone; another run of the same settings has replaced "
                "it. Give every run settings of its own, a seed for example."
            )
        if run.path != card:
            kept = _halved(run) if half else run.weights.read_bytes()
            with atomic_write(card.with_suffix(".safetensors")) as file:
                file.write(kept)
    write_json(
        card,
        {
            "name": run.name,
            "key": run.key,
            "command": command,
            "test": None,
            **{name: asdict(found) for name, found in run._scores.items()},
            "info": run.info,
            "history": {name: [row[name] for row in run.rows] for name in run.rows[0]},
        },
    )
    return card


def _halved(run: Run) -> bytes:
    """The stored weights of a run with float16 in place of float32."""
    from safetensors.torch import load, save

    state = load(run.weights.read_bytes())
    for name, value in state.items():
        if value.is_floating_point():
            state[name] = value.half()
            if not state[name].isfinite().all():
                raise RunError(
                    f"{run.name}: {name} has values up to {value.abs().max():.3g}, float16 ends at "
                    "65504. Publish it with half=False."
                )
    return save(state)


def save_weights(path: Path, state: dict[str, torch.Tensor]) -> None:
    """Write a state dict as safetensors, atomically."""
    from safetensors.torch import save

    with atomic_write(path) as file:
        file.write(save({name: value.contiguous().cpu() for name, value in state.items()}))


def load_weights(model: nn.Module, path: Path) -> None:
    """Read what save_weights wrote into a model. Raises ValueError if it does not fit."""
    from safetensors import SafetensorError
    from safetensors.torch import load

    try:
        model.load_state_dict(load(path.read_bytes()))
    except (SafetensorError, RuntimeError) as error:
        raise ValueError(f"{path.name} does not fit the model: {error}") from error


def open_part(name: str, key: str) -> Path:
    part = next(runs_dir().glob(f"*-{key}.part"), runs_dir() / f"{name}-{key}.part")
    part.mkdir(exist_ok=True)
    for stray in part.glob(".*.tmp"):
        stray.unlink()
    return part


def finish(
    part: Path,
    name: str,
    key: str,
    info: dict[str, Any],
    rows: list[dict[str, float]],
    weights: dict[str, torch.Tensor],
) -> Path:
    History(rows).save(part / "history.csv")
    save_weights(part / "best.safetensors", weights)
    write_json(part / "run.json", info)
    return settle(part)
