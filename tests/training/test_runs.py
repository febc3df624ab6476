"""The run store: what is found again, what is refused, and that no interruption loses a run."""

import copy
import errno
import json
import os
import re
import shutil
import signal
from dataclasses import asdict
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch import nn

import labutils as lab
from labutils.evaluation.metrics import evaluate
from labutils.training import runs
from labutils.training.key import run_key
from labutils.training.runs import RunError, find, load_weights, publish, save_weights, settle

CONFIG = lab.TrainConfig(epochs=2, batch_size=16)


@pytest.fixture
def data(write_npz):
    write_npz()
    return lab.load_data("tiny", val_size=12, device="cpu")


def make_model(width=8):
    torch.manual_seed(0)
    return lab.MLP(36, [width], 3)


def train(data, config=CONFIG, **settings):
    return lab.train(make_model(), data, config, track=None, progress=False, **settings)


@pytest.fixture
def run(data):
    return train(data)


def same_weights(model, other):
    pairs = zip(model.state_dict().values(), other.state_dict().values())
    return all(torch.equal(a, b) for a, b in pairs)


def test_a_finished_run_is_found_with_its_weights(run):
    model = make_model()
    found = find(run.key, model)
    assert found.stored
    assert found.model is model
    assert same_weights(model, run.model)
    assert (found.name, found.path, found.info) == (run.name, run.path, run.info)
    assert found.rows == run.rows
    assert find("0123456789ab", model) is None


def test_a_run_tells_its_numbers(run):
    assert list(run.history.index) == [1, 2]
    best = min(run.rows, key=lambda row: row["val_loss"])
    assert run.best("val_loss") == best["val_loss"]
    assert run.info["best_epoch"] == best["epoch"]
    assert run.epochs == 2
    assert run.seconds == pytest.approx(sum(run.history.seconds), abs=0.01)
    assert run.stop_reason == "finished all 2 epochs"
    assert f"val accuracy {100 * best['val_accuracy']:.2f} % at epoch {best['epoch']}" in str(run)


@pytest.mark.parametrize("weights", [True, False])
def test_a_published_run_reads_back_equal(run, data, weights):
    metrics = run.test(data)
    card = publish(run, weights=weights, command="make report")
    shutil.rmtree(run.path)
    model = make_model()
    found = find(run.key, model)
    assert (found.path, found.stored, found.name) == (card, True, run.name)
    assert found.info == run.info
    assert found.rows == run.rows
    assert found.test(data) == metrics
    assert json.loads(card.read_text())["command"] == "make report"
    if weights:
        assert same_weights(found.require_model(), run.model)
    else:
        assert same_weights(model, make_model())
        with pytest.raises(RunError, match=rf"only the card .*{card.name}.*retrain=True"):
            found.require_model()
        with pytest.raises(RunError, match="only the card"):
            publish(found, weights=True, command="make report")


def test_weights_published_in_half_precision_take_half_the_space_and_come_close(run, data):
    metrics = run.test(data)
    whole = publish(run, weights=True, command="").with_suffix(".safetensors").stat().st_size
    card = publish(run, weights=True, command="", half=True)
    assert card.with_suffix(".safetensors").stat().st_size < 0.6 * whole
    shutil.rmtree(run.path)
    found = find(run.key, make_model())
    assert found.test(data) == metrics
    for near, exact in zip(found.model.parameters(), run.model.parameters()):
        assert near.dtype == torch.float32
        torch.testing.assert_close(near, exact, rtol=2**-11, atol=2**-24)
    # Publishing what is published leaves the file alone.
    before = found.weights.read_bytes()
    publish(found, weights=True, command="")
    assert found.weights.read_bytes() == before


def test_weights_too_large_for_half_precision_are_refused(run):
    with torch.no_grad():
        next(run.model.parameters()).flatten()[0] = 1e5
    save_weights(run.weights, run.model.state_dict())
    with pytest.raises(RunError, match=r"run: .* up to 1e\+05, float16 ends at 65504.*half=False"):
        publish(run, weights=True, command="", half=True)


def test_the_runs_folder_goes_before_published_runs(run):
    card = publish(run, weights=False, command="")
    assert find(run.key, make_model()).path == run.path
    shutil.rmtree(run.path)
    assert find(run.key, make_model()).path == card


def test_tested_and_published_are_the_best_weights_whatever_became_of_the_model(run, data):
    best = copy.deepcopy(run.model)
    with torch.no_grad():
        next(run.model.parameters()).add_(1)
    assert run.test(data) == evaluate(best, data.test)
    card = publish(run, weights=False, command="")
    card.with_suffix(".safetensors").write_text("of an earlier training")
    publish(run, weights=True, command="")
    published = make_model()
    load_weights(published, card.with_suffix(".safetensors"))
    assert same_weights(published, best)


