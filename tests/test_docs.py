"""What the documentation tells people to type works as it stands."""

import inspect
import re
import shlex
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from labutils.__main__ import commands
from labutils.notebook import batch, parameters, sweep

ROOT = Path(__file__).resolve().parent.parent
PAGES = [*ROOT.glob("*.md"), *ROOT.glob("docs/*.md")]
PAGES += ROOT.glob("[!.]*/README.md")  # not of a cache of pytest
TEXTS = {str(page.relative_to(ROOT)): page.read_text() for page in PAGES}
EXAMPLES = [
    pytest.param(example, id=f"{name}-{number}")
    for name, text in TEXTS.items()
    for number, example in enumerate(re.findall(r"```python\n(.*?)```", text, re.DOTALL))
]
SHORT = {  # training images, and parameters with which their notebook is done in no time
    "1.1": (65, {"seeds": [0], "epochs": 1, "distortions": [0.0], "grid_epochs": 1}),
    "1.2": (90, {"seeds": [0], "depths": [2], "sweep_epochs": 1, "epochs": 1, "deep_epochs": 1}),
    "1.3": (90, {"seeds": [0], "epochs": 1, "fast_epochs": 1, "study_lengths": [1, 1], "width": 4}),
}
HELP = [inspect.getdoc(command.callback) for command in commands.commands.values()]
COMMANDS = {
    command.strip()
    for text in [*TEXTS.values(), *HELP]
    for command in re.findall(r"python -m labutils (.+?)(?:`|  |\n|$)", text)
}


@pytest.mark.parametrize("example", EXAMPLES)
def test_an_example_runs(example, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("LABUTILS_DATA", "data")
    Path("data").mkdir()
    exec(compile(example, "example", "exec"), {})


@pytest.mark.parametrize("number", SHORT)
def test_a_notebook_takes_images_of_your_own(number, tmp_path, monkeypatch):
    # Few, in grey and of another size than those that the notebook was written for.
    count, given = SHORT[number]
    images = np.random.default_rng(0).integers(0, 256, (count + 90, 14, 14), np.uint8)
    labels = np.arange(count + 90) % 3
    arrays = {"x_train": images[:count], "y_train": labels[:count]}
    np.savez(tmp_path / "mine.npz", x_test=images[count:], y_test=labels[count:], **arrays)
    for variable in ("LABUTILS_DATA", "LABUTILS_RUNS"):
        monkeypatch.setenv(variable, str(tmp_path))
    [path] = batch.find_notebooks(number)
    job = batch.prepare(path, tmp_path, {"dataset": "mine"} | given)
    batch.execute(replace(job, failed=tmp_path / "failed.ipynb"))
    verdicts = {row["claim"]: row["verdict"] for row in job.reported()["rows"]}
    if number == "1.1":  # with a batch or two an epoch, too
        resumed = "A training that was cut off goes on, and ends with the same bits"
        assert verdicts[resumed] == "holds"


@pytest.mark.parametrize("command", sorted(COMMANDS))
def test_a_command_is_understood(command):
    name, *arguments = shlex.split(command)
    given = commands.commands[name].make_context(name, arguments).params
    if given.get("notebook", "X") == "X":
        return
    path, *others = batch.find_notebooks(given["notebook"])
    if name == "sweep":
        assert sweep.grid(path, given["axes"])
    elif not others:
        values = {key: parameters.from_yaml(text, owner=key) for key, text in given["given"]}
        parameters.check(values, parameters.of_notebook(path), owner=command)


@pytest.mark.parametrize("name", TEXTS)
def test_targets_of_make_exist(name):
    targets = set(re.findall(r"^(\w+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    assert set(re.findall(r"(?:`|^)make (\w+)", TEXTS[name], re.MULTILINE)) <= targets


@pytest.mark.parametrize("name", TEXTS)
def test_links_lead_to_what_is_there(name):
    for target in re.findall(r"\]\(([^)#]+)[^)]*\)", TEXTS[name]):
        assert target.startswith("https://") or (ROOT / name).parent.joinpath(target).exists()
