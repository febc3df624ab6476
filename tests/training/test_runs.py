"""The run store: what is found again, what is refused, and that no interruption loses a run."""

import copy
import errno
import hashlib
import json
import os
import re
import shutil
import signal
import subprocess
import sys
from dataclasses import asdict, replace
from pathlib import Path

import pytest
import torch

import labutils as lab
from labutils.evaluation.metrics import evaluate
from labutils.training import cards, runs
from labutils.training.key import run_key
from labutils.training.runs import (
    RunError,
    find,
    finish,
    load_run,
    load_weights,
    open_part,
    publish,
    save_weights,
)

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


def card_of(path):
    return json.loads(path.read_text())


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
    assert f"val accuracy {100 * best['val_accuracy']:.2f} % at epoch {best['epoch']}" in repr(run)


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
    whole = publish(run, weights=True, command="").with_suffix(".safetensors").stat().st_size
    card = publish(run, weights=True, command="", half=data)
    assert card.with_suffix(".safetensors").stat().st_size < 0.6 * whole
    shutil.rmtree(run.path)
    found = find(run.key, make_model())
    for near, exact in zip(found.model.parameters(), run.model.parameters()):
        assert near.dtype == torch.float32
        torch.testing.assert_close(near, exact, rtol=2**-11, atol=2**-24)
    # Publishing what is published leaves the file alone, and whose command measures it again.
    before = found.weights.read_bytes()
    publish(found, weights=True, command="of another exercise")
    assert found.weights.read_bytes() == before
    assert json.loads(card.read_text())["command"] == ""
    # A card that is gone is written again.
    card.unlink()
    publish(found, weights=True, command="again")
    assert json.loads(card.read_text())["command"] == "again"


@pytest.mark.parametrize("flip", [False, True])
def test_a_card_scores_the_weights_that_are_published_with_it(run, data, monkeypatch, flip):
    # Far from zero float16 has steps of 32: the rounded network is another one.
    with torch.no_grad():
        for parameter in run.model.parameters():
            parameter.mul_(20).add_(4e4 * (parameter.ndim == 2))
    save_weights(run.weights, run.model.state_dict())
    rewrite(run.path / "card.json", weights=cards.sha256(run.weights))
    exact = run.test(data, tta=flip)
    card = publish(run, weights=True, command="", half=data)
    rounded = make_model()
    load_weights(rounded, card.with_suffix(".safetensors"))
    expected = evaluate(rounded, data.test, tta=flip)
    assert expected.loss != exact.loss
    shutil.rmtree(run.path)
    found = find(run.key, make_model())
    monkeypatch.delattr("labutils.evaluation.metrics.evaluate")
    assert found.test(data, tta=flip) == expected
    assert run.test(data, tta=flip) == exact
    assert (card_of(card).get("test") is None) == flip


def test_rounded_weights_are_scored_on_the_data_of_the_run_alone(run, data):
    other = lab.load_data("tiny", val_size=15, device="cpu")
    with pytest.raises(RunError, match=f"asked to test on {other.fingerprint}"):
        publish(run, weights=True, command="", half=other)


def test_weights_too_large_for_half_precision_are_refused(run, data):
    with torch.no_grad():
        next(run.model.parameters()).flatten()[0] = 1e5
    save_weights(run.weights, run.model.state_dict())
    rewrite(run.path / "card.json", weights=cards.sha256(run.weights))
    with pytest.raises(RunError, match=r"best.safetensors: .* float16's 65504.*without half"):
        publish(run, weights=True, command="", half=data)


def test_the_runs_folder_goes_before_published_runs(run):
    card = publish(run, weights=False, command="")
    assert find(run.key, make_model()).path == run.path
    shutil.rmtree(run.path)
    assert find(run.key, make_model()).path == card


