"""The perceptrons against their definitions."""

import itertools
import json

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import labutils as lab
from labutils.models import mlp

widths = st.lists(st.integers(1, 12), max_size=4)


@settings(max_examples=40, deadline=None)
@given(st.integers(1, 20), widths, st.integers(2, 6), st.booleans())
def test_the_parameter_count_has_a_closed_form(in_features, hidden, num_classes, batch_norm):
    sizes = [in_features, *hidden, num_classes]
    weights = sum(a * b for a, b in itertools.pairwise(sizes))
    # A scale and an offset for each unit take the place of the bias before batch norm.
    offsets = sum(hidden) * (2 if batch_norm else 1) + num_classes
    model = lab.MLP(in_features, hidden, num_classes, batch_norm=batch_norm)
    assert lab.num_parameters(model) == weights + offsets


def test_without_hidden_layers_it_is_linear():
    model = lab.MLP(6, [], 3)
    a, b = torch.randn(2, 5, 6)
    weight, bias = model.parameters()
    assert torch.allclose(model(a), a @ weight.T + bias, atol=1e-6)
    assert torch.allclose(model(a + b) - model(b), model(a) - model(torch.zeros_like(a)), atol=1e-5)


def test_the_layers_compute_what_the_formula_says():
    model = lab.MLP(6, [5, 4], 3)
    w1, b1, w2, b2, w3, b3 = model.parameters()
    images = torch.randn(7, 6)
    hidden = torch.relu(torch.relu(images @ w1.T + b1) @ w2.T + b2)
    assert torch.allclose(model(images), hidden @ w3.T + b3, atol=1e-6)


def test_batch_norm_stands_between_linear_and_relu():
    kinds = [type(layer).__name__ for layer in lab.MLP(6, [5, 4], 3, batch_norm=True)]
    block = ["Linear", "BatchNorm1d", "ReLU"]
    assert kinds == ["Flatten", *block, *block, "Linear"]


def test_dropout_takes_its_share_of_the_last_hidden_layer_in_training_only():
    torch.manual_seed(0)
    model = lab.MLP(6, [5, 400], 3, dropout=0.25)
    places = [place for place, layer in enumerate(model) if isinstance(layer, nn.Dropout)]
    assert places == [len(model) - 2]
    images, plain = torch.randn(50, 6), lab.MLP(6, [5, 400], 3)
    plain.load_state_dict(dict(zip(plain.state_dict(), model.state_dict().values())))
    assert torch.equal(model.eval()(images), plain(images))
    *layers, dropout, _ = model.train()
    before = nn.Sequential(*layers)(images)
    after = dropout(before)
    alive = before > 0
    assert (after[alive] == 0).float().mean().item() == pytest.approx(0.25, abs=0.02)
    kept = after != 0
    assert torch.allclose(after[kept], before[kept] / 0.75)


@settings(max_examples=25, deadline=None)
@given(widths, st.sampled_from([0.0, 0.5]), st.booleans())
def test_a_spec_builds_the_same_model_again(hidden, dropout, batch_norm):
    torch.manual_seed(3)
    model = lab.MLP(9, tuple(hidden), 4, dropout=dropout, batch_norm=batch_norm)
    torch.manual_seed(3)
    twin = lab.build(json.loads(json.dumps(model.spec)))
    assert twin.spec == model.spec
    assert str(twin) == str(model)
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), twin.parameters()))


def test_a_list_that_changes_later_does_not_change_the_spec():
    hidden = [8]
    model = lab.MLP(9, hidden, 4)
    hidden.append(8)
    assert model.spec["hidden"] == [8]


def test_an_unknown_name_is_refused_with_the_known_ones():
    with pytest.raises(ValueError, match=r"build: model = 'MPL'.*'CNN',.*'MLP'"):
        lab.build({"model": "MPL"})


@settings(max_examples=60)
@given(
    st.integers(1, 20),
    st.lists(st.integers(1, 6), min_size=2, max_size=9),
    st.integers(1, 4),
    st.booleans(),
)
def test_a_residual_mlp_has_the_parameters_of_the_mlp_and_its_bridges(
    in_features, hidden, block, batch_norm
):
    arguments = in_features, hidden, 3
    residual = lab.ResidualMLP(*arguments, block=block, batch_norm=batch_norm)
    ends = [*hidden[:-1:block], hidden[-1]]
    bridges = sum(a * b for a, b in itertools.pairwise(ends) if a != b)
    plain = lab.num_parameters(lab.MLP(*arguments, batch_norm=batch_norm))
    assert lab.num_parameters(residual) == plain + bridges
    assert residual(torch.zeros(2, in_features)).shape == (2, 3)


