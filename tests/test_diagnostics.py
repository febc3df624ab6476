"""The summary table: parameters and FLOPs from closed formulas, and a model left as it was."""

import pytest
import torch
from torch import nn

import labutils as lab


def test_a_row_for_each_layer_of_an_mlp_with_its_parameters_and_flops():
    table = lab.summary(lab.MLP(64, [10, 5], 3), (1, 8, 8))
    linear = table[table.kind == "Linear"]
    assert list(linear.parameters) == [64 * 10 + 10, 10 * 5 + 5, 5 * 3 + 3]
    assert list(linear.FLOPs) == [2 * 64 * 10, 2 * 10 * 5, 2 * 5 * 3]
    assert list(linear.output) == ["10", "5", "3"]
    others = table[table.kind.isin(["Flatten", "ReLU"])]
    assert len(others) == 3
    assert (others[["parameters", "FLOPs"]] == 0).all(axis=None)
    total = table.loc["total"]
    assert (total.kind, total.output, table.index[-1]) == ("MLP", "3", "total")
    assert (total.parameters, total.FLOPs) == (linear.parameters.sum(), linear.FLOPs.sum())


@pytest.mark.parametrize("kernel", [1, 3])
@pytest.mark.parametrize("stride", [1, 2])
@pytest.mark.parametrize("groups", [1, 2])
@pytest.mark.parametrize("bias", [True, False])
def test_convolutions_follow_the_formula(kernel, stride, groups, bias):
    layer = nn.Conv2d(4, 6, kernel, stride, padding=kernel // 2, groups=groups, bias=bias)
    row = lab.summary(nn.Sequential(layer), (4, 8, 10)).loc["0"]
    height, width = 8 // stride, 10 // stride
    weights = 6 * (4 // groups) * kernel**2
    assert row.parameters == weights + 6 * bias
    assert row.FLOPs == 2 * weights * height * width
    assert row.output == f"6x{height}x{width}"


def test_a_layer_that_is_used_twice_is_counted_once_and_works_twice():
    shared = nn.Linear(6, 6)
    table = lab.summary(nn.Sequential(shared, nn.ReLU(), shared), (6,))
    linear = table[table.kind == "Linear"]
    assert list(linear.parameters) == [42, 0]
    assert list(linear.FLOPs) == [72, 72]
    assert list(table.loc["total", ["parameters", "FLOPs"]]) == [42, 144]


def test_tied_weights_of_two_layers_are_counted_once():
    model = nn.Sequential(nn.Linear(6, 6), nn.Linear(6, 6))
    model[1].weight = model[0].weight
    table = lab.summary(model, (6,))
    assert list(table.parameters) == [42, 6, 48]


class Scaled(nn.Module):
    """Has a parameter of its own beside a child, and ends in a plain function."""

    def __init__(self):
        super().__init__()
        self.scale = nn.Parameter(torch.ones(5))
        self.conv = nn.Conv2d(3, 5, 3)

    def forward(self, images):
        return self.scale * self.conv(images).mean(dim=(2, 3))


def test_the_total_counts_parameters_that_no_layer_owns():
    table = lab.summary(Scaled(), (3, 8, 8))
    assert table.loc["total", "parameters"] == 3 * 5 * 9 + 5 + 5


def test_the_total_shows_what_the_model_returns():
    table = lab.summary(Scaled(), (3, 8, 8))
    assert list(table.output) == ["5x6x6", "5"]


def test_a_single_layer_is_a_model_too():
    assert list(lab.summary(nn.Linear(3, 2), (3,)).index) == ["Linear", "total"]


def mixed_model():
    """Trains, but for a frozen batch norm, and has gradients already."""
    model = nn.Sequential(nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.Flatten(), nn.Linear(144, 2))
    model(torch.randn(2, 1, 8, 8)).sum().backward()
    model[1].eval()
    return model


@pytest.mark.parametrize("size", [(1, 8, 8), (1, 9, 8)])
def test_the_model_is_left_as_it_was_even_after_an_error(size):
    model = mixed_model()
    state = {name: value.clone() for name, value in model.state_dict().items()}
    grads = [p.grad.clone() for p in model.parameters()]
    modes = [part.training for part in model.modules()]
    random_state = torch.get_rng_state()
    try:
        lab.summary(model, size)
    except ValueError:
        assert size == (1, 9, 8)
    assert [part.training for part in model.modules()] == modes
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())
    assert all(torch.equal(p.grad, grad) for p, grad in zip(model.parameters(), grads))
    assert not any(part._forward_hooks or part._forward_pre_hooks for part in model.modules())
    assert torch.equal(torch.get_rng_state(), random_state)


@pytest.mark.parametrize(
    ("model", "size"),
    [
        (lab.MLP(64, [10], 3), (8, 9)),
        (lab.MLP(64, [10], 3), ()),
        (lab.MLP(64, [10], 3), 64),
        (lab.MLP(64, [10], 3), ("64",)),
        (nn.Conv2d(3, 4, 3), (1, 8, 8)),
        (nn.Conv2d(3, 4, 3), (3, 2, 2)),
        (nn.BatchNorm2d(3), (3, 8)),
        (nn.BatchNorm2d(3), [3, -1, 8]),
    ],
)
def test_an_input_size_that_does_not_fit_is_named(model, size):
    with pytest.raises(ValueError, match="does not fit the model") as caught:
        lab.summary(model, size)
    assert f"input_size = {size!r}" in str(caught.value)
    assert "data.image_shape" in str(caught.value)
