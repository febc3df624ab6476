"""nbval compares outputs to the letter; here decimal numbers may differ, each by what its kind may.

A number's kind is its unit: percent (%, points), loss (nats, loss), epochs, or other for none. The
unit follows it ("97.5 %", "1.93 against 0.81 points") or, in an HTML table, is in the heading of
its column or row or in the corner: in parentheses or at the end ("accuracy (%)", "val_loss").

A new number may be atol + rtol * |stored| off: by TOLERANCES, or as the cell's metadata says:

    {"nbval": {"percent": {"atol": 12}, "loss": {"atol": 0.02, "rtol": 0.5}}}

So a tolerance meant for percents never covers a loss. All else is compared to the letter: words,
the dash of a missing number, whole numbers, which count things (but for epochs in a table, whose
mean may happen to be whole), and verdicts; only "not settled" may become "holds" or "fails", or
come from them. Times and versions are masked (tests/nbval_sanitize.cfg). Plain text that repeats an
output's HTML is left out.
"""

import html
import os
import re
from collections import defaultdict
from collections.abc import Iterator
from difflib import SequenceMatcher
from pathlib import Path
from typing import NamedTuple

from nbval.plugin import IPyNbCell, transform_streams_for_comparison

TOLERANCES = {
    "percent": {"atol": 2},
    "loss": {"atol": 0.02, "rtol": 0.1},
    "epochs": {"atol": 2},
    "other": {"rtol": 0.02},
}
VERDICTS = {"✔ holds", "✘ fails", "? not settled"}
CLAIMS = "application/vnd.labutils+json"  # for `batch`, unrounded; the cell shows them as well
# 97.50, -0.3, 1,234.5, 1.2e-08, 2e-15; not what is part of a word or of a version
FORM = r"(?<![\w.])[-+]?\d[\d,]*(?:\.\d+(?:e[-+]\d+)?|e[-+]\d+){}(?!\w|\.\d)"
NUMBER, WHOLE = re.compile(FORM.format("")), re.compile(FORM.format("?"))  # or no decimal point
UNIT = r"(?:(?P<percent>%|points?\b)|(?P<loss>nats\b|loss\b)|(?P<epochs>epochs?\b))"
IN_HEADING = re.compile(rf"(?<![^\W_]){UNIT}(?:\)|$)", re.MULTILINE)
ALONE = r"(?:\s*\(n\s=\s1\))?"  # what mean_std puts behind the number of a single run
SAME = rf"\s*(?:±|<|>|to|against)\s*[-+]?\d+(?:\.\d+)?{ALONE}"  # the unit stands at the end,
LISTED = r"(?:,|\s*and)\s*[-+]\d+(?:\.\d+)?"  # and so have listed differences, which are signed
CELL = re.compile(r'<(t[hd])\b(?:[^>]*colspan="(\d+)")?[^>]*>(.*?)</t[hd]>', re.DOTALL)


class Line(NamedTuple):
    """A line of text; or a cell, with the headings of its column, row and corner, one a line."""

    text: str
    headings: str = ""

    def __str__(self) -> str:
        return ": ".join(filter(None, [self.headings.replace("\n", ", "), self.text.strip()]))

    @property
    def number(self) -> re.Pattern:
        heading = IN_HEADING.search(self.headings)
        return WHOLE if heading and heading.lastgroup == "epochs" else NUMBER

    def words(self) -> str:
        return " ".join(self.number.sub(" \0 ", self.text).split())

    def kind(self, number: re.Match) -> str:
        joined = rf"(?:{SAME}|{LISTED})*" if number[0][0] in "+-" else rf"(?:{SAME})*"
        follows = re.match(rf"{ALONE}{joined}\s*{UNIT}", self.text[number.end() :])
        unit = follows or IN_HEADING.search(self.headings)
        return unit.lastgroup if unit else "other"

    def too_far(self, new: "Line", tolerances: dict) -> Iterator[str]:
        pairs = zip(self.number.finditer(self.text), self.number.finditer(new.text))
        for position, (old, now) in enumerate(pairs, 1):
            before, after = (float(number[0].replace(",", "")) for number in (old, now))
            tolerance = {"atol": 0, "rtol": 0} | tolerances[kind := self.kind(old)]
            allowed = tolerance["atol"] + tolerance["rtol"] * abs(before)
            if abs(after - before) > allowed * (1 + 1e-9):  # 0.3 - 0.1 is not quite 0.2
                yield (
                    f'number {position} in "{self}": stored {old[0]}, new {now[0]}, '
                    f"differs by {abs(after - before):.3g}, allowed {allowed:.3g} ({kind})"
                )


