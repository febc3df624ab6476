"""What a run is made of: a model from its spec and back, and the key by which runs are found."""

from __future__ import annotations

import hashlib
import inspect
from typing import Any

import torch
from torch import nn

from ..base.files import digest
from ..base.settings import TrainConfig
from ..data.tensors import ImageData
from ..models import registry
from ..models.registry import build

FORMAT = 1  # raised when a change makes stored runs mean something else


def run_key(config: TrainConfig, spec: dict[str, Any], weights: str, data: ImageData) -> str:
    """Name of a run: equal keys compute the same thing.

    weights: 'seed' for a model as config.seed initialises it, else a digest of its weights.
    """
    return digest([FORMAT, config.changes(), spec, weights, data.fingerprint])


def identify(model: nn.Module, seed: int) -> tuple[dict[str, Any], str]:
    """The model's spec, and where its weights come from: 'seed', or a digest of them.

    Comparing with a fresh model tells the two apart; a digest alone would differ between machines
    whose random numbers differ in the last bit, and published runs would not be found there.
    What a spec does not say goes into the digest: layers that were changed, which are frozen, and
    the weights that differ from the fresh model's.
    """
    spec, hasher = {"model": repr(model)}, hashlib.sha256()
    state = {name: value.detach().cpu() for name, value in model.state_dict().items()}
    frozen = _frozen(model)
    if type(model) in registry.MODELS.values():
        spec = model.spec
        with torch.random.fork_rng(devices=range(torch.cuda.device_count())):
            torch.manual_seed(seed)
            fresh = build(spec)
        drawn = fresh.state_dict()
        if repr(model) != repr(fresh):
            hasher.update(repr(model).encode())
        elif frozen == _frozen(fresh) and state.keys() == drawn.keys():
            state = {name: value for name, value in state.items() if not value.equal(drawn[name])}
            if not state:
                return spec, "seed"
    for kind in sorted({type(part) for part in model.modules()}, key=repr):
        # What a network of your own computes is in its code; repr and weights do not show it.
        if not kind.__module__.startswith(("torch.", "torchvision.", "labutils.")):
            hasher.update(_code(kind))
    for name in frozen:
        hasher.update(f"{name} is frozen".encode())
    for name, value in state.items():
        hasher.update(f"{name}{tuple(value.shape)}{value.dtype}".encode())
        hasher.update(value.contiguous().view(-1).view(torch.uint8).numpy())
    return spec, hasher.hexdigest()[:12]


def _frozen(model: nn.Module) -> list[str]:
    return [name for name, value in model.named_parameters() if not value.requires_grad]


def _code(kind: type) -> bytes:
    try:
        return inspect.getsource(kind).encode()
    except (OSError, TypeError):  # typed into an interpreter that keeps no source
        code = kind.forward.__code__
        return repr((code.co_code, code.co_consts, code.co_names)).encode()
