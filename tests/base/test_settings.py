"""Settings, folders, devices, seeds and safe writes."""

import contextlib
import dataclasses
import errno
import hashlib
import json
import os
import random
import stat
import subprocess
import sys

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from labutils.base import settings as base
from labutils.base.settings import Augment, TrainConfig

NAN, INF = float("nan"), float("inf")
NOT_COUNTS = [0, -1, 2.0, True, "3"]
NOT_NUMBERS = [-0.1, NAN, INF, -INF, "0.1", True, [0.1]]
BAD = {
    "epochs": [*NOT_COUNTS, None],
    "batch_size": [*NOT_COUNTS, None],
    "optimizer": ["lion", "AdamW", None],
    "lr": [*NOT_NUMBERS, 0, None],
    "weight_decay": [*NOT_NUMBERS, None],
    "schedule": ["step", "", None],
    "warmup_epochs": [*NOT_NUMBERS, None],
    "label_smoothing": [*NOT_NUMBERS, 1, None],
    "clip_norm": [*NOT_NUMBERS, 0],
    "ema": [*NOT_NUMBERS, 0, 1],
    "augment": [None, {"rotate": 5}, "none"],
    "precision": ["bfloat16", "fp16", 32, None],
    "monitor": ["loss", "train_loss", None],
    "patience": NOT_COUNTS,
    "min_delta": [*NOT_NUMBERS, None],
    "overfit_patience": NOT_COUNTS,
    "overfit_delta": [*NOT_NUMBERS, None],
    "seed": [-1, 2**32, 1.0, True, "0", None],
}
VALID = {
    "epochs": st.integers(1, 100) | st.just(20),
    "optimizer": st.sampled_from(["sgd", "adam", "adamw"]),
    "lr": st.floats(1e-6, 1) | st.just(1e-3) | st.just(1),
    "schedule": st.sampled_from(["constant", "cosine", "linear"]),
    "clip_norm": st.none() | st.floats(0.1, 10),
    "precision": st.sampled_from(["auto", "float32", "bf16"]),
    "patience": st.none() | st.integers(1, 9),
    "seed": st.integers(0, 2**32 - 1) | st.just(0),
}
DISTORTIONS = {
    "rotate": st.just(0) | st.floats(0, 180),
    "translate": st.just(0.0) | st.floats(0, 8),
    "zoom": st.just(0.0) | st.floats(0, 0.9),
    "crop": st.integers(0, 8),
    "cutout": st.integers(0, 8),
    "mixup": st.just(0) | st.floats(0, 2),
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
    assert allowed.startswith(("Input should be ", "Give a "))


@pytest.mark.parametrize(
    ("name", "value"),
    [(name, bad) for name in ("rotate", "translate", "zoom") for bad in NOT_NUMBERS]
    + [("rotate", 181), ("zoom", 1)]
    + [(name, bad) for name in ("crop", "cutout") for bad in (-1, 4.0, True, "4", None)]
    + [("mixup", bad) for bad in NOT_NUMBERS],
)
def test_a_bad_distortion_is_named(name, value):
    with pytest.raises(ValueError, match=f"^Augment: {name} = .*Input should be "):
        Augment(**{name: value})


def test_all_bad_settings_are_listed_at_once():
    with pytest.raises(ValueError, match="epochs = 0") as caught:
        TrainConfig(epochs=0, lr="0.1", schedule="step")
    assert [line.split()[1] for line in str(caught.value).splitlines()] == [
        *("epochs", "lr", "schedule")
    ]
    assert "'constant', 'cosine', 'onecycle' or 'linear'" in str(caught.value)


def test_one_cycle_refuses_a_second_warmup():
    with pytest.raises(ValueError, match=r"warmup_epochs = 2\.0 with schedule = 'onecycle'"):
        TrainConfig(schedule="onecycle", warmup_epochs=2)


def test_settings_cannot_be_changed_afterwards():
    with pytest.raises(dataclasses.FrozenInstanceError):
        TrainConfig().lr = 1.0


@settings(deadline=None)
@given(st.fixed_dictionaries({}, optional=VALID), st.fixed_dictionaries({}, optional=DISTORTIONS))
def test_changes_are_the_settings_that_differ_and_rebuild_the_config(settings, distortion):
    built = TrainConfig(**settings, augment=Augment(**distortion))
    expected = {
        key: value for key, value in settings.items() if defaults(TrainConfig)[key] != value
    }
    nested = {key: value for key, value in distortion.items() if value != 0}
    changes = built.changes()
    assert changes == expected | ({"augment": nested} if nested else {})
    stored = json.loads(json.dumps(changes))
    stored["augment"] = Augment(**stored.get("augment", {}))
    assert TrainConfig(**stored) == built


@settings(deadline=None)
@given(st.dictionaries(st.text(), st.integers() | st.text() | st.booleans(), max_size=6))
def test_digest_names_the_value_whatever_the_order(value):
    backwards = dict(reversed(value.items()))
    assert base.digest(value) == base.digest(backwards)
    assert base.digest(value) != base.digest({**value, "one more": None})


def test_digest_is_the_hash_of_compact_json():
    text = b'{"a":[1,2.5,null],"b":"x"}'
    assert base.digest({"b": "x", "a": [1, 2.5, None]}) == hashlib.sha256(text).hexdigest()[:12]


@pytest.mark.parametrize(("variable", "folder"), [("DATA", "data"), ("RUNS", "runs")])
def test_folders_follow_the_environment_else_the_project(variable, folder, tmp_path, monkeypatch):
    look_up = getattr(base, f"{folder}_dir")
    monkeypatch.setenv(f"LABUTILS_{variable}", str(tmp_path / "a" / ".." / "b"))
    assert look_up() == tmp_path / "b"
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv(f"LABUTILS_{variable}", "~/mine")
    assert look_up() == tmp_path / "mine"
    monkeypatch.setattr(base, "project_dir", lambda: tmp_path / "project")
    for unset in (lambda name: monkeypatch.setenv(name, ""), monkeypatch.delenv):
        unset(f"LABUTILS_{variable}")
        assert look_up() == tmp_path / "project" / folder


def test_the_project_does_not_depend_on_the_working_directory(tmp_path, monkeypatch):
    before = base.project_dir()
    monkeypatch.chdir(tmp_path)
    assert base.project_dir() == before
    assert (before / "labutils" / "base" / "settings.py").samefile(base.__file__)


@pytest.mark.parametrize(("available", "kind"), [(False, "cpu"), (True, "cuda")])
def test_auto_is_cuda_where_there_is_one(available, kind, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: available)
    assert base.resolve_device("auto").type == kind
    assert base.resolve_device(torch.device("cpu")) == torch.device("cpu")


@pytest.mark.parametrize("device", ["cuda:99", "tpu", "", "hpu", "privateuseone"])
def test_an_absent_device_is_named_with_those_allowed(device):
    with pytest.raises(ValueError, match=f"device = '{device}'.*Allowed: 'auto', 'cpu', 'cuda'"):
        base.resolve_device(device)


def test_seeding_repeats_python_numpy_and_torch():
    def draw():
        return random.random(), np.random.rand(3).tolist(), torch.rand(3).tolist()

    base.seed_everything(7)
    first, second = draw(), draw()
    base.seed_everything(7)
    assert draw() == first != second
    base.seed_everything(8)
    assert all(ours != theirs for ours, theirs in zip(draw(), first))


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt])
def test_an_error_while_writing_keeps_the_old_content(error, tmp_path):
    path = tmp_path / "kept"
    path.write_bytes(b"old")
    with contextlib.suppress(error), base.atomic_write(path) as file:
        file.write(b"new")
        file.flush()
        assert path.read_bytes() == b"old"
        raise error
    assert path.read_bytes() == b"old"
    assert list(tmp_path.iterdir()) == [path]


