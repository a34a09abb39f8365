"""Writing files: complete under their name, or not there."""

import errno
import os

import pytest

from support import files


def test_a_text_is_written_with_its_line_ends_and_nothing_else_is_left(tmp_path):
    path = tmp_path / "a.json"
    files.write_text(path, "caf\u00e9\nwords\n")
    assert path.read_bytes() == "caf\u00e9\nwords\n".encode() and list(tmp_path.iterdir()) == [path]
    files.write_text(path, "other\n", writer="rank 3")
    assert path.read_text() == "other\n" and list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("error", [OSError(errno.ENOSPC, "No space left"), KeyboardInterrupt()])
@pytest.mark.parametrize("when", ["before the block writes", "while it writes", "when it renames"])
@pytest.mark.parametrize("exists", [False, True])
def test_a_write_that_fails_leaves_the_earlier_file(tmp_path, monkeypatch, error, when, exists):
    path = tmp_path / "a.txt"
    if exists:
        path.write_text("earlier")

    def fail(*_):
        raise error

    if when == "when it renames":
        monkeypatch.setattr(os, "replace", fail)
    with pytest.raises(type(error)) as raised, files.replacing(path) as partial:
        if when != "before the block writes":
            partial.write_text("half")
        if when != "when it renames":
            raise error
    assert raised.value is error
    assert [p.read_text() for p in tmp_path.iterdir()] == (["earlier"] if exists else [])


def test_writers_of_one_file_have_different_temporary_names(tmp_path):
    path, names = tmp_path / "a.txt", set()
    for writer in ("", "0", "1"):
        with files.replacing(path, writer) as partial:
            partial.touch()
            names.add(partial)
    assert len(names) == 3 and path not in names
    assert all(name.parent == tmp_path and name.name.startswith(".") for name in names)


def test_the_file_is_on_the_disk_before_it_gets_its_name(tmp_path, monkeypatch):
    events = []
    monkeypatch.setattr(os, "fsync", lambda descriptor: events.append("sync"))
    replace = os.replace
    monkeypatch.setattr(os, "replace", lambda *paths: (events.append("rename"), replace(*paths)))
    files.write_text(tmp_path / "a.txt", "words\n")
    assert events == ["sync", "rename"]


def test_sha256_is_that_of_the_content(tmp_path):
    (tmp_path / "a").write_bytes(b"abc" * 10**6)
    (tmp_path / "empty").touch()
    assert files.sha256(tmp_path / "a").startswith("f4096a13")
    assert files.sha256(tmp_path / "empty").startswith("e3b0c44298fc1c14")


def refuse(number: int):
    """A stand-in for `os.fsync` of a file system that refuses it."""

    def fsync(descriptor):
        raise OSError(number, os.strerror(number))

    return fsync


@pytest.mark.parametrize("number", [errno.EINVAL, errno.ENOTSUP, errno.ENOSYS])
def test_a_file_system_without_fsync_is_written_to(tmp_path, monkeypatch, number):
    monkeypatch.setattr(os, "fsync", refuse(number))
    files.write_text(tmp_path / "a.txt", "words")
    files.sync(tmp_path)
    assert (tmp_path / "a.txt").read_text() == "words"


def test_a_directory_that_cannot_be_opened_is_not_synced(tmp_path, monkeypatch):
    def refuse_to_open(path, flags):
        raise PermissionError(errno.EACCES, "Permission denied")

    monkeypatch.setattr(os, "open", refuse_to_open)
    files.sync(tmp_path)


@pytest.mark.parametrize("number", [errno.EIO, errno.ENOSPC])
def test_a_failed_fsync_is_an_error(tmp_path, monkeypatch, number):
    monkeypatch.setattr(os, "fsync", refuse(number))
    with pytest.raises(OSError, match=os.strerror(number)):
        files.write_text(tmp_path / "a.txt", "words")
    with pytest.raises(OSError, match=os.strerror(number)):
        files.sync(tmp_path)