def interrupted_run(data):
    """Stopped by Ctrl-C in its second epoch."""
    model, seen = make_model(), []

    def hook(module, inputs, output):
        seen.append(module.training)
        if seen.count(True) == 5 and module.training:
            os.kill(os.getpid(), signal.SIGINT)

    model.register_forward_hook(hook)
    return lab.train(model, data, CONFIG, track=None, progress=False)


def test_an_interrupted_run_is_not_published(data):
    run = interrupted_run(data)
    with pytest.raises(RunError, match="run: interrupted runs are not published"):
        publish(run, weights=False, command="")
    assert not runs.models_dir().exists()


def test_metrics_of_an_interrupted_run_do_not_stay_with_the_finished_one(data):
    run = interrupted_run(data)
    assert run.test(data) == lab.evaluate(run.model, data.test)
    train(data)
    finished = train(data)
    assert finished.stored
    assert finished.test(data) == lab.evaluate(finished.model, data.test)


@pytest.mark.parametrize(("weights", "failing"), [(True, 1), (True, 2), (False, 1)])
def test_a_publication_that_fails_leaves_the_earlier_one(run, monkeypatch, weights, failing):
    card = publish(run, weights=weights, command="first")
    before = {path.name for path in card.parent.iterdir()}
    calls = iter([None] * (failing - 1) + [OSError(errno.ENOSPC, "No space left")])

    def fsync(handle):
        if error := next(calls):
            raise error

    monkeypatch.setattr(os, "fsync", fsync)
    with pytest.raises(OSError, match="No space left"):
        publish(run, weights=weights, command="second")
    assert {path.name for path in card.parent.iterdir()} == before
    assert json.loads(card.read_text())["command"] == "first"


def test_metrics_are_measured_once_and_stored(run, data, monkeypatch):
    metrics = run.test(data)
    assert metrics == lab.evaluate(run.model, data.test)
    monkeypatch.delattr("labutils.evaluation.metrics.evaluate")
    assert run.test(data) is metrics
    found = find(run.key, make_model())
    assert found.test(data) == metrics
    assert asdict(metrics) | {"accuracy_interval": list(metrics.accuracy_interval)} == json.loads(
        (run.path / "test.json").read_text()
    )


def test_metrics_on_other_data_are_refused(run, data):
    other = lab.load_data("tiny", val_size=15, device="cpu")
    wanted = f"trained on data {data.fingerprint}, asked to test on {other.fingerprint}"
    with pytest.raises(RunError, match=f"run: {wanted}.*same name, val_size and seed"):
        run.test(other)
    assert not (run.path / "test.json").exists()