def lines_of(text: str) -> list[Line]:
    """The lines of a text; of HTML, the cells of its tables and what stands around them."""
    if "</td>" not in text:
        return [Line(line) for line in text.splitlines()]
    lines, header, index = [], [], []
    for row in re.split(r"(?=<table\b|<tr\b)", text):
        labels, values = [], []
        for tag, span, content in CELL.findall(row):
            (labels if tag == "th" else values).extend([html.unescape(content)] * int(span or 1))
        lines += [Line(CELL.sub("", row)), *map(Line, labels)]
        if values:
            index = index[: len(index) - len(labels)] + labels  # a label may be for several rows
        else:
            header, index = [*header, labels] if labels else [], []  # none: a new table begins
        columns = [""] * len(values) + [" ".join(names).strip() for names in zip(*header)]
        for column, value in zip(columns[-len(values) :], values):
            headings = filter(None, [column, *index, *columns[: -len(values)]])
            lines.append(Line(value, "\n".join(headings)))
    return lines


def shown(cell: IPyNbCell, outputs: list) -> list[Line]:
    """All streams and media types of a cell's outputs; times and versions are masked."""
    found = defaultdict(list)
    for output in transform_streams_for_comparison(outputs):
        fields = {**output, **output.get("data", {})}
        if "text/html" in fields:
            fields.pop("text/plain", None)
        for name in fields.keys() - {*cell.parent.skip_compare, "data", CLAIMS}:
            found[name] += [Line(name), *lines_of(cell.sanitize(str(fields[name])))]
    return [line for name in sorted(found) for line in found[name]]


def compare_outputs(cell: IPyNbCell, test: list, ref: list, skip_compare=None) -> bool:
    """In the place of nbval's: whether the outputs agree; what differs goes to its traceback."""
    tolerances = TOLERANCES | cell.cell.metadata.get("nbval", {})
    if unknown := sorted(tolerances.keys() - TOLERANCES.keys()):
        raise ValueError(f"metadata nbval: unknown kinds {unknown}, known: {list(TOLERANCES)}")
    before, after = shown(cell, ref), shown(cell, test)
    words = [[line.words() for line in lines] for lines in (before, after)]
    for place, pair in enumerate(zip(*words)):
        # A verdict follows from numbers that are compared; near its threshold it may tip.
        if "? not settled" in pair and VERDICTS.issuperset(pair):
            words[1][place] = pair[0]
    cell.comparison_traceback = found = []
    for what, a, b, c, d in SequenceMatcher(None, *words, autojunk=False).get_opcodes():
        if what == "equal":
            for line, new in zip(before[a:b], after[c:d]):
                found += line.too_far(new, tolerances)
        else:
            stored, now = (" / ".join(map(str, part)) for part in (before[a:b], after[c:d]))
            found.append(f'words differ: stored "{stored}", new "{now}"')
    return not found


def pytest_configure(config) -> None:
    if getattr(config.option, "nbval", False):
        IPyNbCell.compare_outputs = compare_outputs
        config.option.nbval_sanitize_with = Path(__file__).with_name("tests") / "nbval_sanitize.cfg"
        # A check is no run to keep; W&B would send it for whoever is logged in.
        os.environ["WANDB_MODE"] = "disabled"
        # Started from a cell of JupyterLab, kernels would show it their progress.
        os.environ.pop("JPY_SESSION_NAME", None)
