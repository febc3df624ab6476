"""The run store: no interruption loses a run or a publication, and what is published is sound."""

import errno
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from small_runs import card_of, interrupted_run, make_model, rewrite, same_weights, train

import labutils as lab
from labutils.base.files import models_dir, runs_dir
from labutils.evaluation.metrics import evaluate
from labutils.training import cards, runs, store
from labutils.training.cards import RunError, load_weights, save_weights
from labutils.training.runs import find
from labutils.training.store import finish, open_part, publish


@pytest.fixture
def data(write_npz):
    write_npz()
    return lab.load_data("tiny", val_size=12, device="cpu")


@pytest.fixture
def run(data):
    return train(data)


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


def test_an_interrupted_run_is_not_published(data):
    run = interrupted_run(data)
    with pytest.raises(RunError, match=r"^run is interrupted"):
        publish(run, weights=False, command="")
    assert not models_dir().exists()


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
    monkeypatch.setattr(cards, "write", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        publish(run, weights=False, command="second")
    assert runs.open_stored(card).model is not None


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


def test_a_name_does_not_lead_a_publication_out_of_its_folder(run, tmp_path):
    for name, key in (("../../run", run.key), ("a/b", run.key), ("run", "0123456789ab")):
        run.name, run.key = name, key
        with pytest.raises(ValueError, match="is not the name of this card"):
            publish(run, weights=True, command="")
    assert not (tmp_path / "models").exists()


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


def test_a_run_whose_folder_is_gone_is_not_said_to_be_replaced(data):
    run = train(data, name="1.1_mlp")
    shutil.rmtree(run.path)
    wanted = rf"{run.path}/best.safetensors is gone\. Train again with retrain=True"
    with pytest.raises(RunError, match=wanted):
        publish(run, weights=True, command="")


def test_damaged_weights_are_not_published_as_sound(run):
    content = bytearray(run.weights.read_bytes())
    content[-1] ^= 1
    run.weights.write_bytes(content)
    with pytest.raises(RunError, match="is not what was stored with its card"):
        publish(run, weights=True, command="")


def test_who_waits_for_another_process_says_so(capsys, monkeypatch):
    lock = runs_dir() / ".locks" / "k.lock"
    code = "import filelock, sys\nwith filelock.FileLock(sys.argv[1]):\n "
    code += "print(flush=True); sys.stdin.read()"
    lock.parent.mkdir(parents=True)
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
    with subprocess.Popen([sys.executable, "-c", code, lock], **pipes) as other:
        other.stdout.readline()
        say = store.say  # the other lets go when it has been said that we wait
        monkeypatch.setattr(store, "say", lambda *a, **k: say(*a, **k) or other.stdin.close())
        with store.store_lock("k"):
            assert other.wait(60) == 0
    assert capsys.readouterr().out == "another process computes the same: waiting for it\n"
    with store.store_lock("k"):
        pass
    assert capsys.readouterr().out == ""


def test_an_error_of_ones_own_file_is_not_one_of_the_store(data, tmp_path):
    absent = tmp_path / "absent.txt"
    with pytest.raises(FileNotFoundError) as caught, store.store_lock("k"):
        absent.read_text()
    assert caught.value.filename == str(absent)
    with pytest.raises(ConnectionError, match=r"^gone$"), store.store_lock("k"):
        raise ConnectionError("gone")
    with pytest.raises(TimeoutError), store.store_lock("k"):
        raise TimeoutError(errno.ETIMEDOUT, "Connection timed out")
