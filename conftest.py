"""nbval compares text to the letter; here numbers may differ a little, and times are masked.

A notebook's metadata, or a cell's, can set the tolerance: {"nbval": {"rtol": 0.02, "atol": 0.05}}.
A new number agrees with the stored one if |new - stored| <= atol + rtol * |stored|, and with "cap"
no more than that share of |stored|, for tables that hold large numbers and small ones. The text
between numbers must be equal, and so must whole numbers: they count things.
"""

from __future__ import annotations

import math
import os
import re
from pathlib import Path

TOLERANCE = {"rtol": 0.02, "atol": 0.05, "cap": math.inf}
NUMBER = re.compile(
    r"(?<![\w.])[-+]?\d+\.\d+(?:[eE][-+]?\d+)?(?!\w|\.\d)|(?<![\w.])[-+]?\d+[eE][-+]?\d+"
)


class TolerantText(str):
    """Text that equals another if it differs in its decimal numbers only, and in those a little."""

    rtol: float
    atol: float
    cap: float

    def __eq__(self, new: object) -> bool:
        # Columns are padded to their widest number, so the length of blanks may differ as well.
        if not isinstance(new, str) or _words(self) != _words(new):
            return False
        pairs = zip(map(float, NUMBER.findall(self)), map(float, NUMBER.findall(new)))
        return all(abs(new - stored) <= self._allowed(abs(stored)) for stored, new in pairs)

    def _allowed(self, size: float) -> float:
        # An infinite share of 0.0 would be no number.
        share = self.cap * size if self.cap < math.inf else math.inf
        return min(self.atol + self.rtol * size, share)

    def __ne__(self, new: object) -> bool:
        return not self == new

    __hash__ = str.__hash__


def _words(text: str) -> list[list[str]]:
    return [part.split() for part in NUMBER.split(text)]


def tolerant(text: str, *, rtol: float, atol: float, cap: float) -> TolerantText:
    result = TolerantText(text)
    result.rtol, result.atol, result.cap = rtol, atol, cap
    return result


def pytest_configure(config) -> None:
    if not getattr(config.option, "nbval", False):
        return
    from nbval.plugin import IPyNbCell

    # A check is no run to keep; W&B would send it for whoever is logged in.
    os.environ["WANDB_MODE"] = "disabled"

    config.option.nbval_sanitize_with = config.option.nbval_sanitize_with or str(
        Path(__file__).parent / "tests" / "nbval_sanitize.cfg"
    )
    sanitize, compare = IPyNbCell.sanitize, IPyNbCell.compare_outputs

    def sanitize_tolerant(cell, text):
        text = sanitize(cell, text)
        if not isinstance(text, str):
            return text
        settings = {
            **TOLERANCE,
            **cell.parent.nb.metadata.get("nbval", {}),
            **cell.cell.metadata.get("nbval", {}),
        }
        return tolerant(text, **settings)

    def compare_shown(cell, test, ref, skip_compare=None):
        # What Claims reports to `batch` repeats, unrounded, what the same cell shows as a table.
        skip = (*(skip_compare or cell.parent.skip_compare), "application/vnd.labutils+json")
        return compare(cell, test, ref, skip)

    IPyNbCell.sanitize, IPyNbCell.compare_outputs = sanitize_tolerant, compare_shown
