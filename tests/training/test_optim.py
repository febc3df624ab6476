"""Learning rates against torch's schedulers, early stopping against a slow reading of its rules."""

import dataclasses
import math

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch.optim import lr_scheduler

import labutils as lab
from labutils.training.optim import (
    lr_factor,
    make_optimizer,
    orthogonalise,
    stop_reason,
)


def torch_lrs(make, total):
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=1.0)
    scheduler, lrs = make(optimizer), []
    for step in range(total):
        lrs.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        if step < total - 1:
            scheduler.step()
    return lrs


def our_lrs(config, steps):
    return [lr_factor(config, step, steps) for step in range(config.epochs * steps)]


ORACLES = {
    "constant": lambda total: lambda o: lr_scheduler.ConstantLR(o, factor=1.0),
    "linear": lambda total: (
        lambda o: lr_scheduler.LinearLR(o, start_factor=1.0, end_factor=0.0, total_iters=total)
    ),
    "onecycle": lambda total: (
        lambda o: lr_scheduler.OneCycleLR(
            o,
            max_lr=1.0,
            total_steps=total,
            pct_start=0.3,
            div_factor=25,
            final_div_factor=1e4,
            cycle_momentum=False,
        )
    ),
}


@pytest.mark.parametrize("schedule", ORACLES)
@pytest.mark.parametrize(("epochs", "steps"), [(1, 1), (2, 1), (1, 3), (10, 1), (4, 25), (7, 9)])
def test_every_step_has_the_learning_rate_of_torchs_scheduler(schedule, epochs, steps):
    config = lab.TrainConfig(epochs=epochs, schedule=schedule)
    expected = torch_lrs(ORACLES[schedule](epochs * steps), epochs * steps)
    assert our_lrs(config, steps) == pytest.approx(expected, abs=1e-9)


schedules = st.sampled_from(["constant", "linear", "onecycle"])


@settings(max_examples=150, deadline=None)
@given(schedules, st.integers(1, 12), st.integers(1, 30))
@example("onecycle", 1, 1)
@example("linear", 1, 1)
def test_the_factor_stays_between_0_and_1(schedule, epochs, steps):
    config = lab.TrainConfig(epochs=epochs, schedule=schedule)
    assert all(0 < factor <= 1 for factor in our_lrs(config, steps))


def test_one_cycle_rises_once_and_falls_once():
    lrs = our_lrs(lab.TrainConfig(epochs=10, schedule="onecycle"), 10)
    top = lrs.index(max(lrs))
    assert top == 29
    assert lrs[: top + 1] == sorted(lrs[: top + 1])
    assert lrs[top:] == sorted(lrs[top:], reverse=True)


def history(val_loss, val_accuracy=None):
    accuracies = val_accuracy or [0.5] * len(val_loss)
    return [{"val_loss": a, "val_accuracy": b} for a, b in zip(val_loss, accuracies)]


def slow_stop(rows, config):
    """'stagnation', 'overfitting', 'finished' or None, each rule read literally."""
    losses = [row["val_loss"] for row in rows]
    scores = losses if config.monitor == "val_loss" else [-row["val_accuracy"] for row in rows]
    record, record_epoch = math.inf, 0
    for epoch, value in enumerate(scores, 1):
        if value < record:
            record, record_epoch = value, epoch
    if config.patience and len(rows) - record_epoch >= config.patience:
        return "stagnation"
    worse = [
        loss > min(losses[: epoch + 1]) + config.overfit_delta for epoch, loss in enumerate(losses)
    ]
    wanted = config.overfit_patience
    if wanted and len(worse) >= wanted and all(worse[-wanted:]):
        return "overfitting"
    return "finished" if len(rows) >= config.epochs else None


# Quarters, so that differences are exact and equal values do occur.
quarters = st.integers(0, 8).map(lambda k: k / 4)
epochs_seen = st.lists(st.tuples(quarters, quarters), max_size=14)
maybe = st.none() | st.integers(1, 4)
deltas = st.sampled_from([0.0, 0.25, 0.5])


@settings(max_examples=300, deadline=None)
@given(epochs_seen, st.sampled_from(["val_loss", "val_accuracy"]), maybe, maybe, deltas)
def test_early_stopping_follows_its_two_rules(seen, monitor, patience, overfit, over_delta):
    rows = history([a for a, _ in seen], [b for _, b in seen])
    config = lab.TrainConfig(
        epochs=14,
        monitor=monitor,
        patience=patience,
        overfit_patience=overfit,
        overfit_delta=over_delta,
    )
    reason = stop_reason(rows, config)
    assert (reason and reason.split()[0].rstrip(":")) == slow_stop(rows, config)


def stops_at(rows, **settings):
    """The epoch after which training stops, and why."""
    config = lab.TrainConfig(epochs=len(rows), **settings)
    reasons = [stop_reason(rows[:epoch], config) for epoch in range(len(rows) + 1)]
    epoch = next(epoch for epoch, reason in enumerate(reasons) if reason)
    return epoch, reasons[epoch]


