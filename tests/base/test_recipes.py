"""Recipes: settings by name, and changes to them."""

import pytest

import labutils as lab
from labutils.base.recipes import RECIPES


@pytest.mark.parametrize("name", RECIPES)
def test_a_recipe_is_a_config_whose_settings_can_be_changed(name):
    assert lab.recipe(name) == RECIPES[name]
    changed = lab.recipe(name, epochs=3, seed=7)
    assert (changed.epochs, changed.seed) == (3, 7)
    assert changed.optimizer == RECIPES[name].optimizer
    assert changed.augment == RECIPES[name].augment


def test_the_control_is_what_was_published():
    control = lab.recipe("control")
    assert control.changes() == {"epochs": 30, "optimizer": "adam", "patience": 5}
    assert (control.lr, control.batch_size, control.schedule) == (1e-3, 128, "constant")


def test_an_unknown_recipe_is_named_with_the_nearest():
    with pytest.raises(ValueError, match=r"recipe 'contol'\. Did you mean 'control'\? Known: con"):
        lab.recipe("contol")


def test_an_unknown_setting_is_named_with_the_nearest():
    with pytest.raises(ValueError, match=r"no setting 'epoch'\. Did you mean 'epochs'\? Known: ep"):
        lab.recipe("ours", epoch=3)


def test_a_bad_value_is_refused():
    with pytest.raises(ValueError, match="TrainConfig: epochs = 0"):
        lab.recipe("ours", epochs=0)
