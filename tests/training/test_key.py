"""The key of a run: stable where it must be, different where runs differ."""

import dataclasses
import functools
import os
import subprocess
import sys
import threading
from collections import OrderedDict
from types import SimpleNamespace

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import labutils as lab
from labutils.training import watch
from labutils.training.key import identify, run_key


def make_model(seed=0, **changes):
    torch.manual_seed(seed)
    return lab.MLP(**{"in_features": 9, "hidden": [4], "num_classes": 3} | changes)


def test_keys_of_published_runs_never_change():
    spec = {"model": "MLP", "in_features": 64, "hidden": [16, 8], "num_classes": 10}
    data = SimpleNamespace(fingerprint="0123456789ab")
    config = lab.TrainConfig(
        epochs=30, lr=0.003, schedule="onecycle", augment=lab.Augment(rotate=10), seed=3
    )
    assert run_key(lab.TrainConfig(), spec, "seed", data) == "4f6185a9a9d7"
    assert run_key(config, spec, "seed", data) == "2892de3440b1"


def test_a_model_as_its_seed_makes_it_is_known_by_that_alone():
    assert identify(make_model(7), 7) == (make_model().spec, "seed")
    assert identify(make_model(7), 8)[1] != "seed"


def trained(model):
    with torch.no_grad():
        model[1].weight[0, 0] += 1e-6
    return model


def frozen(model):
    model[1].requires_grad_(False)
    return model


def extended(model):
    model.append(nn.Tanh())
    return model


def swapped(model):
    model[2] = nn.Tanh()
    return model


@pytest.mark.parametrize("change", [trained, frozen, extended, swapped])
def test_what_the_seed_and_the_spec_do_not_say_makes_another_key(change):
    spec, weights = identify(change(make_model()), 0)
    assert spec == make_model().spec
    assert weights not in ("seed", identify(trained(make_model(1)), 0)[1])
    assert identify(change(make_model()), 0) == (spec, weights)


def test_identifying_leaves_the_random_state_alone():
    torch.manual_seed(3)
    model = make_model(3)
    before = torch.get_rng_state()
    identify(model, 3)
    assert torch.equal(torch.get_rng_state(), before)


def test_a_module_of_your_own_is_known_by_its_layers_weights_and_code():
    torch.manual_seed(0)
    spec, weights = identify(nn.Sequential(nn.Linear(3, 2)), 0)
    assert "Linear" in spec["model"]
    torch.manual_seed(1)
    assert identify(nn.Sequential(nn.Linear(3, 2)), 0)[1] != weights


def other_forward(x):
    return -x


def with_attribute(name, value, part=None):
    def change(model):
        setattr(model if part is None else model[part], name, value)
        return model

    return change


def tied(model):
    model.append(nn.Linear(3, 3))
    model.append(nn.Linear(3, 3))
    with torch.no_grad():
        model[-1].weight.copy_(model[-2].weight)
        model[-1].bias.copy_(model[-2].bias)
    return model


def shared(model):
    tied(model)
    model[-1].weight = model[-2].weight
    return model


def with_buffer(value):
    def change(model):
        model.register_buffer("offset", torch.tensor(value), persistent=False)
        return model

    return change


CHANGES = {
    "trained": trained,
    "frozen": frozen,
    "extended": extended,
    "swapped": swapped,
    "other forward": with_attribute("forward", other_forward),
    "forward of a layer": with_attribute("forward", other_forward, 2),
    "in place": with_attribute("inplace", True, 2),
    "attribute": with_attribute("scale", 2.0),
    "double": lambda model: model.double(),
    "tied": tied,
    "shared": shared,
    "buffer": with_buffer(1.0),
    "other buffer": with_buffer(2.0),
}


def test_each_change_of_a_registered_network_makes_a_key_of_its_own():
    torch.manual_seed(0)
    found = {name: identify(change(make_model()), 0)[1] for name, change in CHANGES.items()}
    assert len({"seed", *found.values()}) == len(CHANGES) + 1
    again = {name: identify(change(make_model()), 0)[1] for name, change in CHANGES.items()}
    assert again == found


@pytest.mark.parametrize("setting", ["eps", "momentum"])
def test_a_changed_setting_of_a_layer_is_noticed(setting):
    torch.manual_seed(0)
    model = lab.CNN((3, 8, 8), 4, widths=[4])
    assert identify(model, 0)[1] == "seed"
    norm = next(part for part in model.modules() if isinstance(part, nn.BatchNorm2d))
    setattr(norm, setting, 0.5)
    assert identify(model, 0)[1] != "seed"


def test_a_patched_class_is_noticed(monkeypatch):
    before = identify(make_model(), 0)[1]
    monkeypatch.setattr(nn.ReLU, "forward", lambda self, x: x.tanh())
    assert before == "seed"
    assert identify(make_model(), 0)[1] != "seed"


def test_compiling_or_evaluating_a_network_leaves_its_key_alone():
    model = make_model()
    model.compile()
    model.eval()
    assert identify(model, 0)[1] == "seed"


