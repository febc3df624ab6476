"""Parameters: read from their cell, and checked by name and type."""

import re
from pathlib import Path

import nbformat
import pytest
import yaml
from nbformat.v4 import new_code_cell, new_notebook

from labutils.notebook import parameters

DEFAULTS = {
    "profile": "quick",
    "seeds": [0, 1],
    "depths": [2, 5],
    "lrs": [0.1],
    "grid_widths": [3, 10],
    "grid_depths": [1, 2],
    "grid_epochs": 15,
    "distortions": [0.0, 1.5],
    "distortion": 1.0,
    "epochs": 3,
    "batch_size": 32,
    "large_runs": 1,
    "lr": 0.1,
    "val_size": 0.1,
    "name": "a",
    "models": ["cnn"],
    "longer_models": [],
    "sizes": [[3], [10]],
    "mixed": [1, "a"],
    "momentum": 0.9,
    "retrain": True,
    "nothing": None,
}


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("seeds", [0, True], "valid integer"),
        ("seeds", 3, "valid list"),
        ("seeds", "(0, 1)", "valid list"),
        ("depths", [], "at least 1 item"),
        ("grid_widths", [], "at least 1 item"),
        ("epochs", "3", "valid integer"),
        ("epochs", 2.5, "valid integer"),
        ("epochs", True, "valid integer"),
        ("epochs", [3], "valid integer"),
        ("lrs", [], "at least 1 item"),
        ("lr", "0.1", "valid number"),
        ("lr", "1e-3", "valid number"),
        ("momentum", "0.9", "valid number"),
        ("distortions", [], "at least 1 item"),
        ("name", 3, "valid string"),
        ("models", [], "at least 1 item"),
        ("models", [3], "valid string"),
        ("sizes", [3], "valid list"),
        ("retrain", 1, "valid boolean"),
        ("retrain", "False", "valid boolean"),
    ],
)
def test_a_value_of_another_type_is_refused_in_one_line(name, value, message):
    with pytest.raises(ValueError, match=f"^run: 1.1: {name}") as error:
        parameters.check({name: value}, DEFAULTS, owner="run: 1.1")
    assert message in str(error.value)
    assert "\n" not in str(error.value)
    assert re.search(re.escape(repr(value)) + r"|\[\d\] = ", str(error.value))


@pytest.mark.parametrize(
    ("name", "value", "checked"),
    [
        ("seeds", [2**32 - 1, 0], [2**32 - 1, 0]),
        ("lr", 1, 1.0),
        ("lrs", [1, 0.5], [1.0, 0.5]),
        ("distortions", [0], [0.0]),
        ("batch_size", 2, 2),
        ("val_size", 0.2, 0.2),
        ("longer_models", ["cnn"], ["cnn"]),
        ("longer_models", [], []),
        ("mixed", [None], [None]),
        ("sizes", [[3, 3]], [[3, 3]]),
        ("nothing", "anything", "anything"),
    ],
)
def test_a_value_that_fits_becomes_one_of_the_type_of_its_default(name, value, checked):
    found = parameters.check({name: value}, DEFAULTS, owner="run: 1.1")
    assert found == {name: checked}
    assert type(found[name]) is type(checked)


def test_an_unknown_name_is_refused_with_a_suggestion():
    with pytest.raises(ValueError, match=r"^run: 1\.1: epoch = 3\. .*\. Did you mean 'epochs'\?"):
        parameters.check({"epoch": 3}, DEFAULTS, owner="run: 1.1")
    with pytest.raises(ValueError, match=r"^run: 1\.1: x = 3\..* Known: profile, seeds, depths"):
        parameters.check({"x": 3}, DEFAULTS, owner="run: 1.1")


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("1e-3", 0.001),
        ("[1e-3,.5]", [0.001, 0.5]),
        ("lr: 1e-3", {"lr": 0.001}),
        ("[1e5, -9E-1, 1.5e+2]", [1e5, -0.9, 150.0]),
        ("[3, 0.1, 1.5]", [3, 0.1, 1.5]),
        ("[e3, 1e, 1e3x, '1e3']", ["e3", "1e", "1e3x", "1e3"]),
        ("{true: ~}", {True: None}),
    ],
)
def test_text_stands_for_the_value_that_it_looks_like(text, value):
    found = parameters.from_yaml(text, owner="run: -p lr")
    assert found == value
    assert type(found) is type(value)


@pytest.mark.parametrize("text", ["[1", "{", "a: b: c", "'x", "@", "\t- x"])
def test_text_that_is_no_yaml_is_refused_in_one_line(text):
    with pytest.raises(ValueError, match=r"^run: -p epochs is no YAML: ") as error:
        parameters.from_yaml(text, owner="run: -p epochs")
    assert "\n" not in str(error.value)


def test_all_notebooks_and_their_full_profiles_pass():
    folder = Path(__file__).resolve().parents[2] / "notebooks"
    for path in folder.glob("*.ipynb"):
        known = parameters.of_notebook(path)
        full = yaml.safe_load((folder / "full" / f"{path.stem}.yaml").read_text())
        assert parameters.check(known, known, owner=path.stem) == known
        assert parameters.check(full, known, owner=path.stem) == full


def write_notebook(path, source, *cells):
    tagged = new_code_cell(source, metadata={"tags": ["parameters"]})
    kernel = {"name": "python3", "display_name": "Python 3", "language": "python"}
    cells = [new_code_cell("import labutils"), tagged, *map(new_code_cell, cells)]
    nbformat.write(new_notebook(cells=cells, metadata={"kernelspec": kernel}), path)


def test_the_cell_gives_names_and_literals(tmp_path):
    write_notebook(tmp_path / "a.ipynb", 'a = 3  # why\nb, c = 1, 2\nd = e = [1, "x"]\nf = 2 * a')
    known = parameters.of_notebook(tmp_path / "a.ipynb")
    assert known == {"a": 3, "d": [1, "x"], "e": [1, "x"], "f": None}


def test_an_annotated_parameter_is_one(tmp_path):
    write_notebook(tmp_path / "a.ipynb", "a: int = 3\nb: list[float] = [0.5]\nc: str")
    assert parameters.of_notebook(tmp_path / "a.ipynb") == {"a": 3, "b": [0.5]}
