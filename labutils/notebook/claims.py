"""What a notebook claims, and the evidence: the same numbers, the same seeds, the same test images.

Claims and headline rows travel in the cell outputs under a media type of their own, which viewers
ignore and `batch` collects, so that no number is ever copied by hand.
"""

import functools
import html
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import pandas as pd
import torch
from pydantic import InstanceOf
from scipy import stats
from torch import Tensor

from ..base.device import device_name
from ..base.settings import check
from ..data.tensors import ImageData
from ..evaluation.metrics import Metrics, predict
from ..training.runs import Run

MEDIA_TYPE = "application/vnd.labutils+json"
ByModel = Mapping[str, float]  # accuracies in percent
NONE: ByModel = {}
_MEASURED = [name for name, kind in Metrics.__annotations__.items() if kind is float]
_MEASURED += ["train_loss", "train_accuracy", "val_loss", "val_accuracy", "epochs", "seconds"]
MARKS = {"holds": "✔", "fails": "✘", "not settled": "?"}


@dataclass(frozen=True, eq=False)
class Score:
    """The runs of one model, one for each seed, and what they score. Accuracies in percent."""

    runs: Mapping[int, Run]  # by seed
    data: ImageData

    @property
    def first(self) -> Run:
        """The run of the first seed, whose weights a report publishes and looks into."""
        return next(iter(self.runs.values()))

    def values(self, what: str = "accuracy", *, tta: bool = False) -> pd.Series:
        """One number for each seed, indexed by seed.

        what: a number of Metrics, measured on the test split, with test-time augmentation if tta; a
            loss or an accuracy of the history at the best epoch, such as val_accuracy; or epochs or
            seconds. Losses are in nats, all else that is measured in percent.
        """
        check("values", {"what": Literal[*_MEASURED]}, {"what": what})
        found = {}
        for seed, run in self.runs.items():
            if what in ("epochs", "seconds"):
                found[seed] = float(getattr(run, what))
            elif what.startswith(("train_", "val_")):
                found[seed] = run.best(what)
            else:
                found[seed] = getattr(run.test(self.data, tta=tta), what)
        unit = 1 if what.endswith(("loss", "epochs", "seconds")) else 100
        return pd.Series(found).rename_axis("seed") * unit

    def __sub__(self, other: "Score") -> pd.Series:
        """Difference of the test accuracies in points, for the seeds that both have."""
        return (self.values() - other.values()).dropna()

    @functools.cached_property
    def logits(self) -> Tensor:
        """What the run of the first seed says of the test images: [N, num_classes], on the CPU.

        Raises RunError if its weights are not stored.
        """
        precision = self.first.info.get("precision", "float32")
        model, few = self.first.network(), 64  # images at once, which stay in the cache
        return predict(model, self.data.test, precision=precision, batch_size=few).cpu()

    def __repr__(self) -> str:
        return mean_std(self.values())


ONE = "\u00a0(n\u00a0=\u00a01)"  # behind a number that has no deviation


def mean_std(values: Sequence[float] | pd.Series) -> str:
    """'mean ± sample deviation' of the numbers that are there; 'mean (n = 1)', or a dash."""
    values = pd.Series(values, dtype=float).dropna()
    if len(values) < 2:
        return f"{values.iloc[0]:.2f}{ONE}" if len(values) else "–"
    return f"{values.mean():.2f}\u00a0±\u00a0{values.std():.2f}"


def labelled(table: pd.DataFrame, labels: Mapping[str, Any]) -> pd.DataFrame:
    """The table with a column for each label, in every row the same: one that is a list, too."""
    return table.assign(**{name: [value] * len(table) for name, value in labels.items()})


def tabulate(scores: Mapping[Any, Score], names: Sequence[str]) -> pd.DataFrame:
    """Test and train accuracy of every run, the long table that figures take.

    scores: key -> Score. names: of the columns that hold the parts of a key. The other columns are
    seed, split and accuracy (%). Raises ValueError for names that do not fit, or no scores.
    """
    if not scores:
        raise ValueError("tabulate: scores are empty. Give one at least.")
    if taken := {"seed", "split", "accuracy (%)"} & {*names}:
        problem = f"names = {list(names)}, but {', '.join(sorted(taken))} is a column already"
        raise ValueError(f"tabulate: {problem}. Give others.")
    parts = []
    for key, score in scores.items():
        values = key if isinstance(key, tuple) else (key,)
        if len(values) != len(names):
            problem = f"key = {key!r}, names = {list(names)}"
            raise ValueError(f"tabulate: {problem}. Give a name for each part of a key.")
        labels = dict(zip(names, values))
        for split, what in (("test", "accuracy"), ("train", "train_accuracy")):
            part = score.values(what).rename("accuracy (%)").reset_index()
            parts.append(labelled(part.assign(split=split), labels))
    return pd.concat(parts, ignore_index=True)