def test_what_a_kill_left_beside_a_run_does_not_hide_it(run):
    aside = run.path.with_name(f"{run.path.name}.old")
    shutil.copytree(run.path, aside)
    assert lab.load_run(run.name).path == run.path
    shutil.rmtree(run.path)
    assert lab.load_run(run.name).path == aside


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
    with pytest.raises(RunError, match=r"^run is interrupted"):
        publish(run, weights=False, command="")
    assert not runs.models_dir().exists()


def test_metrics_of_an_interrupted_run_do_not_stay_with_the_finished_one(data):
    run = interrupted_run(data)
    assert run.test(data) == lab.evaluate(run.model, data.test)
    train(data)
    finished = train(data)
    assert finished.stored
    assert finished.test(data) == lab.evaluate(finished.model, data.test)


@pytest.mark.parametrize("half", [False, True])
@pytest.mark.parametrize(("weights", "failing"), [(True, 1), (True, 2), (False, 1)])
def test_a_publication_that_fails_leaves_the_earlier_one(
    run, data, monkeypatch, weights, failing, half
):
    card = publish(run, weights=weights, command="first")
    before = {path.name for path in card.parent.iterdir()}
    calls = iter([None] * (failing - 1) + [OSError(errno.ENOSPC, "No space left")])

    def fsync(handle):
        if error := next(calls):
            raise error

    monkeypatch.setattr(os, "fsync", fsync)
    with pytest.raises(OSError, match="No space left"):
        publish(run, weights=weights, command="second", half=data if half else None)
    assert {path.name for path in card.parent.iterdir()} == before
    assert json.loads(card.read_text())["command"] == "first"
    assert runs.open_stored(card).model is not None or not weights


