"""The key of a run: what it computes, told by its settings, its data and its network."""

from __future__ import annotations

import dis
import hashlib
import io
import pickle
import secrets
import sys
import weakref
from dataclasses import fields
from functools import _lru_cache_wrapper
from itertools import chain
from types import CellType, CodeType, FunctionType, ModuleType, SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules import module as torch_module

from ..base.files import digest
from ..base.settings import Augment, TrainConfig, first_line
from ..data.tensors import ImageData
from ..models import registry
from .watch import warn

_KNOWN = {"torch", "torchvision", "labutils", *sys.stdlib_module_names}
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
    """The model's spec, and where its weights come from: 'seed', or a digest.

    Comparing with a fresh model tells the two apart; a digest alone would differ between machines
    whose random numbers differ in the last bit, and published runs would not be found there.
    What a spec does not say goes into the digest: weights that are frozen or differ from the fresh
    model's, what was changed in its layers, and all that a network of one's own is made of.
    If part of that cannot be told, a hook or a lock say, the digest is a random number: such a
    network is trained anew each time, and a line says so.
    """
    registered = registry.MODELS.get(type(model).__name__) is type(model)
    spec = model.spec if registered else {"model": repr(model)}
    hasher, frozen = hashlib.sha256(), _frozen(model)
    state = {k: v.detach().cpu() for k, v in model.state_dict().items() if isinstance(v, Tensor)}
    try:
        described, own_code = _describe(model)
    except Exception as error:  # whatever the classes of its parts raise
        reason = f"no key can tell what it computes ({first_line(error)})"
        warn(f"{type(model).__name__} is trained anew each time: {reason}")
        return spec, secrets.token_hex(6)
    fresh = None
    if registered and not own_code:
        with torch.random.fork_rng(devices=range(torch.cuda.device_count())):
            torch.manual_seed(seed)
            fresh = registry.build(spec)
    if fresh is not None and described == _describe(fresh)[0] and frozen == _frozen(fresh):
        for name, drawn in fresh.state_dict().items():
            if state[name].dtype == drawn.dtype and state[name].equal(drawn.cpu()):
                del state[name]
        if not state:
            return spec, "seed"
    else:
        hasher.update(described)
    for name in frozen:
        hasher.update(f"{name} is frozen".encode())
    for name, value in state.items():
        hasher.update(f"{name}{tuple(value.shape)}{value.dtype}".encode())
        hasher.update(_content(value))
    return spec, hasher.hexdigest()[:12]


def _frozen(model: nn.Module) -> list[str]:
    return [name for name, value in model.named_parameters() if not value.requires_grad]


def _content(value: Tensor) -> bytes:
    return value.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().tobytes()


def _describe(model: nn.Module) -> tuple[bytes, bool]:
    """All that makes a network but its weights, and whether that is code of one's own.

    Raises ValueError, or what pickle raises, for parts that cannot be told by name and content.
    """
    holders: dict[Any, list[str]] = {}
    named = {"remove_duplicate": False}
    for name, value in chain(model.named_parameters(**named), model.named_buffers(**named)):
        if value._backward_hooks or value._post_accumulate_grad_hooks:
            raise ValueError(f"{name} has a hook")
        holders.setdefault(value.data_ptr() or name, []).append(name)
    if any(value for name, value in vars(torch_module).items() if name.endswith("_hooks")):
        raise ValueError("there are hooks for all modules")
    shared = [names for names in holders.values() if len(names) > 1]
    extra = [value for value in model.state_dict().values() if not isinstance(value, Tensor)]
    describer = _Describer(model)
    describer.dump([model, shared, extra])
    return describer.file.getvalue(), describer.own_code


