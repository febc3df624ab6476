"""Checkpoints: what an epoch sums up, what is saved, and which files are refused."""

import errno
import os
import pickle
import re
import zipfile
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from labutils.training.checkpoint import Average, Position, Tally, load, save
from labutils.training.runs import RunError

CPU = torch.device("cpu")


def make_parts(width=3, seed=0):
    """A model after one step of its optimizer, and where its training stands."""
    torch.manual_seed(seed)
    model = torch.nn.Linear(4, width)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1, fused=True)
    model(torch.rand(5, 4)).square().sum().backward()
    optimizer.step()
    tally = Tally()
    tally.add(torch.tensor(2.0), torch.eye(width), torch.zeros(width, dtype=torch.long))
    best = {"weight": torch.rand(width, 4)}
    position = Position(1, 2, 3.5, 0.25, [{"epoch": 1, "val_loss": 0.1}], 1, best)
    return {"model": model, "optimizer": optimizer, "position": position, "tally": tally}


@pytest.fixture
def last(tmp_path):
    path = tmp_path / "name-abc.part" / "last.pt"
    save(path, "abc", make_parts(), CPU, "float32")
    return path


def assert_refused(path, *, parts=None, key="abc", why):
    with pytest.raises(RunError) as caught:
        load(path, key, parts or make_parts(), CPU, "float32")
    message = str(caught.value)
    assert re.search(why, message)
    assert f"checkpoint {path}" in message
    assert f"Remove {path.parent} to start this run anew" in message


@settings(deadline=None, max_examples=25)
@given(
    sizes=st.lists(st.integers(1, 5), min_size=1, max_size=140),
    cut=st.integers(0, 140),
    seed=st.integers(0, 2**31),
)
def test_means_equal_a_loop_over_images_wherever_they_are_saved(sizes, cut, seed):
    generator = torch.Generator().manual_seed(seed)
    tally, losses, hits = Tally(), [], 0
    for number, size in enumerate(sizes):
        if number == cut:
            state, tally = tally.state_dict(), Tally()
            tally.add(torch.tensor(99.0), torch.eye(4), torch.arange(4))
            tally.load_state_dict(state)
        logits = torch.randn(size, 4, generator=generator)
        labels = torch.randint(4, (size,), generator=generator)
        each = [-row.log_softmax(0)[label] for row, label in zip(logits, labels)]
        tally.add(torch.stack(each).mean(), logits, labels)
        losses += [float(loss) for loss in each]
        hits += sum(int(row.argmax() == label) for row, label in zip(logits, labels))
    loss, accuracy = tally.means()
    assert tally.images == len(losses)
    assert loss == pytest.approx(sum(losses) / len(losses), rel=1e-5)
    assert accuracy == hits / len(losses)


def test_a_tally_keeps_the_loss_of_each_batch_and_forgets_on_reset():
    tally = Tally()
    for loss, size in ((1.0, 2), (float("inf"), 3)):
        tally.add(torch.tensor(loss), torch.rand(size, 4), torch.zeros(size, dtype=torch.long))
    assert tally.losses().tolist() == [2.0, float("inf")]
    tally.reset()
    assert tally.images == 0
    assert tally.losses().tolist() == []


def test_load_brings_every_part_to_the_state_that_was_saved(last):
    wanted, parts = make_parts(), make_parts(seed=1)
    parts["position"], parts["tally"] = Position(), Tally()
    load(last, "abc", parts, CPU, "float32")
    assert torch.equal(parts["model"].weight, wanted["model"].weight)
    moments, wanted_moments = (p["optimizer"].state_dict()["state"] for p in (parts, wanted))
    for name in ("step", "exp_avg", "exp_avg_sq"):
        assert torch.equal(moments[0][name], wanted_moments[0][name])
    best, wanted_best = (vars(p["position"]).pop("best_weights") for p in (parts, wanted))
    assert torch.equal(best["weight"], wanted_best["weight"])
    assert vars(parts["position"]) == vars(wanted["position"])
    assert parts["tally"].means() == wanted["tally"].means()


