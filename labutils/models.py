"""The perceptrons under comparison, and a registry of networks by name."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Annotated, Any

from pydantic import Field
from torch import nn

from .config import Fraction, PositiveInt, check

MODELS: dict[str, type[nn.Module]] = {}


def register(cls: type[nn.Module]) -> type[nn.Module]:
    """Class decorator: build by name, and keep the arguments of each instance in `.spec`."""
    init, signature = cls.__init__, inspect.signature(cls.__init__)

    @functools.wraps(init)
    def __init__(self, *args: Any, **kwargs: Any) -> None:
        init(self, *args, **kwargs)
        # A subclass computes something else, so it has no spec before it registers its own name.
        if type(self) is not cls:
            return
        given = dict(list(signature.bind(self, *args, **kwargs).arguments.items())[1:])
        # Without defaults, so that an argument added later leaves the spec of older runs alone.
        self.spec = {"model": cls.__name__} | {
            name: _json(value)
            for name, value in given.items()
            if _json(value) != _json(signature.parameters[name].default)
        }

    cls.__init__ = __init__
    MODELS[cls.__name__] = cls
    return cls


def _json(value: Any) -> Any:
    """A copy that later changes to lists leave alone, with the lists that JSON has for tuples."""
    if isinstance(value, (list, tuple)):
        return [_json(item) for item in value]
    return {key: _json(item) for key, item in value.items()} if isinstance(value, dict) else value


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Evaluation mode inside of the block; each part's own mode again after it."""
    modes = {part: part.training for part in model.modules()}
    model.eval()
    try:
        yield
    finally:
        for part, mode in modes.items():
            part.training = mode


def num_parameters(model: nn.Module) -> int:
    """How many numbers training can change."""
    return sum(p.numel() for p in model.parameters() if p.requires_grad)


@register
class MLP(nn.Sequential):
    """Multilayer perceptron: flatten, then linear, (batch norm), ReLU for each width, then linear.

    Takes images [N, ...] with in_features numbers each, returns logits [N, num_classes].
    hidden: widths of the hidden layers, any number of them; [] is a linear classifier.
    dropout: fraction of the last hidden layer's values that training drops.
    Raises ValueError if a width is not a whole number above 0 or dropout is not in [0, 1).
    """

    def __init__(
        self,
        in_features: int,
        hidden: Sequence[int],
        num_classes: int,
        *,
        dropout: float = 0.0,
        batch_norm: bool = False,
    ) -> None:
        kinds = {
            "in_features": PositiveInt,
            "hidden": list[PositiveInt],
            "num_classes": Annotated[int, Field(ge=2)],
            "dropout": Fraction,
            "batch_norm": bool,
        }
        widths = list(hidden) if isinstance(hidden, tuple) else hidden
        values = {
            "in_features": in_features,
            "hidden": widths,
            "num_classes": num_classes,
            "dropout": dropout,
            "batch_norm": batch_norm,
        }
        check("MLP", kinds, values)
        layers: list[nn.Module] = [nn.Flatten()]
        width = in_features
        for next_width in widths:
            # Batch norm has an offset of its own, which makes the one of the linear layer idle.
            layers.append(nn.Linear(width, next_width, bias=not batch_norm))
            if batch_norm:
                layers.append(nn.BatchNorm1d(next_width))
            layers.append(nn.ReLU())
            width = next_width
        if dropout:
            layers.append(nn.Dropout(dropout))
        super().__init__(*layers, nn.Linear(width, num_classes))

    def __getitem__(self, index: int | slice) -> nn.Module:
        """A layer, or a plain Sequential of the layers in a slice: model[:-1] has no head."""
        if isinstance(index, slice):
            return nn.Sequential(*list(self)[index])
        return super().__getitem__(index)