@dataclass
class Claims:
    """What a notebook asserts: each claim holds, fails or is not settled, and none stops anybody.

    As the last expression of a cell it shows the claims made since it was last shown.
    Accuracies are compared seed by seed: a claim is settled by the 95 % t interval of the mean
    difference. One seed or two say too little for that; then it is the interval over the test
    images, of the networks of the first seed that both have. It excludes 0 just if McNemar's exact
    test (1947), 5 % two-sided, does, which looks at the images that only one of them gets right.
    """

    exercise: str
    headline: str = ""
    rows: dict[str, dict[str, str]] = field(default_factory=dict)  # by claim
    headline_rows: dict[str, dict[str, Any]] = field(default_factory=dict)  # by model
    _new: list[str] = field(default_factory=list)

    def add(self, claim: str, holds: bool | None, evidence: str) -> None:
        """claim: a sentence. holds: what the numbers say, None if they do not settle it."""
        verdict = "not settled" if holds is None else "holds" if holds else "fails"
        self.rows[claim] = {"claim": claim, "evidence": evidence, "verdict": verdict}
        self._new.append(claim)

    def above(
        self, claim: str, more: Any, less: Any, *, by: float = 0.0, unit: str = "points"
    ) -> None:
        """Claim that one score lies above another by more than `by`.

        more, less: Scores, or numbers for each seed (Series) such as a difference of two Scores;
            20 numbers or more whose index is not named 'seed' are taken for those of test images.
            unit: of these numbers.
        """
        low, high, evidence = _compare(more, less, unit)
        self.add(claim, _exceeds(low, high, by), evidence)

    def below(
        self, claim: str, less: Any, more: Any, *, by: float = 0.0, unit: str = "points"
    ) -> None:
        """Claim that one score lies below another by more than `by`; arguments as for above."""
        low, high, evidence = _compare(less, more, unit)
        self.add(claim, _exceeds(-high, -low, by), evidence)

    def close(self, claim: str, one: Any, other: Any, *, within: float) -> None:
        """Claim that two scores differ by less than `within` points; arguments as for above."""
        low, high, evidence = _compare(one, other, "points")
        apart = low > within or high < -within
        self.add(claim, False if apart else True if max(-low, high) < within else None, evidence)

    def targets(
        self, scores: dict, *, published: ByModel = NONE, target: ByModel = NONE, headline=True
    ) -> None:
        """Record the test accuracy of each model, and claim that it reaches its target.

        scores: model -> Score; else ValueError.
        headline: whether the tables of all exercises show the rows too, or only those of a sweep.
        """
        check("targets", {"scores": dict[str, InstanceOf[Score]]}, {"scores": scores})
        for model, score in scores.items():
            info, compared = score.first.info, (published.get(model), target.get(model))
            cost = {"params": info["parameters"], "device": info["device"]}
            cost["seconds"] = score.values("seconds").mean()
            self.record(model, score.values(), score.data, *compared, **cost, headline=headline)

    def record(
        self,
        model: str,
        accuracies: pd.Series,
        data: ImageData,
        published: float | None = None,
        target: float | None = None,
        *,
        params: int,
        seconds: float,
        device: str | None = None,
        headline: bool = True,
    ) -> None:
        """Record what no run is, a classifier of features say, as targets does a Score.

        accuracies: on the test split, in percent, one for each seed. seconds: of one training, on
            device; None: this processor.
        """
        if target:
            evidence = f"{mean_std(accuracies)} %"
            evidence += f", published {published:g} %" if published else ""
            reached = accuracies.mean() >= target - 1e-9  # 100 * 0.564 is a little less than 56.4
            self.add(f"{model} reaches {target:g} %", reached, evidence)
        row = {"exercise": self.exercise, "model": model, "dataset": data.name}
        row |= {"metric": "accuracy", "split": "test", "mean": float(accuracies.mean())}
        row |= {"std": float(accuracies.std()) if len(accuracies) > 1 else 0.0}
        row |= {"n": len(accuracies), "values": list(accuracies), "published": published}
        row |= {"target": target, "params": params, "seconds": round(seconds, 1)}
        row |= {"device": device or device_name(torch.device("cpu")), "headline": headline}
        self.headline_rows[model] = row

    def _repr_mimebundle_(self, **_: Any) -> dict[str, Any]:
        shown, self._new = [self.rows[claim] for claim in dict.fromkeys(self._new)], []
        lines = [f"{row['verdict']}: {row['claim']} ({row['evidence']})" for row in shown]
        left = "style='text-align:left'"
        heads = "".join(f"<th {left}>{name}</th>" for name in ("claim", "evidence", "verdict"))
        table = f"<table><tr>{heads}</tr>"
        for row in shown:
            texts = row["claim"], row["evidence"], f"{MARKS[row['verdict']]} {row['verdict']}"
            cells = [f"<td {left}>{html.escape(text)}</td>" for text in texts]
            table += f"<tr>{''.join(cells)}</tr>"
        reported = {"exercise": self.exercise, "headline": self.headline}
        reported |= {"rows": [*self.rows.values()], "headline_rows": [*self.headline_rows.values()]}
        readable = {"text/plain": "\n".join(lines)}
        readable |= {"text/html": f"{table}</table>"} if shown else {}
        return readable | {MEDIA_TYPE: reported}


