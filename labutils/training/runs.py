"""Runs, and how finished ones are found again, in the runs folder or among the published ones.

A run is a folder NAME-KEY with card.json and its weights, or NAME-KEY.part while it is unfinished.
A published run is models/NAME-KEY.json, the same card, perhaps with NAME-KEY.safetensors beside it.
"""

import copy
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch
from pydantic import InstanceOf
from torch import nn

from ..base.files import models_dir, runs_dir
from ..base.settings import check, first_line, suggestion
from ..data.tensors import ImageData
from ..evaluation import metrics
from ..models.registry import build, registered
from . import cards
from .cards import RunError, load_weights
from .watch import warn

if TYPE_CHECKING:
    import pandas as pd


@dataclass(eq=False)
class Run:
    """One training: what went in, what came out."""

    name: str
    key: str
    info: dict[str, Any]  # model spec, config, data, versions, device, seconds, best_epoch, ...
    rows: list[dict[str, float]]
    path: Path  # the run's folder, or the card of a published run
    model: nn.Module | None = None  # of the best epoch; None where only the card was published
    stored: bool = False  # found in the store, not trained by this call
    scores: dict[str, metrics.Metrics] = field(default_factory=dict)

    @property
    def history(self) -> "pd.DataFrame":
        """One row an epoch, indexed from 1: losses, accuracies, lr, images_per_second, seconds."""
        import pandas as pd

        return pd.DataFrame(self.rows).set_index("epoch") if self.rows else pd.DataFrame()

    @property
    def seconds(self) -> float:
        return self.info["seconds"]

    @property
    def epochs(self) -> int:
        return len(self.rows)

    @property
    def stop_reason(self) -> str:
        return self.info["stop_reason"]

    @property
    def weights(self) -> Path:
        """Where the weights of the best epoch are, if they are stored."""
        if self.path.suffix == ".json":
            return self.path.with_suffix(".safetensors")
        return self.path / "best.safetensors"

    def best(self, column: str) -> float:
        """A column of the history at the best epoch, else ValueError.

        Raises RunError if the first epoch did not end.
        """
        if not self.info["best_epoch"]:
            raise RunError(f"{self.name}: {self.stop_reason} before the first epoch ended.")
        row = self.rows[self.info["best_epoch"] - 1]
        check("best", {"column": Literal[*row]}, {"column": column})
        return row[column]

    def test(self, data: ImageData, *, tta: bool = False) -> metrics.Metrics:
        """Metrics on the test split, measured once, in the precision of training; in the card.

        tta: as for predict, stored apart. Raises RunError for other data than it was trained on,
        and for a run that has neither metrics nor weights.
        """
        self.require_trained_on(data)
        name = "test_flip" if tta else "test"
        if name not in self.scores:
            self.scores[name] = self.measure(data, tta=tta)
            if self.path.is_dir() and (card := self.own_card()):
                try:
                    cards.write(_card(self.path), card | {name: self.scores[name].values()})
                except OSError as error:
                    warn(f"{self.name}: its {name} metrics are not stored ({first_line(error)})")
        return self.scores[name]

    def require_trained_on(self, data: ImageData) -> None:
        """Raises RunError for data of another fingerprint."""
        check("test", {"data": InstanceOf[ImageData]}, {"data": data})
        trained, asked = self.info["data"]["fingerprint"], data.fingerprint
        if asked != trained:
            problem = f"{self.name}: trained on data {trained}, asked to test on {asked}"
            raise RunError(f"{problem}. Load it with the same name, val_size and seed.")

    def measure(self, data: ImageData, *, tta: bool, half: bool = False) -> metrics.Metrics:
        """As test, but measured anew, and kept nowhere. half: with weights rounded to float16."""
        model = self.network()
        if half:
            model.half().float()
        options = {"precision": self.info.get("precision", "float32"), "tta": tta}
        return metrics.evaluate(model, data.test, **options)

    def require_finished(self) -> None:
        """Raises RunError for a run that was interrupted: it goes on, and will be another."""
        if self.stop_reason == "interrupted":
            raise RunError(f"{self.name} is interrupted. Train it to the end first.")

    def require_model(self) -> nn.Module:
        """The model with its best weights. Raises RunError where only the card was published."""
        if self.model is None:
            problem = f"{self.name}: only the card of this run is published ({self.path.name})"
            raise RunError(f"{problem}. To have its weights, train with retrain=True.")
        return self.model

    def network(self) -> nn.Module:
        """A copy of the model with the stored weights: a caller may have gone on changing it."""
        model = copy.deepcopy(self.require_model())
        if self.own_card() and self.weights.exists():
            load_weights(model, self.weights)
        return model

    def own_card(self) -> dict[str, Any] | None:
        """Its card, None if it is unfinished or a later run has taken its place."""
        with suppress(OSError, ValueError, LookupError, TypeError):
            card = cards.read(_card(self.path))
            return card if card["info"] == self.info else None

    def __repr__(self) -> str:
        if not self.rows:
            return f"{self.name}: {self.stop_reason} in the first epoch"
        where = "loaded, trained {finished} on {device}, torch {torch}".format(**self.info)
        what = f"{where if self.stored else 'trained'}; {self.epochs} epochs, {self.seconds:.1f} s"
        best = f"{100 * self.best('val_accuracy'):.2f} % at epoch {self.info['best_epoch']}"
        return f"{self.name}: {what}, val accuracy {best}; {self.stop_reason}"


