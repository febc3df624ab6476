"""A notebook's parameters: what its cell tagged `parameters` has, and values that fit them.

The command line checks names and types before a kernel starts; the library checks the values.
"""

import ast
import re
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Annotated, Any, NotRequired

import nbformat
import yaml
from pydantic import Field

from ..base import settings


class NotebookError(RuntimeError):
    """A notebook does not exist, cannot be read, or a cell of it failed."""


class _Loader(yaml.SafeLoader):
    """YAML 1.1, to which 1e-3 is a word; here it is a number, as in YAML 1.2 and JSON."""


_FLOAT = re.compile(r"[-+]?\d+(\.\d*)?[eE][-+]?\d+$")
_Loader.add_implicit_resolver("tag:yaml.org,2002:float", _FLOAT, list("-+0123456789"))


def from_yaml(text: str, *, owner: str) -> Any:
    """The value that a text stands for. Raises ValueError naming its owner if it is no YAML."""
    try:
        return yaml.load(text, _Loader)
    except (yaml.YAMLError, ValueError) as error:  # ValueError: the 13th month, say
        problem = getattr(error, "problem", None) or settings.first_line(error)
        raise ValueError(f"{owner} is no YAML: {problem}. Lists are written [3, 10].") from None


def of_notebook(path: Path) -> dict[str, Any]:
    """Names and literals, else None, of the cell tagged `parameters`; ValueError without one."""
    for cell in read(path).cells:
        if "parameters" in cell.metadata.get("tags", []):
            return _assigned(cell.source)
    raise ValueError(f"{path.name} has no cell tagged 'parameters'. Tag the one that sets them.")


def read(path: Path) -> nbformat.NotebookNode:
    """A notebook from its file. Raises NotebookError naming it if it is damaged."""
    try:
        notebook = nbformat.read(path, as_version=4)
        nbformat.validate(notebook)
        return notebook
    except Exception as error:  # JSON that is no notebook fails in many ways
        reason = f"{path} is no notebook ({settings.first_line(error)})"
        raise NotebookError(f"{reason}. Restore it, or execute it again.") from None


def check(values: Mapping[str, Any], defaults: Mapping[str, Any], *, owner: str) -> dict[str, Any]:
    """The values; an int given for a float becomes one. defaults: of all parameters.

    Raises ValueError with one line for each name that is not among them or value of another type.
    """
    kinds = {name: NotRequired[_hint(default)] for name, default in defaults.items()}
    return settings.check(owner, kinds, values)


def _assigned(source: str) -> dict[str, Any]:
    """What code assigns at its top level: names and literals, None for other values."""
    found: dict[str, Any] = {}
    with suppress(SyntaxError):
        for statement in ast.parse(source).body:
            targets = statement.targets if isinstance(statement, ast.Assign) else []
            if isinstance(statement, ast.AnnAssign) and statement.value:
                targets = [statement.target]
            for target in targets:
                if isinstance(target, ast.Name):
                    found[target.id] = None
                    with suppress(ValueError):
                        found[target.id] = ast.literal_eval(statement.value)
    return found


def _hint(default: Any) -> Any:
    """The type of a default; of a list, whose items have one type, so do those that are given."""
    if isinstance(default, list) and len({type(item) for item in default}) == 1:
        return Annotated[list[_hint(default[0])], Field(min_length=1)]
    return Any if default is None else type(default)
