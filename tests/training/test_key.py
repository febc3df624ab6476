"""The key of a run: stable where it must be, different where runs differ."""

import copy

import pytest
import torch
from torch import nn

import labutils as lab
from labutils.models import registry
from labutils.training import watch
from labutils.training.key import identify, run_key


def make_model(seed=0, **changes):
    torch.manual_seed(seed)
    return lab.MLP(**{"in_features": 9, "hidden": [4], "num_classes": 3} | changes)


def test_keys_of_published_runs_never_change():
    spec = {"model": "MLP", "in_features": 64, "hidden": [16, 8], "num_classes": 10}
    config = lab.TrainConfig(
        epochs=30, lr=0.003, schedule="onecycle", augment=lab.Augment(rotate=10), seed=3
    )
    assert run_key(lab.TrainConfig(), spec, "seed", "0123456789ab") == "4f6185a9a9d7"
    assert run_key(config, spec, "seed", "0123456789ab") == "2892de3440b1"


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


OTHER_WEIGHTS = {"trained": trained, "frozen": frozen, "double": nn.Module.double}


def test_other_weights_have_lasting_keys_of_their_own():
    found = {name: identify(change(make_model()), 0) for name, change in OTHER_WEIGHTS.items()}
    assert {str(spec) for spec, _ in found.values()} == {str(make_model().spec)}
    assert len({"seed", *(weights for _, weights in found.values())}) == len(OTHER_WEIGHTS) + 1
    again = {name: identify(change(make_model()), 0) for name, change in OTHER_WEIGHTS.items()}
    assert again == found
    assert identify(trained(make_model(1)), 0) != found["trained"]


def test_the_key_of_changed_weights_stays_what_it_was():
    torch.manual_seed(0)
    model = make_model()
    for parameter in model.parameters():
        nn.init.constant_(parameter, 0.5)
    model[1].requires_grad_(False)
    assert identify(model, 0)[1] == "66bb6e045596"


def test_identifying_leaves_the_random_state_alone():
    torch.manual_seed(3)
    model = make_model(3)
    before = torch.get_rng_state()
    identify(model, 3)
    assert torch.equal(torch.get_rng_state(), before)


def test_compiling_or_evaluating_a_network_leaves_its_key_alone():
    model = make_model()
    model.compile()
    model.eval()
    assert identify(model, 0)[1] == "seed"


def other_forward(x):
    return -x


def with_attribute(name, value, part=None):
    def change(model):
        setattr(model if part is None else model[part], name, value)

    return change


def with_layer(layer, place=None):
    def change(model):
        if place is None:
            model.append(layer)
        else:
            model[place] = layer

    return change


def tied(model):
    model[-1].weight = model[1].weight


def changed_class(model):
    model.__class__ = type("MLP", (lab.MLP,), {})


CHANGES = {
    "longer": with_layer(nn.Tanh()),
    "longer by weights": with_layer(nn.Linear(3, 3)),
    "another layer": with_layer(nn.Tanh(), 2),
    "a layer of other settings": with_layer(nn.ReLU(inplace=True), 2),
    "shorter": lambda model: model.pop(-1),
    "without a bias": with_attribute("bias", None, 1),
    "other forward": with_attribute("forward", other_forward),
    "forward of a layer": with_attribute("forward", other_forward, 2),
    "in place": with_attribute("inplace", True, 2),
    "attribute": with_attribute("scale", 2.0),
    "buffer": lambda model: model.register_buffer("offset", torch.ones(1), persistent=False),
    "lasting buffer": lambda model: model.register_buffer("offset", torch.ones(1)),
    "another class": changed_class,
    "tied": tied,
    "hook": lambda model: model.register_forward_hook(lambda *_: None),
    "hook before": lambda model: model[1].register_forward_pre_hook(lambda *_: None),
    "hook backward": lambda model: model.register_full_backward_hook(lambda *_: None),
    "hook of a gradient": lambda model: model[1].weight.register_hook(lambda grad: 0 * grad),
    "hook after": lambda model: model[1].weight.register_post_accumulate_grad_hook(print),
    "weight norm": lambda model: nn.utils.parametrizations.weight_norm(model[1]),
    "old weight norm": lambda model: nn.utils.spectral_norm(model[1]),
}