HOOKS = {
    "forward": lambda model: model.register_forward_hook(lambda *_: None),
    "before": lambda model: model[1].register_forward_pre_hook(lambda *_: None),
    "backward": lambda model: model.register_full_backward_hook(lambda *_: None),
    "gradient": lambda model: model[1].weight.register_hook(lambda g: 0 * g),
    "accumulated": lambda model: model[1].weight.register_post_accumulate_grad_hook(print),
    "everywhere": lambda _: nn.modules.module.register_module_forward_hook(lambda *_: None),
    "weight norm": lambda model: nn.utils.parametrizations.weight_norm(model[1]),
}


@pytest.mark.parametrize("hook", HOOKS)
def test_what_no_key_can_tell_is_trained_anew_and_said(hook, monkeypatch, capsys):
    monkeypatch.setattr(watch, "_warned", set())
    model = make_model()
    handle = HOOKS[hook](model)
    try:
        first, second = identify(model, 0), identify(model, 0)
    finally:
        if hook == "everywhere":
            handle.remove()
    assert first[0] == model.spec
    assert len({"seed", first[1], second[1]}) == 3
    said = capsys.readouterr().out
    assert said.startswith("MLP is trained anew each time: no key can tell what it computes (")
    assert said.count("\n") == 1


SCALE = 1.0


def helper(x):
    return deeper(x) * SCALE


def deeper(x):
    return x + 1


def other_deeper(x):
    return x + 2


@dataclasses.dataclass
class Options:
    scale: float = 1.0
    names: tuple = ("a", "b")


class Power:
    def __init__(self, exponent):
        self.exponent = exponent

    def __call__(self, x):
        return x**self.exponent


class Net(nn.Module):
    """A network of one's own, which holds anything."""

    factor = 1

    def __init__(self, **held):
        super().__init__()
        torch.manual_seed(0)
        self.layer = nn.Linear(2, 2)
        for name, value in held.items():
            setattr(self, name, value)

    def forward(self, x):
        return helper(self.layer(x)) * self.factor

    @torch.no_grad()
    def predict(self, x):
        return self(x) if {"one", "two", "three"} else None


def scaled(factor):
    return lambda x: factor * x


def closed_over(module):
    def call(x):
        return module(x)

    return call


def layer(seed, kind=nn.Linear):
    torch.manual_seed(seed)
    return kind(2, 2)


HELD = {
    "nothing": dict,
    "zero": lambda: {"scale": 0},
    "one": lambda: {"scale": 1},
    "float": lambda: {"scale": 1.0},
    "true": lambda: {"scale": True},
    "text": lambda: {"scale": "1"},
    "another name": lambda: {"other": 1},
    "list": lambda: {"scale": [1, 2]},
    "tuple": lambda: {"scale": (1, 2)},
    "order": lambda: {"scale": [2, 1]},
    "set": lambda: {"scale": {"b", "a", "c"}},
    "dict": lambda: {"scale": {"a": 1}},
    "ordered": lambda: {"scale": OrderedDict(a=1)},
    "nested": lambda: {"scale": {"a": [{"b": (1, None)}]}},
    "tensor": lambda: {"scale": torch.tensor([1.0, 2.0])},
    "other tensor": lambda: {"scale": torch.tensor([1.0, 3.0])},
    "half": lambda: {"scale": torch.tensor([1.0, 2.0]).half()},
    "dtype": lambda: {"scale": torch.float16},
    "device": lambda: {"scale": torch.device("meta")},
    "size": lambda: {"scale": torch.Size([1, 2])},
    "array": lambda: {"scale": torch.tensor([1.0, 2.0]).numpy()},
    "other array": lambda: {"scale": torch.tensor([1.0, 3.0]).numpy()},
    "function": lambda: {"act": other_forward},
    "torch function": lambda: {"act": F.relu},
    "other torch function": lambda: {"act": F.gelu},
    "builtin": lambda: {"act": torch.tanh},
    "other builtin": lambda: {"act": torch.relu},
    "pool": lambda: {"act": F.max_pool2d},
    "other pool": lambda: {"act": F.adaptive_max_pool2d},
    "closure": lambda: {"act": scaled(2)},
    "other closure": lambda: {"act": scaled(3)},
    "lambda": lambda: {"act": lambda x: x},
    "default": lambda: {"act": lambda x=1: x},
    "other default": lambda: {"act": lambda x=2: x},
    "keyword default": lambda: {"act": lambda *, x=2: x},
    "pretender": lambda: {"act": functools.wraps(F.relu)(lambda x: -x)},
    "partial": lambda: {"act": functools.partial(F.leaky_relu, negative_slope=0.1)},
    "other partial": lambda: {"act": functools.partial(F.leaky_relu, negative_slope=0.2)},
    "cached": lambda: {"act": functools.lru_cache(other_forward)},
    "other cached": lambda: {"act": functools.lru_cache(deeper)},
    "object": lambda: {"act": Power(2)},
    "other object": lambda: {"act": Power(3)},
    "dataclass": lambda: {"act": Options()},
    "other dataclass": lambda: {"act": Options(scale=2.0)},
    "namespace": lambda: {"act": SimpleNamespace(a=1)},
    "method": lambda: {"act": Power(2).__call__},
    "class": lambda: {"act": nn.ReLU},
    "own class": lambda: {"act": Power},
    "layers in a list": lambda: {"act": [layer(0)]},
    "other layers in a list": lambda: {"act": [layer(1)]},
    "layer in a closure": lambda: {"act": closed_over(layer(0))},
    "other layer in a closure": lambda: {"act": closed_over(layer(1))},
    "network": lambda: {"act": Net()},
    "other network": lambda: {"act": Net(scale=3)},
    "row reader": lambda: {"act": layer(0, nn.LSTM)},
}


