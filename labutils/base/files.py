"""Where files belong, and how they are written: whole or not at all."""

from __future__ import annotations

import hashlib
import json
import os
import re
import secrets
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO


def digest(value: Any) -> str:
    """Twelve hexadecimal digits that name a JSON value."""
    text = json.dumps(value, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()[:12]


def project_dir() -> Path:
    """The checkout that labutils is part of, or the working directory when it is installed alone.

    Notebooks run with varying working directories, so no other path is taken from there.
    """
    checkout = Path(__file__).resolve().parents[2]
    return checkout if (checkout / "notebooks").is_dir() else Path.cwd()


def data_dir() -> Path:
    """Where data sets are looked for: $LABUTILS_DATA, else data/ in the project."""
    return _folder("LABUTILS_DATA", "data")


def runs_dir() -> Path:
    """Where runs are kept: $LABUTILS_RUNS, else runs/ in the project."""
    return _folder("LABUTILS_RUNS", "runs")


def _folder(variable: str, name: str) -> Path:
    # pathlib's own would raise where ~NAME is no user, or a link leads back to itself.
    path = os.environ.get(variable) or project_dir() / name
    return Path(os.path.realpath(os.path.expanduser(path)))  # noqa: PTH111


def models_dir() -> Path:
    """Where published runs are kept: models/ in the project."""
    return project_dir() / "models"


def images_dir() -> Path:
    """Where reports leave their figures: images/ in the project."""
    return project_dir() / "images"


@contextmanager
def atomic_write(path: Path) -> Iterator[BinaryIO]:
    """Yield a binary file that takes the place of path when the block ends well.

    Readers see the old content or the new, never a part; after an error or a kill the old stays.
    Raises OSError as the system reports it.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    # tempfile would make a file that only its owner may read.
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(4)}.tmp")
    try:
        with temporary.open("xb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def write_json(path: Path, value: Any) -> None:
    """Write a JSON file atomically: indented for people, but a list of numbers on one line."""
    text = json.dumps(value, indent=1, ensure_ascii=False)
    # JSON strings hold no line break, so a string with brackets in it is left alone.
    numbers = r"\[\n([^\[\]{}\"]*)\n *\]"
    text = re.sub(numbers, lambda match: f"[{' '.join(match[1].split())}]", text)
    with atomic_write(path) as file:
        # A folder's name that is not UTF-8 holds characters that only an escape can write.
        file.write(f"{text}\n".encode(errors="backslashreplace"))
