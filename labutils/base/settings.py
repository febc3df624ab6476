"""Settings of a training run, recipes by name, and how settings are checked."""

import dataclasses
import difflib
import inspect
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Annotated, Any, Literal, dataclass_transform, get_type_hints

import pydantic.dataclasses
from pydantic import ConfigDict, Field, Strict, TypeAdapter, ValidationError, field_validator
from typing_extensions import TypedDict  # before Python 3.12, pydantic refuses that of typing

# PyTorch counts in 64 bits; with this bound, products of two sizes still fit.
PositiveInt = Annotated[int, Field(gt=0, lt=2**31)]
Pixels = Annotated[int, Field(ge=0, lt=2**31)]
Precision = Literal["auto", "float32", "bf16"]
PositiveFloat = Annotated[float, Field(gt=0, allow_inf_nan=False)]
NonNegativeFloat = Annotated[float, Field(ge=0, allow_inf_nan=False)]
Fraction = Annotated[float, Field(ge=0, lt=1, allow_inf_nan=False)]
Seed = Annotated[int, Field(ge=0, lt=2**32)]
_STRICT = ConfigDict(strict=True, extra="forbid")


def check(owner: str, kinds: Mapping[str, Any], values: Mapping[str, Any]) -> dict[str, Any]:
    """Values that fit their type hints; else a ValueError, one line a value, that names `owner`."""
    kind = pydantic.with_config(_STRICT)(TypedDict(owner, dict(kinds)))
    with _readable_errors(kinds):
        return TypeAdapter(kind).validate_python(dict(values))


@contextmanager
def _readable_errors(known: Iterable[str]) -> Iterator[None]:
    """Turn pydantic's error into a ValueError with one line for each value that does not fit."""
    try:
        yield
    except ValidationError as error:
        lines = []
        for problem in error.errors():
            name, *rest = problem["loc"]
            where = str(name) + "".join(f"[{part}]" for part in rest if isinstance(part, int))
            hint = "" if name in known else f"{suggestion(where, known)} Known: {', '.join(known)}."
            if problem["type"] == "literal_error":  # its message lists what is known
                allowed = re.findall("'([^']+)'", problem["ctx"]["expected"])
                hint = suggestion(str(problem["input"]), allowed)
            why = problem["msg"].removeprefix("Value error, ")
            missing = problem["type"] == "missing"  # its input is all that is there
            shown = repr(problem["input"])
            if "\n" in shown:  # an array, say
                shown = f"{' '.join(shown.split()):.60} ..."
            value = "is missing" if missing else f"= {shown}. {why}"
            lines.append(f"{error.title}: {where} {value}.{hint}")
        raise ValueError("\n".join(lines)) from None


def plain_numbers(values: Any) -> Any:
    """A list for a range, an array or NumPy's numbers; what is no sequence stays for check."""
    import numpy as np  # which the command line can spare

    return [np.asarray(each).tolist() for each in values] if np.iterable(values) else values


def first_line(error: BaseException) -> str:
    """The first line of an error, or its kind if it says nothing: fits into another message."""
    return next(iter(str(error).strip().splitlines()), type(error).__name__)


def suggestion(name: str, known: Iterable[str]) -> str:
    """' Did you mean ...?' for a name that is nearly a known one, else nothing."""
    close = difflib.get_close_matches(name, known, n=1)
    return f" Did you mean {close[0]!r}?" if close else ""


@dataclass_transform(kw_only_default=True, frozen_default=True)
def _settings(cls: type) -> type:
    """Class decorator: a frozen dataclass; raises check()'s ValueError if a value does not fit.

    Its docstring lists the fields with the comments beside them, so that help() explains them.
    """
    fields = inspect.getsource(cls).partition('"""\n\n')[2].partition("\n\n")[0]
    cls.__doc__ = f"{cls.__doc__}\n\n{fields}"
    cls = pydantic.dataclasses.dataclass(cls, frozen=True, kw_only=True, config=_STRICT)
    cls.__init__ = _readable_errors(cls.__dataclass_fields__)(cls.__init__)
    cls.__signature__ = plain_signature(cls)
    return cls


def plain_signature(owner: Callable) -> inspect.Signature:
    """Its signature with plain types: help() would show the bounds as pydantic's objects."""
    signature, plain = inspect.signature(owner), get_type_hints(owner)
    given = signature.parameters.values()
    shown = [each.replace(annotation=plain.get(each.name, each.annotation)) for each in given]
    return signature.replace(parameters=shown)


@_settings
class Augment:
    """Changes of training images, in this order, drawn anew for each in every epoch."""

    crop: Pixels = 0  # whole pixels, either way, on both axes; the border is mirrored
    flip: Literal["none", "random", "alternating"] = "none"  # left and right; see Split.shuffled
    translate: NonNegativeFloat = 0.0  # pixels, either way, on both axes
    rotate: Annotated[float, Field(ge=0, le=180)] = 0.0  # degrees, either way
    zoom: Fraction = 0.0  # scale drawn from [1 - zoom, 1 + zoom]
    area: Annotated[float, Field(gt=0, le=1)] = 1.0  # least area of a window drawn, of the image's
    cutout: Pixels = 0  # side of a square that is blanked


