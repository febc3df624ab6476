"""The key of a run: stable where it must be, different where runs differ."""

from types import SimpleNamespace

import pytest
import torch
from torch import nn

import labutils as lab
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