def test_stagnation_waits_for_patience_epochs_without_gain():
    rows = history([1.0, 0.8, 0.9, 0.8, 0.85, 0.1])
    assert stops_at(rows, patience=3) == (5, "stagnation: no better val_loss for 3 epochs")


def test_monitoring_accuracy_looks_at_accuracy_alone():
    rows = history([0.5, 0.4, 0.3, 0.2], [0.7, 0.8, 0.8, 0.75])
    assert stops_at(rows, patience=2, monitor="val_accuracy") == (
        4,
        "stagnation: no better val_accuracy for 2 epochs",
    )


def test_overfitting_counts_epochs_in_a_row_above_the_best_loss():
    rows = history([0.5, 0.7, 0.7, 0.55, 0.7, 0.7, 0.7, 0.1])
    expected = (7, "overfitting: val_loss above its best for 3 epochs")
    assert stops_at(rows, overfit_patience=3, overfit_delta=0.1) == expected
    assert stops_at(rows, overfit_patience=3, overfit_delta=0.3) == (8, "finished all 8 epochs")


def test_overfitting_watches_the_loss_whatever_is_monitored():
    rows = history([0.5, 0.9, 0.9, 0.9], [0.1, 0.2, 0.3, 0.4])
    epoch, reason = stops_at(rows, overfit_patience=2, monitor="val_accuracy")
    assert (epoch, reason.split(":")[0]) == (3, "overfitting")


def test_without_rules_all_epochs_run():
    assert stops_at(history([0.1, 5.0, 6.0, 7.0])) == (4, "finished all 4 epochs")


def test_frozen_parameters_are_not_given_to_the_optimizer():
    model = lab.MLP(4, [5], 3)
    model[1].requires_grad_(False)
    (group,) = make_optimizer(model, lab.TrainConfig(weight_decay=0.1)).param_groups
    assert [id(p) for p in group["params"]] == [id(p) for p in model[-1].parameters()]


@pytest.mark.parametrize("optimizer", ["sgd", "adam", "adamw", "muon"])
def test_with_stage_decay_each_stage_below_has_a_lower_rate(optimizer):
    model = lab.FastNet((3, 16, 16), 4, widths=[4, 4, 4])
    plain = make_optimizer(model, lab.TrainConfig(optimizer=optimizer)).param_groups
    config = lab.TrainConfig(optimizer=optimizer, stage_decay=0.5)
    shares = {
        p: g["share"] for g in make_optimizer(model, config).param_groups for p in g["params"]
    }
    factors = {"head": 1, "stage3": 1, "stage2": 0.5, "stage1": 0.25, "whiten": 0.125}
    for group in plain:
        for parameter in group["params"]:
            name = next(n for n, p in model.named_parameters() if p is parameter)
            factor = next(factor for part, factor in factors.items() if part in name)
            assert shares.pop(parameter) == pytest.approx(factor * group["share"])
    assert not shares


def test_stage_decay_needs_stages():
    with pytest.raises(ValueError, match=r"stage_decay = 0\.5, but MLP has no stages"):
        make_optimizer(lab.MLP(4, [5], 3), lab.TrainConfig(stage_decay=0.5))


@settings(max_examples=30)
@given(st.integers(1, 12), st.integers(1, 12), st.integers(0, 99))
def test_orthogonalise_changes_the_singular_values_by_its_polynomial_alone(rows, columns, seed):
    matrix = torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed))
    u, values, vh = torch.linalg.svd(matrix.double(), full_matrices=False)
    values = values / values.norm()
    for _ in range(3):
        values = 3.4445 * values - 4.775 * values**3 + 2.0315 * values**5
    expected = u @ values.diag() @ vh
    torch.testing.assert_close(orthogonalise(matrix).double(), expected, rtol=1e-3, atol=1e-4)


def test_all_but_the_smallest_singular_values_come_near_1():
    values = torch.logspace(-1, 0, 20)  # after division by their norm from 0.04 to 0.4
    basis = torch.linalg.qr(torch.randn(30, 20, generator=torch.Generator().manual_seed(0)))[0]
    found = torch.linalg.svdvals(orthogonalise(basis @ values.diag()))
    assert 0.5 < found.min() < found.max() < 1.5


def test_without_a_gradient_nothing_is_turned():
    assert torch.equal(orthogonalise(torch.zeros(3, 4)), torch.zeros(3, 4))


def muon_after_two_steps(model, images):
    rates = {"lr": 0.2, "bias_lr": 0.05, "head_lr": 0.1}
    config = lab.TrainConfig(optimizer="muon", weight_decay=0.01, **rates)
    optimizer = make_optimizer(model, config)
    for _ in range(2):
        for group in optimizer.param_groups:
            group["lr"] = 0.2 * group["share"]
        model(images).square().sum().backward()
        optimizer.step()
        optimizer.zero_grad()


