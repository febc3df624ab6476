"""A notebook's parameters: what its cell tagged `parameters` has, and which values make sense.

The command line checks them before a kernel starts, `lab.start` in the kernel, so that papermill
alone and a person in JupyterLab get the same errors, in one line and before anything trains.
"""

from __future__ import annotations

import ast
import re
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import AfterValidator, BeforeValidator, Field
from pydantic_core import PydanticCustomError

from ..base import settings
from ..base.settings import NonNegativeFloat, PositiveFloat, PositiveInt, Seed

EXPONENT = re.compile(r"[-+]?\d+(\.\d*)?[eE][-+]?\d+")


def _number(value: Any) -> Any:
    """YAML takes 1e-3 for text."""
    return float(value) if isinstance(value, str) and EXPONENT.fullmatch(value) else value


def _choices(values: list) -> list:
    if not values or len(set(values)) < len(values):
        raise PydanticCustomError("choices", "Give at least one value, and none twice")
    return values


# What values make sense, by the last words of a parameter's name. The library checks all others.
# A name with an s added is that of a list of such values: not empty, and none twice.
RULES = {
    "profile": Literal["quick", "full"],
    "seed": Seed,
    "epochs": PositiveInt,
    "batch_size": Annotated[int, Field(ge=2)],  # batch norm has nothing to compare one image with
    "width": PositiveInt,
    "depth": PositiveInt,
    "runs": PositiveInt,
    "lr": Annotated[PositiveFloat, BeforeValidator(_number)],
    "distortion": Annotated[NonNegativeFloat, BeforeValidator(_number)],
    "val_size": Annotated[float, Field(gt=0, lt=1)] | PositiveInt,  # a share, or how many images
}


def from_yaml(text: str, *, owner: str) -> Any:
    """The value that a text stands for. Raises ValueError naming its owner if it is no YAML."""
    try:
        return yaml.safe_load(text)
    except yaml.YAMLError as error:
        problem = getattr(error, "problem", None) or settings.first_line(error)
        raise ValueError(f"{owner} is no YAML: {problem}. Lists are written [3, 10].") from None


def of_notebook(path: Path) -> dict[str, Any]:
    """Names and default values of the cell tagged `parameters`; None for what is no literal.

    Raises ValueError if there is no such cell.
    """
    import nbformat

    for cell in nbformat.read(path, as_version=4).cells:
        if "parameters" in cell.metadata.get("tags", []):
            return _assigned(cell.source)
    raise ValueError(f"{path.name} has no cell tagged 'parameters'. Tag the one that sets them.")


def check(values: Mapping[str, Any], defaults: Mapping[str, Any], *, owner: str) -> dict[str, Any]:
    """Refuse names that a notebook does not have, and values that make no sense for it.

    defaults: all its parameters. owner: named in the error. Returns the values; an int that is
    given for a float becomes one. Raises ValueError with one line: name, value, what is allowed.
    """
    checked = {}
    for name, value in values.items():
        if name not in defaults:
            raise ValueError(
                f"{owner} has no parameter {name!r}.{settings.suggestion(name, defaults)} "
                f"It has: {', '.join(defaults)}."
            )
        try:
            checked |= settings.check(owner, {name: _hint(name, defaults[name])}, {name: value})
        except ValueError as error:
            line, default = settings.first_line(error), repr(defaults[name])
            # In a kernel the default may be what somebody wrote there.
            hint = f" Its default: {default}." if repr(value) != default else ""
            raise ValueError(line + hint) from None
    return checked


def check_session() -> dict[str, Any] | None:
    """Check the parameters of the notebook in this kernel, as they are now, and return them.

    None where no executed cell sets `profile`, as outside of a notebook.
    Raises ValueError as check does, for unknown names that papermill injected as well.
    """
    ipython = sys.modules["IPython"].get_ipython() if "IPython" in sys.modules else None
    defaults: dict[str, Any] = {}
    injected: dict[str, Any] = {}
    for source in ipython.user_ns["In"] if ipython else []:
        if source.startswith("# Parameters"):  # so begins the cell that papermill adds
            injected = _assigned(source)
        elif "profile" in (assigned := _assigned(source)):
            defaults, injected = assigned, {}
    if not defaults:
        return None
    values = {name: ipython.user_ns[name] for name in [*injected, *defaults]}
    return check(values, defaults, owner="The parameters cell")


def _assigned(source: str) -> dict[str, Any]:
    """What code assigns at its top level: names and literals, None for other values."""
    try:
        statements = [part for part in ast.parse(source).body if isinstance(part, ast.Assign)]
    except SyntaxError:
        return {}
    found = {}
    for statement in statements:
        for name in (target.id for target in statement.targets if isinstance(target, ast.Name)):
            try:
                found[name] = ast.literal_eval(statement.value)
            except ValueError:
                found[name] = None
    return found


def _hint(name: str, default: Any) -> Any:
    """The type hint of a parameter: by its name if there is a rule for it, else by its default."""
    words = name.split("_")
    for ending in ("_".join(words[start:]) for start in range(len(words))):
        if ending in RULES:
            return RULES[ending]
        if ending.endswith("s") and ending[:-1] in RULES:
            return Annotated[list[RULES[ending[:-1]]], AfterValidator(_choices)]
    return _like(default)


def _like(default: Any) -> Any:
    if isinstance(default, list) and len({type(item) for item in default}) == 1:
        return Annotated[list[_like(default[0])], Field(min_length=1)]
    if isinstance(default, float):
        return Annotated[float, BeforeValidator(_number)]
    return Any if default is None else type(default)
