"""The key of a run: what it computes, told by its settings, its data and its network."""

import hashlib
import secrets
from typing import Any

import torch
from torch import nn
from torch.nn.modules import module as torch_module

from ..base.device import own_random_numbers
from ..base.files import digest
from ..base.settings import Augment, TrainConfig
from ..models import registry
from .watch import warn

FORMAT = 1  # raised when a change makes stored runs mean something else


def run_key(
    config: TrainConfig, spec: dict[str, Any], weights: str, fingerprint: str, teacher: str = ""
) -> str:
    """Equal keys compute the same. spec, weights: from identify. fingerprint: of the data.

    teacher: its key; without one, keys are what they were before there were teachers.
    """
    # Without defaults, so that a setting added later leaves the keys of older runs alone.
    parts = [FORMAT, config.values(exclude_defaults=True), spec, weights, fingerprint]
    return digest([*parts, teacher] if teacher else parts)


def recorded_key(info: dict[str, Any]) -> str:
    """The key of a run by what its card says. Raises ValueError or TypeError for odd settings."""
    augment = Augment(**_known(Augment, info["config"].get("augment", {})))
    config = TrainConfig(**_known(TrainConfig, info["config"]) | {"augment": augment})
    fingerprint = info["data"]["fingerprint"]
    weights, teacher = info.get("weights", "seed"), info.get("teacher", "")
    return run_key(config, info["model"], weights, fingerprint, teacher)


def _known(kind: type, values: dict[str, Any]) -> dict[str, Any]:
    # Settings of earlier versions that are gone were switched off by 0 or None.
    return {k: value for k, value in values.items() if value or k in kind.__dataclass_fields__}


def remember_origin(model: nn.Module, key: str, *, new_head: bool = False) -> None:
    """Its weights, but for a new head, are those of the run with this key: identify says so.

    Only as long as they are what they are now. Unlike a digest, which knows the weights of one
    machine, the key of the run also finds what went on from its published weights, in float16.
    """
    model.origin = key, new_head, weights_digest(model.state_dict())


def identify(model: nn.Module, seed: int) -> tuple[dict[str, Any], str]:
    """The model's spec, and where its weights come from: 'seed', 'from run KEY', or a digest of
    what differs from the seed's.

    Not always a digest: random numbers differ in the last bit between machines. A network of your
    own, or with a part that its spec does not build (a hook), gets a random number and a warning.
    """
    spec = getattr(model, "spec", {"model": repr(model)})
    fresh, odd = _compared(model, seed)
    if odd is not None:
        kind = type(model).__name__
        warn(f"{kind} is trained anew each time: no key can tell what {odd!r} computes")
        return spec, secrets.token_hex(6)
    if origin := _origin(model, fresh):
        return spec, origin
    frozen, drawn = _frozen(model), fresh.state_dict()
    changes = ["".join(f"{name} is frozen" for name in frozen).encode()]
    for name, value in model.state_dict().items():
        value, initial = value.cpu(), drawn[name].cpu()
        if value.dtype != initial.dtype or not value.equal(initial):
            changes += _written(name, value)
    as_drawn = len(changes) == 1 and frozen == _frozen(fresh)
    return spec, "seed" if as_drawn else hashlib.sha256(b"".join(changes)).hexdigest()[:12]


def as_its_spec(model: nn.Module) -> bool:
    """Whether a network is as its spec builds it but for its weights: no hook, no other part."""
    return _compared(model, seed=0)[1] is None


def _compared(model: nn.Module, seed: int) -> tuple[nn.Module | None, str | None]:
    """The network that its spec builds under a seed, and what in it is not as built there."""
    kind, name = type(model), type(model).__name__
    if registry.MODELS.get(name) is not kind or kind.__module__.partition(".")[0] != "labutils":
        return None, name
    with own_random_numbers(seed):
        fresh = registry.build(model.spec)
    return fresh, _odd_part(model, fresh)


def _origin(model: nn.Module, fresh: nn.Module) -> str | None:
    """The run that the weights come from, the head if it is not the run's, what is frozen."""
    if not hasattr(model, "origin"):
        return None
    (key, new_head, weights), state = model.origin, model.state_dict()
    if weights != weights_digest(state):
        return None  # they have been changed since
    parts = [f"from run {key}"]
    if new_head:
        head = {name: value for name, value in state.items() if name.startswith("head.")}
        drawn = fresh.state_dict()
        as_drawn = all(value.cpu().equal(drawn[name]) for name, value in head.items())
        parts.append("head drawn anew" if as_drawn else f"head {weights_digest(head)}")
    if (frozen := _frozen(model)) != _frozen(fresh):
        parts.append(f"{' '.join(frozen)} frozen")
    return ", ".join(parts)


def weights_digest(state: dict[str, torch.Tensor]) -> str:
    """Twelve hexadecimal digits for named tensors: their names, shapes, types and bits."""
    pieces = [piece for name, value in state.items() for piece in _written(name, value.cpu())]
    return hashlib.sha256(b"".join(pieces)).hexdigest()[:12]


def _written(name: str, value: torch.Tensor) -> list[bytes]:
    numbers = value.contiguous().view(-1).view(torch.uint8).numpy().tobytes()
    return [f"{name}{tuple(value.shape)}{value.dtype}".encode(), numbers]


def _frozen(model):
    return [name for name, value in model.named_parameters() if not value.requires_grad]


def _odd_part(model: nn.Module, fresh: nn.Module) -> str | None:
    """What in a network is not as its spec builds it, whatever its weights."""
    built = dict(fresh.named_modules(remove_duplicate=False))
    for name, part in model.named_modules(remove_duplicate=False):
        # The class itself may have been given another forward.
        home = getattr(type(part).forward, "__globals__", {}).get("__name__", "").split(".")[0]
        if home not in ("labutils", "torch", "torchvision") or _facts(part) != _facts(built[name]):
            return name or type(model).__name__
    hooks = [value for name, value in vars(torch_module).items() if name.endswith("_hooks")]
    hooks += [p._backward_hooks or p._post_accumulate_grad_hooks for p in model.parameters()]
    tied = len(list(model.parameters())) != len(list(fresh.parameters()))
    return "hooks" if any(hooks) else "tied weights" if tied else None


def _facts(part: nn.Module) -> dict[str, str]:
    """What a module is, but for its weights, origin and mode: kind, attributes, hooks."""
    facts = vars(part) | {"kind": type(part), "training": None, "_compiled_call_impl": None}
    facts["origin"] = None
    for name in ("_parameters", "_buffers", "_modules"):
        facts[name] = {key: held is None for key, held in facts[name].items()}
    return {name: repr(value) for name, value in facts.items()}