def test_muon_equals_its_definition_for_hidden_weights_and_sgd_takes_head_and_vectors():
    torch.manual_seed(0)
    ours, bare = lab.CNN((1, 4, 4), 3, widths=[4]).eval(), lab.CNN((1, 4, 4), 3, widths=[4]).eval()
    bare.load_state_dict(ours.state_dict())
    images = torch.randn(8, 1, 4, 4)
    muon_after_two_steps(ours, images)
    hidden = [p for p in bare.parameters() if p.ndim == 4]
    vectors = {"params": [p for p in bare.parameters() if p.ndim == 1], "lr": 0.05}
    head = {"params": [bare.head.weight], "lr": 0.1}
    # A step takes 0.2 * 0.01 of each, whatever its rate.
    groups = [vectors | {"weight_decay": 0.04}, head | {"weight_decay": 0.02}]
    sgd = torch.optim.SGD(groups, momentum=0.85, nesterov=True)
    sums = [0.0, 0.0]
    for _ in range(2):
        bare.zero_grad()
        bare(images).square().sum().backward()
        for i, weight in enumerate(hidden):
            old, gradient = weight.detach().flatten(1), weight.grad.flatten(1)
            sums[i] = 0.6 * sums[i] + gradient
            turned = orthogonalise(gradient + 0.6 * sums[i])
            new = old / old.norm() - 0.2 * turned / turned.norm()
            weight.data = (new / new.norm() * old.norm()).view_as(weight)
        sgd.step()
    for a, b in zip(ours.parameters(), bare.parameters()):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-6)


def test_muon_keeps_the_norm_of_the_weights_it_turns():
    torch.manual_seed(0)
    model, images = lab.MLP(4, [6, 5], 3), torch.randn(8, 4)
    before = [(p.clone(), p.norm()) for p in model.parameters()]
    muon_after_two_steps(model, images)
    kept = [
        abs(p.norm() - norm) < 1e-5 and not p.allclose(old, rtol=0.02)
        for p, (old, norm) in zip(model.parameters(), before)
    ]
    assert kept == [True, False, True, False, False, False]


def test_muon_survives_weights_and_gradients_of_zero():
    model = lab.MLP(4, [6, 5], 3)
    torch.nn.init.zeros_(model[1].weight)
    muon_after_two_steps(model, torch.zeros(8, 4))
    assert all(p.isfinite().all() for p in model.parameters())


def test_muon_leaves_a_weight_alone_that_has_no_part_in_the_loss():
    model = torch.nn.ModuleDict({"unused": torch.nn.Linear(4, 4), "net": lab.MLP(4, [6, 5], 3)})
    before = model["unused"].weight.clone()
    optimizer = make_optimizer(model, lab.TrainConfig(optimizer="muon", lr=0.1))
    model["net"](torch.randn(8, 4)).sum().backward()
    optimizer.step()
    assert model["unused"].weight.equal(before)


def linear_classifier():
    return lab.MLP(4, [], 3)


def only_head():
    model = lab.MLP(4, [5], 3)
    model[1].requires_grad_(False)
    return model


@pytest.mark.parametrize("make", [linear_classifier, only_head])
def test_muon_with_nothing_to_orthogonalise_is_refused(make):
    with pytest.raises(ValueError, match=r"optimizer = 'muon': below its last .* 'sgd' or 'adamw'"):
        make_optimizer(make(), lab.TrainConfig(optimizer="muon"))


SPLITS = {
    "labels too few": (lambda s: {"labels": s.labels[:-1]}, "val has .* images and .* labels"),
    "labels of 32 bits": (lambda s: {"labels": s.labels.int()}, "val has .* torch.int32"),
    "a label too high": (lambda s: {"labels": s.labels + 1}, "int64, from 0 to 9"),
    "a label below 0": (lambda s: {"labels": s.labels - 1}, "int64, from 0 to 9"),
    "labels in a column": (lambda s: {"labels": s.labels[:, None]}, "one label an image"),
    "smaller images": (
        lambda s: {"images": s.images[..., :6]},
        r"val has .* 8, 6\], train .* 8, 8",
    ),
    "no images": (lambda s: {"images": s.images[:0], "labels": s.labels[:0]}, "at least one"),
}


def test_data_of_one_class_are_refused_before_they_are_trained_on(digits):
    one = dataclasses.replace(digits, classes=("only",))
    with pytest.raises(ValueError, match=r"^train: data.classes = \['only'\]\. .*at least 2"):
        lab.train(lab.MLP(digits.num_features, [4], 10), one, progress=False)


@pytest.mark.parametrize(("change", "message"), SPLITS.values(), ids=SPLITS)
def test_a_split_of_ones_own_has_a_label_for_each_image(digits, change, message):
    val = dataclasses.replace(digits.val, **change(digits.val))
    model = lab.MLP(digits.num_features, [4], 10)
    with pytest.raises(ValueError, match=rf"^train: .*{message}"):
        lab.train(model, dataclasses.replace(digits, val=val), progress=False)
