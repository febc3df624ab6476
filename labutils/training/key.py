"""The key of a run: what it computes, told by its settings, its data and its network."""

import hashlib
import secrets
from typing import Any

import torch
from torch import nn
from torch.nn.modules import module as torch_module

from ..base.files import digest
from ..base.settings import Augment, TrainConfig
from ..models import registry
from .watch import warn

FORMAT = 1  # raised when a change makes stored runs mean something else


def run_key(config: TrainConfig, spec: dict[str, Any], weights: str, fingerprint: str) -> str:
    """Equal keys compute the same. spec, weights: from identify. fingerprint: of the data."""
    return digest([FORMAT, config.changes(), spec, weights, fingerprint])


def recorded_key(info: dict[str, Any]) -> str:
    """The key of a run by what its card says. Raises ValueError or TypeError for odd settings."""
    augment = Augment(**_known(Augment, info["config"].get("augment", {})))
    config = TrainConfig(**_known(TrainConfig, info["config"]) | {"augment": augment})
    fingerprint = info["data"]["fingerprint"]
    return run_key(config, info["model"], info.get("weights", "seed"), fingerprint)


def _known(kind: type, values: dict[str, Any]) -> dict[str, Any]:
    # Settings of earlier versions that are gone were switched off by 0 or None.
    return {k: value for k, value in values.items() if value or k in kind.__dataclass_fields__}


def identify(model: nn.Module, seed: int) -> tuple[dict[str, Any], str]:
    """The model's spec, and where its weights come from: 'seed', or a digest of what differs.

    Not always a digest: random numbers differ in the last bit between machines. A network of your
    own, or with a part that its spec does not build (a hook), gets a random number and a warning.
    """
    kind, spec = type(model), getattr(model, "spec", {"model": repr(model)})
    odd = kind.__name__
    if registry.MODELS.get(odd) is kind and kind.__module__.startswith("labutils."):
        with torch.random.fork_rng(devices=range(torch.cuda.device_count())):
            torch.manual_seed(seed)
            fresh = registry.build(spec)
        odd = _odd_part(model, fresh)
    if odd is not None:
        warn(f"{kind.__name__} is trained anew each time: no key can tell what {odd!r} computes")
        return spec, secrets.token_hex(6)
    changes, drawn = [_frozen(model)], fresh.state_dict()
    for name, value in model.state_dict().items():
        value, initial = value.cpu(), drawn[name].cpu()
        if value.dtype != initial.dtype or not value.equal(initial):
            changes.append(f"{name}{tuple(value.shape)}{value.dtype}".encode())
            changes.append(value.contiguous().view(-1).view(torch.uint8).numpy().tobytes())
    as_drawn = changes == [_frozen(fresh)]
    return spec, "seed" if as_drawn else hashlib.sha256(b"".join(changes)).hexdigest()[:12]


def _frozen(model):
    names = [name for name, value in model.named_parameters() if not value.requires_grad]
    return "".join(f"{name} is frozen" for name in names).encode()


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
    """What a module is, but for its weights and its mode: its kind, its attributes, its hooks."""
    facts = vars(part) | {"kind": type(part), "training": None, "_compiled_call_impl": None}
    for name in ("_parameters", "_buffers", "_modules"):
        facts[name] = {key: held is None for key, held in facts[name].items()}
    return {name: repr(value) for name, value in facts.items()}