def _exceeds(low: float, high: float, by: float) -> bool | None:
    return True if low > by else False if high < by else None


def _compare(one: Any, other: Any, unit: str) -> tuple[float, float, str]:
    """The 95 % interval of the mean difference, infinite if unknown, and the evidence."""
    first, second = (side.values() if isinstance(side, Score) else side for side in (one, other))
    kinds = dict.fromkeys(["first", "second"], InstanceOf[pd.Series])
    check("Claims: a Score or a Series by seed", kinds, {"first": first, "second": second})
    if not (first.index.is_unique and second.index.is_unique):
        raise ValueError("Claims: a seed has several numbers. Give one for each seed.")
    apart = (first - second).dropna()
    if (n := len(apart)) > 2:
        gain, width = apart.mean(), stats.t.ppf(0.975, n - 1) * apart.std() / math.sqrt(n)
        sides = [side[apart.index] for side in (first, second)]
        # How far images lie apart says nothing of how well their mean is known.
        images = n >= 20 and apart.index.name != "seed"
        shown = [f"{side.mean():.2f}" if images else mean_std(side) for side in sides]
        source = f"over {n:,} images" if images else f"n = {n}"
        return _interval(*shown, unit, gain, width, source)
    evidence = f"{mean_std(first)} against {mean_std(second)} {unit}"
    if isinstance(one, Score) and isinstance(other, Score) and n:
        tests = [(score.data.test.images, score.data.test.labels) for score in (one, other)]
        seed = apart.index[0]
        right = [score.runs[seed].test(score.data).right for score in (one, other)]
        if not all(map(torch.equal, *tests)):
            evidence += ", not of the same test images"
        elif any(images is None for images in right):
            evidence += ", no answers stored to compare the images"
        else:
            shown = (f"{side[seed]:.2f}" for side in (first, second))
            images = f"for one seed, over {len(right[0]):,} images"
            return _interval(*shown, unit, *_mcnemar(*right), images)
    return -math.inf, math.inf, evidence


def _interval(one, other, unit, gain, width, source) -> tuple[float, float, str]:
    lead, low, high = (f"{round(x, 2) + 0.0:.2f}" for x in (gain, gain - width, gain + width))
    between = f"95 % interval {low} to {high} {unit}, {source}"
    evidence = f"{one} against {other} {unit}: by {lead} {unit}, {between}"
    return gain - width, gain + width, evidence


def _mcnemar(one: Tensor, other: Tensor) -> tuple[float, float]:
    """The difference on the same images, in points, and half of its 95 % interval.

    The interval excludes 0 if and only if McNemar's exact test rejects it.
    """
    n, only, others = len(one), int((one & ~other).sum()), int((other & ~one).sum())
    p = stats.binomtest(only, only + others).pvalue if only + others else 1.0
    gain = 100 * (only - others) / n
    width = 196 / n * math.sqrt(only + others - (only - others) ** 2 / n)
    if not only + others:  # the rule of three: so many images apart would be likely to show
        width = 300 / n
    # The normal interval may be a little narrower than the exact test allows.
    return gain, max(width, abs(gain)) if p >= 0.05 else width
