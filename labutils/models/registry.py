"""Networks by name: what can be built again from a spec, and what all networks share."""

import functools
import importlib
import inspect
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Annotated, Any, Literal, NotRequired, get_type_hints

import torch
from pydantic import Field
from torch import Tensor, nn
from torch.func import functional_call
from torch.random import fork_rng

from ..base.device import gpus
from ..base.settings import check, first_line, plain_signature

MODELS: dict[str, type[nn.Module]] = {}
Classes = Annotated[int, Field(ge=2, lt=2**31)]


def register(cls: type[nn.Module]) -> type[nn.Module]:
    """Class decorator: check the arguments (ValueError), keep them, as JSON has them, in .spec."""
    init, kinds, defaults = cls.__init__, {}, {}
    hints = get_type_hints(init, include_extras=True)
    for name, parameter in list(inspect.signature(init).parameters.items())[1:]:
        kinds[name], defaults[name] = NotRequired[hints.get(name, Any)], _json(parameter.default)

    @functools.wraps(init)
    def __init__(self, *args: Any, **kwargs: Any) -> None:
        given = check(cls.__name__, kinds, _json(dict(zip(kinds, args)) | kwargs))
        try:
            init(self, *args, **kwargs)
        except (RuntimeError, TypeError) as error:  # no memory; not these arguments
            raise ValueError(f"{cls.__name__}: {first_line(error)}. Given: {given}.") from error
        # A subclass computes something else, so it has no spec before it registers its own name.
        if type(self) is cls:
            # Without defaults, so that an argument added later leaves the spec of older runs alone.
            changed = {name: value for name, value in given.items() if value != defaults[name]}
            self.spec = {"model": cls.__name__} | changed

    __init__.__signature__ = plain_signature(init)
    cls.__init__ = __init__
    MODELS[cls.__name__] = cls
    return cls


def _json(value: Any) -> Any:
    """A copy that later changes to lists leave alone, with the lists that JSON has for tuples."""
    if isinstance(value, (list, tuple)):
        return [_json(item) for item in value]
    return {key: _json(item) for key, item in value.items()} if isinstance(value, dict) else value


@contextmanager
def in_mode(model: nn.Module, *, training: bool) -> Iterator[None]:
    """Training or evaluation mode inside of the block; each part's own mode again after it."""
    modes = {part: part.training for part in model.modules()}
    model.train(training)
    try:
        yield
    finally:
        for part, mode in modes.items():
            part.training = mode


def training_logits(model: nn.Module, images: Tensor) -> Tensor:
    """The logits of a training step; modes, buffers and random state are left alone."""
    statistics = {name: buffer.clone() for name, buffer in model.named_buffers()}
    with in_mode(model, training=True), fork_rng(gpus()):
        return functional_call(model, statistics, (images,))


@contextmanager
def takes_images(problem: str, remedy: str) -> Iterator[None]:
    """A model that cannot take the images in this block ends it with a ValueError of both."""
    try:
        yield
    except torch.OutOfMemoryError:  # of a GPU: nothing is wrong with the images
        raise
    except (RuntimeError, ValueError, IndexError, TypeError) as error:
        raise ValueError(f"{problem} ({first_line(error)}). {remedy}") from error


@contextmanager
def evaluating(model: nn.Module, images: Tensor, owner: str = "") -> Iterator[None]:
    """The model without dropout or gradients; a ValueError for images that it cannot take."""
    problem = f"{owner}images are {list(images.shape)}, which the model cannot take"
    remedy = "Give them at the size that it was made for."
    with takes_images(problem, remedy), in_mode(model, training=False), torch.inference_mode():
        yield


def num_parameters(model: nn.Module) -> int:
    """How many numbers training can change."""
    return sum(p.numel() for p in model.parameters() if p.requires_grad)


def registered() -> dict[str, type[nn.Module]]:
    """All networks of labutils by name."""
    # They register their networks; torchvision, which some need, takes a second to import.
    for module in ("mlp", "convnets", "resnet", "fastnet"):
        importlib.import_module(f".{module}", __package__)
    return MODELS


def build(spec: dict[str, Any]) -> nn.Module:
    """The model of a spec, with fresh weights; ValueError for an unknown name or argument."""
    arguments = check("build", {"spec": dict[str, Any]}, {"spec": spec})["spec"]
    check("build", {"model": Literal[*sorted(registered())]}, {"model": arguments.get("model")})
    return MODELS[arguments.pop("model")](**arguments)