def test_a_full_disk_keeps_the_old_content(tmp_path):
    resource = pytest.importorskip("resource", reason="no file size limits on this system")
    path = tmp_path / "kept"
    path.write_text("old")
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (5_000, hard))
    try:
        with pytest.raises(OSError, match=os.strerror(errno.EFBIG)):
            base.write_json(path, list(range(100_000)))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]


def test_a_written_file_is_as_readable_as_any_other(tmp_path):
    path, plain = tmp_path / "new" / "folder" / "file", tmp_path / "plain"
    with base.atomic_write(path) as file:
        file.write(b"new")
    plain.touch()
    assert path.read_bytes() == b"new"
    assert stat.S_IMODE(path.stat().st_mode) == stat.S_IMODE(plain.stat().st_mode)


@settings(deadline=None)
@given(
    st.recursive(
        st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False)
        # Text that looks like a list must not be taken for one.
        | st.text() | st.text("[]1 ,\n\""),
        lambda inner: st.lists(inner) | st.dictionaries(st.text("[] 1"), inner),
        max_leaves=12,
    )
)  # fmt: skip
def test_json_reads_back_as_written(tmp_path_factory, value):
    path = tmp_path_factory.getbasetemp() / "value.json"
    base.write_json(path, value)
    assert json.loads(path.read_text(encoding="utf-8")) == value


def test_json_strings_keep_their_brackets(tmp_path):
    value = {"[ 1 ]": "a [ 2,  3 ] b", "rows": [[1, 2], [3.5, None]]}
    base.write_json(tmp_path / "value.json", value)
    text = (tmp_path / "value.json").read_text()
    assert json.loads(text) == value
    assert "[1, 2]" in text
    assert "[3.5, null]" in text


def test_importing_is_light():
    heavy = ["pandas", "matplotlib", "sklearn", "torchvision", "torchmetrics", "wandb"]
    child = """
import sys, labutils
print([name for name in ["torch", *sys.argv[1:]] if name in sys.modules])
import labutils.data, labutils.training
print([name for name in sys.argv[1:] if name in sys.modules])
"""
    command = [sys.executable, "-c", child, *heavy]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert done.stdout.split("\n") == ["[]", "[]", ""]


def test_a_silent_error_is_named_by_its_kind():
    assert base.reason(RuntimeError("first\nsecond")) == "first"
    assert base.reason(RuntimeError()) == "RuntimeError"


def test_only_a_name_that_is_near_is_suggested():
    assert base.suggestion("minst", ["mnist", "digits"]) == " Did you mean 'mnist'?"
    assert base.suggestion("photos", ["mnist", "digits"]) == ""
