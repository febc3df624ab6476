"""Checkpoints: what an epoch sums up, what is saved, and which files are refused."""

import errno
import functools
import hashlib
import io
import os
import pickle
import re
import zipfile
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from labutils.training.checkpoint import Average, TrainingState, load, save
from labutils.training.runs import RunError

CPU = torch.device("cpu")


def make_state(width=3, seed=0, **values):
    """A model after one step of its optimizer, and where its training stands."""
    torch.manual_seed(seed)
    model = torch.nn.Linear(4, width)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1, fused=True)
    model(torch.rand(5, 4)).square().sum().backward()
    optimizer.step()
    best = {"weight": torch.rand(width, 4)}
    rows = [{"epoch": 1, "val_loss": 0.1}]
    state = TrainingState(model, optimizer, threads=2, epoch=1, batch=2, rows=rows, **values)
    state.best_epoch, state.best_weights = 1, best
    state.add(torch.tensor(2.0), torch.eye(width), torch.zeros(width, dtype=torch.long))
    return state


def sums(state):
    state.count()
    return state.images, state.losses.tolist(), int(state.hits)


@pytest.fixture
def last(tmp_path):
    path = tmp_path / "name-abc.part" / "last.pt"
    save(path, "abc", make_state(), CPU)
    return path


def write(path, payload):
    """A file whose content is what it was when it was written, whatever it is."""
    path.write_bytes(hashlib.sha256(payload).digest() + payload)


def packed(content):
    buffer = io.BytesIO()
    torch.save(content, buffer)
    return buffer.getvalue()


def assert_refused(path, *, state=None, key="abc", why):
    with pytest.raises(RunError) as caught:
        load(path, key, state or make_state(), CPU)
    message = str(caught.value)
    assert re.search(why, message)
    assert f"checkpoint {path}" in message
    assert f"Remove {path.parent} to start it anew" in message


@settings(deadline=None, max_examples=25)
@given(
    sizes=st.lists(st.integers(1, 5), min_size=1, max_size=140),
    cut=st.integers(0, 140),
    seed=st.integers(0, 2**31),
)
def test_sums_equal_a_loop_over_images_wherever_they_are_saved(tmp_path_factory, sizes, cut, seed):
    generator = torch.Generator().manual_seed(seed)
    model = nn.Linear(1, 1)
    optimizer = torch.optim.SGD(model.parameters())
    state, losses, hits = TrainingState(model, optimizer), [], 0
    path = tmp_path_factory.getbasetemp() / "sums" / "last.pt"
    for number, size in enumerate(sizes):
        if number == cut:
            save(path, "abc", state, CPU)
            state = TrainingState(model, optimizer)
            state.add(torch.tensor(99.0), torch.eye(4), torch.arange(4))
            load(path, "abc", state, CPU)
        logits = torch.randn(size, 4, generator=generator)
        labels = torch.randint(4, (size,), generator=generator)
        each = [-row.log_softmax(0)[label] for row, label in zip(logits, labels)]
        state.add(torch.stack(each).mean(), logits, labels)
        losses += [float(loss) for loss in each]
        hits += sum(int(row.argmax() == label) for row, label in zip(logits, labels))
    images, found, found_hits = sums(state)
    assert (images, found_hits, state.batch) == (len(losses), hits, len(sizes))
    assert len(found) == len(sizes)
    assert sum(found) == pytest.approx(sum(losses), rel=1e-5)


def test_a_state_keeps_the_loss_of_each_batch_and_forgets_it_when_the_epoch_ends():
    state = make_state()
    for loss, size in ((1.0, 2), (float("inf"), 3)):
        state.add(torch.tensor(loss), torch.rand(size, 4)[:, :3], torch.zeros(size).long())
    assert sums(state)[:2] == (8, [6.0, 2.0, float("inf")])
    state.epoch_seconds = 7.0
    state.end_epoch({"epoch": 2, "val_loss": 0.2}, state.model, "val_loss")
    assert sums(state) == (0, [], 0)
    assert (state.epoch, state.batch, state.epoch_seconds, state.best_epoch) == (2, 0, 0.0, 1)