def cut(path, tenths=5):
    content = path.read_bytes()
    path.write_bytes(content[: len(content) * tenths // 10])


def cut_after_a_row(path):
    path.write_text("".join(path.read_text().splitlines(keepends=True)[:2]))


def empty_list(path):
    path.write_text("[]")


FOLDER_DAMAGES = [
    *[(file, Path.unlink) for file in ("run.json", "history.csv", "best.safetensors")],
    *[(file, cut) for file in ("run.json", "test.json", "history.csv", "best.safetensors")],
    *[(file, empty_list) for file in ("run.json", "test.json", "best.safetensors")],
    ("history.csv", cut_after_a_row),
]
CARD_DAMAGES = [(".json", cut), (".json", empty_list), (".safetensors", cut)]


@pytest.mark.parametrize(("file", "damage"), FOLDER_DAMAGES)
def test_a_damaged_run_is_named_and_can_be_trained_anew(run, data, file, damage):
    run.test(data)
    damage(run.path / file)
    wanted = rf"stored run {run.path} is damaged .*Remove it, or .*retrain=True"
    with pytest.raises(RunError, match=re.compile(wanted, re.DOTALL)):
        train(data)
    again = train(data, retrain=True)
    assert same_weights(again.model, run.model)
    assert train(data).stored


@pytest.mark.parametrize(("suffix", "damage"), CARD_DAMAGES)
def test_a_damaged_publication_is_named(run, suffix, damage):
    card = publish(run, weights=True, command="")
    shutil.rmtree(run.path)
    damage(card.with_suffix(suffix))
    wanted = rf"stored run {card} is damaged .*Remove it, or .*retrain=True"
    with pytest.raises(RunError, match=re.compile(wanted, re.DOTALL)):
        find(run.key, make_model())


class Killed(BaseException):
    """Stands for SIGKILL: nothing in the library catches it."""


def kill_at(monkeypatch, moment):
    """Let settle die at its n-th change on disk: before it for even n, after it for odd n."""
    changes = iter(range(0, 100, 2))

    def dying(change):
        def wrapped(path, *args, **kwargs):
            number = next(changes)
            if number == moment:
                raise Killed
            if number + 1 == moment and change is shutil.rmtree:
                (Path(path) / "run.json").unlink()
                raise Killed
            result = change(path, *args, **kwargs)
            if number + 1 == moment:
                raise Killed
            return result

        return wrapped

    monkeypatch.setattr(shutil, "rmtree", dying(shutil.rmtree))
    monkeypatch.setattr(Path, "rename", dying(Path.rename))


@pytest.mark.parametrize("name", ["run", "other"])
@pytest.mark.parametrize("moment", range(6))
def test_a_kill_while_a_run_is_replaced_loses_nothing(run, name, moment):
    part = run.path.with_name(f"{name}-{run.key}.part")
    shutil.copytree(run.path, part)
    with pytest.MonkeyPatch.context() as patch:
        kill_at(patch, moment)
        with pytest.raises(Killed):
            settle(part)
    found = find(run.key, make_model())
    assert found.rows == run.rows
    assert found.name in ("run", name)
    if not part.exists():
        shutil.copytree(found.path, part)
    assert settle(part) == part.with_suffix("")
    assert [path for path in part.parent.iterdir() if path.name != ".locks"] == [
        part.with_suffix("")
    ]


def test_weights_that_do_not_fit_are_refused(run, tmp_path):
    weights = run.path / "best.safetensors"
    with pytest.raises(
        ValueError, match=r"best.safetensors does not fit the model: .*\s+size mismatch"
    ):
        load_weights(make_model(width=9), weights)
    with pytest.raises(ValueError, match=r"does not fit the model: .*\s+Missing key"):
        load_weights(nn.Linear(2, 2), weights)
    for tenths in range(10):
        path = shutil.copy(weights, tmp_path / f"cut{tenths}.safetensors")
        cut(path, tenths)
        with pytest.raises(ValueError, match=f"{path.name} does not fit the model"):
            load_weights(make_model(), path)


def test_weights_of_any_memory_layout_read_back(tmp_path):
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)).to(
        memory_format=torch.channels_last
    )
    other = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4))
    save_weights(tmp_path / "weights", model.state_dict())
    load_weights(other, tmp_path / "weights")
    assert same_weights(model, other)


CARDS = sorted((Path(__file__).resolve().parents[2] / "models").glob("*.json"))


# Settings of earlier versions, and the values at which they did nothing.
GONE = {"clip_norm": None, "min_delta": 0.0, "warmup_epochs": 0.0, "mixup": 0.0}


def config_of(stored):
    stored, augment = dict(stored), dict(stored["augment"])
    for name in GONE:
        assert stored.pop(name, GONE[name]) == GONE[name]
        assert augment.pop(name, GONE[name]) == GONE[name]
    return lab.TrainConfig(**{**stored, "augment": lab.Augment(**augment)})


def test_published_runs_are_found_by_what_they_computed():
    assert CARDS
    for path in CARDS:
        card = json.loads(path.read_text())
        info = card["info"]
        config = config_of(info["config"])
        data = SimpleNamespace(fingerprint=info["data"]["fingerprint"])
        assert run_key(config, info["model"], info.get("weights", "seed"), data) == card["key"]
        assert path.stem == f"{card['name']}-{card['key']}"
        assert lab.num_parameters(lab.build(info["model"])) == info["parameters"]
        assert card["command"].startswith("python -m labutils run ")


def test_published_weights_fit_their_models_and_stay_small():
    weights = [path.with_suffix(".safetensors") for path in CARDS]
    weights = [path for path in weights if path.exists()]
    assert weights
    for path in weights:
        card = json.loads(path.with_suffix(".json").read_text())
        load_weights(lab.build(card["info"]["model"]), path)
        # A network that is looked at after its first epoch is not judged by its test accuracy.
        assert card["test"] or "first-epoch" in path.name
        assert path.stat().st_size < 25e6


def test_scores_with_test_time_flip_are_stored_apart(run, data, monkeypatch):
    plain, flipped = run.test(data), run.test(data, tta=True)
    assert plain != flipped
    assert flipped == evaluate(run.model, data.test, tta=True)
    assert sorted(path.name for path in run.path.glob("test*")) == ["test.json", "test_flip.json"]
    monkeypatch.delattr("labutils.evaluation.metrics.evaluate")
    card = publish(run, weights=False, command="")
    for _ in range(2):
        found = find(run.key, make_model())
        assert (found.test(data), found.test(data, tta=True)) == (plain, flipped)
        shutil.rmtree(run.path, ignore_errors=True)
    assert found.path == card
