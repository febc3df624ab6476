"""Training recipes by name: settings that are compared or used in more than one place."""

from __future__ import annotations

import dataclasses
from typing import Any

from .settings import Augment, TrainConfig, suggestion

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
