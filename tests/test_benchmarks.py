"""Benchmarks that take seconds run at their smallest; what they measure is no test."""

import importlib.util
import math
import re
import sys
from pathlib import Path

import pandas as pd
import pytest
import torch

from labutils.base.device import usable_precision

BENCHMARKS = Path(__file__).resolve().parent.parent / "benchmarks"
SMALL = {  # arguments, and rows of all tables
    "cam": (["--images", "2", "--turns", "1", "--methods", "gradcam"], 6),
    "distillation": (["--images", "128", "--turns", "1"], 4),
    "loop": (["--repeats", "1"], 5),
    "throughput": (
        ["--images", "128", "--seconds", "0.05", "--turns", "1", "--models", "simplecnn"],
        10 + 2 * (usable_precision("auto", torch.device("cpu")) != "float32"),
    ),
}


@pytest.fixture
def script(monkeypatch):
    """A benchmark, imported as the others import it."""
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    return importlib.import_module


def run(module, monkeypatch, arguments):
    monkeypatch.setattr(sys, "argv", [f"{module.__name__}.py", *arguments])
    module.main()


@pytest.mark.parametrize("name", SMALL)
def test_a_benchmark_fills_its_tables(script, monkeypatch, capsys, name):
    module, (arguments, count) = script(name), SMALL[name]
    if name == "loop":
        monkeypatch.setattr(module, "IMAGES", 512)
    run(module, monkeypatch, arguments)
    lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith("|")]
    rules = [place for place, line in enumerate(lines) if set(line) <= set("|-")]
    rows = [line for place, line in enumerate(lines) if not {place, place + 1} & {*rules}]
    assert len(rows) == count + (importlib.util.find_spec("captum") is not None) * (name == "cam")
    for row in rows:
        assert re.search(r"\d\.\d\d", row)  # the ratio, in its last column
        assert not re.search(r"\b(nan|inf)\b", row)


@pytest.mark.parametrize(
    ("name", "arguments"),
    [
        ("cam", ["--images", "1"]),
        ("loop", ["--repeats", "0"]),
        ("throughput", ["--images", "100"]),
        ("throughput", ["--turns", "0"]),
        ("distillation", ["--images", "127"]),
        ("record", ["--rounds", "0"]),
        ("synthetic", ["--repeats", "0"]),
    ],
)
def test_a_benchmark_of_nothing_says_what_it_needs(script, monkeypatch, capsys, name, arguments):
    with pytest.raises(SystemExit, match="2"):
        run(script(name), monkeypatch, arguments)
    assert f"{arguments[0]}: {arguments[1]} is too low" in capsys.readouterr().err


def test_threads_are_not_compared_with_themselves(script, monkeypatch):
    with pytest.raises(SystemExit, match="one thread"):
        run(script("threads"), monkeypatch, [])


def test_a_seed_that_never_reaches_the_goal_is_not_left_out_of_the_mean(script, capsys):
    row = {"training": "narrow", "PFLOP": 0.001}
    script("record").print_table(pd.DataFrame([row | {"to goal": x} for x in (20, math.inf, 22)]))
    assert "| narrow | 3 | never in 1 | 1.00" in capsys.readouterr().out
