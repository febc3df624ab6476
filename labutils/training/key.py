"""The key of a run: what it computes, told by its settings, its data and its network."""

from __future__ import annotations

import hashlib
import secrets
from dataclasses import fields
from types import SimpleNamespace
from typing import Any

import torch
from torch import nn
from torch.nn.modules import module as torch_module

from ..base.files import digest
from ..base.settings import Augment, TrainConfig
from ..data.tensors import ImageData
from ..models import registry
from .watch import warn

FORMAT = 1  # raised when a change makes stored runs mean something else


def run_key(config: TrainConfig, spec: dict[str, Any], weights: str, data: ImageData) -> str:
    """Name of a run: equal keys compute the same thing. spec, weights: from identify."""
    return digest([FORMAT, config.changes(), spec, weights, data.fingerprint])


def recorded_key(info: dict[str, Any]) -> str:
    """The key of a run by what its card says. Raises ValueError or TypeError for odd settings."""
    settings = _known(TrainConfig, info["config"])
    settings["augment"] = Augment(**_known(Augment, settings.get("augment", {})))
    data = SimpleNamespace(fingerprint=info["data"]["fingerprint"])
    return run_key(TrainConfig(**settings), info["model"], info.get("weights", "seed"), data)


def _known(kind: type, values: dict[str, Any]) -> dict[str, Any]:
    """Without settings of earlier versions that were switched off, all of them by 0 or None."""
    names = {item.name for item in fields(kind)}
    return {name: value for name, value in values.items() if value or name in names}


def identify(model: nn.Module, seed: int) -> tuple[dict[str, Any], str]:
    """The model's spec, and where its weights come from: 'seed', or a digest of what differs.

    Comparing with a fresh model tells the two apart; a digest alone would differ between machines
    whose random numbers differ in the last bit, and published runs would not be found there.
    Only a network of labutils, with every part as its spec builds it, says what it computes. Any
    other, such as one of your own or one with hooks, gets a random number in place of the digest:
    it is trained anew each time, and a line says so.
    """
    spec, odd = getattr(model, "spec", {"model": repr(model)}), type(model).__name__
    if registry.MODELS.get(odd) is type(model) and type(model).__module__.startswith("labutils."):
        with torch.random.fork_rng(devices=range(torch.cuda.device_count())):
            torch.manual_seed(seed)
            fresh = registry.build(spec)
        odd = _odd_part(model, fresh)
    if odd is not None:
        reason = f"no stored run can be known to be its own, because of {odd!r}"
        warn(f"{type(model).__name__} is trained anew each time: {reason}")
        return spec, secrets.token_hex(6)
    drawn = {name: value.cpu() for name, value in fresh.state_dict().items()}
    state = {name: value.detach().cpu() for name, value in model.state_dict().items()}
    changed = {name: value for name, value in state.items() if not _same(value, drawn[name])}
    if not changed and _frozen(model) == _frozen(fresh):
        return spec, "seed"
    hasher = hashlib.sha256()
    for name in _frozen(model):
        hasher.update(f"{name} is frozen".encode())
    for name, value in changed.items():
        hasher.update(f"{name}{tuple(value.shape)}{value.dtype}".encode())
        hasher.update(value.contiguous().view(-1).view(torch.uint8).numpy())
    return spec, hasher.hexdigest()[:12]


def _same(one: torch.Tensor, other: torch.Tensor) -> bool:
    return one.dtype == other.dtype and one.equal(other)


def _frozen(model: nn.Module) -> list[str]:
    return [name for name, value in model.named_parameters() if not value.requires_grad]


def _odd_part(model: nn.Module, fresh: nn.Module) -> str | None:
    """The first part of a network that is not as its spec builds it, whatever its weights."""
    parts, built = (dict(network.named_modules()) for network in (model, fresh))
    for name in [*parts, *(built.keys() - parts.keys())]:
        if name not in parts or name not in built or _facts(parts[name]) != _facts(built[name]):
            return name or type(model).__name__
    hooks = [value for name, value in vars(torch_module).items() if name.endswith("_hooks")]
    hooks += [hook for p in model.parameters() for hook in (p._backward_hooks,)]
    tied = len(list(model.parameters())) < len(list(fresh.parameters()))
    return "hooks" if any(hooks) else "tied weights" if tied else None


def _facts(part: nn.Module) -> dict[str, str]:
    """What a module is, but for its weights and its mode: its kind, its attributes, its hooks."""
    left_out = ("training", "_parameters", "_buffers", "_modules", "_compiled_call_impl")
    facts = {name: repr(value) for name, value in vars(part).items() if name not in left_out}
    names = [*part._parameters, *part._buffers, *part._modules]
    return facts | {"kind": repr(type(part)), "names": repr(names)}
