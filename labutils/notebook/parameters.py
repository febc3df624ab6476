"""A notebook's parameters: what its cell tagged `parameters` has, and which values make sense.

The command line checks them before a kernel starts, `lab.start` in it, for papermill and people.
"""

import ast
import json
import sys
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Annotated, Any, Literal, NotRequired

import yaml
from pydantic import AfterValidator, Field
from pydantic_core import PydanticCustomError

from ..base import settings
from ..base.settings import NonNegativeFloat, PositiveFloat, PositiveInt, Seed


def _choices(values: list) -> list:
    if not values or len(set(values)) < len(values):
        raise PydanticCustomError("choices", "Give at least one value, and none twice")
    return values


# What values make sense, by the last words of a parameter's name. The library checks all others.
RULES = {
    "profile": Literal["quick", "full"],
    "seed": Seed,
    **dict.fromkeys(["epochs", "width", "depth", "runs"], PositiveInt),
    "batch_size": Annotated[int, Field(ge=2)],  # batch norm has nothing to compare one image with
    "lr": PositiveFloat,
    "distortion": NonNegativeFloat,
    "val_size": Annotated[float, Field(gt=0, lt=1)] | PositiveInt,  # a share, or how many images
}
RULES |= {
    f"{name}s": Annotated[list[kind], AfterValidator(_choices)] for name, kind in RULES.items()
}


def from_yaml(text: str, *, owner: str) -> Any:
    """The value that a text stands for. Raises ValueError naming its owner if it is no YAML."""
    with suppress(ValueError):
        return json.loads(text)  # in YAML 1.1, 1e-3 is no number
    try:
        return yaml.safe_load(text)
    except yaml.YAMLError as error:
        problem = getattr(error, "problem", None) or settings.first_line(error)
        raise ValueError(f"{owner} is no YAML: {problem}. Lists are written [3, 10].") from None


def of_notebook(path: Path) -> dict[str, Any]:
    """Names and literals, else None, of the cell tagged `parameters`. ValueError without one."""
    import nbformat

    for cell in nbformat.read(path, as_version=4).cells:
        if "parameters" in cell.metadata.get("tags", []):
            return _assigned(cell.source)
    raise ValueError(f"{path.name} has no cell tagged 'parameters'. Tag the one that sets them.")


def check(values: Mapping[str, Any], defaults: Mapping[str, Any], *, owner: str) -> dict[str, Any]:
    """The values; an int given for a float becomes one. defaults: of all parameters.

    Raises ValueError with one line for a name that is not among them or a value out of place.
    """
    kinds = {name: NotRequired[_hint(name, default)] for name, default in defaults.items()}
    checked = {}
    for name, value in values.items():
        try:
            checked |= settings.check(owner, kinds, {name: value})
        except ValueError as error:
            # In a kernel the default may be what somebody wrote there.
            known = name in defaults and repr(defaults[name]) != repr(value)
            hint = f" Its default: {defaults[name]!r}." if known else ""
            raise ValueError(settings.first_line(error) + hint) from None
    return checked


def check_session() -> dict[str, Any]:
    """Check the parameters of the notebook in this kernel, as they are now or as papermill injected
    them, and return them; none where no executed cell sets `profile`. Raises as check does."""
    ipython = sys.modules["IPython"].get_ipython() if "IPython" in sys.modules else None
    defaults, injected = {}, {}
    for source in ipython.user_ns["In"] if ipython else []:
        if source.startswith("# Parameters"):  # so begins the cell that papermill adds
            injected = _assigned(source)
        elif "profile" in (assigned := _assigned(source)):
            defaults, injected = assigned, {}
    values = {name: ipython.user_ns[name] for name in [*injected, *defaults] if defaults}
    return check(values, defaults, owner="The parameters cell")


def _assigned(source: str) -> dict[str, Any]:
    """What code assigns at its top level: names and literals, None for other values."""
    found: dict[str, Any] = {}
    with suppress(SyntaxError):
        for statement in ast.parse(source).body:
            for target in statement.targets if isinstance(statement, ast.Assign) else []:
                if isinstance(target, ast.Name):
                    found[target.id] = None
                    with suppress(ValueError):
                        found[target.id] = ast.literal_eval(statement.value)
    return found


def _hint(name: str, default: Any) -> Any:
    """The type hint of a parameter: by its name if there is a rule for it, else by its default."""
    while name and name not in RULES:
        name = name.partition("_")[2]
    if name:
        return RULES[name]
    if isinstance(default, list) and len({type(item) for item in default}) == 1:
        return Annotated[list[_hint("", default[0])], Field(min_length=1)]
    return Any if default is None else type(default)
