"""What is published, measured again: the test scores of all weights beside those of their cards.

LABUTILS_DATA=~/data python tools/verify.py

Exit status 1 if an accuracy differs by more than 0.05 points, or a file is damaged. Runs whose
data set is neither on disk nor to be downloaded are skipped, and that is said.
"""

import json
import sys
from dataclasses import replace
from itertools import groupby
from pathlib import Path

from labutils.base.device import usable_precision
from labutils.base.files import models_dir
from labutils.base.settings import first_line
from labutils.data.load import load_data
from labutils.data.sources import DataError
from labutils.data.tensors import ImageData
from labutils.training.runs import Run, RunError, open_stored


def verify(folder: Path) -> bool:
    """Test every run of a folder of cards that has weights, and print one line for each.

    Returns whether no file is damaged and every accuracy is that of the card within 0.05 points,
    or within 0.3 where a run of bf16 is tested in float32, which moves single images. A run whose
    data set is not here, or other than what it was trained on, is skipped; the last lines say why.
    """
    runs, reasons, agree = [], {}, True
    for path in sorted(folder.glob("*.json")):
        try:
            runs.append(open_stored(path))
        except RunError as error:
            print(error)
            agree = False
    runs = sorted((run for run in runs if run.model is not None), key=_arguments)
    print(f"{'published run':<46}{'':<9}test accuracy (%): card, here")
    for arguments, group in groupby(runs, key=_arguments):
        data, name = None, json.loads(arguments)["name"]
        try:
            data = load_data(**json.loads(arguments))
        except (DataError, ValueError) as error:
            reasons[f"No {name}"] = first_line(error)
        for run in group:
            if data is not None and data.fingerprint == run.info["data"]["fingerprint"]:
                verdict, line = _compare(run, data)
                agree = agree and verdict != "differs"
            elif data is None:
                verdict, line = "skipped", f"needs {name}"
            else:
                verdict, line = "skipped", f"other data than {name} here"
                reasons["Other data"] = "another copy, or images or labels that a notebook changed."
            print(f"{run.name:<46}{verdict:<9}{line}", flush=True)
    for what, reason in reasons.items():
        print(f"{what}: {reason}")
    return agree


def _arguments(run: Run) -> str:
    about = run.info["data"]
    # Older cards do not say: the usual cut.
    return json.dumps(about.get("loaded") or {"name": about["name"]})


def _compare(run: Run, data: ImageData) -> tuple[str, str]:
    """Verdict and numbers for a run and its own data."""
    device, precision = data.test.images.device, run.info.get("precision", "float32")
    allowed = 0.05 if usable_precision(precision, device) == precision else 0.3
    again = replace(run, model=run.model.to(device), scores={})
    verdict, shown = "agrees", []
    for name, known in run.scores.items():
        card, here = (100 * m.accuracy for m in (known, again.test(data, tta=name == "test_flip")))
        verdict = "differs" if abs(card - here) > allowed + 1e-9 else verdict
        shown.append(f"{name} {card:.2f}, {here:.2f}")
    return (verdict, "; ".join(shown)) if shown else ("loads", "no score on its card")


if __name__ == "__main__":
    sys.exit(not verify(models_dir()))
