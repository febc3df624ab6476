"""The networks: shapes, parameter counts, what a spec holds, and refused arguments."""

import json

import numpy as np
import pytest
import torch

import labutils as lab
from labutils.models import registry


def test_frozen_parameters_are_not_counted():
    model = lab.MLP(5, [4], 3)
    model[1].requires_grad_(False)
    assert lab.num_parameters(model) == 4 * 3 + 3


@pytest.mark.parametrize("hidden", [[], [1], [7, 3], (7, 3)])
@pytest.mark.parametrize("shape", [(12,), (3, 2, 2), (1, 3, 4)])
def test_images_of_any_shape_become_one_logit_a_class(hidden, shape):
    assert lab.MLP(12, hidden, 4)(torch.zeros(2, *shape)).shape == (2, 4)


def test_a_spec_leaves_out_defaults_and_knows_no_difference_between_ways_to_say_it():
    spec = {"model": "MLP", "in_features": 9, "hidden": [8], "num_classes": 4}
    assert lab.MLP(9, [8], 4).spec == spec
    assert lab.MLP(9, (8,), 4, dropout=0.0, batch_norm=False).spec == spec
    assert lab.MLP(num_classes=4, hidden=[8], in_features=9, dropout=0).spec == spec
    assert lab.MLP(9, [8], 4, dropout=0.5).spec == spec | {"dropout": 0.5}


def test_a_subclass_does_not_pass_for_its_parent():
    class Doubled(lab.MLP):
        def forward(self, images):
            return 2 * super().forward(images)

    assert not hasattr(Doubled(9, [8], 4), "spec")


def test_a_registered_subclass_is_built_by_its_own_name(monkeypatch):
    monkeypatch.setitem(registry.MODELS, "Wide", None)  # and undone after the test

    @registry.register
    class Wide(lab.MLP):
        def __init__(self, width: int = 32):
            super().__init__(9, [width], 4)

    assert Wide(16).spec == {"model": "Wide", "width": 16}
    assert isinstance(lab.build({"model": "Wide"}), Wide)


@pytest.mark.parametrize(
    ("argument", "value", "message"),
    [
        ("hidden", [0], r"hidden\[0\] = 0.*greater than 0"),
        ("hidden", [8, -1], r"hidden\[1\] = -1.*greater than 0"),
        ("hidden", [2.5], r"hidden\[0\] = 2\.5.*integer"),
        ("hidden", [8, True], r"hidden\[1\] = True.*integer"),
        ("hidden", ["64"], r"hidden\[0\] = '64'.*integer"),
        ("hidden", "64", r"hidden = '64'.*list"),
        ("hidden", 64, r"hidden = 64.*list"),
        ("hidden", None, r"hidden = None.*list"),
        ("in_features", 0, r"in_features = 0.*greater than 0"),
        ("num_classes", 1, r"num_classes = 1.*greater than or equal to 2"),
        ("dropout", 1.0, r"dropout = 1\.0.*less than 1"),
        ("dropout", -0.1, r"dropout = -0\.1.*greater than or equal to 0"),
        ("dropout", float("nan"), r"dropout = nan.*finite"),
        ("batch_norm", 1, r"batch_norm = 1.*boolean"),
    ],
)
def test_a_bad_argument_is_named_with_its_value(argument, value, message):
    arguments = {"in_features": 9, "hidden": [8], "num_classes": 4} | {argument: value}
    with pytest.raises(ValueError, match=f"MLP: {message}"):
        lab.MLP(**arguments)


def test_all_bad_arguments_are_named_at_once():
    with pytest.raises(ValueError, match=r"(?s)in_features.*hidden\[0\].*hidden\[2\].*dropout"):
        lab.MLP(0, [0, 8, -3], 4, dropout=2)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"hiden": [8]}, r"hiden = \[8\]\..* Did you mean 'hidden'\? Known: in_features, hidden"),
        ({"num_classes": 4}, "missing .*'in_features' and 'hidden'.*Given: {'num_classes': 4}"),
        (dict.fromkeys(["in_features", "num_classes"], 2**30) | {"hidden": []}, "memory"),
        ({"in_features": 2**63, "hidden": [], "num_classes": 2}, "in_features = .* less than"),
        ({"in_features": 9, "hidden": [10**30], "num_classes": 2}, r"hidden\[0\] = .* less than"),
    ],
)
def test_arguments_that_build_nothing_are_named_by_the_class_and_by_build(arguments, message):
    for attempt in (lambda: lab.MLP(**arguments), lambda: lab.build({"model": "MLP"} | arguments)):
        with pytest.raises(ValueError, match=f"^MLP: .*{message}"):
            attempt()


def test_more_arguments_than_there_are_and_one_given_twice_are_refused():
    for attempt in (lambda: lab.MLP(9, [8], 4, 0.5), lambda: lab.MLP(9, [8], 4, hidden=[7])):
        with pytest.raises(ValueError, match=r"^MLP: .*(positional|multiple).*Given"):
            attempt()


@pytest.mark.parametrize("spec", [{}, {"model": None}, {"model": ["MLP"]}, {"hidden": [3]}])
def test_a_spec_without_a_known_model_is_refused(spec):
    with pytest.raises(ValueError, match=r"^build: model = .*'MLP'"):
        lab.build(spec)


@pytest.mark.parametrize("spec", [None, "MLP", [], 3, [("model", "MLP")]])
def test_what_is_no_spec_is_refused(spec):
    with pytest.raises(ValueError, match=r"^build: spec = .*dictionary"):
        lab.build(spec)


def test_a_spec_holds_numbers_as_json_has_them(monkeypatch):
    """Keys are digests of its text, so 0 and 0.0 must not make two keys of one network."""
    monkeypatch.setitem(registry.MODELS, "Half", None)  # and undone after the test

    @registry.register
    class Half(lab.MLP):
        def __init__(self, dropout: float = 0.5):
            super().__init__(9, [8], 4, dropout=dropout)

    specs = [Half(zero).spec for zero in (0, 0.0, np.float32(0))]
    assert len({json.dumps(spec) for spec in specs}) == 1
    assert specs[0]["dropout"] == 0.0


def test_in_mode_gives_every_part_its_own_mode_back_even_after_an_error():
    model = lab.MLP(12, [5], 3, dropout=0.5)
    model.train()
    model[1].eval()

    def look_and_fail():
        with registry.in_mode(model, training=False):
            assert not any(part.training for part in model.modules())
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        look_and_fail()
    assert [part.training for part in model] == [True, False, True, True, True]
    assert model.training


def test_a_gpu_without_memory_is_not_taken_for_images_that_do_not_fit():
    with pytest.raises(torch.OutOfMemoryError, match=r"^full$"), registry.takes_images("p", "r"):
        raise torch.OutOfMemoryError("full")
    with pytest.raises(ValueError, match=r"^p \(odd\)\. r$"), registry.takes_images("p", "r"):
        raise RuntimeError("odd")