@pytest.mark.parametrize(
    ("depth", "block", "expected"), [(2, 2, [1]), (5, 2, [2, 2]), (6, 2, [2, 2, 1]), (7, 3, [3, 3])]
)
def test_layers_after_the_first_are_cut_into_blocks(depth, block, expected):
    blocks = [
        layer
        for layer in lab.ResidualMLP(4, [8] * depth, 3, block=block)
        if isinstance(layer, mlp.ResidualBlock)
    ]
    linear = [sum(isinstance(part, nn.Linear) for part in layer.body) for layer in blocks]
    assert linear == expected


def test_a_residual_network_computes_what_the_formula_says():
    model = lab.ResidualMLP(6, [5, 4, 3], 2)
    w1, b1, w2, b2, w3, b3, bridge, w4, b4 = model.parameters()
    images = torch.randn(7, 6)
    first = torch.relu(images @ w1.T + b1)
    body = torch.relu(first @ w2.T + b2) @ w3.T + b3
    logits = torch.relu(body + first @ bridge.T) @ w4.T + b4
    assert torch.allclose(model(images), logits, atol=1e-6)


@pytest.mark.parametrize("batch_norm", [False, True])
@pytest.mark.parametrize("layers", [1, 2, 3])
def test_a_block_whose_weights_are_zero_is_the_identity(layers, batch_norm):
    block = mlp.ResidualBlock([5] * (layers + 1), batch_norm=batch_norm, dropout=0.3)
    for parameter in block.parameters():
        nn.init.zeros_(parameter)
    inputs = torch.rand(4, 5)  # what comes out of a ReLU is not negative
    assert torch.equal(block(inputs), inputs)


@pytest.mark.parametrize("batch_norm", [False, True])
def test_dropout_stands_before_the_last_linear_layer_of_a_block(batch_norm):
    body = mlp.ResidualBlock([5, 5, 5], dropout=0.2, batch_norm=batch_norm).body
    kinds = [type(layer).__name__ for layer in body]
    norm = ["BatchNorm1d"] * batch_norm
    assert kinds == ["Linear", *norm, "ReLU", "Dropout", "Linear", *norm]


def test_he_initialisation_keeps_the_size_of_the_signal():
    images = torch.randn(500, 256)
    sizes = {}
    for init in ("he", "torch"):
        torch.manual_seed(0)
        *layers, _ = lab.MLP(256, [256] * 20, 10, init=init)
        signal = nn.Sequential(*layers)(images)
        sizes[init] = float(signal.detach().square().mean().sqrt())
    assert 0.5 < sizes["he"] < 2
    assert sizes["torch"] < 0.1


def test_he_initialisation_is_normal_by_the_inputs_of_a_layer():
    torch.manual_seed(0)
    linear = next(
        m for m in lab.MLP(784, [50], 10, init="he").modules() if isinstance(m, nn.Linear)
    )
    assert linear.weight.std().item() == pytest.approx((2 / 784) ** 0.5, rel=0.02)
    fourth = (linear.weight / linear.weight.std()).pow(4).mean().item()
    assert fourth == pytest.approx(3, rel=0.05)  # of a normal; 1.8 of a uniform
    assert not linear.bias.any()


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"hidden": []}, ["hidden = []", "at least 2 items"]),
        ({"hidden": [4]}, ["hidden = [4]", "at least 2 items"]),
        ({"hidden": [4, 0]}, ["hidden[1] = 0"]),
        ({"hidden": [4, 2.5]}, ["hidden[1] = 2.5"]),
        ({"hidden": "ab"}, ["hidden = 'ab'"]),
        ({"block": 0}, ["block = 0", "greater than 0"]),
        ({"block": 1.5}, ["block = 1.5"]),
        ({"dropout": 1.0}, ["dropout = 1.0"]),
        ({"num_classes": 1}, ["num_classes = 1"]),
        ({"in_features": -1}, ["in_features = -1"]),
    ],
)
def test_a_residual_mlp_refuses_what_cannot_be_built(arguments, words):
    with pytest.raises(ValueError, match="ResidualMLP: ") as error:
        lab.ResidualMLP(**{"in_features": 6, "hidden": [4, 4, 4], "num_classes": 3, **arguments})
    assert all(word in str(error.value) for word in words)


def test_an_unknown_initialisation_is_refused_with_the_known_ones():
    with pytest.raises(ValueError, match=r"init = 'orthogonal'.*'torch' or 'he'"):
        lab.MLP(6, [4], 3, init="orthogonal")
