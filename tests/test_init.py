"""What `import labutils as lab` gives, and what it costs."""

import importlib
import inspect
import re
import subprocess
import sys

import pytest

import labutils as lab


@pytest.mark.parametrize("name", lab.__all__)
def test_every_exported_name_resolves(name):
    assert getattr(lab, name) is not None


def test_exported_names_are_those_of_their_modules():
    for module, names in lab._EXPORTS.items():
        home = importlib.import_module(f"labutils.{module}")
        for name in names:
            assert getattr(lab, name) is getattr(home, name)


def test_names_are_exported_once_and_listed():
    assert len(set(lab.__all__)) == len(lab.__all__)
    assert dir(lab) == sorted(lab.__all__)


def test_an_unknown_name_is_an_error_that_lists_the_known_ones():
    with pytest.raises(AttributeError, match="labutils has no 'trian'") as caught:
        lab.trian  # noqa: B018
    assert all(name in str(caught.value) for name in lab.__all__)
    assert not hasattr(lab, "__wrapped__")


def test_heavy_packages_wait_until_they_are_used():
    code = """
import sys
import labutils as lab
assert "torch" not in sys.modules
lab.TrainConfig, lab.MLP, lab.load_data, lab.evaluate, lab.train
heavy = "wandb tensorboard sklearn matplotlib seaborn pandas pytorch_grad_cam dask"
heavy += " IPython ipywidgets"
print([name for name in heavy.split() if name in sys.modules])
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def exported_callables():
    for name in lab.__all__:
        value = getattr(lab, name)
        if inspect.isclass(value):
            methods = {
                n: f for n, f in vars(value).items() if n[0] != "_" and inspect.isfunction(f)
            }
            yield from ((f"{name}.{method}", function) for method, function in methods.items())
        if callable(value):
            yield name, value


@pytest.mark.parametrize(("name", "value"), list(exported_callables()))
def test_a_docstring_says_shapes_of_tensors_and_errors_that_are_raised(name, value):
    assert inspect.getdoc(value), f"{name} has no docstring"
    if inspect.isfunction(value):
        if re.search("Tensor|ndarray", str(inspect.signature(value))):
            assert re.search(r"\[[^]]+\]", value.__doc__), f"{name}: of which shape is its tensor?"
        for error in re.findall(r"raise (\w+)\(", inspect.getsource(value)):
            assert error in value.__doc__, f"{name} raises {error} and does not say so"
