"""Runs: what is found again, what is refused, and what a run tells of itself."""

import copy
import errno
import hashlib
import json
import re
import shutil
from dataclasses import asdict, replace
from pathlib import Path

import pytest
import torch
from small_runs import CONFIG, card_of, interrupted_run, make_model, rewrite, same_weights, train

import labutils as lab
from labutils.evaluation.metrics import evaluate
from labutils.training import cards, runs
from labutils.training.cards import RunError, load_weights, save_weights
from labutils.training.key import run_key
from labutils.training.runs import find, load_run
from labutils.training.store import finish, open_part, publish


@pytest.fixture
def data(write_npz):
    write_npz()
    return lab.load_data("tiny", val_size=12, device="cpu")


@pytest.fixture
def run(data):
    return train(data)


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


def test_metrics_of_an_interrupted_run_do_not_stay_with_the_finished_one(data):
    run = interrupted_run(data)
    assert run.test(data) == lab.evaluate(run.model, data.test)
    train(data)
    finished = train(data)
    assert finished.stored
    assert finished.test(data) == lab.evaluate(finished.model, data.test)


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
