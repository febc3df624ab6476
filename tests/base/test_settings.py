"""Settings of a run: what is allowed, how errors read, what of them enters a key; recipes."""

import copy
import dataclasses
import inspect
import json
import pickle
import stat
from typing import NotRequired

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import labutils as lab
from labutils.base import files
from labutils.base import settings as base
from labutils.base.settings import RECIPES, Augment, TrainConfig

NAN, INF = float("nan"), float("inf")
NOT_COUNTS = [0, -1, 2.0, True, "3", np.int64(3), 2**31, 10**400]
NOT_NUMBERS = [-0.1, NAN, INF, -INF, "0.1", True, [0.1], -(10**400)]
BAD = {
    "epochs": [*NOT_COUNTS, None],
    "batch_size": [*NOT_COUNTS, None],
    "accumulate": [*NOT_COUNTS, None],
    "image_sizes": [None, 32, "32", 0.5],
    "optimizer": ["lion", "AdamW", None],
    "lr": [*NOT_NUMBERS, 0, None],
    "bias_lr": [*NOT_NUMBERS, 0, None],
    "head_lr": [*NOT_NUMBERS, 0, None],
    "weight_decay": [*NOT_NUMBERS, None],
    "schedule": ["step", "", None],
    "label_smoothing": [*NOT_NUMBERS, 1, None],
    "stage_decay": [*NOT_NUMBERS, 0, 1.1, None],
    "alpha": [*NOT_NUMBERS, 1.1, None],
    "temperature": [*NOT_NUMBERS, 0, None],
    "ema": [*NOT_NUMBERS, 0, 1],
    "augment": [None, {"rotate": 5}, "none", Augment],
    "precision": ["bfloat16", "fp16", 32, None],
    "monitor": ["loss", "train_loss", None],
    "patience": NOT_COUNTS,
    "overfit_patience": NOT_COUNTS,
    "overfit_delta": [*NOT_NUMBERS, None],
    "seed": [-1, 2**32, 1.0, True, "0", None, np.int64(0)],
}
VALID = {
    "epochs": st.integers(1, 100) | st.just(20),
    "image_sizes": st.just([24, 28, 32]) | st.just([]),
    "optimizer": st.sampled_from(["sgd", "adam", "adamw", "muon"]),
    "lr": st.floats(1e-6, 1) | st.just(1e-3) | st.just(1),
    "schedule": st.sampled_from(["constant", "linear"]),
    "precision": st.sampled_from(["auto", "float32", "bf16"]),
    "patience": st.none() | st.integers(1, 9),
    "seed": st.integers(0, 2**32 - 1) | st.just(0),
}
DISTORTIONS = {
    "rotate": st.just(0) | st.floats(0, 180),
    "translate": st.just(0.0) | st.floats(0, 8),
    "zoom": st.just(0.0) | st.floats(0, 0.9),
    "area": st.just(1.0) | st.floats(0.1, 0.9),
    "crop": st.integers(0, 8),
    "cutout": st.integers(0, 8),
}


def defaults(kind) -> dict:
    return {item.name: item.default for item in dataclasses.fields(kind)}


def test_the_table_of_bad_values_covers_every_setting():
    assert set(BAD) == set(defaults(TrainConfig))


@pytest.mark.parametrize(("name", "value"), [(name, bad) for name in BAD for bad in BAD[name]])
def test_a_bad_setting_is_named_with_its_value_and_what_is_allowed(name, value):
    with pytest.raises(ValueError, match=f"^TrainConfig: {name} = ") as caught:
        TrainConfig(**{name: value})
    first, allowed = str(caught.value).split(f"{value!r}. ", maxsplit=1)
    assert first == f"TrainConfig: {name} = "
    assert allowed.startswith("Input should be ")
    assert "pydantic" not in str(caught.value)


@pytest.mark.parametrize(
    ("name", "value"),
    [(name, bad) for name in ("rotate", "translate", "zoom") for bad in NOT_NUMBERS]
    + [("rotate", 181), ("zoom", 1)]
    + [("area", bad) for bad in [*NOT_NUMBERS, 0, 1.1, None]]
    + [(name, bad) for name in ("crop", "cutout") for bad in (-1, 4.0, True, "4", None, 2**31)],
)
def test_a_bad_distortion_is_named(name, value):
    with pytest.raises(ValueError, match=f"^Augment: {name} = .*Input should be "):
        Augment(**{name: value})