def test_load_restores_the_random_numbers(last):
    parts = make_parts()
    save(last, "abc", parts, CPU, "float32")
    wanted = torch.rand(3)
    load(last, "abc", parts, CPU, "float32")
    assert torch.equal(torch.rand(3), wanted)


@pytest.mark.parametrize("tenths", range(10))
def test_a_file_that_was_cut_short_is_refused(last, tenths):
    content = last.read_bytes()
    last.write_bytes(content[: len(content) * tenths // 10])
    assert_refused(last, why="cannot be read; it was cut short")


@pytest.mark.parametrize("content", [b"no checkpoint\n", bytes(range(256)) * 64, b"\x80\x02."])
def test_garbage_is_refused(last, content):
    last.write_bytes(content)
    assert_refused(last, why="cannot be read")


def test_another_zip_file_is_refused(last):
    with zipfile.ZipFile(last, "w") as archive:
        archive.writestr("archive/data.pkl", b"text")
    assert_refused(last, why="cannot be read")


class Code:
    """Creates a file when it is unpickled."""

    def __init__(self, marker):
        self.marker = str(marker)

    def __reduce__(self):
        return Path.touch, (Path(self.marker),)


def dump_plain(value, path):
    path.write_bytes(pickle.dumps(value, protocol=2))


@pytest.mark.parametrize("dump", [torch.save, dump_plain])
def test_code_in_a_file_is_refused_and_not_executed(last, tmp_path, dump):
    marker = tmp_path / "executed"
    dump({"key": "abc", "model": Code(marker)}, last)
    assert_refused(last, why="cannot be read")
    assert not marker.exists()


@pytest.mark.parametrize("content", [{"key": "def"}, {}, [1, 2], torch.zeros(2)])
def test_a_file_of_another_run_is_refused(last, content):
    torch.save(content, last)
    assert_refused(last, why="belongs to another run")


def test_a_file_of_another_model_is_refused(last):
    assert_refused(last, parts=make_parts(width=7), why=r"another model (.|\n)*size mismatch")
    assert_refused(last, parts={"averaged": Tally()}, why="another model .*averaged")


def test_a_save_that_fails_leaves_the_older_file_and_no_other(last, monkeypatch):
    def fail(handle):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", fail)
    with pytest.raises(OSError, match="No space left"):
        save(last, "abc", make_parts(seed=1), CPU, "float32")
    parts = make_parts(seed=2)
    load(last, "abc", parts, CPU, "float32")
    assert torch.equal(parts["model"].weight, make_parts()["model"].weight)
    assert list(last.parent.iterdir()) == [last]


def test_a_file_of_another_precision_is_refused_on_both_sides(last, tmp_path):
    wanted = "was made on cpu in float32, this is cpu in bf16.*same bits"
    with pytest.raises(RunError, match=wanted):
        load(last, "abc", make_parts(), CPU, "bf16")
    save(last, "abc", make_parts(), CPU, "bf16")
    assert_refused(last, why="was made on cpu in bf16, this is cpu in float32")


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
        ours.update(model)
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
    model = small_network()
    average, path = Average(model, 0.5), tmp_path / "last.pt"
    for step, _ in enumerate(steps(model, 4)):
        average.update(model)
        if step == 1:
            save(path, "abc", {"averaged": average}, CPU, "float32")
            again = Average(small_network(), 0.5)
            load(path, "abc", {"averaged": again}, CPU, "float32")
        elif step > 1:
            again.update(model)
    for ours, theirs in zip(again.state_dict().values(), average.state_dict().values()):
        assert torch.equal(ours, theirs)


def test_the_average_does_not_wait_for_the_device():
    # Reading a value of a tensor without values fails.
    model = small_network().to("meta")
    average = Average(model, 0.5)
    for _ in range(3):
        average.update(model)
    assert average.n_averaged == 3
