"""Published scores are measured again: what agrees, what differs, what is skipped and why."""

import dataclasses
import json
import shutil

import pytest
import torch

import labutils as lab
from labutils.training import cards
from labutils.training.store import publish
from tools import verify


@pytest.fixture
def models(tmp_path):
    return tmp_path / "models"


def published(data, name="digits-mlp", *, half=None, **config):
    """The card of a run whose weights are published and stand nowhere else."""
    torch.manual_seed(0)
    config = lab.TrainConfig(**{"epochs": 1, "batch_size": 32, "lr": 1e-2, **config})
    model = lab.MLP(data.num_features, [16], data.num_classes)
    run = lab.train(model, data, config, name=name, track=None, progress=False)
    run.test(data), run.test(data, tta=True)
    card = publish(run, weights=True, command="", half=half)
    shutil.rmtree(run.path)
    return card


def change(card, accuracy):
    """Put another test accuracy on a card, digest and all."""
    values = cards.read(card)
    values["test"]["accuracy"] += accuracy
    cards.write(card, values)


def lines(capsys):
    return capsys.readouterr().out.splitlines()


@pytest.mark.parametrize("half", [False, True])
def test_what_a_card_says_is_what_its_weights_reach(models, digits, capsys, half):
    card = published(digits, half=digits if half else None)
    accuracies = [100 * cards.read(card)[name]["accuracy"] for name in ("test", "test_flip")]
    assert verify.verify(models)
    _, line = lines(capsys)
    assert line.split()[:2] == ["digits-mlp", "agrees"]
    assert line.endswith("test {0:.2f}, {0:.2f}; test_flip {1:.2f}, {1:.2f}".format(*accuracies))


@pytest.mark.parametrize(("off", "agrees"), [(0.0004, True), (-0.0006, False), (0.0006, False)])
def test_a_score_that_is_not_that_of_the_weights_is_noticed(models, digits, capsys, off, agrees):
    change(published(digits), off)
    published(digits, "other", seed=1)
    assert verify.verify(models) == agrees
    verdicts = {name: verdict for name, verdict, *_ in map(str.split, lines(capsys)[1:])}
    assert verdicts == {"digits-mlp": ["differs", "agrees"][agrees], "other": "agrees"}


@pytest.mark.parametrize(
    ("computes", "off", "agrees"),
    [(True, 6e-4, False), (False, 6e-4, True), (False, 4e-3, False)],
)
def test_a_run_of_bf16_may_differ_where_bf16_is_not_computed(
    models, digits, monkeypatch, computes, off, agrees
):
    card = published(digits)
    values = cards.read(card)
    values["info"]["precision"] = "bf16"
    cards.write(card, values)
    change(card, off)
    monkeypatch.setattr(
        verify, "usable_precision", lambda asked, _: asked if computes else "float32"
    )
    monkeypatch.setattr("labutils.evaluation.metrics.usable_precision", lambda *_: "float32")
    assert verify.verify(models) == agrees


def test_the_data_are_cut_and_drawn_as_the_card_says(models, capsys):
    data = lab.load_data(
        "shapes10", val_size=500, seed=3, subset=0.1, image_size=8, shortcut=1.0, device="cpu"
    )
    published(data)
    assert verify.verify(models)
    assert lines(capsys)[1].split()[:2] == ["digits-mlp", "agrees"]


def test_a_run_on_data_made_by_hand_is_skipped(models, digits, capsys):
    published(dataclasses.replace(digits, name="mine", loaded={}))
    assert verify.verify(models)
    assert lines(capsys)[1].endswith("needs mine")


def test_data_that_are_absent_or_other_data_are_named_and_skipped(
    models, digits, capsys, write_npz
):
    path = write_npz()
    published(lab.load_data("tiny", val_size=12, device="cpu"), "tiny-mlp")
    published(digits)
    path.unlink()
    assert verify.verify(models)
    shown = lines(capsys)
    assert [line.split()[1] for line in shown[1:3]] == ["agrees", "skipped"]
    assert shown[2].endswith("needs tiny")
    assert shown[3].startswith("No tiny: load_data: unknown data set 'tiny'.")
    write_npz(train=90)
    assert verify.verify(models)
    shown = lines(capsys)
    assert shown[2].endswith("other data than tiny here")
    assert shown[3].startswith("Other data: another copy, or images or labels that")


def test_a_damaged_file_is_named_and_the_others_are_tested(models, digits, capsys):
    published(digits)
    weights = published(digits, "broken", seed=1).with_suffix(".safetensors")
    weights.write_bytes(weights.read_bytes()[:-1])
    assert not verify.verify(models)
    shown = lines(capsys)
    assert "is damaged" in shown[0]
    assert weights.name in shown[0]
    assert shown[2].split()[:2] == ["digits-mlp", "agrees"]


def test_cards_alone_need_no_data_and_weights_may_have_no_score(models, digits, capsys):
    card = published(digits)
    cards.write(card, cards.read(card) | {"test": None, "test_flip": None})
    assert verify.verify(models)
    line = lines(capsys)[1]
    assert line.split()[1] == "loads"
    assert line.endswith("no score on its card")
    card.with_suffix(".safetensors").unlink()
    cards.write(card, json.loads(card.read_text()) | {"weights": None})
    assert verify.verify(models)
    assert len(lines(capsys)) == 1
