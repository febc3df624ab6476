"""What a notebook does with its runs: set-up line, scores, table of results."""

from __future__ import annotations

import platform
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from .. import __version__
from ..base.device import device_name, resolve_device, seed_everything
from ..base.settings import check
from ..data.tensors import ImageData
from ..training.runs import Run, RunError

if TYPE_CHECKING:
    import pandas as pd


def start(namespace: Mapping[str, Any], /, **kinds: Any) -> None:
    """Check a notebook's parameters, seed everything, print what runs where.

    namespace: the notebook's globals(). kinds: parameter name -> its type hint; `profile` is one.
    Raises ValueError naming each parameter that has a value of another type.
    """
    try:
        check("parameter", kinds, {name: namespace[name] for name in kinds})
    except ValueError as error:
        raise ValueError(
            f"{error}\nChange it in the parameters cell, or in papermill's -p NAME VALUE or YAML "
            "file (lists only work in YAML)."
        ) from None
    seed_everything(0)
    print(
        f"profile {namespace['profile']} · labutils {__version__} · torch {torch.__version__} · "
        f"Python {platform.python_version()} · {device_name(resolve_device())}"
    )


def mean_std(values: Sequence[float]) -> str:
    """'mean ± sample deviation', without the deviation for one value, a dash for none."""
    if not values:
        return "–"
    deviation = f"\u00a0±\u00a0{statistics.stdev(values):.2f}" if len(values) > 1 else ""
    return f"{statistics.fmean(values):.2f}{deviation}"


@dataclass(frozen=True)
class Score:
    """One row of results: a model over its seeds. Accuracies, precision and errors in percent."""

    runs: Sequence[Run]
    data: ImageData

    def values(self, what: str, *, tta: bool = False) -> list[float]:
        """One number a seed. what: a field of Metrics, on the test split, or epochs or seconds.

        tta: with test-time augmentation, see predict.
        """
        if stopped := [run.name for run in self.runs if run.stop_reason == "interrupted"]:
            raise RunError(f"results: {', '.join(stopped)} interrupted. Train to the end first.")
        if what in ("epochs", "seconds"):
            return [float(getattr(run, what)) for run in self.runs]
        scale = 1 if what == "loss" else 100
        return [scale * getattr(run.test(self.data, tta=tta), what) for run in self.runs]

    def mean(self, what: str = "accuracy", *, tta: bool = False) -> float:
        return statistics.fmean(self.values(what, tta=tta))

    def std(self, what: str = "accuracy", *, tta: bool = False) -> float:
        """Standard deviation over seeds, of the sample; 0 for a single seed."""
        values = self.values(what, tta=tta)
        return statistics.stdev(values) if len(values) > 1 else 0.0

    def text(self, *, tta: bool = False) -> str:
        """Test accuracy as 'mean ± deviation'; a single seed has no deviation."""
        return mean_std(self.values("accuracy", tta=tta))


def results(
    scores: Mapping[tuple[str, str], Score],
    *,
    tta: bool = False,
    **references: Mapping[str, float],
) -> pd.DataFrame:
    """The table of a comparison on the test split: means over seeds, accuracy with its deviation.

    scores: (recipe, model) -> Score. tta: add a column for the accuracy with test-time flip, from
    the mean of the logits of each image and of its mirror image. references: more columns, model ->
    accuracy in percent, a published result for example.
    """
    import pandas as pd

    rows = {
        key: {
            "parameters": f"{score.runs[0].info['parameters']:,}",
            "seeds": len(score.runs),
            "accuracy (%)": score.text(),
            **({"test-time flip (%)": score.text(tta=True)} if tta else {}),
            **{f"{name} (%)": values.get(key[1]) for name, values in references.items()},
            "precision (%)": f"{score.mean('precision'):.2f}",
            "loss (nats)": f"{score.mean('loss'):.3f}",
            "calibration error (%)": f"{score.mean('calibration_error'):.2f}",
            "epochs": f"{score.mean('epochs'):.1f}",
            "time a run": f"{score.mean('seconds'):.1f} s",
        }
        for key, score in scores.items()
    }
    table = pd.DataFrame.from_dict(rows, orient="index")
    table.index = pd.MultiIndex.from_tuples(rows, names=["recipe", "model"])
    return table
