"""Cards and weights as files: what is read is what was written, or an error."""

import re
import shutil
from pathlib import Path

import pytest
import torch
from torch import nn

import labutils as lab
from labutils.training import cards
from labutils.training.cards import load_weights, save_weights

PUBLISHED = min((Path(__file__).resolve().parents[2] / "models").glob("*.json"))


def test_a_card_that_is_written_again_is_the_same_file(tmp_path):
    card = cards.read(PUBLISHED)
    cards.write(tmp_path / PUBLISHED.name, card)
    assert cards.read(tmp_path / PUBLISHED.name) == card
    assert (tmp_path / PUBLISHED.name).read_bytes() == PUBLISHED.read_bytes()


def test_another_number_or_another_name_is_noticed(tmp_path):
    text, path = PUBLISHED.read_text(), tmp_path / PUBLISHED.name
    number = re.search(r"0\.\d+", text)
    path.write_text(f"{text[: number.end()]}1{text[number.end() :]}")
    with pytest.raises(ValueError, match=f"{path.name} is not what was written"):
        cards.read(path)
    shutil.copy(PUBLISHED, tmp_path / "other.json")
    with pytest.raises(ValueError, match="is not the name of this card"):
        cards.read(tmp_path / "other.json")


def test_weights_that_do_not_fit_are_refused(tmp_path):
    weights = tmp_path / "best.safetensors"
    save_weights(weights, lab.MLP(36, [8], 3).state_dict())
    with pytest.raises(
        ValueError, match=r"best.safetensors does not fit the model: .*\s+size mismatch"
    ):
        load_weights(lab.MLP(36, [9], 3), weights)
    with pytest.raises(ValueError, match=r"does not fit the model: .*\s+Missing key"):
        load_weights(nn.Linear(2, 2), weights)
    for tenths in range(10):
        path, whole = tmp_path / f"cut{tenths}.safetensors", weights.read_bytes()
        path.write_bytes(whole[: len(whole) * tenths // 10])
        with pytest.raises(ValueError, match=f"{path.name} does not fit the model"):
            load_weights(lab.MLP(36, [8], 3), path)


def test_weights_of_another_digest_are_refused_before_they_are_used(tmp_path):
    """A run that is trained again may replace its weights after its card was read."""
    model, weights = nn.Linear(2, 2), tmp_path / "best.safetensors"
    save_weights(weights, model.state_dict())
    load_weights(model, weights, cards.sha256(weights))
    before = model.weight.detach().clone()
    save_weights(weights, nn.Linear(2, 2).state_dict())
    with pytest.raises(ValueError, match=r"best\.safetensors is not what was stored with the card"):
        load_weights(model, weights, "0" * 64)
    torch.testing.assert_close(model.weight.detach(), before, rtol=0, atol=0)


def test_weights_of_any_memory_layout_read_back(tmp_path):
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)).to(
        memory_format=torch.channels_last
    )
    other = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4))
    save_weights(tmp_path / "weights", model.state_dict())
    load_weights(other, tmp_path / "weights")
    torch.testing.assert_close(other.state_dict(), model.state_dict(), rtol=0, atol=0)


def test_a_buffer_may_hold_infinity(tmp_path):
    """Masks of attention do."""
    model = nn.Linear(2, 2)
    model.register_buffer("mask", torch.tensor([0.0, -torch.inf]))
    save_weights(tmp_path / "weights", model.state_dict())
    load_weights(model, tmp_path / "weights")