class _Describer(pickle.Pickler):
    """Writes values so that equal bytes compute the same thing; nothing reads them again.

    Code of installed packages is written as its name, other code as what it does: its bytecode,
    defaults, closure, and the globals that it uses, wherever they lead.
    """

    def __init__(self, model: nn.Module) -> None:
        self.file, self.own_code = io.BytesIO(), False
        super().__init__(self.file, protocol=4)
        self.fast = True  # equal values give equal bytes, whether they are one object or two
        self._trained = {id(part) for part in model.modules()}  # their weights are told elsewhere
        self._seen: dict[int, tuple[int, Any]] = {}  # holds the values, so that ids stay theirs

    def persistent_id(self, value: Any) -> list[Any] | None:
        """What to write in place of a value; None for what pickle writes well."""
        if isinstance(value, nn.Module | FunctionType | type):
            if id(value) in self._seen:
                return ["part", self._seen[id(value)][0]]
            self._seen[id(value)] = len(self._seen), value
        match value:
            case Tensor():
                return [type(value).__name__, value.dtype, value.shape, _content(value)]
            case set() | frozenset():
                return ["set", *sorted(value, key=repr)]
            case CodeType():
                facts = [value.co_code, value.co_consts, value.co_names, value.co_varnames]
                return [*facts, value.co_flags, value.co_exceptiontable]
            case CellType():
                return [value.cell_contents]
            case property():
                return ["property", value.fget, value.fset]
            case staticmethod() | classmethod() | _lru_cache_wrapper():
                return [type(value).__name__, value.__wrapped__]
            case weakref.ref():
                return ["weak", value()]
            case ModuleType():
                raise ValueError(f"it uses the module {value.__name__} in an unusual way")
            case nn.Module():
                return self._module(value)
            case FunctionType() if not _installed(value) or "<locals>" in value.__qualname__:
                return self._function(value)
            case type() if not _installed(value):
                self.own_code = True
                return [value.__qualname__, value.__bases__, _members(value)]
        return None

    def _module(self, module: nn.Module) -> list[Any]:
        values = dict(vars(module))
        values.pop("_compiled_call_impl", None)  # from model.compile(), a matter of speed
        if id(module) in self._trained:
            del values["_parameters"], values["training"]
            unsaved = sorted(module._non_persistent_buffers_set)
            values["_buffers"] = {name: module._buffers[name] for name in unsaved}
        if any(name.endswith("_hooks") and value for name, value in values.items()):
            raise ValueError(f"{type(module).__name__} has hooks")
        return [type(module), type(module).forward, sorted(values.items())]

    def _function(self, function: FunctionType) -> list[Any]:
        code, closure = function.__code__, list(function.__closure__ or ())
        parts = [code, function.__defaults__, function.__kwdefaults__, vars(function), closure]
        if _installed(function):
            return parts
        self.own_code = True
        return [*parts, _globals(code, function.__globals__)]


def _members(kind: type) -> list[tuple[str, Any]]:
    code = FunctionType | classmethod | staticmethod | property
    return [
        (name, value)
        for name, value in sorted(vars(kind).items())
        if isinstance(value, code) or not name.startswith(("__", "_abc_"))
    ]


def _globals(code: CodeType, scope: dict[str, Any]) -> dict[str, Any]:
    """What the global names in a function's code stand for; of a module, what is used of it."""
    found: dict[str, Any] = {}
    for step in dis.get_instructions(code):
        name = step.argval
        if step.opname == "IMPORT_NAME":
            value = sys.modules.get(name, name)
        elif ("GLOBAL" in step.opname or step.opname == "LOAD_NAME") and name in scope:
            value = scope[name]
        else:
            continue
        if not isinstance(value, ModuleType):
            found[name] = value
        elif _installed(value):
            found[name] = value.__name__
        else:
            used = {f"{name}.{n}": vars(value)[n] for n in code.co_names if n in vars(value)}
            found |= used or {name: value}
    for constant in code.co_consts:
        if isinstance(constant, CodeType):
            found |= _globals(constant, scope)
    return found


def _installed(value: type | FunctionType | ModuleType) -> bool:
    """Whether it belongs to an installed package, so that its name says what it is."""
    home = value.__name__ if isinstance(value, ModuleType) else value.__module__
    # A function can pretend to be another one, as functools.wraps makes it do; its globals cannot.
    home = str(value.__globals__.get("__name__") if isinstance(value, FunctionType) else home)
    file = getattr(sys.modules.get(home), "__file__", None) or ""
    packages = ("site-packages" in file) or ("dist-packages" in file)
    return packages or home.partition(".")[0] in _KNOWN
