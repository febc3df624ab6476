"""Training: equal to a bare loop, found again, continued with the same bits, clear in failure."""

import dataclasses
import itertools
import json
import multiprocessing
import os
import pkgutil
import re
import resource
import signal
import threading
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import labutils as lab
from labutils.base import device
from labutils.training import checkpoint, loop, runs, watch
from labutils.training.cards import RunError, load_weights
from labutils.training.key import identify, run_key
from labutils.training.optim import make_optimizer
from labutils.training.runs import find

# 48 images: three batches of 13 and one of 9.
CONFIG = lab.TrainConfig(epochs=3, batch_size=13, lr=0.01)
DISTORTION = {"rotate": 10, "translate": 1, "zoom": 0.1}
EVERYTHING = lab.TrainConfig(
    epochs=3,
    batch_size=13,
    lr=0.01,
    schedule="linear",
    ema=0.9,
    augment=lab.Augment(**DISTORTION, flip="alternating", crop=1, cutout=2),
)
TIMING = ("images_per_second", "seconds")


def load_tiny():
    return lab.load_data("tiny", val_size=12, device="cpu")


@pytest.fixture
def data(write_npz):
    write_npz()
    return load_tiny()


def make_model(width=8, dropout=0.2):
    torch.manual_seed(0)
    return lab.MLP(36, [width], 3, dropout=dropout, batch_norm=True)


def train(data, config=CONFIG, model=None, **settings):
    settings = {"track": None, "progress": False} | settings
    return lab.train(model or make_model(), data, config, **settings)


def with_changes(config=CONFIG, **changes):
    return lab.TrainConfig(**{**vars(config), **changes})


def bare_loop(data, optimizer, model, *, epochs=1, criterion=F.cross_entropy, each_step=None):
    """What train has to compute, written by hand. Returns train loss and accuracy by epoch."""
    torch.manual_seed(0)
    scores = []
    for epoch in range(epochs):
        model.train()
        loss_sum, hits, count = 0.0, 0, 0
        for x, y in data.train.shuffled(13, seed=0, epoch=epoch):
            optimizer.zero_grad()
            logits = model(x)
            loss = criterion(logits, y)
            loss.backward()
            if each_step:
                each_step("backward")
            optimizer.step()
            if each_step:
                each_step("step")
            loss_sum += float(loss.detach() * len(y))
            hits += int((logits.argmax(1) == y).sum())
            count += len(y)
        scores.append((loss_sum / count, hits / count))
    return scores


def adamw(model, lr=0.01):
    return torch.optim.AdamW(model.parameters(), lr=lr, weight_decay=0.0, fused=True)


def same_weights(model, other):
    state, other = model.state_dict(), other.state_dict()
    return all(torch.equal(value, other[name]) for name, value in state.items())


def without_timing(run):
    return [{k: v for k, v in row.items() if k not in TIMING} for row in run.rows]


def assert_same_run(run, other):
    assert without_timing(run) == without_timing(other)
    assert same_weights(run.model, other.model)


def on_forward(model, step, action, *, mode=True):
    """Call action in the given forward pass of a mode: training (True) or evaluation (False).

    The first pass in evaluation mode is the check of the outputs, before training.
    """
    passes = itertools.count(1)

    def hook(module, inputs, output):
        if module.training == mode and next(passes) == step:
            return action(output)

    model.register_forward_hook(hook)
    return model


def interrupt(output):
    os.kill(os.getpid(), signal.SIGINT)


def spoil(output):
    return output * float("nan")


OPTIMIZERS = {
    "sgd": lambda p: torch.optim.SGD(p, 0.01, 0.9, nesterov=True, weight_decay=0.1, fused=True),
    "adam": lambda p: torch.optim.Adam(p, 0.01, weight_decay=0.1, fused=True),
    "adamw": lambda p: torch.optim.AdamW(p, 0.01, weight_decay=0.1, fused=True),
}


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_an_epoch_equals_a_bare_loop_bit_for_bit(data, optimizer):
    model = make_model()
    run = train(data, with_changes(epochs=1, optimizer=optimizer, weight_decay=0.1), model)
    bare = make_model()
    [(loss, accuracy)] = bare_loop(data, OPTIMIZERS[optimizer](bare.parameters()), bare)
    assert same_weights(model, bare)
    assert run.rows[0]["train_loss"] == pytest.approx(loss, rel=1e-12)
    assert run.rows[0]["train_accuracy"] == accuracy


@pytest.mark.parametrize("batch_size", [13, 47])
def test_history_equals_a_loop_over_single_images(data, batch_size):
    config = with_changes(epochs=1, batch_size=batch_size, optimizer="sgd", lr=1e-12)
    run = train(data, config, make_model(dropout=0.0))
    # With a rate this small, the weights of every step are those of the start.
    model, losses, hits = make_model(dropout=0.0), [], 0
    for x, y in data.train.shuffled(batch_size, seed=0, epoch=0):
        for row, label in zip(model(x).detach(), y):
            losses.append(float(row.exp().sum().log() - row[label]))
            hits += int(row.argmax() == label)
    row = run.rows[0]
    assert row["train_loss"] == pytest.approx(sum(losses) / len(losses), rel=1e-4)
    assert row["train_accuracy"] == hits / len(losses)
    scores = [run.model.eval()(x).detach()[0] for x, _ in data.val.batches(1)]
    losses = [float(s.exp().sum().log() - s[y]) for s, y in zip(scores, data.val.labels)]
    assert row["val_loss"] == pytest.approx(sum(losses) / 12, rel=1e-4)
    hits = sum(int(s.argmax() == y) for s, y in zip(scores, data.val.labels))
    assert row["val_accuracy"] == pytest.approx(hits / 12)
    assert list(row) == [
        *("epoch", "train_loss", "train_accuracy", "val_loss", "val_accuracy", "lr"),
        *TIMING,
    ]