@settings(deadline=None, max_examples=50)
@given(
    st.lists(st.tuples(st.integers(0, 5), st.integers(0, 5)), min_size=1, max_size=8),
    st.sampled_from(["val_loss", "val_accuracy"]),
)
def test_the_first_of_the_best_epochs_is_kept(scores, monitor):
    model = nn.Linear(1, 1, bias=False)
    state = TrainingState(model, torch.optim.SGD(model.parameters()))
    assert state.summary() == {}
    for epoch, (loss, accuracy) in enumerate(scores, 1):
        nn.init.constant_(model.weight, epoch)
        row = {"epoch": epoch, "val_loss": loss, "val_accuracy": accuracy}
        state.end_epoch(row, model, monitor)
    wanted = (min if monitor == "val_loss" else max)(state.rows, key=lambda row: row[monitor])
    assert state.summary()["best/epoch"] == wanted["epoch"]
    assert state.best_weights["weight"].item() == wanted["epoch"]


def test_load_brings_every_part_to_the_state_that_was_saved(last):
    wanted, state = make_state(), make_state(seed=1)
    for name in ("threads", "epoch", "batch", "rows", "best_epoch", "best_weights", "losses"):
        setattr(state, name, None)
    load(last, "abc", state, CPU)
    assert torch.equal(state.model.weight, wanted.model.weight)
    moments, wanted_moments = (s.optimizer.state_dict()["state"] for s in (state, wanted))
    for name in ("step", "exp_avg", "exp_avg_sq"):
        assert torch.equal(moments[0][name], wanted_moments[0][name])
    assert torch.equal(state.best_weights["weight"], wanted.best_weights["weight"])
    assert sums(state) == sums(wanted)
    for name in ("threads", "epoch", "batch", "epoch_seconds", "rows", "best_epoch", "precision"):
        assert getattr(state, name) == getattr(wanted, name), name


def test_load_restores_the_random_numbers(last):
    state = make_state()
    save(last, "abc", state, CPU)
    wanted = torch.rand(3)
    load(last, "abc", state, CPU)
    assert torch.equal(torch.rand(3), wanted)


@settings(max_examples=150, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.integers(0, 2**31), st.integers(1, 255))
def test_every_flipped_byte_is_noticed(last, position, flip):
    content = last.read_bytes()
    damaged = bytearray(content)
    damaged[position % len(content)] ^= flip
    try:
        last.write_bytes(damaged)
        assert_refused(last, why="it was cut short or is damaged")
    finally:
        last.write_bytes(content)


def test_a_file_of_a_version_without_a_digest_is_refused(last):
    last.write_bytes(last.read_bytes()[32:])
    assert_refused(last, why="it was cut short or is damaged")