@_settings
class TrainConfig:
    """Everything that decides what a run computes, apart from the model and the data."""

    epochs: PositiveInt = 20  # passes over the training split, at most
    batch_size: PositiveInt = 128  # images per step
    accumulate: PositiveInt = 1  # equal parts that a step computes one after another; see train
    image_sizes: Annotated[tuple[PositiveInt, ...], Strict(False)] = ()  # that grow: see train
    optimizer: Literal["sgd", "adam", "adamw", "muon"] = "adamw"  # see optim.make_optimizer
    lr: PositiveFloat = 1e-3  # learning rate at its highest point
    bias_lr: PositiveFloat = 0.1  # the same for what muon leaves to sgd: all vectors, and
    head_lr: PositiveFloat = 0.1  # the weights of the last layer
    stage_decay: Annotated[float, Field(gt=0, le=1)] = 1.0  # of lr, for each stage further below
    weight_decay: NonNegativeFloat = 0.0  # decoupled for adamw, else an L2 term
    schedule: Literal["constant", "onecycle", "linear"] = "constant"
    label_smoothing: Fraction = 0.0  # Szegedy et al. 2016, https://arxiv.org/abs/1512.00567
    alpha: Annotated[float, Field(ge=0, le=1)] = 0.0  # share of a teacher in the loss; 0: none
    temperature: PositiveFloat = 1.0  # softens teacher and student: see target.batch_loss
    ema: Annotated[float, Field(gt=0, lt=1)] | None = None  # decay of averaged weights; None: off
    augment: Augment = Augment()
    precision: Precision = "float32"  # auto: bf16 where it is computed
    monitor: Literal["val_loss", "val_accuracy"] = "val_loss"  # picks the best epoch
    patience: PositiveInt | None = None  # stagnation: stop after so many epochs without gain
    overfit_patience: PositiveInt | None = None  # overfitting: stop after so many epochs in a row
    overfit_delta: NonNegativeFloat = 0.0  # ... with val loss this far above its best
    seed: Seed = 0  # order of images, augmentation, dropout

    @field_validator("accumulate")
    @classmethod
    def _divides(cls, value: int, info: pydantic.ValidationInfo) -> int:
        if info.data.get("batch_size", value) % value:
            raise ValueError(f"It has to divide batch_size = {info.data['batch_size']}")
        return value

    @field_validator("image_sizes")
    @classmethod
    def _grow(cls, sizes: tuple[int, ...]) -> tuple[int, ...]:
        if list(sizes) != sorted(set(sizes)):
            raise ValueError("Each has to be larger than the one before")
        return sizes

    def values(self, **options: bool) -> dict[str, Any]:
        """The settings as plain JSON values, which a card gives back as they are."""
        return TypeAdapter(TrainConfig).dump_python(self, mode="json", **options)


# One cycle as in Smith and Topin 2018, https://arxiv.org/abs/1708.07120. Crops, flips and cutout
# after DeVries and Taylor 2017, https://arxiv.org/abs/1708.04552, but with a smaller hole, as the
# training is shorter, and flips that alternate. Averages over 200 steps, half an epoch of CIFAR-10.
_ONE_CYCLE = {"optimizer": "sgd", "lr": 0.1, "weight_decay": 5e-4, "schedule": "onecycle"}
_DISTORTED = Augment(crop=4, flip="alternating", cutout=8)
# airbench94_muon of https://github.com/KellerJordan/cifar10-airbench, but for images that grow and
# batch statistics over parts of a batch. Its rates are for summed losses, these for their mean.
_FAST = {"batch_size": 2000, "accumulate": 16, "image_sizes": (24, 32), "schedule": "linear"}
_FAST |= {"optimizer": "muon", "lr": 0.24, "weight_decay": 0.0167}
_FAST |= {"bias_lr": 106.0, "head_lr": 1.66}
_FAST |= {"augment": Augment(crop=2, flip="alternating"), "label_smoothing": 0.2}
_SMOOTHED = {"label_smoothing": 0.1, "ema": 0.995, "monitor": "val_accuracy"}
RECIPES = {
    # How published solutions of this lab train convolutional networks, with a patience we chose.
    "control": TrainConfig(epochs=30, batch_size=128, optimizer="adam", lr=1e-3, patience=5),
    "ours": TrainConfig(epochs=30, augment=_DISTORTED, precision="auto", **_ONE_CYCLE, **_SMOOTHED),
    # For a FastNet on images of 32 pixels: a third of the epochs of ours.
    "fast": TrainConfig(epochs=10, precision="auto", monitor="val_accuracy", **_FAST),
}


def recipe(name: str, **changes: Any) -> TrainConfig:
    """A recipe with changed settings: control, ours, fast. ValueError for what is not allowed."""
    check("recipe", {"name": Literal[*RECIPES]}, {"name": name})
    return dataclasses.replace(RECIPES[name], **changes)
