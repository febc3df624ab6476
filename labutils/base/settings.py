"""Settings of a training run, and what every module shares: folders, device, seeds, safe writes.

Nothing here knows about networks.
"""

from __future__ import annotations

import dataclasses
import difflib
import functools
import hashlib
import json
import os
import platform
import random
import re
import secrets
import typing
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, BinaryIO, Literal

import torch
from pydantic import ConfigDict, Field, TypeAdapter, ValidationError

PositiveInt = Annotated[int, Field(gt=0)]
Pixels = Annotated[int, Field(ge=0)]
Precision = Literal["auto", "float32", "bf16"]
PositiveFloat = Annotated[float, Field(gt=0, allow_inf_nan=False)]
NonNegativeFloat = Annotated[float, Field(ge=0, allow_inf_nan=False)]
Fraction = Annotated[float, Field(ge=0, lt=1, allow_inf_nan=False)]
Seed = Annotated[int, Field(ge=0, lt=2**32)]


@functools.cache
def _adapter(kind: Any) -> TypeAdapter:
    return TypeAdapter(kind, config=ConfigDict(strict=True))


def check(owner: str, kinds: Mapping[str, Any], values: Mapping[str, Any]) -> dict[str, Any]:
    """Check values against type hints without coercing text into numbers.

    owner: who asks, named in the error. kinds: name -> type hint, pydantic constraints allowed.
    Returns the values; an int given for a float becomes a float.
    Raises ValueError with one line for each value that does not fit.
    """
    checked, problems = {}, []
    for name, kind in kinds.items():
        try:
            if dataclasses.is_dataclass(kind):
                if not isinstance(values[name], kind):
                    problems.append(f"{owner}: {name} = {values[name]!r}. Give a {kind.__name__}.")
                checked[name] = values[name]
            else:
                checked[name] = _adapter(kind).validate_python(values[name])
        except ValidationError as error:
            for detail in error.errors():
                place = "".join(f"[{part}]" for part in detail["loc"] if isinstance(part, int))
                problems.append(f"{owner}: {name}{place} = {detail['input']!r}. {detail['msg']}.")
    if problems:
        raise ValueError("\n".join(problems))
    return checked


def reason(error: BaseException) -> str:
    """The first line of an error, or its kind if it says nothing: fits into another message."""
    return next(iter(str(error).splitlines()), type(error).__name__)


def suggestion(name: str, known: Iterable[str]) -> str:
    """' Did you mean ...?' for a name that is nearly a known one, else nothing."""
    close = difflib.get_close_matches(name, known, n=1)
    return f" Did you mean {close[0]!r}?" if close else ""


class _Checked:
    """Mixin of the settings below: a frozen dataclass whose values fit their type hints."""

    def __post_init__(self) -> None:
        kinds = typing.get_type_hints(type(self), include_extras=True)
        for name, value in check(type(self).__name__, kinds, vars(self)).items():
            object.__setattr__(self, name, value)

    def changes(self) -> dict[str, Any]:
        """The settings that differ from their defaults, as plain JSON values.

        Keys are built from these, so a setting added later leaves the key of older runs alone.
        """
        found = {}
        for item in dataclasses.fields(self):
            value = getattr(self, item.name)
            if isinstance(value, _Checked):
                if value.changes():
                    found[item.name] = value.changes()
            elif value != item.default:
                found[item.name] = value
        return found


@dataclass(frozen=True, kw_only=True)
class Augment(_Checked):
    """Changes of training images, drawn anew for every image and epoch; flips may alternate.

    In the order in which they are made: crop, flip, then rotate, translate and zoom as one
    distortion, cutout, mixup. Any of them can be combined. See labutils.augmentation.
    """

    rotate: Annotated[float, Field(ge=0, le=180)] = 0.0  # degrees, either way
    translate: NonNegativeFloat = 0.0  # pixels, either way, on both axes
    zoom: Fraction = 0.0  # scale drawn from [1 - zoom, 1 + zoom]
    flip: Literal["none", "random", "alternating"] = "none"  # left and right; see Split.shuffled
    crop: Pixels = 0  # whole pixels, either way, on both axes; the border is mirrored
    cutout: Pixels = 0  # side of a square that is blanked
    mixup: NonNegativeFloat = 0.0  # alpha: shares are drawn from Beta(alpha, alpha); 0: off


