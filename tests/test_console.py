"""A console that cannot be written to ends no run, and loses none."""

import os
import pty
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import ROOT, assert_one_line, command_line, environment, outcome

from support import checkpoint


@pytest.mark.parametrize("console", ["a closed terminal", "a full disk", "no console"])
def test_a_run_continues_without_its_console(small, console):
    config = small(max_steps=2)
    command = [sys.executable, str(ROOT / "train_gpt2.py"), *command_line(config)]
    options = dict(env=environment(), stderr=subprocess.PIPE, timeout=120)
    if console == "no console":
        done = subprocess.run(["sh", "-c", '"$@" >&-', "sh", *command], **options)
    elif console == "a full disk":
        with open("/dev/full", "w") as file:
            done = subprocess.run(command, stdout=file, **options)
    else:
        master, terminal = pty.openpty()
        os.close(master)  # each write to the terminal is then refused (EIO)
        done = subprocess.run(command, stdout=terminal, **options)
        os.close(terminal)
    assert done.returncode == 0, done.stderr[-300:]
    assert checkpoint.find_problem(Path(config.log_dir) / "step_00002") is None


def test_a_log_dir_that_cannot_be_made_is_one_line(small, capsys):
    code, _, errors = outcome(small(log_dir="/proc/log"), capsys)
    assert code == 2
    assert_one_line(errors, ("log_dir=", "/proc/log"))
