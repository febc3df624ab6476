"""What the documentation tells people to type works as it stands."""

import inspect
import re
import shlex
from pathlib import Path

import pytest

from labutils.__main__ import commands
from labutils.notebook import parameters, sweep
from labutils.notebook.batch import find_notebooks

ROOT = Path(__file__).resolve().parent.parent
PAGES = [*ROOT.glob("*.md"), *ROOT.glob("[!.]*/README.md")]  # not of a cache of pytest
TEXTS = {str(page.relative_to(ROOT)): page.read_text() for page in PAGES}
EXAMPLES = [
    pytest.param(example, id=f"{name}-{number}")
    for name, text in TEXTS.items()
    for number, example in enumerate(re.findall(r"```python\n(.*?)```", text, re.DOTALL))
]
HELP = [inspect.getdoc(command.callback) for command in commands.commands.values()]
COMMANDS = {
    command.strip()
    for text in [*TEXTS.values(), *HELP]
    for command in re.findall(r"python -m labutils (.+?)(?:`|  |\n|$)", text)
}


@pytest.mark.parametrize("example", EXAMPLES)
def test_an_example_runs(example, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    exec(compile(example, "example", "exec"), {})


@pytest.mark.parametrize("command", sorted(COMMANDS))
def test_a_command_is_understood(command):
    name, *arguments = shlex.split(command)
    given = commands.commands[name].make_context(name, arguments).params
    if given.get("notebook", "X") == "X":
        return
    path, *others = find_notebooks(given["notebook"])
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