def test_whatever_a_network_of_your_own_holds_is_in_its_key():
    found = {name: identify(Net(**held()), 0) for name, held in HELD.items()}
    groups = {}
    for name, key in found.items():
        groups.setdefault(str(key), []).append(name)
    assert [names for names in groups.values() if len(names) > 1] == []
    again = {name: identify(Net(**held()), 0) for name, held in HELD.items()}
    assert [name for name in found if again[name] != found[name]] == []


def test_a_network_that_holds_itself_has_a_key():
    model = Net()
    model.myself, model.call = [model], closed_over(model)
    assert identify(model, 0) == identify(model, 0)


@pytest.mark.parametrize("held", [threading.Lock(), sys, (x for x in "ab")])
def test_an_object_that_cannot_be_told_from_another_makes_no_lasting_key(held):
    assert identify(Net(held=held), 0)[1] != identify(Net(held=held), 0)[1]


@pytest.mark.parametrize(
    ("name", "value"),
    [("deeper", other_deeper), ("SCALE", 2.0), ("helper", deeper), ("layer", 0)],
)
def test_what_a_forward_calls_is_in_the_key(monkeypatch, name, value):
    before = identify(Net(), 0)[1]
    monkeypatch.setitem(globals(), name, value)
    # Net has an attribute `layer` as well, which is no use of the global one.
    assert (identify(Net(), 0)[1] == before) == (name == "layer")


@pytest.mark.parametrize(
    ("name", "value"),
    [("factor", 2), ("forward", other_forward), ("extra", property(other_forward))],
)
def test_what_the_class_says_is_in_the_key(monkeypatch, name, value):
    before = identify(Net(), 0)[1]
    monkeypatch.setattr(Net, name, value, raising=False)
    assert identify(Net(), 0)[1] != before


PROGRAM = """
import sys
sys.path.insert(0, {folder!r})
import torch, torch.nn as nn, helpers
from labutils.training.key import identify
class Base(nn.Module):
    def act(self, x):
        return helpers.act(x)  {comment}
class Net(Base):
    def __init__(self):
        super().__init__()
        self.layer, self.names = nn.Linear(2, 2), {{"one", "two", "three"}}
    def forward(self, x):
        from helpers import late
        return late(self.act(self.layer(x))) if x in {{"four", "five", "six"}} else [
            self.act(y) for y in x]
torch.manual_seed(0)
print(identify(Net(), 0)[1])
"""
HELPERS = "from math import sin\nUSED = 1\ndef act(x): return {act}\ndef late(x): return {late}\n"


@pytest.fixture
def key_in_another_process(tmp_path):
    def key(act="x + USED", late="x", comment="", hash_seed="1"):
        (tmp_path / "helpers.py").write_text(HELPERS.format(act=act, late=late))
        program = tmp_path / "program.py"
        program.write_text(PROGRAM.format(folder=str(tmp_path), comment=comment))
        environment = {
            "PYTHONHASHSEED": hash_seed,
            "PYTHONPATH": os.pathsep.join(sys.path),
            "PYTHONDONTWRITEBYTECODE": "1",
        }
        command = [sys.executable, str(program)]
        done = subprocess.run(
            command, env=os.environ | environment, capture_output=True, text=True, check=True
        )
        return done.stdout.strip()

    return key


def test_another_process_finds_the_same_key_and_sees_changed_helpers(key_in_another_process):
    key = key_in_another_process()
    assert key_in_another_process(hash_seed="2", comment="# a comment") == key
    assert key_in_another_process(act="x - USED") != key
    assert key_in_another_process(late="sin(x)") != key


def test_a_network_of_your_own_is_not_given_the_run_of_another(write_npz):
    write_npz()
    data = lab.load_data("tiny", val_size=12, device="cpu")

    class Scaled(nn.Module):
        def __init__(self, scale):
            super().__init__()
            torch.manual_seed(0)
            self.scale, self.layers = scale, nn.Sequential(nn.Flatten(), nn.Linear(36, 3))

        def forward(self, x):
            return self.layers(x) * self.scale

    config = lab.TrainConfig(epochs=1, batch_size=16)
    settings = {"track": None, "progress": False}
    runs = [lab.train(Scaled(scale), data, config, **settings) for scale in (0, 1, 1)]
    assert [run.stored for run in runs] == [False, False, True]
    assert runs[0].key != runs[1].key == runs[2].key
