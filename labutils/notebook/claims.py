"""What a notebook claims, with the evidence.

Claims and headline rows travel in the cell outputs under a media type of their own, which viewers
ignore and `batch` collects, so that no number is ever copied by hand.
"""

from __future__ import annotations

import html
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    pass
from .experiment import Score

MEDIA_TYPE = "application/vnd.labutils+json"


@dataclass
class Claims:
    """What a notebook asserts, with the evidence; a claim can fail, and then says so.

    As the last expression of a cell it is shown as a table. `python -m labutils run` and nbval fail
    on a claim that fails in the quick profile; a person who explores is never stopped by one.
    """

    exercise: str
    headline: str = ""
    rows: list[dict[str, Any]] = field(default_factory=list)
    headline_rows: list[dict[str, Any]] = field(default_factory=list)

    def add(self, claim: str, holds: bool, evidence: str) -> None:
        """claim: a sentence. holds: whether the numbers bear it out. evidence: those numbers."""
        self.rows.append({"claim": claim, "evidence": evidence, "holds": bool(holds)})

    def record(
        self,
        score: Score,
        *,
        model: str,
        published: float | None = None,
        target: float | None = None,
        headline: bool = True,
    ) -> None:
        """Add a row of results: test accuracy of a model over its seeds, in percent.

        headline: whether the tables of all exercises show it too, or only that of a sweep.
        """
        run = score.runs[0]
        self.headline_rows.append(
            {
                "exercise": self.exercise,
                "model": model,
                "dataset": score.data.name,
                "metric": "accuracy",
                "split": "test",
                "mean": round(score.mean(), 3),
                "std": round(score.std(), 3),
                "n": len(score.runs),
                "values": [round(value, 3) for value in score.values("accuracy")],
                "published": published,
                "target": target,
                "params": run.info["parameters"],
                "seconds": round(score.mean("seconds"), 1),
                "device": run.info["device"],
                "headline": headline,
            }
        )

    def _repr_mimebundle_(self, **_: Any) -> dict[str, Any]:
        mark = {True: "holds", False: "FAILS"}
        lines = [f"{mark[row['holds']]}: {row['claim']} ({row['evidence']})" for row in self.rows]
        cells = "".join(
            f"<tr><td style='text-align:left'>{html.escape(row['claim'])}</td>"
            f"<td style='text-align:left'>{html.escape(row['evidence'])}</td>"
            f"<td>{'✔' if row['holds'] else '✘'} {mark[row['holds']]}</td></tr>"
            for row in self.rows
        )
        head = "<tr><th>claim</th><th>evidence</th><th></th></tr>"
        return {
            "text/plain": "\n".join([*lines, self.headline]),
            "text/html": f"<table>{head}{cells}</table><p>{html.escape(self.headline)}</p>",
            MEDIA_TYPE: asdict(self),
        }