def find(key: str, model: nn.Module) -> Run | None:
    """The finished run with this key, its weights put into model. RunError if it is damaged."""
    # A kill in the middle of finish leaves the older run as the only finished one.
    found = folders(key) or folders(f"{key}.old")
    path = next(iter(found or models_dir().glob(f"*-{key}.json")), None)
    return None if path is None else open_stored(path, model)


def open_stored(path: Path, model: nn.Module | None = None) -> Run:
    """The finished run of a folder, or of the card of a published run. RunError if it is damaged.

    model: what its weights, if it has them, are put into; by default a network as its card says.
    """
    try:
        card = cards.read(_card(path))
        columns = card["history"]
        rows = [dict(zip(columns, values)) for values in zip(*columns.values())]
        run = Run(card["name"], card["key"], card["info"], rows, path, stored=True)
        scores = {name: card[name] for name in ("test", "test_flip") if card.get(name)}
        run.scores = {k: metrics.Metrics(**values) for k, values in scores.items()}
        if card["weights"]:
            spec = card["info"]["model"]
            if model is None and spec["model"] not in registered():
                problem = f"{run.name}: labutils cannot build its network, which is your own"
                remedy = "Build it, then `load_state_dict` of safetensors.torch.load_file"
                raise RunError(f"{problem}. {remedy}({str(run.weights)!r}).")
            with torch.random.fork_rng(devices=()):  # the caller's random numbers stay
                run.model = build(spec) if model is None else model
            load_weights(run.model, run.weights, card["weights"])
    # Text that is valid JSON but of another shape fails with an error of Python's own.
    except (OSError, ValueError, LookupError, TypeError, AttributeError) as error:
        problem = f"the stored run {path} is damaged ({type(error).__name__}: {error})"
        raise RunError(f"{problem}. Remove it, or train with retrain=True.") from error
    return run


def load_run(name: str) -> Run:
    """A finished run by its name, with its network on the CPU: one stored here, or a published one.

    name: that of the run, with its key where two have the same name; the key alone finds it too
        where its name has changed.
    Raises RunError if none or several have it, if only its card is published, or it is damaged.
    """
    check("load_run", {"name": str}, {"name": name})
    stored = {path.stem: path for path in models_dir().glob("*.json")}
    # What a kill in the middle of finish has left beside a run counts only where that is gone.
    for path in sorted(runs_dir().glob("*/card.json"), reverse=True):
        if path.parent.suffix != ".part":
            stored[path.parent.name.removesuffix(".old")] = path.parent
    names = {home: (home, home.rpartition("-")[0]) for home in stored}
    fits = sorted(home for home in stored if name in names[home])
    # A run that was trained again may have another name, under the same key.
    key = name.rpartition("-")[2]
    fits = fits or [home for home in stored if home.rpartition("-")[2] == key][:1]
    if len(fits) != 1:
        known = [each for both in names.values() for each in both]
        hint = f"{suggestion(name, known)} They are in {models_dir()} and {runs_dir()}."
        found = f"Give one of {', '.join(fits)}." if fits else f"There is no such run.{hint}"
        raise RunError(f"load_run: name = {name!r}. {found}")
    run = open_stored(stored[fits[0]])
    run.require_model()
    return run


def _card(path: Path) -> Path:
    return path / "card.json" if path.is_dir() else path


def folders(ending: str) -> list[Path]:
    """Those of the runs folder whose name ends with -ending, a key say."""
    return [path for path in sorted(runs_dir().glob(f"*-{ending}")) if path.is_dir()]
