"""How a run's card and weights are written, atomically, and read: as they were, or an error.

A card: name, key, digest (of the rest), weights (SHA-256 or null), command, test, info, history.
"""

import hashlib
import json
from pathlib import Path
from typing import Any

import safetensors.torch as st
from safetensors import SafetensorError
from torch import Tensor, nn

from ..base.files import atomic_write, digest, write_json
from .key import recorded_key


class RunError(RuntimeError):
    """A run cannot be started, stored, continued or used."""


def read(path: Path) -> dict[str, Any]:
    """Raises ValueError if it is not as write left it, or the card of another run."""
    text = path.read_text(encoding="utf-8")
    card = json.loads(text)
    if card["digest"] != _card_digest(text):
        raise ValueError(f"{path.name} is not what was written: its digest is of another text")
    home = path.parent.name.removesuffix(".old") if path.name == "card.json" else path.stem
    require_own(home, card["name"], card["key"], card["info"])
    return card


def require_own(home: str, name: str, key: str, info: dict[str, Any]) -> None:
    """Raises ValueError unless home is the name of a run's card or folder, and the key its own."""
    if home != f"{name}-{key}" or key != recorded_key(info):
        raise ValueError(f"{name}-{key} is not the name of this card or the key of its settings")


def write(path: Path, card: dict[str, Any]) -> None:
    write_json(path, card | {"digest": _card_digest(json.dumps(card))})


def _card_digest(text: str) -> str:
    # Numbers as they are written, to the last digit.
    return digest(json.loads(text, parse_float=str) | {"digest": None})


def sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def save_weights(path: Path, state: dict[str, Tensor]) -> None:
    with atomic_write(path) as file:
        file.write(st.save({name: value.contiguous().cpu() for name, value in state.items()}))


def load_weights(model: nn.Module, path: Path, written: str | None = None) -> None:
    """Read them into a model. Raises ValueError if one does not fit or is not finite.

    written: their SHA-256, if ValueError is to be raised for any other.
    """
    stored = path.read_bytes()
    if written not in (None, hashlib.sha256(stored).hexdigest()):
        raise ValueError(f"{path.name} is not what was stored with the card")
    try:
        state = st.load(stored)
        for name, _ in model.named_parameters():
            if name in state and not state[name].isfinite().all():
                raise ValueError(f"{path.name} has values in {name} that are not finite")
        model.load_state_dict(state)
    except (SafetensorError, RuntimeError) as error:
        raise ValueError(f"{path.name} does not fit the model: {error}") from error


def copy_weights(source: Path, target: Path, *, half: bool) -> None:
    """half: as float16. Raises RunError if a value is too large for it."""
    state = st.load(source.read_bytes())
    for name, value in state.items() if half else ():
        state[name] = value.half() if value.is_floating_point() else value
        if not state[name].isfinite().all():
            raise RunError(f"{source}: {name} exceeds float16's 65504. Publish it without half.")
    save_weights(target, state)