def test_a_kill_before_the_card_is_written_leaves_the_earlier_publication(run, monkeypatch):
    card = publish(run, weights=True, command="first")
    monkeypatch.setattr(runs.cards, "write", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        publish(run, weights=False, command="second")
    assert runs.open_stored(card).model is not None


def test_metrics_are_measured_once_and_stored(run, data, monkeypatch):
    metrics = run.test(data)
    assert metrics == lab.evaluate(run.model, data.test)
    monkeypatch.delattr("labutils.evaluation.metrics.evaluate")
    assert run.test(data) is metrics
    found = find(run.key, make_model())
    assert found.test(data) == metrics
    assert (
        asdict(metrics) | {"accuracy_interval": list(metrics.accuracy_interval)}
        == card_of(run.path / "card.json")["test"]
    )


def test_metrics_on_other_data_are_refused(run, data):
    other = lab.load_data("tiny", val_size=15, device="cpu")
    wanted = f"trained on data {data.fingerprint}, asked to test on {other.fingerprint}"
    with pytest.raises(RunError, match=f"run: {wanted}.*same name, val_size and seed"):
        run.test(other)
    assert card_of(run.path / "card.json")["test"] is None


def cut(path, tenths=5):
    content = path.read_bytes()
    path.write_bytes(content[: len(content) * tenths // 10])


def empty_list(path):
    path.write_text("[]")


FOLDER_DAMAGES = [
    (file, damage)
    for file in ("card.json", "best.safetensors")
    for damage in (Path.unlink, cut, empty_list)
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
    """Let finish die at its n-th change on disk: before it for even n, after it for odd n."""
    changes = iter(range(0, 100, 2))

    def dying(change):
        def wrapped(path, *args, **kwargs):
            number = next(changes)
            if number == moment:
                raise Killed
            if number + 1 == moment and change is shutil.rmtree:
                (Path(path) / "card.json").unlink()
                raise Killed
            result = change(path, *args, **kwargs)
            if number + 1 == moment:
                raise Killed
            return result

        return wrapped

    monkeypatch.setattr(shutil, "rmtree", dying(shutil.rmtree))
    monkeypatch.setattr(Path, "rename", dying(Path.rename))
    monkeypatch.setattr(Path, "replace", dying(Path.replace))


@pytest.mark.parametrize("name", ["run", "other"])
@pytest.mark.parametrize("moment", range(10))
def test_a_kill_while_a_run_is_replaced_loses_nothing(run, name, moment):
    def finish_again():
        again = runs.Run(name, run.key, run.info, run.rows, open_part(name, run.key))
        finish(again, run.model.state_dict())
        return again.path

    with pytest.MonkeyPatch.context() as patch:
        kill_at(patch, moment)
        with pytest.raises(Killed):
            finish_again()
    found = find(run.key, make_model())
    assert found.rows == run.rows
    assert found.name in ("run", name)
    path = finish_again()
    assert path == run.path.with_name(f"{name}-{run.key}")
    assert [path for path in path.parent.iterdir() if path.name != ".locks"] == [path]
    assert sorted(file.name for file in path.iterdir()) == ["best.safetensors", "card.json"]
    again = find(run.key, make_model())
    assert (again.name, again.info, again.rows) == (name, run.info, run.rows)
    assert same_weights(again.model, run.model)


def test_an_unfinished_run_is_taken_up_under_whatever_name_without_stray_files(tmp_path):
    part = open_part("first", "0123456789ab")
    assert part == tmp_path / "runs" / "first-0123456789ab.part"
    (part / "last.pt").write_text("state")
    (part / ".last.pt.1234.tmp").write_text("half")
    assert open_part("second", "0123456789ab") == part
    assert [path.name for path in part.iterdir()] == ["last.pt"]
    assert open_part("second", "0123456789ac") != part


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
        # Checks the digest, the file's name, and the key.
        card = cards.read(path)
        info = card["info"]
        config = config_of(info["config"])
        weights, fingerprint = info.get("weights", "seed"), info["data"]["fingerprint"]
        teacher = info.get("teacher")
        assert run_key(config, info["model"], weights, fingerprint, teacher) == card["key"]
        assert path.stem == f"{card['name']}-{card['key']}"
        model = lab.build(info["model"])
        for name, parameter in model.named_parameters():
            if name in weights.split():  # those that were frozen are named there
                parameter.requires_grad_(False)
        assert lab.num_parameters(model) == info["parameters"]
        exact = rf"OMP_NUM_THREADS={info['threads']} python -m labutils run \d\.\d --profile full "
        assert re.fullmatch(f"{exact}-p retrain true", card["command"])


def test_published_weights_fit_their_models_and_stay_small():
    weights = [path.with_suffix(".safetensors") for path in CARDS]
    weights = [path for path in weights if path.exists()]
    assert weights
    for path in weights:
        card = json.loads(path.with_suffix(".json").read_text())
        assert hashlib.sha256(path.read_bytes()).hexdigest() == card["weights"]
        load_weights(lab.build(card["info"]["model"]), path)
        # A network on the way to another, looked into or a teacher, is not judged by its accuracy.
        on_the_way = ("first-epoch", "early", "unfreezing_stage", "shuffled", "2.3_true")
        assert card["test"] or any(word in path.name for word in on_the_way)
        assert path.stat().st_size < 25e6


def test_scores_with_test_time_flip_are_stored_apart(run, data, monkeypatch):
    plain, flipped = run.test(data), run.test(data, tta=True)
    assert plain != flipped
    assert flipped == evaluate(run.model, data.test, tta=True)
    card = card_of(run.path / "card.json")
    assert (card["test"]["loss"], card["test_flip"]["loss"]) == (plain.loss, flipped.loss)
    monkeypatch.delattr("labutils.evaluation.metrics.evaluate")
    card = publish(run, weights=False, command="")
    for _ in range(2):
        found = find(run.key, make_model())
        assert (found.test(data), found.test(data, tta=True)) == (plain, flipped)
        shutil.rmtree(run.path, ignore_errors=True)
    assert found.path == card


def is_damaged(key):
    try:
        find(key, make_model())
    except RunError as error:
        return "is damaged" in str(error)
    return False


@pytest.mark.parametrize("file", ["card.json", "best.safetensors"])
def test_every_flipped_bit_is_noticed(run, data, file):
    run.test(data)
    path = run.path / file
    whole = path.read_bytes()
    assert not is_damaged(run.key)
    # Every byte of the card once, each of its bits many times; of the weights, a sample.
    positions = range(len(whole)) if file == "card.json" else range(0, len(whole), 11)
    for position in positions:
        damaged = bytearray(whole)
        damaged[position] ^= 1 << (position * 5 + position // 8) % 8
        path.write_bytes(damaged)
        assert is_damaged(run.key), (position, whole[position : position + 20])


def test_a_flipped_bit_of_a_published_run_is_noticed(run):
    card = publish(run, weights=True, command="make report")
    shutil.rmtree(run.path)
    for path in (card, card.with_suffix(".safetensors")):
        whole = path.read_bytes()
        for position in range(0, len(whole), 53):
            path.write_bytes(
                whole[:position] + bytes([whole[position] ^ 1]) + whole[position + 1 :]
            )
            assert is_damaged(run.key)
        path.write_bytes(whole)
    assert not is_damaged(run.key)


def rewrite(path, **changes):
    """Change a card as somebody would who knows how its digest is made."""
    cards.write(path, card_of(path) | changes)


def test_a_card_of_other_settings_or_another_name_is_refused(run, data):
    card = publish(run, weights=False, command="")
    shutil.rmtree(run.path)
    other = dict(run.info, config=run.info["config"] | {"lr": 0.5})
    for changes, wanted in [
        ({"info": other}, "or the key of its settings"),
        ({"name": "../outside"}, r"\.\./outside-\w+ is not the name of this card"),
        ({"key": "0123456789ab"}, "run-0123456789ab is not the name"),
    ]:
        before = card.read_bytes()
        rewrite(card, **changes)
        with pytest.raises(RunError, match=rf"is damaged .*{wanted}"):
            find(run.key, make_model())
        card.write_bytes(before)
    shutil.copy(card, card.with_name(f"copy-{run.key}.json"))
    card.unlink()
    with pytest.raises(RunError, match=r"is damaged .*run-.* is not the name of this card"):
        find(run.key, make_model())


def test_a_name_does_not_lead_a_publication_out_of_its_folder(run, tmp_path):
    for name, key in (("../../run", run.key), ("a/b", run.key), ("run", "0123456789ab")):
        run.name, run.key = name, key
        with pytest.raises(ValueError, match="is not the name of this card"):
            publish(run, weights=True, command="")
    assert not (tmp_path / "models").exists()


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_weights_that_are_not_finite_are_refused(run, value):
    with torch.no_grad():
        next(run.model.parameters()).flatten()[3] = value
    save_weights(run.weights, run.model.state_dict())
    with pytest.raises(ValueError, match=r"best.safetensors has values .* that are not finite"):
        load_weights(make_model(), run.weights)
    digest = hashlib.sha256(run.weights.read_bytes()).hexdigest()
    rewrite(run.path / "card.json", weights=digest)
    assert is_damaged(run.key)


def test_weights_of_another_run_are_not_taken_for_its_own(run):
    card = publish(run, weights=True, command="")
    shutil.rmtree(run.path)
    save_weights(card.with_suffix(".safetensors"), lab.MLP(36, [8], 3).state_dict())
    assert is_damaged(run.key)


def test_a_publication_takes_the_place_of_one_under_another_name(run):
    older = publish(run, weights=True, command="")
    run.name = "renamed"
    card = publish(run, weights=False, command="")
    assert card != older
    assert sorted(path.name for path in card.parent.iterdir()) == [card.name]


def test_a_card_without_weights_does_not_keep_those_of_an_earlier_training(run):
    card = publish(run, weights=True, command="")
    publish(run, weights=False, command="")
    assert not card.with_suffix(".safetensors").exists()
    assert card_of(card)["weights"] is None


def test_weights_of_a_run_that_was_replaced_are_not_published_as_its_own(run, data):
    again = train(data, retrain=True)
    assert again.path == run.path
    rewrite(run.path / "card.json", info=again.info | {"seconds": 123.0})
    with pytest.raises(RunError, match="is gone; another run of the same settings"):
        publish(run, weights=True, command="")


def test_damaged_weights_are_not_published_as_sound(run):
    content = bytearray(run.weights.read_bytes())
    content[-1] ^= 1
    run.weights.write_bytes(content)
    with pytest.raises(RunError, match="is not what was stored with its card"):
        publish(run, weights=True, command="")


def test_a_run_that_was_replaced_keeps_its_own_network_and_score(run, data):
    own, info = copy.deepcopy(run.model), dict(run.info)
    torch.manual_seed(1)
    again = train(data, replace(CONFIG, seed=1))
    assert not same_weights(own, again.model)
    # What another machine or number of threads would do: other weights under the same key.
    save_weights(run.weights, again.model.state_dict())
    rewrite(
        run.path / "card.json", info=info | {"seconds": 123.0}, weights=cards.sha256(run.weights)
    )
    assert same_weights(run.network(), own)
    assert run.test(data) == evaluate(own, data.test)
    assert card_of(run.path / "card.json")["test"] is None


def test_an_interrupted_run_is_tested_as_it_is_whatever_lies_in_its_folder(data):
    run = interrupted_run(data)
    save_weights(run.weights, train(data, replace(CONFIG, seed=1)).model.state_dict())
    assert same_weights(run.network(), run.model)


def test_a_run_is_loaded_without_a_change_of_the_random_numbers(run):
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    load_run(run.name)
    assert torch.rand(3).equal(expected)


def test_metrics_that_cannot_be_stored_are_returned_all_the_same(run, data, monkeypatch, capsys):
    def full(path, value):
        raise OSError(errno.EROFS, "Read-only file system")

    monkeypatch.setattr(cards, "write_json", full)
    runs.warn.cache_clear()  # what was said once is not said again
    assert run.test(data) == evaluate(run.model, data.test)
    assert "run: its test metrics are not stored" in capsys.readouterr().out


def test_a_history_is_a_table_that_keeps_every_bit(run):
    rows = [
        {"epoch": 1, "loss": 5e-324, "lr": 1 / 3},
        {"epoch": 2, "loss": 1.7976931348623157e308, "lr": -0.0},
        {"epoch": 3, "loss": 0.1 + 0.2, "lr": 2.0**-1074 * 3},
    ]
    run.rows, run.path = rows, open_part("run", run.key)
    finish(run, run.model.state_dict())
    found = find(run.key, make_model())
    # repr tells -0.0 from 0.0 and int from float.
    assert repr(found.rows) == repr(rows)
    frame = found.history
    assert (frame.index.name, list(frame.index)) == ("epoch", [1, 2, 3])
    assert list(frame.columns) == ["loss", "lr"]
    run.rows = []
    assert len(run.history) == 0


def test_a_run_is_loaded_by_its_name_with_its_network(run, data):
    for name in (run.name, f"{run.name}-{run.key}"):
        found = load_run(name)
        assert (found.key, found.stored) == (run.key, True)
        assert same_weights(found.require_model(), run.model)
        assert found.test(data).accuracy == run.test(data).accuracy


def test_a_published_run_is_loaded_when_the_runs_folder_is_gone(run, data):
    publish(run, weights=True, command="make it")
    shutil.rmtree(run.path)
    assert same_weights(load_run(run.name).require_model(), run.model)


def test_a_network_of_ones_own_is_not_called_damaged(data):
    own = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(36, 3))
    run = lab.train(own, data, CONFIG, name="own", track=None, progress=False)
    with pytest.raises(RunError, match=r"^own: labutils cannot build its network") as caught:
        load_run("own")
    assert str(run.weights) in str(caught.value)
    assert "Remove" not in str(caught.value)


def test_a_name_that_is_not_one_runs_is_refused(run, data):
    with pytest.raises(RunError, match=r"name = 'rum'. There is no such run. Did you mean 'run'"):
        load_run("rum")
    other = train(data, lab.TrainConfig(epochs=1, batch_size=16))
    both = sorted([f"run-{run.key}", f"run-{other.key}"])
    with pytest.raises(RunError, match=rf"name = 'run'\. Give one of {both[0]}, {both[1]}\."):
        load_run("run")
    assert load_run(f"run-{other.key}").key == other.key
    assert load_run(f"as-it-was-called-{other.key}").key == other.key
    assert load_run(other.key).key == other.key


def test_a_card_without_weights_cannot_be_loaded(run):
    publish(run, weights=False, command="make it")
    shutil.rmtree(run.path)
    with pytest.raises(RunError, match="only the card of this run is published"):
        load_run(run.name)


def test_a_run_that_does_not_say_what_network_it_is_cannot_be_loaded(run):
    card = cards.read(run.path / "card.json")
    (run.path / "card.json").write_text(json.dumps(card).replace('"MLP"', '"MLQ"'))
    with pytest.raises(RunError, match=r"stored run .* is damaged .*digest"):
        load_run(run.name)


def test_what_a_run_is_asked_for_is_checked(data):
    run = lab.train(make_model(), data, CONFIG, track=None, progress=False)
    with pytest.raises(
        ValueError, match=r"^best: column = 'val_acc'.* Did you mean 'val_accuracy'"
    ):
        run.best("val_acc")
    with pytest.raises(ValueError, match=r"^test: data = 'digits'\. .* ImageData"):
        run.test("digits")
    with pytest.raises(ValueError, match=r"^load_run: name = None"):
        lab.load_run(None)


def test_who_waits_for_another_process_says_so(capsys, monkeypatch):
    lock = runs.runs_dir() / ".locks" / "k.lock"
    code = "import filelock, sys\nwith filelock.FileLock(sys.argv[1]):\n "
    code += "print(flush=True); sys.stdin.read()"
    lock.parent.mkdir(parents=True)
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
    with subprocess.Popen([sys.executable, "-c", code, lock], **pipes) as other:
        other.stdout.readline()
        say = runs.say  # the other lets go when it has been said that we wait
        monkeypatch.setattr(runs, "say", lambda *a, **k: say(*a, **k) or other.stdin.close())
        with runs.store_lock("k"):
            assert other.wait(60) == 0
    assert capsys.readouterr().out == "another process computes the same: waiting for it\n"
    with runs.store_lock("k"):
        pass
    assert capsys.readouterr().out == ""


def test_an_error_of_ones_own_file_is_not_one_of_the_store(data, tmp_path):
    absent = tmp_path / "absent.txt"
    with pytest.raises(FileNotFoundError) as caught, runs.store_lock("k"):
        absent.read_text()
    assert caught.value.filename == str(absent)
    with pytest.raises(ConnectionError, match=r"^gone$"), runs.store_lock("k"):
        raise ConnectionError("gone")
    with pytest.raises(TimeoutError), runs.store_lock("k"):
        raise TimeoutError(errno.ETIMEDOUT, "Connection timed out")


def test_a_split_of_ones_own_may_have_statistics_as_tensors(data):
    splits = {
        name: replace(split, mean=torch.tensor(split.mean), std=torch.tensor(split.std))
        for name, split in (("train", data.train), ("val", data.val), ("test", data.test))
    }
    torch.manual_seed(0)
    model = lab.MLP(data.num_features, [4], data.num_classes)
    run = lab.train(model, replace(data, **splits), CONFIG, track=None, progress=False)
    assert run.info["data"]["mean"] == pytest.approx(data.train.mean)


def test_an_unfinished_run_is_not_loaded_by_its_name(run):
    run.path.rename(run.path.with_name(f"{run.path.name}.part"))  # killed before it was renamed
    with pytest.raises(RunError, match="There is no such run"):
        load_run(run.name)
