"""Files are written whole or not at all, where they belong."""

import contextlib
import errno
import hashlib
import json
import os

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from labutils.base import files


@settings(deadline=None)
@given(st.dictionaries(st.text(), st.integers() | st.text() | st.booleans(), max_size=6))
def test_digest_names_the_value_whatever_the_order(value):
    backwards = dict(reversed(value.items()))
    assert files.digest(value) == files.digest(backwards)
    assert files.digest(value) != files.digest({**value, "one more": None})


def test_digest_is_the_hash_of_compact_json():
    text = b'{"a":[1,2.5,null],"b":"x"}'
    assert files.digest({"b": "x", "a": [1, 2.5, None]}) == hashlib.sha256(text).hexdigest()[:12]


@pytest.mark.parametrize(("variable", "folder"), [("DATA", "data"), ("RUNS", "runs")])
def test_folders_follow_the_environment_else_the_project(variable, folder, tmp_path, monkeypatch):
    look_up = getattr(files, f"{folder}_dir")
    monkeypatch.setenv(f"LABUTILS_{variable}", str(tmp_path / "a" / ".." / "b"))
    assert look_up() == tmp_path / "b"
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv(f"LABUTILS_{variable}", "~/mine")
    assert look_up() == tmp_path / "mine"
    monkeypatch.setattr(files, "project_dir", lambda: tmp_path / "project")
    for unset in (lambda name: monkeypatch.setenv(name, ""), monkeypatch.delenv):
        unset(f"LABUTILS_{variable}")
        assert look_up() == tmp_path / "project" / folder


def test_the_project_does_not_depend_on_the_working_directory(tmp_path, monkeypatch):
    before = files.project_dir()
    monkeypatch.chdir(tmp_path)
    assert files.project_dir() == before
    assert (before / "labutils" / "base" / "files.py").samefile(files.__file__)


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt])
def test_an_error_while_writing_keeps_the_old_content(error, tmp_path):
    path = tmp_path / "kept"
    path.write_bytes(b"old")
    with contextlib.suppress(error), files.atomic_write(path) as file:
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
            files.write_json(path, list(range(100_000)))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]


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
    files.write_json(path, value)
    assert json.loads(path.read_text(encoding="utf-8")) == value


def test_json_holds_names_of_files_that_are_not_utf8(tmp_path):
    value = {"class": os.fsdecode(b"caf\xe9"), "unit": "±"}
    files.write_json(tmp_path / "value.json", value)
    text = (tmp_path / "value.json").read_bytes().decode()
    assert json.loads(text) == value
    assert "±" in text


def test_json_strings_keep_their_brackets(tmp_path):
    value = {"[ 1 ]": "a [ 2,  3 ] b", "rows": [[1, 2], [3.5, None]]}
    files.write_json(tmp_path / "value.json", value)
    text = (tmp_path / "value.json").read_text()
    assert json.loads(text) == value
    assert "[1, 2]" in text
    assert "[3.5, null]" in text


def test_a_file_name_has_no_part_that_leads_elsewhere():
    assert files.file_name("1.3_lr0.1_seed0") == "1.3_lr0.1_seed0"
    assert files.file_name("ours, 60 epochs/\u03b1") == "ours-60-epochs-"
    assert "/" not in files.file_name("folder:../../elsewhere")
