"""Runs on file systems that do less than a local disk: what is missing is known before step 0."""

import errno
import os
import stat
from pathlib import Path

import pytest
from conftest import assert_one_line, losses, outcome, tree

from support import checkpoint


def refusal(number: int) -> OSError:
    return OSError(number, os.strerror(number))


def test_without_modes_and_without_fsync_of_directories_a_run_is_complete(
    small, tmp_path, monkeypatch, capsys
):
    """As on vfat, on SMB and on mounts of object stores."""
    original = os.fsync

    def fsync(descriptor):
        if stat.S_ISDIR(os.fstat(descriptor).st_mode):
            raise refusal(errno.EINVAL)
        original(descriptor)

    def chmod(*_, **__):
        raise refusal(errno.EPERM)

    monkeypatch.setattr(os, "fsync", fsync)
    monkeypatch.setattr(os, "chmod", chmod)
    config = small()
    code, _, errors = outcome(config, capsys)
    assert code == 0, errors
    assert checkpoint.find_problem(Path(config.log_dir) / "step_00004") is None


@pytest.mark.parametrize("number", [errno.ENOTSUP, errno.EXDEV, errno.EPERM])
def test_without_rename_of_directories_a_run_does_not_begin(small, monkeypatch, capsys, number):
    original = os.replace

    def rename(path, target):
        if path.is_dir():
            raise refusal(number)
        return original(path, target)

    monkeypatch.setattr(os, "replace", rename)
    config = small()
    code, _, errors = outcome(config, capsys)
    assert code == 2 and tree(Path(config.log_dir)).keys() == {".lock"}
    assert_one_line(errors, ("log_dir=", "checkpoints cannot be written", "another file system"))


def test_a_directory_that_may_not_be_written_is_known_before_the_first_step(
    small, monkeypatch, capsys
):
    original = Path.mkdir

    def mkdir(self, *arguments, **settings):
        if ".partial" in self.name:
            raise refusal(errno.EROFS)
        return original(self, *arguments, **settings)

    monkeypatch.setattr(Path, "mkdir", mkdir)
    config = small()
    code, _, errors = outcome(config, capsys)
    assert code == 2 and not Path(config.log_dir, "log.txt").exists()
    assert_one_line(errors, ("log_dir=", "Read-only file system"))


def test_the_trial_leaves_nothing(small, capsys):
    config = small()
    assert outcome(config, capsys)[0] == 0
    assert not [name for name in tree(Path(config.log_dir)) if "trial" in name]
    assert len(losses(config)) == 4
