"""Where files belong, and how they are written: whole or not at all."""

import hashlib
import json
import os
import re
import secrets
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any, BinaryIO


def digest(value: Any) -> str:
    """Twelve hexadecimal digits that name a JSON value."""
    text = json.dumps(value, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()[:12]


def file_name(text: str) -> str:
    """The text with a dash for all that not every file system has in a name."""
    return re.sub(r"[^\w.-]+", "-", text, flags=re.ASCII)


def project_dir() -> Path:
    """The checkout that labutils is part of; the working directory if it is installed alone."""
    checkout = Path(__file__).resolve().parents[2]
    return checkout if (checkout / "notebooks").is_dir() else Path.cwd()


def _folder(name: str) -> Path:
    path = os.environ.get(f"LABUTILS_{name.upper()}") or project_dir() / name
    return Path(path).expanduser().resolve()


data_dir = partial(_folder, "data")  # where data sets are looked for: $LABUTILS_DATA, else data/
runs_dir = partial(_folder, "runs")  # where runs are kept: $LABUTILS_RUNS, else runs/
models_dir = partial(_folder, "models")  # where published runs are kept
images_dir = partial(_folder, "images")  # where reports leave their figures


@contextmanager
def atomic_write(path: Path) -> Iterator[BinaryIO]:
    """A new binary file that takes the place of `path` when the block ends well, and only then."""
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


def write_sealed(path: Path, content: bytes, owner: str = "") -> None:
    """Write a file atomically, behind the SHA-256 of its owner's name and its content."""
    with atomic_write(path) as file:
        file.write(hashlib.sha256(owner.encode() + content).digest())
        file.write(content)


def read_sealed(path: Path, owner: str = "") -> bytes:
    """What write_sealed wrote for this owner; ValueError if a bit of it is another."""
    stored = path.read_bytes()
    seal, content = stored[:32], stored[32:]
    if hashlib.sha256(owner.encode() + content).digest() != seal:
        raise ValueError("it was cut short or is damaged")
    return content


def write_json(path: Path, value: Any) -> None:
    """Write a JSON file atomically: indented for people, but a list of numbers on one line."""
    text = json.dumps(value, indent=1, ensure_ascii=False)
    # JSON strings hold no line break, so a string with brackets in it is left alone.
    text = re.sub(r'\[\n([^\[\]{}"]*)\n *\]', lambda match: f"[{' '.join(match[1].split())}]", text)
    with atomic_write(path) as file:
        # A folder's name that is not UTF-8 holds characters that only an escape can write.
        file.write(f"{text}\n".encode(errors="backslashreplace"))
