"""What a recipe decides on the way: the optimizer, its learning rate, when to stop."""

import math

import torch
from torch import nn

from ..base.settings import TrainConfig


def stop_reason(rows: list[dict[str, float]], config: TrainConfig) -> str | None:
    """Why training ends after these epochs; None if it goes on.

    Stagnation: `patience` epochs without a better config.monitor.
    Overfitting: val loss above its lowest by more than overfit_delta, `overfit_patience` in a row.
    """
    sign = 1 if config.monitor == "val_loss" else -1
    best, waited, lowest, above = math.inf, 0, math.inf, 0
    for row in rows:
        value = sign * row[config.monitor]
        best, waited = (value, 0) if value < best else (best, waited + 1)
        lowest = min(lowest, row["val_loss"])
        above = above + 1 if row["val_loss"] > lowest + config.overfit_delta else 0
    if config.patience and waited >= config.patience:
        return f"stagnation: no better {config.monitor} for {waited} epochs"
    if config.overfit_patience and above >= config.overfit_patience:
        return f"overfitting: val_loss above its best for {above} epochs"
    return f"finished all {config.epochs} epochs" if len(rows) >= config.epochs else None


def lr_factor(config: TrainConfig, step: int, steps_per_epoch: int) -> float:
    """The learning rate of a step as a fraction of config.lr; no schedule has a state to save.

    onecycle rises from 1/25 over the first 30 % and falls to almost 0, along cosines, as torch's
    OneCycleLR does (Smith and Topin 2018, https://arxiv.org/abs/1708.07120).
    """
    total = config.epochs * steps_per_epoch
    if config.schedule != "onecycle":
        return 1 - step / total if config.schedule == "linear" else 1.0
    peak = 0.3 * total - 1
    start, end, done = 1, 1 / 25e4, (step - peak) / (total - 1 - peak)
    if step <= peak:
        start, end, done = 1 / 25, 1, step / peak if peak else 1.0
    return end + (start - end) * (1 + math.cos(math.pi * done)) / 2


def make_optimizer(model: nn.Module, config: TrainConfig) -> torch.optim.Optimizer:
    """A fused torch optimizer over the parameters that require a gradient."""
    parameters = [p for p in model.parameters() if p.requires_grad]
    kinds = {"sgd": torch.optim.SGD, "adam": torch.optim.Adam, "adamw": torch.optim.AdamW}
    momentum = {"momentum": 0.9, "nesterov": True} if config.optimizer == "sgd" else {}
    common = {"lr": config.lr, "weight_decay": config.weight_decay, "fused": True}
    return kinds[config.optimizer](parameters, **common, **momentum)
