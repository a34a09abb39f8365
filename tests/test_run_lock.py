"""Two runs in one log directory: the second is refused by name, and a kill blocks nothing."""

import errno
import fcntl
import json
import os
import socket

import pytest
import torch
from conftest import assert_one_line, losses, outcome, start, tree, wait_for_step

from support.distributed import Runtime
from support.errors import SettingError
from support.run_lock import RunLock

ALONE = Runtime(0, 1, torch.device("cpu"), torch.float32)


def test_a_second_run_is_refused_and_a_killed_one_does_not_block(small, tmp_path, capsys):
    config = small(max_steps=100_000, val_every=0)
    first = start(config)
    try:
        wait_for_step(config, 1, first)
        code, _, errors = outcome(config, capsys)
        assert code == 2
        words = ("log_dir=", f"process {first.pid} on {socket.gethostname()} since 20")
        assert_one_line(errors, words)
        assert first.poll() is None
    finally:
        first.kill()
        first.communicate()
    assert len(losses(config)) > 1
    short = small(max_steps=2, log_dir=str(tmp_path / "log"), resume=True)
    before = len(losses(config))
    code, _, errors = outcome(short, capsys)  # refused for another reason: not in use any more
    assert code == 2 and "max_steps" in errors and len(losses(config)) == before


def test_of_two_new_runs_the_second_is_refused(tmp_path):
    with RunLock(tmp_path / "log", ALONE) as one, RunLock(tmp_path / "log", ALONE) as other:
        assert not (tmp_path / "log").exists()
        one.acquire()
        one.acquire()
        with pytest.raises(SettingError, match=f"in use by process {os.getpid()} on "):
            other.acquire()
    with RunLock(tmp_path / "log", ALONE) as third:
        third.acquire()
    assert tree(tmp_path / "log").keys() == {".lock"}


def test_the_lock_of_an_earlier_run_is_taken_before_it_is_read(tmp_path):
    (tmp_path / ".lock").touch()
    killed = dict(host="node", pid=2**22 + 1, since="2026-01-01 00:00:00")
    (tmp_path / ".lock.json").write_text(json.dumps(killed))
    with RunLock(tmp_path, ALONE), pytest.raises(SettingError) as error:
        RunLock(tmp_path, ALONE).__enter__()
    assert f"in use by process {os.getpid()} on " in str(error.value)
    assert tree(tmp_path).keys() == {".lock"}


@pytest.mark.parametrize("number", [errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP])
def test_without_locks_the_run_is_warned_and_trains(small, monkeypatch, capsys, number):
    def flock(*_):
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(fcntl, "flock", flock)
    config = small()
    code, output, errors = outcome(config, capsys)
    assert code == 0, errors
    assert "cannot be locked" in output and len(losses(config)) == 4