def test_label_smoothing_equals_its_formula(data):
    def criterion(logits, labels):
        log_probs = logits.log_softmax(1)
        return -(0.8 * log_probs[range(len(labels)), labels] + 0.2 * log_probs.mean(1)).mean()

    run, bare = train(data, with_changes(epochs=1, label_smoothing=0.2)), make_model()
    [(loss, _)] = bare_loop(data, adamw(bare), bare, criterion=criterion)
    assert run.rows[0]["train_loss"] == pytest.approx(loss, rel=1e-5)
    torch.testing.assert_close(run.model.state_dict(), bare.state_dict(), rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("decay", [1.0, 0.5])
def test_every_group_of_weights_learns_at_its_own_rate(data, decay):
    rates = {"lr": 0.02, "bias_lr": 0.5, "head_lr": 0.01, "weight_decay": 0.1}
    config = with_changes(epochs=1, optimizer="muon", stage_decay=decay, **rates)

    def network():
        torch.manual_seed(0)
        return lab.CNN((1, 6, 6), 3, widths=[4, 5])

    run, bare = train(data, config, network()), network()
    optimizer = make_optimizer(bare, config)
    for group in optimizer.param_groups:
        group["lr"] = config.lr * group["share"]
    assert len({group["lr"] for group in optimizer.param_groups}) > 2
    bare_loop(data, optimizer, bare)
    torch.testing.assert_close(run.model.state_dict(), bare.state_dict(), rtol=1e-4, atol=1e-5)


def test_the_schedule_reaches_the_optimizer(data):
    def fall(moment):
        steps.append(moment)
        optimizer.param_groups[0]["lr"] = 0.01 * (1 - len(steps) // 2 / 4)

    run = train(data, with_changes(epochs=1, schedule="linear"))
    bare, steps = make_model(), []
    optimizer = adamw(bare)
    bare_loop(data, optimizer, bare, each_step=fall)
    assert same_weights(run.model, bare)
    assert run.rows[0]["lr"] == pytest.approx(0.01 / 4)


def test_averaged_weights_equal_a_hand_computed_average(data):
    def average(moment):
        if moment == "step":
            now = {k: v.double().clone() for k, v in bare.state_dict().items()}
            averages.append(
                {k: 0.7 * averages[-1][k] + 0.3 * v for k, v in now.items()} if averages else now
            )

    model, bare, averages = make_model(), make_model(), []
    run = train(data, with_changes(epochs=1, ema=0.7), model)
    bare_loop(data, adamw(bare), bare, each_step=average)
    for name, value in model.state_dict().items():
        if value.is_floating_point():
            assert torch.allclose(value.double(), averages[-1][name], rtol=1e-5, atol=1e-6), name
    assert run.rows[0]["val_loss"] == pytest.approx(lab.evaluate(model, data.val).loss, rel=1e-6)


@pytest.mark.parametrize(("monitor", "best"), [("val_loss", 2), ("val_accuracy", 1)])
def test_the_model_ends_with_the_weights_of_the_best_epoch(data, monkeypatch, monitor, best):
    scores = iter([(3.0, 0.8), (1.0, 0.2), (2.0, 0.8)])
    monkeypatch.setattr(loop, "loss_and_accuracy", lambda *_, **__: next(scores))
    model, bare = make_model(), make_model()
    run = train(data, with_changes(monitor=monitor), model)
    assert run.info["best_epoch"] == best
    bare_loop(data, adamw(bare), bare, epochs=best)
    assert same_weights(model, bare)
    stored = make_model()
    load_weights(stored, run.path / "best.safetensors")
    assert same_weights(stored, bare)


def make_cnn():
    torch.manual_seed(0)
    return lab.CNN((1, 6, 6), 3, widths=[4, 6])


@pytest.fixture(params=[True, False])
def bf16(request, monkeypatch):
    """Let the processor compute in bf16, or not; where it does not, it emulates it."""
    monkeypatch.setattr(device, "_computes_bf16", lambda device: request.param)
    return request.param


def test_a_convolutional_network_equals_a_bare_loop(data):
    model, bare = make_cnn(), make_cnn().to(memory_format=torch.channels_last)
    run = train(data, with_changes(epochs=1), model)
    [(loss, _)] = bare_loop(data, adamw(bare), bare)
    assert same_weights(model, bare)
    assert run.rows[0]["train_loss"] == pytest.approx(loss, rel=1e-12)
    plain = make_cnn()
    [(loss, _)] = bare_loop(data, adamw(plain), plain)
    assert run.rows[0]["train_loss"] == pytest.approx(loss, rel=1e-4)
    stored = make_cnn()
    load_weights(stored, run.path / "best.safetensors")
    assert same_weights(stored, model)


# 48 images: steps of 20, 20 and 8 images; of the last, in parts of 5, one has 5 and one 3.
@pytest.mark.parametrize("accumulate", [2, 4, 20])
def test_accumulated_gradients_are_those_of_the_whole_batch(data, accumulate):
    config = with_changes(batch_size=20, optimizer="sgd", schedule="linear", ema=0.5)
    runs = []
    for parts in (1, accumulate):
        torch.manual_seed(0)
        model = lab.MLP(36, [8], 3)
        runs.append(train(data, with_changes(config, accumulate=parts), model))
    torch.testing.assert_close(*[run.model.state_dict() for run in runs])
    losses = [run.history.train_loss.tolist() for run in runs]
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)


def test_images_grow_during_training_and_are_scored_at_full_size(data):
    seen, model = [], make_cnn()
    model.register_forward_pre_hook(lambda _, inputs: seen.append((model.training, *inputs)))
    train(data, with_changes(image_sizes=(4, 6), epochs=2, batch_size=16), model)
    sides = [images.shape[2:] for training, images in seen if training]
    assert sides == 3 * [(4, 4)] + 3 * [(6, 6)]
    assert {images.shape[2] for training, images in seen if not training} == {4, 6}
    assert [images.shape[2] for training, images in seen[-2:]] == [6, 6]
    small = next(images for training, images in seen if training)
    whole = next(data.train.shuffled(16, seed=0, epoch=0))[0]
    assert torch.equal(small, F.interpolate(whole, (4, 4), mode="bilinear", antialias=True))


@pytest.mark.parametrize(
    ("batch_size", "epochs", "shares"), [(16, 4, [4, 4, 4]), (16, 2, [2, 2, 2]), (6, 1, [3, 3, 2])]
)
def test_image_sizes_have_equal_shares_of_the_steps(data, batch_size, epochs, shares):
    seen, model = [], make_cnn()
    model.register_forward_pre_hook(lambda _, inputs: seen.append((model.training, *inputs)))
    changes = {"image_sizes": (4, 5, 6), "epochs": epochs, "batch_size": batch_size}
    train(data, with_changes(**changes), model)
    sides = [images.shape[2] for training, images in seen if training]
    assert sides == sorted(sides)
    assert [sides.count(side) for side in (4, 5, 6)] == shares


FAST = with_changes(EVERYTHING, optimizer="muon", batch_size=24, accumulate=3, image_sizes=(5, 6))


# Six forward passes an epoch, two steps of three.
@pytest.mark.parametrize("step", [1, 3, 4, 6, 8])
def test_muon_in_parts_on_growing_images_goes_on_with_the_same_bits(data, step):
    run = train(data, FAST, on_forward(make_cnn(), step, interrupt))
    assert run.stop_reason == "interrupted"
    run = train(data, FAST, make_cnn())
    assert_same_run(run, train(data, FAST, make_cnn(), retrain=True))


def test_a_loss_that_is_not_finite_is_placed_in_its_step(data):
    with pytest.raises(RunError, match=r"loss became nan in epoch 2, step 1 of 2, at learning"):
        train(data, FAST, on_forward(make_cnn(), 8, spoil))


def test_auto_is_bf16_where_it_is_computed_else_float32(data, bf16, capsys):
    auto = train(data, with_changes(precision="auto"), make_cnn(), progress=True)
    assert auto.info["precision"] == ("bf16" if bf16 else "float32")
    assert capsys.readouterr() == ("", "")
    plain = train(data, CONFIG, make_cnn())
    assert plain.info["precision"] == "float32"
    assert plain.key != auto.key
    assert (without_timing(plain) == without_timing(auto)) != bf16
    assert auto.rows[0]["train_loss"] == pytest.approx(plain.rows[0]["train_loss"], rel=0.05)
    # Scored in the precision of its training, whoever asks.
    expected = lab.evaluate(auto.model, data.test, precision=auto.info["precision"])
    assert auto.test(data) == expected


@pytest.mark.parametrize("step", [1, 4, 6])
def test_an_interrupted_convolutional_network_goes_on_with_the_same_bits(data, bf16, step):
    config = with_changes(EVERYTHING, precision="auto", optimizer="sgd")
    run = train(data, config, on_forward(make_cnn(), step, interrupt))
    assert run.stop_reason == "interrupted"
    run = train(data, config, make_cnn())
    assert_same_run(run, train(data, config, make_cnn(), retrain=True))


def test_bf16_is_not_emulated_and_this_is_said_once(data, bf16, capsys):
    watch.warn.cache_clear()
    runs = [
        train(data, with_changes(precision="bf16", seed=seed), make_cnn(), progress=seed > 0)
        for seed in range(3)
    ]
    said = capsys.readouterr().out
    line = f"{runs[0].info['device']} does not compute in bf16: trained in float32\n"
    assert said == ("" if bf16 else line)
    for run in runs:
        assert run.info["precision"] == ("bf16" if bf16 else "float32")
        assert (line in (run.path / "train.log").read_text()) != bf16


def test_a_run_does_not_change_its_precision_on_the_way(data, monkeypatch):
    config = with_changes(precision="auto")
    monkeypatch.setattr(device, "_computes_bf16", lambda device: False)
    train(data, config, on_forward(make_cnn(), 6, interrupt))
    monkeypatch.setattr(device, "_computes_bf16", lambda device: True)
    with pytest.raises(RunError, match=r"made for .*'cpu'.*'float32'.* this is .*'cpu'.*'bf16'"):
        train(data, config, make_cnn())


@pytest.mark.parametrize(("count", "other"), [(1, 2), (2, 1)])
def test_a_run_keeps_the_number_of_threads_that_it_began_with(data, count, other):
    def note(module, *_):
        if module.training:
            used.add(torch.get_num_threads())

    before, used = torch.get_num_threads(), set()
    try:
        torch.set_num_threads(count)
        expected = train(data, model=make_cnn())
        train(data, model=on_forward(make_cnn(), 6, interrupt), retrain=True)
        torch.set_num_threads(other)
        model = make_cnn()
        model.register_forward_hook(note)
        run = train(data, model=model, retrain=True)
        assert torch.get_num_threads() == other
    finally:
        torch.set_num_threads(before)
    assert used == {count}
    assert run.info["threads"] == count
    assert "continues at image 74" in (run.path / "train.log").read_text()
    assert_same_run(run, expected)


def test_compiling_is_no_part_of_the_key_or_the_weights(data):
    config, model = with_changes(epochs=1, ema=0.9), make_model()
    # The compiler itself takes too long for a test; what is compiled for it does not.
    model.compile(backend="eager")
    run = train(data, config, model=model)
    assert list(run.model.state_dict()) == list(make_model().state_dict())
    assert train(data, config).stored
    again = train(data, config, retrain=True)
    torch.testing.assert_close(again.model.state_dict(), run.model.state_dict())


def test_a_model_that_is_frozen_in_part_trains_the_rest(data):
    model, before = make_model(), make_model()
    model[1].requires_grad_(False)
    train(data, with_changes(weight_decay=0.1), model)
    assert torch.equal(model[1].weight, before[1].weight)
    assert not torch.equal(model[-1].weight, before[-1].weight)


def test_random_numbers_outside_neither_change_nor_matter(data):
    model = make_model()
    torch.manual_seed(1)
    before = torch.get_rng_state()
    run = train(data, model=model)
    assert torch.equal(torch.get_rng_state(), before)
    model = make_model()
    torch.manual_seed(2)
    assert_same_run(run, train(data, model=model, retrain=True))


def test_a_finished_run_is_loaded_with_a_line_and_not_trained(data, capsys):
    run = train(data, progress=True)
    assert not run.stored
    again = train(data, name="other", progress=True, model=on_forward(make_model(), 1, spoil))
    assert again.stored
    assert_same_run(run, again)
    assert again.rows == run.rows
    line = f"run: loaded, trained {run.info['finished']} on {run.info['device']}, torch "
    assert capsys.readouterr().out.startswith(line)
    assert train(data).stored
    assert capsys.readouterr() == ("", "")


def test_a_finished_run_keeps_no_checkpoint(data):
    assert not list(train(data, checkpoint_seconds=0).path.glob("last.pt"))


def test_retrain_trains_anew_and_replaces_the_finished_run(data):
    run = train(data)
    again = train(data, retrain=True, name="other")
    assert not again.stored
    assert_same_run(run, again)
    assert train(data).name == "other"
    assert not run.path.exists()


def test_a_retrain_that_fails_leaves_the_earlier_run(data):
    run = train(data)
    with pytest.raises(RunError, match="loss became nan"):
        train(data, retrain=True, model=on_forward(make_model(), 6, spoil))
    again = train(data)
    assert again.stored
    assert_same_run(run, again)


def test_the_key_is_made_of_config_spec_and_data(data):
    spec = {"model": "MLP", "in_features": 36, "hidden": [8], "num_classes": 3}
    spec |= {"dropout": 0.2, "batch_norm": True}
    run = train(data)
    assert run.key == run_key(CONFIG, spec, "seed", data.fingerprint)
    assert run.info["model"] == spec
    assert train(data, with_changes(weight_decay=0.0, patience=None)).stored


def frozen():
    model = make_model()
    model[1].requires_grad_(False)
    return model


def seeded_otherwise():
    make_model()
    return lab.MLP(36, [8], 3, dropout=0.2, batch_norm=True)


def test_a_card_tells_what_it_takes_to_use_the_network_without_the_data(data):
    told = train(data).info["data"]
    assert told["classes"] == list(data.classes)
    assert told["shape"] == [1, 6, 6]
    pixels = torch.full((1, 1, 2, 2), 200, dtype=torch.uint8)
    mean, std = (torch.tensor(told[name]).view(-1, 1, 1) for name in ("mean", "std"))
    by_card = (pixels / 255 - mean) / std
    torch.testing.assert_close(by_card, data.train.normalise(pixels), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("other", [lambda: make_model(9), frozen, seeded_otherwise])
def test_another_model_has_another_key(data, other):
    run = train(data)
    found = train(data, model=other())
    assert not found.stored
    assert found.key != run.key
    assert train(data, model=other()).stored


def test_a_run_tells_where_its_weights_came_from(data):
    assert train(data).info["weights"] == "seed"
    changed = make_model()
    with torch.no_grad():
        next(changed.parameters()).add_(1)
    _, weights = identify(changed, CONFIG.seed)
    assert train(data, model=changed).info["weights"] == weights != "seed"


def test_other_settings_data_and_weights_have_other_keys(data):
    model = make_model()
    keys = [train(data, model=model).key, train(data, model=model).key]
    keys += [train(data, with_changes(**{k: 2})).key for k in ("lr", "epochs", "seed")]
    keys += [train(lab.load_data("tiny", val_size=15, device="cpu")).key]
    assert len(set(keys)) == 6


def own_module():
    torch.manual_seed(0)
    return nn.Sequential(nn.Flatten(), nn.Linear(36, 3))


def test_a_module_of_your_own_is_trained_anew_each_time_and_this_is_said(data, capsys):
    watch.warn.cache_clear()
    run, again = train(data, model=own_module()), train(data, model=own_module())
    assert capsys.readouterr().out.count("Sequential is trained anew each time") == 1
    assert not again.stored
    assert again.key != run.key
    assert_same_run(run, again)
    assert run.test(data) == lab.evaluate(run.model, data.test)
    # What its card says holds all the same.
    assert find(run.key, own_module()).rows == run.rows


def test_training_works_outside_of_the_main_thread(data):
    found = []
    thread = threading.Thread(target=lambda: found.append(train(data)))
    thread.start()
    thread.join()
    assert_same_run(found[0], train(data, retrain=True))


INTERRUPTED = {
    "first step": (1, True, 0, 1),
    "in the second epoch": (6, True, 1, 6),
    "last step of an epoch": (4, True, 0, 4),
    "while scoring": (2, False, 1, 5),
}


@pytest.mark.parametrize(("step", "mode", "epochs", "done"), INTERRUPTED.values(), ids=INTERRUPTED)
def test_ctrl_c_stops_after_the_batch_and_the_run_goes_on(data, step, mode, epochs, done):
    handler = signal.getsignal(signal.SIGINT)
    steps = []
    model = on_forward(make_model(), step, interrupt, mode=mode)
    model.register_forward_hook(lambda module, *_: steps.append(module.training))
    run = train(data, EVERYTHING, model)
    assert signal.getsignal(signal.SIGINT) is handler
    assert run.stop_reason == "interrupted"
    assert "interrupted" in str(run)
    assert run.epochs == epochs
    assert steps.count(True) == done
    assert find(run.key, make_model()) is None
    run = train(data, EVERYTHING)
    assert not run.stored
    assert (run.path / "train.log").read_text().count("continues at image") == 1
    assert_same_run(run, train(data, EVERYTHING, retrain=True))


def test_ctrl_c_while_scoring_the_last_epoch_is_raised_when_the_run_is_stored(data):
    with pytest.raises(KeyboardInterrupt):
        train(data, model=on_forward(make_model(), 4, interrupt, mode=False))
    run = train(data)
    assert run.stored
    assert run.stop_reason == "finished all 3 epochs"
    assert_same_run(run, train(data, retrain=True))


def test_an_ignored_ctrl_c_stays_ignored(data):
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    run = train(data, model=on_forward(make_model(), 4, interrupt))
    assert run.stop_reason == "finished all 3 epochs"
    assert signal.getsignal(signal.SIGINT) == signal.SIG_IGN


def test_a_second_ctrl_c_stops_at_once_and_the_run_goes_on(data):
    def twice(output):
        interrupt(output)
        interrupt(output)

    handler = signal.getsignal(signal.SIGINT)
    with pytest.raises(KeyboardInterrupt):
        train(data, model=on_forward(make_model(), 6, twice), checkpoint_seconds=0)
    assert signal.getsignal(signal.SIGINT) is handler
    assert_same_run(train(data), train(data, retrain=True))


def in_child(function, *args):
    """Start a function in a process forked from one that has torch loaded but never used it.

    Forking this process would not do: where a GPU is, autograd refuses to work in a fork.
    """
    context = multiprocessing.get_context("forkserver")
    # torch imports _dynamo, which takes seconds, when the first optimizer is made.
    preload = ["labutils.training.loop", "torch._dynamo", "sklearn.model_selection", "pytest"]
    context.set_forkserver_preload(preload)
    folders = {name: os.environ[name] for name in ("LABUTILS_DATA", "LABUTILS_RUNS")}
    process = context.Process(target=_child, args=(function, folders, args))
    process.start()
    return process


def _child(function, folders, args):
    os.environ.update(folders)
    torch.set_num_threads(1)
    function(*args)


def exit_code(process):
    process.join(120)
    return process.exitcode


# Each start goes on from where the one before was killed: before or after the n-th call.
KILLS = [
    ("before", "os.fsync", 1),  # the first last.pt
    ("before", "pathlib.Path.replace", 1),  # written but not in place
    ("after", "pathlib.Path.replace", 1),  # in place
    (
        "before",
        "labutils.training.checkpoint.TrainingState.add",
        3,
    ),  # after a step, before its checkpoint
    ("before", "labutils.training.loop.loss_and_accuracy", 1),  # last step of an epoch saved
    ("after", "labutils.training.loop.loss_and_accuracy", 1),
    ("after", "os.fsync", 2),
    ("before", "labutils.training.checkpoint.TrainingState.add", 5),  # in the last epoch
    ("before", "pathlib.Path.replace", 4),  # best.safetensors
    ("after", "pathlib.Path.replace", 2),  # the card
    ("before", "pathlib.Path.rename", 1),  # all written, not yet in the store
    ("after", "pathlib.Path.rename", 1),
]


def train_and_die(when, function, number):
    owner, name = function.rsplit(".", 1)
    owner, calls = pkgutil.resolve_name(owner), itertools.count(1)
    original = getattr(owner, name)

    def dying(*args, **kwargs):
        last = next(calls) == number
        if last and when == "before":
            os.kill(os.getpid(), signal.SIGKILL)
        result = original(*args, **kwargs)
        if last:
            os.kill(os.getpid(), signal.SIGKILL)
        return result

    setattr(owner, name, dying)
    train(load_tiny(), EVERYTHING, checkpoint_seconds=0)


def test_a_run_killed_at_any_moment_ends_with_the_same_bits(data, tmp_path):
    for kill in KILLS:
        assert exit_code(in_child(train_and_die, *kill)) == -signal.SIGKILL, kill
    run = train(data, EVERYTHING)
    assert run.stored
    log = (run.path / "train.log").read_text()
    images = re.findall(r"(?:starts|continues) at image (\d+) of 144", log)
    assert images == ["0", "0", "0", "13", "39", "48", "48", "61", "109", "144", "144", "144"]
    assert not list(tmp_path.glob("runs/**/.*.tmp"))
    assert not list(tmp_path.glob("runs/*.part"))
    assert_same_run(run, train(data, EVERYTHING, retrain=True))


def train_when_all_have_looked(barrier, answer):
    find = loop.find

    def find_and_wait(*args):
        run = find(*args)
        if barrier is not None:
            loop.find = find
            barrier.wait(60)
        return run

    loop.find = find_and_wait
    run = train(load_tiny())
    weights = run.model.state_dict()["1.weight"].sum().item()
    answer.write_text(json.dumps([run.stored, weights, run.rows]))


def test_two_processes_at_once_share_one_training(data, tmp_path):
    barrier = multiprocessing.get_context("forkserver").Barrier(2)
    answers = [tmp_path / "0.json", tmp_path / "1.json"]
    processes = [in_child(train_when_all_have_looked, barrier, answer) for answer in answers]
    assert [exit_code(process) for process in processes] == [0, 0]
    first, second = sorted(json.loads(answer.read_text()) for answer in answers)
    assert (first[0], second[0]) == (False, True)
    assert first[1:] == second[1:]
    assert train(data).rows == first[2]


def train_until_the_disk_is_full(width, limit, answer):
    saves, save = itertools.count(1), checkpoint.save

    def save_on_a_full_disk(*args):
        if next(saves) == 3:
            hard = resource.getrlimit(resource.RLIMIT_FSIZE)[1]
            resource.setrlimit(resource.RLIMIT_FSIZE, (limit, hard))
        save(*args)

    checkpoint.save = save_on_a_full_disk
    with pytest.raises(RunError) as caught:
        train(load_tiny(), model=make_model(width), checkpoint_seconds=0)
    answer.write_text(str(caught.value))


@pytest.mark.parametrize("limit", [2_000, 100_000])
def test_a_full_disk_is_named_and_what_was_saved_is_whole(data, tmp_path, limit):
    width, answer = 2_000, tmp_path / "answer"
    assert exit_code(in_child(train_until_the_disk_is_full, width, limit, answer)) == 0
    [part] = tmp_path.glob("runs/*.part")
    message = answer.read_text()
    assert f"train: cannot write to {part.parent} (File too large)" in message
    assert "Free space or set LABUTILS_RUNS" in message
    assert {path.name for path in part.iterdir()} == {"last.pt", "train.log"}
    run = train(data, model=make_model(width))
    assert "continues at image 26 of" in (run.path / "train.log").read_text()
    assert_same_run(run, train(data, model=make_model(width), retrain=True))


def test_a_runs_folder_that_is_a_file_is_named(data, tmp_path):
    (tmp_path / "runs").write_text("in the way")
    wanted = rf"cannot write to {tmp_path}/runs .* set LABUTILS_RUNS"
    with pytest.raises(RunError, match=wanted):
        train(data)


def test_a_runs_folder_without_permission_is_named(data, tmp_path):
    (tmp_path / "runs").mkdir(mode=0o500)
    if os.access(tmp_path / "runs", os.W_OK):
        pytest.skip("this user, root, may write to any folder")
    with pytest.raises(RunError, match=rf"cannot write to {tmp_path}/runs.*Permission denied"):
        train(data)


@pytest.mark.parametrize("checkpoint_seconds", [0, 30])
def test_a_loss_that_is_not_finite_stops_the_run(data, checkpoint_seconds):
    config, model = with_changes(schedule="linear"), on_forward(make_model(), 6, spoil)
    with pytest.raises(RunError) as caught:
        train(data, config, model, checkpoint_seconds=checkpoint_seconds)
    [part] = Path(os.environ["LABUTILS_RUNS"]).glob("*.part")
    message = str(caught.value)
    assert "run: the loss became nan in epoch 2, step 2 of 4, at learning rate 0.00583" in message
    assert f"Last good checkpoint: {part / 'best.safetensors'} (epoch 1)" in message
    assert "lower lr" in message
    assert not list(part.glob(".*"))
    kept = make_model()
    load_weights(kept, part / "best.safetensors")
    logged = float(re.search(r"epoch 1/3, .*val (\S+)\)", (part / "train.log").read_text())[1])
    assert lab.evaluate(kept, data.val).loss == pytest.approx(logged, abs=1e-3)


@pytest.mark.parametrize(("mode", "what"), [(True, "loss"), (False, "validation loss")])
def test_without_a_good_epoch_no_checkpoint_is_named(data, mode, what):
    step = 4 if mode else 2
    wanted = rf"the {what} became nan in epoch 1, step 4 of 4, .*checkpoint: there is none yet"
    with pytest.raises(RunError, match=wanted):
        train(data, model=on_forward(make_model(), step, spoil, mode=mode))
    assert not list(Path(os.environ["LABUTILS_RUNS"]).glob("*/best.safetensors"))


def test_a_damaged_checkpoint_stops_the_run_with_advice(data):
    train(data, model=on_forward(make_model(), 6, interrupt))
    [last] = Path(os.environ["LABUTILS_RUNS"]).glob("*.part/last.pt")
    last.write_bytes(last.read_bytes()[:1000])
    wanted = (
        rf"checkpoint {last} does not continue .*damaged.*Remove {last.parent} to start it anew"
    )
    with pytest.raises(RunError, match=wanted):
        train(data)


def test_images_that_the_model_cannot_take_are_named(data):
    with pytest.raises(
        ValueError, match=r"cannot take images of shape \(1, 6, 6\).*in_features=36"
    ):
        train(data, model=lab.MLP(784, [8], 3))


def test_a_wrong_number_of_outputs_is_refused_before_training(data, tmp_path):
    with pytest.raises(ValueError, match=r"4 outputs, the data 3 classes.*num_classes=3"):
        train(data, model=lab.MLP(36, [8], 4))
    assert not (tmp_path / "runs").exists()


def test_a_renamed_run_goes_on_under_its_first_name(data):
    train(data, model=on_forward(make_model(), 6, interrupt))
    run = train(data, name="other")
    assert run.path.name.startswith("run-")
    assert_same_run(run, train(data, retrain=True))


@pytest.fixture
def mirror(monkeypatch):
    """What reaches a mirror: (what, value), with the folders in the runs folder at that time."""
    calls = []

    def note(value, final):
        folders = sorted(path.suffix for path in Path(os.environ["LABUTILS_RUNS"]).glob("*-*"))
        calls.append(("close" if final else "row", value, folders))

    monkeypatch.setattr(watch, "open_mirrors", lambda run, track: {"mirror": note})
    return calls


def test_mirrors_see_each_epoch_and_are_closed_before_their_folder_is_renamed(data, mirror):
    run = train(data)
    assert [row for what, row, _ in mirror if what == "row"] == run.rows
    what, summary, folders = mirror[-1]
    assert (what, folders) == ("close", [".part"])
    assert summary["best/val_accuracy"] == run.best("val_accuracy")
    assert [what for what, *_ in mirror] == ["row", "row", "row", "close"]


@pytest.mark.parametrize("action", [interrupt, spoil])
def test_mirrors_are_closed_when_a_run_is_cut_off(data, mirror, action):
    try:
        train(data, model=on_forward(make_model(), 6, action))
    except RunError:
        assert action is spoil
    what, summary, folders = mirror[-1]
    assert (what, folders) == ("close", [".part"])
    assert summary["best/epoch"] == 1


def test_a_run_that_is_being_replaced_is_found_when_it_is_whole(data, monkeypatch):
    first, looks = train(data), []

    def find(key, model):
        looks.append(key)
        if len(looks) == 1:
            raise RunError("the stored run is damaged")  # between the old one and the new one
        return runs.find(key, model)

    monkeypatch.setattr(loop, "find", find)
    again = train(data)
    assert again.stored
    assert (again.key, len(looks)) == (first.key, 2)


def test_classes_that_no_card_can_hold_are_refused_before_the_training(data):
    numbered = dataclasses.replace(data, classes=tuple(range(3)))
    with pytest.raises(ValueError, match=r"^train: data.classes\[0\] = 0"):
        train(numbered)


def test_a_network_that_returns_several_things_is_refused(data):
    class Two(nn.Module):
        def __init__(self):
            super().__init__()
            self.body = nn.Linear(36, 3)

        def forward(self, images):
            return self.body(images.flatten(1)), images

    with pytest.raises(ValueError, match=r"cannot take images .* returned tuple, not \[N, num_c"):
        train(data, model=Two())


def normalised():
    return lab.MLP(36, [3], 3, batch_norm=True)


def all_frozen():
    return make_model().requires_grad_(False)


@pytest.mark.parametrize(
    ("arguments", "wanted"),
    [
        (
            {"config": with_changes(batch_size=49)},
            r"batch_size = 49\. Choose at most 48, the images of",
        ),
        (
            {"config": with_changes(batch_size=4, accumulate=4), "model": normalised()},
            r"batch_size = 4 in 4 parts are single images \(.*Choose a larger batch_size",
        ),
        (  # whose last maps are of one pixel
            {"config": with_changes(batch_size=1), "model": lab.ResNet((1, 6, 6), 3, width=2)},
            r"batch_size = 1 in 1 parts are single images \(.*Choose a larger batch_size",
        ),
        ({"track": 3}, r"^train: track = 3\."),
        ({"track": "neptune"}, r"^train: track\[0\] = 'neptune'.* 'wandb' or 'tensorboard'"),
        ({"track": ["wandb", "neptune"]}, r"^train: track\[1\] = 'neptune'"),
        (
            {"config": with_changes(stage_decay=0.5)},
            "stage_decay = 0.5, but MLP has no stages",
        ),
        (
            {"config": with_changes(augment=lab.Augment(crop=6))},
            "crop = 6 with images of 6x6 pixels: .* at most 5",
        ),
        (
            {"config": {"epochs": 3}},
            r"config = \{'epochs': 3\}. Input should be an instance of TrainConfig",
        ),
        ({"config": lab.TrainConfig}, "config = .* an instance of TrainConfig"),
        ({"model": "MLP"}, "model = 'MLP'. .* an instance of Module"),
        ({"model": lab.MLP}, "model = .* an instance of Module"),
        ({"checkpoint_seconds": "x"}, "checkpoint_seconds = 'x'"),
        ({"checkpoint_seconds": -1}, "checkpoint_seconds = -1.* greater than or equal to 0"),
        ({"model": all_frozen()}, "no parameter that requires a gradient"),
        ({"data": "tiny"}, "data = 'tiny'. .* an instance of ImageData"),
        (
            {"config": with_changes(image_sizes=(4, 5))},
            r"image_sizes = \(4, 5\)\. End at the side of the data's images, .*: \(6, 6\)",
        ),
        (
            {"config": with_changes(image_sizes=(4, 6))},
            r"cannot take images of shape \(1, 4, 4\) .* image_sizes above 4, or a network that",
        ),
        (
            {"config": with_changes(optimizer="muon"), "model": lab.MLP(36, [], 3)},
            "optimizer = 'muon': below its last layer",
        ),
        *[
            ({"name": name}, re.escape(f"name = {name!r}. ") + "(.*A-Za-z0-9|.* valid string)")
            for name in ("a/b", "../a", "", "a b", "a\n", "é", 3)
        ],
    ],
)
def test_bad_arguments_are_named_and_nothing_is_written(data, arguments, wanted):
    with pytest.raises(ValueError, match=wanted):
        train(**{"data": data} | arguments)
    assert not Path(os.environ["LABUTILS_RUNS"]).exists()


def test_gradients_that_a_network_brings_along_are_not_learned_from(data):
    model = make_model().eval()
    model(torch.ones(4, 1, 6, 6)).square().sum().backward()
    run = train(data, model=model)
    assert run.info["weights"] == "seed"
    assert_same_run(run, train(data, retrain=True))


def test_a_network_in_evaluation_mode_is_trained_all_the_same(data):
    run = train(data, model=make_model().eval())
    assert_same_run(run, train(data, retrain=True))


def test_an_epoch_is_scored_in_the_precision_of_its_training(data, monkeypatch):
    monkeypatch.setattr(device, "_computes_bf16", lambda device: True)
    run = train(data, with_changes(precision="bf16"), make_cnn())
    there, plain = (lab.evaluate(run.model, data.val, precision=p) for p in ("bf16", "float32"))
    assert there.loss != plain.loss
    assert run.best("val_loss") == pytest.approx(there.loss, rel=1e-6)


def test_an_epoch_has_the_speed_of_its_training_and_the_seconds_of_all_of_it(data, monkeypatch):
    # A second passes between two looks: one for training, one for scoring.
    looks = itertools.count(100)
    clock = SimpleNamespace(perf_counter=lambda: float(next(looks)), monotonic=time.monotonic)
    for module in (loop, checkpoint):
        monkeypatch.setattr(module, "time", clock)
    run = train(data)
    assert [(row["images_per_second"], row["seconds"]) for row in run.rows] == 3 * [(48.0, 2.0)]
    assert run.seconds == 6.0


def test_a_checkpoint_is_saved_once_in_checkpoint_seconds(data, monkeypatch):
    # A second passes with every step: after 4, 8 and 12 of them.
    looks, saved = itertools.count(), []
    clock = SimpleNamespace(perf_counter=time.perf_counter, monotonic=lambda: next(looks))
    monkeypatch.setattr(loop, "time", clock)
    monkeypatch.setattr(checkpoint, "save", lambda *given: saved.append(given[2].batch))
    train(data, checkpoint_seconds=4)
    assert saved == [4, 4, 4]


def test_the_bar_counts_every_image_and_other_runs_are_not_kept_waiting(data, monkeypatch):
    counted, locked, lock = [], [], loop.store_lock

    class Counting(watch.Progress):
        def __init__(self, *given, **settings):
            super().__init__(*given, **settings)
            self.step = counted.append

    monkeypatch.setattr(watch, "Progress", Counting)
    monkeypatch.setattr(loop, "store_lock", lambda key: locked.append(key) or lock(key))
    run = train(data)
    assert counted == 3 * [13, 13, 13, 9]
    assert locked == [run.key]
    assert run.info["data"]["images"] == {"train": 48, "val": 12, "test": 20}


@pytest.mark.parametrize("facts", [{"source": Path("mine")}, {"loaded": {"size": {1, 2}}}])
def test_facts_of_data_that_a_card_cannot_hold_are_named_before_the_training(data, facts):
    with pytest.raises(ValueError, match=r"^train: the name, source or loaded of the data cannot"):
        train(dataclasses.replace(data, **facts))
    assert not runs.runs_dir().exists()


def test_facts_of_data_are_kept_as_the_card_has_them(data):
    run = train(dataclasses.replace(data, loaded={"size": (1, 2)}))
    assert run.info["data"]["loaded"] == {"size": [1, 2]}
    run.test(data)
    assert json.loads((run.path / "card.json").read_text())["test"]