@pytest.mark.parametrize("tenths", range(10))
def test_a_file_that_was_cut_short_is_refused(last, tenths):
    content = last.read_bytes()
    last.write_bytes(content[: len(content) * tenths // 10])
    assert_refused(last, why="it was cut short")


@pytest.mark.parametrize("content", [b"no checkpoint\n", bytes(range(256)) * 64, b"\x80\x02."])
def test_garbage_is_refused(last, content):
    for put in (Path.write_bytes, write):
        put(last, content)
        assert_refused(last, why="does not continue this run")


def test_another_zip_file_is_refused(last):
    with zipfile.ZipFile(last, "w") as archive:
        archive.writestr("archive/data.pkl", b"text")
    write(last, last.read_bytes())
    assert_refused(last, why="does not continue this run")


class Code:
    """Creates a file when it is unpickled."""

    def __init__(self, marker):
        self.marker = str(marker)

    def __reduce__(self):
        return Path.touch, (Path(self.marker),)


@pytest.mark.parametrize("dump", [packed, functools.partial(pickle.dumps, protocol=2)])
def test_code_in_a_file_is_refused_and_not_executed(last, tmp_path, dump):
    marker = tmp_path / "executed"
    write(last, dump({"key": "abc", "model": Code(marker)}))
    assert_refused(last, why="does not continue this run")
    assert not marker.exists()


@pytest.mark.parametrize("content", [{"key": "def"}, {}, [1, 2], 5])
def test_a_file_of_another_run_is_refused(last, content):
    write(last, packed(content))
    assert_refused(last, why="does not continue this run")


def test_a_file_of_another_model_is_refused(last):
    assert_refused(
        last, state=make_state(width=7), why="does not continue this run .*loading state_dict"
    )
    averaged = make_state(averaged=Average(nn.Linear(4, 3), 0.5))
    assert_refused(last, state=averaged, why="does not continue this run .*state_dict")


def test_a_save_that_fails_leaves_the_older_file_and_no_other(last, monkeypatch):
    def fail(handle):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", fail)
    with pytest.raises(OSError, match="No space left"):
        save(last, "abc", make_state(seed=1), CPU)
    state = make_state(seed=2)
    load(last, "abc", state, CPU)
    assert torch.equal(state.model.weight, make_state().model.weight)
    assert list(last.parent.iterdir()) == [last]


def test_a_file_of_another_precision_is_refused_on_both_sides(last):
    wanted = "was made for .*'float32'}, this is .*'bf16'}"
    assert_refused(last, state=make_state(precision="bf16"), why=wanted)
    save(last, "abc", make_state(precision="bf16"), CPU)
    assert_refused(last, why="was made for .*'bf16'}, this is .*'float32'}")


def small_network():
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(1, 3, 3), nn.BatchNorm2d(3), nn.Flatten(), nn.Linear(12, 2))


def steps(model, count):
    """Change the weights and the statistics of a model, as training would."""
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for step in range(count):
        images = torch.rand(5, 1, 4, 4, generator=torch.Generator().manual_seed(step))
        model(images).square().sum().backward()
        optimizer.step()
        optimizer.zero_grad()
        yield


@pytest.mark.parametrize("decay", [0.3, 0.99])
def test_the_average_is_torchs_with_counters_copied(decay):
    model = small_network()
    ours = Average(model, decay)
    theirs = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(decay), use_buffers=True)
    for step, _ in enumerate(steps(model, 5), start=1):
        ours.update()
        theirs.update_parameters(model)
        found, expected = ours.state_dict(), theirs.state_dict()
        assert found.keys() == expected.keys()
        for name, value in found.items():
            if name.endswith("num_batches_tracked"):
                assert value == step
            else:
                assert torch.equal(value, expected[name]), name
    assert not any(p.grad is not None for p in ours.parameters())


def test_an_average_goes_on_from_a_checkpoint(tmp_path):
    def with_average(model):
        return TrainingState(
            model, torch.optim.SGD(model.parameters()), averaged=Average(model, 0.5)
        )

    state, again = with_average(small_network()), with_average(small_network())
    path = tmp_path / "last.pt"
    for step, _ in enumerate(steps(state.model, 4)):
        state.averaged.update()
        if step == 1:
            save(path, "abc", state, CPU)
            load(path, "abc", again, CPU)
        elif step > 1:
            again.model.load_state_dict(state.model.state_dict())
            again.averaged.update()
    found, expected = (s.averaged.state_dict() for s in (again, state))
    for ours, theirs in zip(found.values(), expected.values()):
        assert torch.equal(ours, theirs)


def test_the_average_does_not_wait_for_the_device():
    # Reading a value of a tensor without values fails.
    model = small_network().to("meta")
    average = Average(model, 0.5)
    for _ in range(3):
        average.update()
    assert average.n_averaged == 3


def test_no_graph_of_a_batch_is_kept():
    state, logits = make_state(), torch.rand(3, 3, requires_grad=True)
    state.add(logits.square().mean(), logits, torch.zeros(3).long())
    assert not any(tensor.requires_grad for tensor in state.uncounted[-1])


def test_a_file_of_another_device_is_refused(last):
    content = torch.load(io.BytesIO(last.read_bytes()[32:]), weights_only=True)
    write(last, packed(content | {"device": "cuda"}))
    assert_refused(last, why="was made for .*'cuda'.*, this is .*'cpu'")


def test_an_epoch_takes_the_time_of_all_its_parts(monkeypatch):
    looks, state = iter([12.0, 15.0]), make_state(started=10.0)
    monkeypatch.setattr("labutils.training.checkpoint.time.perf_counter", lambda: next(looks))
    state.stop_clock()
    state.stop_clock()
    assert (state.epoch_seconds, state.started) == (5.0, 15.0)
