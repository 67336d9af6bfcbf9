"""Files are replaced whole or not at all."""

import pytest

from memlens.files import replace_files, replace_text


def test_all_are_written_and_the_same_bytes_are_left_alone(tmp_path):
    replace_files(tmp_path / "new", {"a": b"1", "b": b"2"})
    before = (tmp_path / "new/a").stat().st_mtime_ns
    replace_files(tmp_path / "new", {"a": b"1", "b": b"3"})
    assert (tmp_path / "new/a").stat().st_mtime_ns == before
    assert {path.name: path.read_bytes() for path in (tmp_path / "new").iterdir()} == {"a": b"1", "b": b"3"}


def test_a_failure_leaves_the_old_files_and_no_rubbish(tmp_path, monkeypatch):
    replace_text(tmp_path / "a", "old")
    real = type(tmp_path).write_bytes

    def full(path, raw):
        if path.name.startswith(".b"):
            raise OSError(28, "No space left on device")
        return real(path, raw)

    monkeypatch.setattr(type(tmp_path), "write_bytes", full)
    with pytest.raises(OSError, match="No space"):
        replace_files(tmp_path, {"a": b"new", "b": b"new"})
    assert [(path.name, path.read_text()) for path in tmp_path.iterdir()] == [("a", "old")]
