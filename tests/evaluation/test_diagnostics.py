"""Networks from inside: counts and norms from closed formulas, and a model left as it was."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F

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


def test_a_layer_that_two_blocks_share_does_its_own_work_in_each():
    shared = nn.Linear(6, 6)
    table = lab.summary(
        nn.Sequential(nn.Sequential(shared), nn.Sequential(nn.ReLU(), shared)), (6,)
    )
    assert list(table.FLOPs[table.kind == "Linear"]) == [72, 72]


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


class Mixed(nn.Sequential):
    """Multiplies with a matrix of its own between two layers."""

    def forward(self, images):
        return self[1](self[0](images) @ torch.ones(5, 4))


def test_work_between_two_layers_is_in_the_total_alone():
    table = lab.summary(Mixed(nn.Linear(3, 5), nn.Linear(4, 2)), (3,))
    assert list(table.FLOPs) == [2 * 3 * 5, 2 * 4 * 2, 2 * (3 * 5 + 5 * 4 + 4 * 2)]


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


def assert_no_hooks(model):
    for part in model.modules():
        assert not part._forward_hooks
        assert not part._forward_pre_hooks
        assert not part._backward_hooks
    assert not nn.modules.module._global_forward_hooks
    assert not nn.modules.module._global_forward_pre_hooks


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
    assert_no_hooks(model)
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


@pytest.mark.parametrize(("size", "growing"), [((1, 16, 16), ()), ((3, 16, 16), (0, 16))])
def test_sizes_that_a_training_cannot_take_are_named(size, growing):
    model = lab.CNN((3, 16, 16), 10, widths=[4, 8])
    with pytest.raises(ValueError, match=r"^training_flops: .* does not fit the model") as caught:
        lab.training_flops(model, size, growing)
    assert f"input_size = {size}, image_sizes = {growing}" in str(caught.value)


def batch(n=5, features=6, classes=3):
    torch.manual_seed(1)
    return torch.randn(n, features), torch.arange(n) % classes


def make(**options):
    torch.manual_seed(0)
    return lab.MLP(6, [5, 4], 3, **options)


def test_gradient_norms_are_those_of_the_chain_rule():
    model = make()
    w1, b1, w2, b2, w3, b3 = (p.detach() for p in model.parameters())
    images, labels = batch()
    z1 = images @ w1.T + b1
    z2 = z1.relu() @ w2.T + b2
    logits = z2.relu() @ w3.T + b3
    g3 = (logits.softmax(1) - torch.eye(3)[labels]) / len(labels)
    g2 = (g3 @ w3) * (z2 > 0)
    g1 = (g2 @ w2) * (z1 > 0)
    table = lab.gradient_norms(model, (images, labels))
    for row, grad, inputs in zip(
        table.itertuples(), (g1, g2, g3), (images, z1.relu(), z2.relu()), strict=True
    ):
        both = torch.cat([grad.T @ inputs, grad.sum(0)[:, None]], dim=1)
        assert row.parameters == pytest.approx(float(both.norm()), rel=1e-5)


def test_gradient_norms_are_those_that_backward_leaves_in_a_residual_network():
    torch.manual_seed(0)
    model = lab.ResidualMLP(6, [5, 5, 4, 4], 3, batch_norm=True)
    table = lab.gradient_norms(model, batch())
    images, labels = batch()
    F.cross_entropy(model(images), labels).backward()
    for name, row in table.iterrows():
        own = [p.grad.norm() for p in model.get_submodule(name).parameters()]
        assert row.parameters == pytest.approx(float(torch.stack(own).norm()), rel=1e-5)
    assert len(table) == 10  # five linear layers, a bridge, and four normalisations


def test_a_gradient_that_hardly_arrives_is_measured_all_the_same():
    model = nn.Sequential(nn.Linear(100, 900, bias=False), nn.Linear(900, 2, bias=False))
    nn.init.constant_(model[1].weight[0], 1e-30)
    nn.init.constant_(model[1].weight[1], -1e-30)
    # Both logits are as good as 0: their gradients are -1/2 and 1/2, and each unit gets -1e-30.
    table = lab.gradient_norms(model, (torch.ones(1, 100), torch.tensor([0])))
    assert table.parameters["0"] == pytest.approx(300e-30, rel=1e-5, abs=0)


def test_frozen_layers_have_no_row_and_layers_out_of_use_neither():
    model = make()
    model[1].requires_grad_(False)
    model.unused = nn.Linear(2, 2)
    model.forward = lambda images: nn.Sequential(*list(model)[:-1])(images)
    assert list(lab.gradient_norms(model, batch()).index) == ["3", "5"]


def test_activation_stats_are_those_of_the_outputs():
    model = make()
    images, _ = batch()
    hidden = nn.Sequential(*list(model)[:3])(images)
    row = lab.activation_stats(model, batch()).loc["2"]
    assert row.kind == "ReLU"
    assert row.rms == pytest.approx(hidden.pow(2).mean().sqrt().item())
    assert row.spread == pytest.approx((hidden - hidden.mean(0)).pow(2).mean().sqrt().item())


def test_a_signal_that_hardly_arrives_is_measured_all_the_same():
    model = nn.Sequential(nn.Linear(6, 4, bias=False))
    images, labels = batch()
    expected = lab.activation_stats(model, (images, labels)).loc["0"]
    found = lab.activation_stats(model, (1e-30 * images, labels)).loc["0"]
    assert found.rms == pytest.approx(1e-30 * expected.rms)
    assert found.spread == pytest.approx(1e-30 * expected.spread)


def test_a_layer_that_cannot_tell_images_apart_has_no_spread():
    model = nn.Sequential(nn.Linear(6, 4))
    nn.init.zeros_(model[0].weight)
    table = lab.activation_stats(model, batch())
    assert table.spread.item() == pytest.approx(0.0, abs=1e-6)
    assert table.rms.item() > 0


PROBES = {"gradient_norms": lab.gradient_norms, "activation_stats": lab.activation_stats}


@pytest.mark.parametrize("fails", [False, True])
@pytest.mark.parametrize("probe", PROBES)
def test_a_look_inside_leaves_nothing_behind(probe, fails):
    model = make(batch_norm=True, dropout=0.5)
    model.eval()
    model[1].train()
    images, labels = batch()
    model(images).sum().backward()
    state = {name: value.clone() for name, value in model.state_dict().items()}
    grads = [p.grad.clone() for p in model.parameters()]
    modes = [part.training for part in model.modules()]
    random = torch.get_rng_state()
    if fails:
        with pytest.raises(RuntimeError):
            PROBES[probe](model, (images[:, :-1], labels))
    else:
        PROBES[probe](model, (images, labels))
    assert torch.equal(torch.get_rng_state(), random)
    assert [part.training for part in model.modules()] == modes
    for name, value in model.state_dict().items():
        assert torch.equal(value, state[name]), name
    for parameter, grad in zip(model.parameters(), grads):
        assert torch.equal(parameter.grad, grad)
    assert_no_hooks(model)


def test_gradients_do_not_appear_where_there_were_none():
    model = make()
    lab.gradient_norms(model, batch())
    assert all(p.grad is None for p in model.parameters())


def test_a_look_inside_sees_the_network_as_a_training_step_does():
    model = make(batch_norm=True).eval()
    normalised = lab.activation_stats(model, batch()).loc["2"]
    # The statistics of the batch, not the running ones that evaluation would use.
    assert normalised.rms == pytest.approx(1.0, rel=0.05)


def test_what_has_no_gradient_is_refused():
    with pytest.raises(ValueError, match="no parameter that requires a gradient"):
        lab.gradient_norms(make().requires_grad_(False), batch())
    with pytest.raises(ValueError, match=r"^training_flops: .* no parameter"):
        lab.training_flops(make().requires_grad_(False), (3, 8, 8))


def test_training_costs_a_backward_pass_for_the_input_and_one_for_the_weights():
    model = lab.CNN((3, 16, 16), 10, widths=[4, 8, 16])
    rows = lab.summary(model, (3, 16, 16)).FLOPs
    first = rows.iloc[0]  # whose input has no gradient
    assert lab.training_flops(model, (3, 16, 16)) == 3 * rows["total"] - first
    assert all(p.grad is None for p in model.parameters())
    assert model.training


def test_a_network_in_double_precision_is_counted_like_any_other():
    single, double = (nn.Sequential(nn.Flatten(), nn.Linear(12, 3)) for _ in range(2))
    double.double()
    assert lab.training_flops(double, (3, 2, 2)) == lab.training_flops(single, (3, 2, 2)) > 0
    assert lab.summary(double, (3, 2, 2)).equals(lab.summary(single, (3, 2, 2)))


def test_images_that_grow_cost_the_mean_of_their_sizes():
    model = lab.CNN((3, 16, 16), 10, widths=[4, 8])
    small, full = (lab.training_flops(model, (3, side, side)) for side in (8, 16))
    assert lab.training_flops(model, (3, 16, 16), image_sizes=(8, 16)) == (small + full) // 2
    assert lab.training_flops(model, (3, 16, 16), image_sizes=()) == full


def test_counting_the_operations_of_training_leaves_the_model_as_it_was():
    model = lab.CNN((3, 16, 16), 10, widths=[4, 8]).eval()
    model(torch.ones(2, 3, 16, 16)).sum().backward()
    state = {name: value.clone() for name, value in model.state_dict().items()}
    gradients, drawn = [p.grad.clone() for p in model.parameters()], torch.get_rng_state()
    lab.training_flops(model, (3, 16, 16))
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())
    assert all(torch.equal(p.grad, g) for p, g in zip(model.parameters(), gradients))
    assert torch.equal(torch.get_rng_state(), drawn)
    assert not model.training


def test_gradients_are_measured_also_where_none_are_recorded():
    expected = lab.gradient_norms(make(), batch())
    with torch.no_grad():
        assert lab.gradient_norms(make(), batch()).equals(expected)


def test_a_layer_that_is_used_twice_shows_its_last_output():
    shared = nn.ReLU()
    model = nn.Sequential(nn.Linear(6, 4), shared, nn.Linear(4, 5), shared)
    row = lab.activation_stats(model, batch()).loc["1"]
    assert row.rms == pytest.approx(model(batch()[0]).square().mean().sqrt().item())


def test_of_a_recurrent_layer_the_outputs_are_shown():
    recurrent = nn.LSTM(8, 6, batch_first=True)
    model = nn.Sequential(nn.Flatten(1, 2), recurrent, Last())
    images, labels = torch.randn(4, 1, 5, 8), torch.tensor([0, 1, 2, 3])
    rms = recurrent(images.flatten(1, 2))[0].square().mean().sqrt().item()
    assert lab.activation_stats(model, (images, labels)).loc["1"].rms == pytest.approx(rms)
    rows = lab.summary(model, (1, 5, 8))
    assert list(rows.output) == ["5x8", "5x6", "6", "6"]
    assert rows.parameters["total"] == rows.parameters["1"] == 4 * 6 * (8 + 6 + 2)


class Last(nn.Module):
    def forward(self, found):
        return found[0][:, -1]
