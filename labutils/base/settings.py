"""Settings of a training run, recipes by name, and how settings are checked."""

from __future__ import annotations

import dataclasses
import difflib
import functools
import typing
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Annotated, Any, Literal

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


def first_line(error: BaseException) -> str:
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
    distortion, cutout. Any of them can be combined. See labutils.augmentation.
    """

    rotate: Annotated[float, Field(ge=0, le=180)] = 0.0  # degrees, either way
    translate: NonNegativeFloat = 0.0  # pixels, either way, on both axes
    zoom: Fraction = 0.0  # scale drawn from [1 - zoom, 1 + zoom]
    flip: Literal["none", "random", "alternating"] = "none"  # left and right; see Split.shuffled
    crop: Pixels = 0  # whole pixels, either way, on both axes; the border is mirrored
    cutout: Pixels = 0  # side of a square that is blanked


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
    schedule: Literal["constant", "onecycle", "linear"] = "constant"
    label_smoothing: Fraction = 0.0  # Szegedy et al. 2016, https://arxiv.org/abs/1512.00567
    ema: Annotated[float, Field(gt=0, lt=1)] | None = None  # decay of averaged weights; None: off
    augment: Augment = field(default=Augment())
    precision: Precision = "float32"  # auto: bf16 where it is computed
    monitor: Literal["val_loss", "val_accuracy"] = "val_loss"  # picks the best epoch
    patience: PositiveInt | None = None  # stagnation: stop after so many epochs without gain
    overfit_patience: PositiveInt | None = None  # overfitting: stop after so many epochs in a row
    overfit_delta: NonNegativeFloat = 0.0  # ... with val loss this far above its best
    seed: Seed = 0  # order of images, augmentation, dropout


RECIPES = {
    # How published solutions of this lab train their convolutional networks. They stop early, but
    # do not say how patient they are.
    "control": TrainConfig(epochs=30, batch_size=128, optimizer="adam", lr=1e-3, patience=5),
    # Crops, flips and cutout after DeVries and Taylor 2017, https://arxiv.org/abs/1708.04552, but
    # with a smaller hole, as the training is shorter, and flips that alternate; one cycle as in
    # Smith and Topin 2018, https://arxiv.org/abs/1708.07120.
    "ours": TrainConfig(
        epochs=30,
        batch_size=128,
        optimizer="sgd",
        lr=0.1,
        weight_decay=5e-4,
        schedule="onecycle",
        label_smoothing=0.1,
        ema=0.995,  # over about 200 steps: half an epoch of CIFAR-10
        augment=Augment(crop=4, flip="alternating", cutout=8),
        precision="auto",
        monitor="val_accuracy",
    ),
}


def recipe(name: str, **changes: Any) -> TrainConfig:
    """A recipe, with some of its settings replaced: recipe("ours", epochs=5, seed=1).

    name: 'control' or 'ours'. changes: settings of TrainConfig.
    Raises ValueError for a name or a setting that is not known.
    """
    if name not in RECIPES:
        raise ValueError(
            f"recipe: unknown recipe {name!r}.{suggestion(name, RECIPES)} "
            f"Known: {', '.join(RECIPES)}."
        )
    settings = [item.name for item in dataclasses.fields(TrainConfig)]
    for setting in changes:
        if setting not in settings:
            raise ValueError(
                f"recipe: TrainConfig has no setting {setting!r}.{suggestion(setting, settings)} "
                f"Known: {', '.join(settings)}."
            )
    return dataclasses.replace(RECIPES[name], **changes)