@pytest.fixture
def assert_no_lasting_key(capsys):
    def check(model):
        watch.warn.cache_clear()
        first, second = identify(model, 0), identify(model, 0)
        assert len({"seed", first[1], second[1]}) == 3
        said = capsys.readouterr().out
        start = f"{type(model).__name__} is trained anew each time: no key can tell what "
        assert said.startswith(start)
        assert said.count("\n") == 1
        return first[0]

    return check


@pytest.mark.parametrize("change", CHANGES)
def test_a_network_that_is_not_as_its_spec_builds_it_has_no_lasting_key(
    change, assert_no_lasting_key
):
    model = make_model(hidden=[9, 9], in_features=9)
    assert identify(model, 0)[1] == "seed"
    CHANGES[change](model)
    assert assert_no_lasting_key(model) == model.spec


EVERYWHERE = ["forward_pre", "forward", "full_backward_pre", "full_backward"]


@pytest.mark.parametrize("kind", EVERYWHERE)
def test_a_hook_for_all_modules_leaves_no_lasting_key(kind, assert_no_lasting_key):
    register = getattr(nn.modules.module, f"register_module_{kind}_hook")
    handle = register(lambda *_: None)
    try:
        assert_no_lasting_key(make_model())
    finally:
        handle.remove()
    assert identify(make_model(), 0)[1] == "seed"


def test_a_setting_or_a_statistic_of_a_norm_that_was_changed_is_noticed(assert_no_lasting_key):
    def make():
        torch.manual_seed(0)
        return lab.CNN((3, 8, 8), 4, widths=[4])

    assert identify(make(), 0)[1] == "seed"
    for name, value in (("eps", 0.5), ("momentum", 0.5), ("running_mean", None)):
        model = make()
        norm = next(part for part in model.modules() if isinstance(part, nn.BatchNorm2d))
        setattr(norm, name, value)
        assert_no_lasting_key(model)


@pytest.mark.parametrize("kind", [nn.ReLU, nn.Linear, lab.MLP])
def test_a_class_that_was_given_another_forward_is_noticed(
    kind, monkeypatch, assert_no_lasting_key
):
    monkeypatch.setattr(kind, "forward", lambda self, x: x.tanh())
    assert_no_lasting_key(make_model())


class Doubled(lab.MLP):
    def forward(self, images):
        return 2 * super().forward(images)


class Net(nn.Module):
    """A network of one's own, which may hold anything."""

    def __init__(self, held=None):
        super().__init__()
        self.layer, self.held = nn.Linear(2, 2), held

    def forward(self, x):
        return self.layer(x)


OWN = {
    "subclass": lambda: Doubled(9, [4], 3),
    "module": Net,
    "holds a tensor": lambda: Net(torch.ones(3)),
    "holds a function": lambda: Net(other_forward),
    "holds itself": lambda: Net([Net()]),
    "torch's": lambda: nn.Sequential(nn.Linear(3, 2)),
    "torch's alone": lambda: nn.Linear(3, 2),
}


@pytest.mark.parametrize("make", OWN)
def test_a_network_of_your_own_has_no_lasting_key(make, assert_no_lasting_key):
    model = OWN[make]()
    assert assert_no_lasting_key(model) == {"model": repr(model)}


def test_a_registered_network_of_your_own_has_no_lasting_key(monkeypatch, assert_no_lasting_key):
    monkeypatch.setattr(registry, "MODELS", dict(registry.MODELS))

    @registry.register
    class Mine(nn.Linear):
        def __init__(self, width: int):
            super().__init__(width, width)

    assert assert_no_lasting_key(Mine(3)) == {"model": "Mine", "width": 3}

    @registry.register
    class MLP(lab.MLP):
        """Of the same name as one of labutils."""

    for model in (MLP(9, [4], 3), make_model()):
        assert_no_lasting_key(model)


@pytest.mark.parametrize(
    "make",
    [
        lambda: lab.ResidualMLP(9, [4, 4], 3),
        lambda: lab.ResNet((3, 8, 8), 4, width=4),
        lambda: lab.FastNet((3, 8, 8), 4, widths=[4, 4]),
        lambda: lab.FullyConvCNN((3, 8, 8), 4, layers=[4]),
        lambda: lab.SimpleCNN((3, 8, 8), 4, widths=[4, 4]),
    ],
)
def test_the_networks_of_labutils_and_copies_of_them_have_lasting_keys(make):
    torch.manual_seed(0)
    model = make()
    assert identify(model, 0)[1] == "seed"
    assert identify(copy.deepcopy(model), 0)[1] == "seed"


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
    assert not any(run.stored for run in runs)
    assert len({run.key for run in runs}) == 3