@pytest.mark.parametrize(
    ("settings", "wanted"),
    [
        ({"batch_size": 12, "accumulate": 5}, r"accumulate = 5\. It has to divide batch_size = 12"),
        ({"image_sizes": [24, 24]}, r"image_sizes = \[24, 24\]\. Each has to be larger than"),
        ({"image_sizes": (32, 24)}, r"image_sizes = \(32, 24\)\. Each has to be larger than"),
        ({"image_sizes": [24, 0]}, r"image_sizes\[1\] = 0\. Input should be greater than 0"),
        ({"image_sizes": [2.5]}, r"image_sizes\[0\] = 2\.5\. Input should be a valid integer"),
    ],
)
def test_settings_that_do_not_fit_each_other_are_named(settings, wanted):
    with pytest.raises(ValueError, match=f"^TrainConfig: {wanted}[^\n]*$"):
        TrainConfig(**settings)


def test_all_bad_settings_are_listed_at_once():
    with pytest.raises(ValueError, match="epochs = 0") as caught:
        TrainConfig(epochs=0, lr="0.1", schedule="step")
    assert [line.split()[1] for line in str(caught.value).splitlines()] == [
        *("epochs", "lr", "schedule")
    ]
    assert "'constant', 'onecycle' or 'linear'" in str(caught.value)


def test_settings_cannot_be_changed_afterwards():
    with pytest.raises(dataclasses.FrozenInstanceError):
        TrainConfig().lr = 1.0


@pytest.mark.parametrize("kind", [TrainConfig, Augment])
def test_settings_are_an_ordinary_dataclass(kind):
    built = kind()
    assert dataclasses.replace(built) == built == pickle.loads(pickle.dumps(built))
    assert hash(copy.deepcopy(built)) == hash(built)
    assert list(dataclasses.asdict(built)) == list(vars(built)) == list(defaults(kind))
    assert str(inspect.signature(kind)).startswith("(*, ")


def test_numbers_are_kept_as_json_has_them():
    """Keys are digests of these texts, so 1 and 1.0 must not make two keys of one run."""
    config = TrainConfig(
        lr=1, weight_decay=np.float64(0.5), optimizer=np.str_("sgd"), augment=Augment(rotate=5)
    )
    expected = {"optimizer": "sgd", "lr": 1.0, "weight_decay": 0.5, "augment": {"rotate": 5.0}}
    assert json.dumps(config.values(exclude_defaults=True)) == json.dumps(expected)
    assert type(dataclasses.asdict(config)["weight_decay"]) is float


@settings(deadline=None)
@given(st.fixed_dictionaries({}, optional=VALID), st.fixed_dictionaries({}, optional=DISTORTIONS))
def test_changes_are_the_settings_that_differ_and_rebuild_the_config(settings, distortion):
    built = TrainConfig(**settings, augment=Augment(**distortion))
    expected = {
        key: value for key, value in settings.items() if defaults(TrainConfig)[key] != value
    }
    if not settings.get("image_sizes"):  # a list here, a tuple there
        expected.pop("image_sizes", None)
    nested = {key: v for key, v in distortion.items() if v != defaults(Augment)[key]}
    changes = built.values(exclude_defaults=True)
    assert changes == expected | ({"augment": nested} if nested else {})
    stored = json.loads(json.dumps(changes))
    stored["augment"] = Augment(**stored.get("augment", {}))
    assert TrainConfig(**stored) == built


def test_a_written_file_is_as_readable_as_any_other(tmp_path):
    path, plain = tmp_path / "new" / "folder" / "file", tmp_path / "plain"
    with files.atomic_write(path) as file:
        file.write(b"new")
    plain.touch()
    assert path.read_bytes() == b"new"
    assert stat.S_IMODE(path.stat().st_mode) == stat.S_IMODE(plain.stat().st_mode)


def test_a_silent_error_is_named_by_its_kind():
    assert base.first_line(RuntimeError("first\nsecond")) == "first"
    assert base.first_line(RuntimeError()) == "RuntimeError"
    assert base.first_line(RuntimeError("\nsecond")) == "second"


def test_only_a_name_that_is_near_is_suggested():
    assert base.suggestion("minst", ["mnist", "digits"]) == " Did you mean 'mnist'?"
    assert base.suggestion("photos", ["mnist", "digits"]) == ""


@pytest.mark.parametrize("name", RECIPES)
def test_a_recipe_is_a_config_whose_settings_can_be_changed(name):
    changed = lab.recipe(name, epochs=3, seed=7)
    assert (changed.epochs, changed.seed) == (3, 7)
    assert changed.optimizer == RECIPES[name].optimizer
    assert changed.augment == RECIPES[name].augment