@dataclass(frozen=True, kw_only=True)
class TrainConfig(_Checked):
    """Everything that decides what a training run computes, apart from the model and the data.

    Raises ValueError naming the setting, its value and what is allowed.
    """

    epochs: PositiveInt = 20  # passes over the training split, at most
    batch_size: PositiveInt = 128  # images per step
    optimizer: Literal["sgd", "adam", "adamw"] = "adamw"  # sgd is with Nesterov momentum 0.9
    lr: PositiveFloat = 1e-3  # learning rate at its highest point
    weight_decay: NonNegativeFloat = 0.0  # decoupled for adamw, an L2 term for the others
    schedule: Literal["constant", "cosine", "onecycle", "linear"] = "constant"
    warmup_epochs: NonNegativeFloat = 0.0  # linear rise from 0 before the schedule
    label_smoothing: Fraction = 0.0  # Szegedy et al. 2016, https://arxiv.org/abs/1512.00567
    clip_norm: PositiveFloat | None = None  # largest allowed norm of all gradients together
    ema: Annotated[float, Field(gt=0, lt=1)] | None = None  # decay of averaged weights; None: off
    augment: Augment = field(default=Augment())
    precision: Precision = "float32"  # auto: bf16 where it is computed
    monitor: Literal["val_loss", "val_accuracy"] = "val_loss"  # picks the best epoch
    patience: PositiveInt | None = None  # stagnation: stop after so many epochs without gain
    min_delta: NonNegativeFloat = 0.0  # a gain smaller than this does not count for patience
    overfit_patience: PositiveInt | None = None  # overfitting: stop after so many epochs in a row
    overfit_delta: NonNegativeFloat = 0.0  # ... with val loss this far above its best
    seed: Seed = 0  # order of images, augmentation, dropout

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.warmup_epochs and self.schedule == "onecycle":
            raise ValueError(
                f"TrainConfig: warmup_epochs = {self.warmup_epochs} with schedule = 'onecycle'. "
                "One-cycle has its own warm-up; set warmup_epochs to 0 or choose 'cosine'."
            )


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
    return Path(os.environ.get("LABUTILS_DATA") or project_dir() / "data").expanduser().resolve()


def runs_dir() -> Path:
    """Where runs are kept: $LABUTILS_RUNS, else runs/ in the project."""
    return Path(os.environ.get("LABUTILS_RUNS") or project_dir() / "runs").expanduser().resolve()


def models_dir() -> Path:
    """Where published runs are kept: models/ in the project."""
    return project_dir() / "models"


def images_dir() -> Path:
    """Where reports leave their figures: images/ in the project."""
    return project_dir() / "images"


def resolve_device(device: str | torch.device = "auto") -> torch.device:
    """'auto' is the first CUDA device when there is one, else the CPU.

    Raises ValueError if the name means nothing to torch or the device is not there.
    """
    if str(device) == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        return torch.empty(0, device=device).device
    except (RuntimeError, AssertionError, ImportError) as error:
        raise ValueError(
            f"device = {str(device)!r} cannot be used here ({reason(error)}). "
            "Allowed: 'auto', 'cpu', 'cuda', 'cuda:N', 'mps'; 'auto' always works."
        ) from error


def device_name(device: torch.device) -> str:
    """What a reader of a result wants to know of a device: the processor's or the GPU's name."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    name = platform.processor() or platform.machine()
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        lines = cpuinfo.read_text().splitlines()
        models = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
        name = models[0] if models else name
    return f"{name}, {os.cpu_count()} cores"


def seed_everything(seed: int) -> None:
    """Seed Python, NumPy and torch (all devices): call it before building a model."""
    import numpy as np

    random.seed(seed)
    np.random.seed(seed)
    torch.manual_seed(seed)


@contextmanager
def atomic_write(path: Path) -> Iterator[BinaryIO]:
    """Yield a binary file that takes the place of path when the block ends well.

    Readers see the old content or the new, never a part; after an error or a kill the old stays.
    Raises OSError as the system reports it.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    # Not by tempfile, whose files nobody but their owner may read.
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(4)}.tmp")
    try:
        with temporary.open("xb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def write_json(path: Path, value: Any) -> None:
    """Write a JSON file atomically: indented for people, but a list of numbers on one line."""
    text = json.dumps(value, indent=1, ensure_ascii=False)
    # Only outside of strings is there a line break, so a string that holds brackets is left alone.
    text = re.sub(
        r"\[\n([^\[\]{}\"]*)\n *\]", lambda match: f"[{' '.join(match[1].split())}]", text
    )
    with atomic_write(path) as file:
        file.write(f"{text}\n".encode())