def test_the_control_is_what_was_published():
    control = lab.recipe("control")
    assert control.values(exclude_defaults=True) == {
        "epochs": 30,
        "optimizer": "adam",
        "patience": 5,
    }
    assert (control.lr, control.batch_size, control.schedule) == (1e-3, 128, "constant")


def test_our_recipes_are_what_the_published_runs_were_trained_with():
    ours, fast = lab.recipe("ours"), lab.recipe("fast")
    assert ours.values(exclude_defaults=True) == {
        "epochs": 30,
        "optimizer": "sgd",
        "lr": 0.1,
        "weight_decay": 5e-4,
        "schedule": "onecycle",
        "label_smoothing": 0.1,
        "ema": 0.995,
        "augment": {"crop": 4, "flip": "alternating", "cutout": 8},
        "precision": "auto",
        "monitor": "val_accuracy",
    }
    assert fast.values(exclude_defaults=True) == {
        "epochs": 10,
        "batch_size": 2000,
        "accumulate": 16,
        "image_sizes": [24, 32],
        "optimizer": "muon",
        "lr": 0.24,
        "bias_lr": 106.0,
        "head_lr": 1.66,
        "weight_decay": 0.0167,
        "schedule": "linear",
        "label_smoothing": 0.2,
        "augment": {"crop": 2, "flip": "alternating"},
        "precision": "auto",
        "monitor": "val_accuracy",
    }


@pytest.mark.parametrize("name", ["contol", "", None, 3, ["ours"]])
def test_an_unknown_recipe_is_named_with_the_known_ones(name):
    with pytest.raises(ValueError, match=r"^recipe: name = .* 'ours' or 'fast'") as caught:
        lab.recipe(name)
    assert repr(name) in str(caught.value)


@pytest.mark.parametrize(
    "change",
    [
        lambda: lab.recipe("ours", epoch=3),
        lambda: TrainConfig(epoch=3),
        lambda: dataclasses.replace(TrainConfig(), epoch=3),
    ],
)
def test_an_unknown_setting_is_named_with_the_nearest(change):
    with pytest.raises(ValueError, match=r"^TrainConfig: epoch = 3\..* mean 'epochs'\? Known: ep"):
        change()
    with pytest.raises(ValueError, match=r"^Augment: rotat = 3\..* mean 'rotate'\? Known: crop"):
        Augment(rotat=3)


def test_a_bad_value_is_refused():
    with pytest.raises(ValueError, match="TrainConfig: epochs = 0"):
        lab.recipe("ours", epochs=0)


def test_values_are_checked_against_any_type_hints():
    kinds = {"count": int, "shares": NotRequired[list[float]]}
    assert base.check("cut", kinds, {"count": 3, "shares": [1, 0.5]}) == {
        "count": 3,
        "shares": [1.0, 0.5],
    }
    assert base.check("cut", kinds, {"count": 3}) == {"count": 3}
    with pytest.raises(ValueError, match=r"^cut: ") as caught:
        base.check("cut", kinds, {"count": "3", "shares": [1, "x", None], "share": 1})
    assert str(caught.value).splitlines() == [
        "cut: count = '3'. Input should be a valid integer.",
        "cut: shares[1] = 'x'. Input should be a valid number.",
        "cut: shares[2] = None. Input should be a valid number.",
        "cut: share = 1. Extra inputs are not permitted. Did you mean 'shares'? "
        "Known: count, shares.",
    ]


def test_help_explains_every_setting_in_plain_types():
    for kind in (TrainConfig, Augment):
        text, shown = inspect.getdoc(kind), str(inspect.signature(kind))
        for field in dataclasses.fields(kind):
            assert f"\n{field.name}: " in text
        assert "FieldInfo" not in shown
        assert "crop: int = 0" in shown or "epochs: int = 20" in shown
    assert "# images per step" in inspect.getdoc(TrainConfig)
    assert str(inspect.signature(lab.MLP)).startswith("(in_features: int, hidden: list[int]")


def test_a_value_that_is_missing_is_said_to_be():
    kinds = {"spec": dict, "seed": int}
    with pytest.raises(ValueError, match=r"^f: seed is missing\.$"):
        base.check("f", kinds, {"spec": {}})


def test_a_value_of_many_lines_is_cut_short():
    shown = r"^f: x = array\(\[\[0\., 0\., .{,60} \.\.\.\. Input should be a valid integer\.$"
    with pytest.raises(ValueError, match=shown):
        base.check("f", {"x": int}, {"x": np.zeros((9, 9))})
