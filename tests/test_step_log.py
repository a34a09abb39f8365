"""The console: lines of steps, and the progress bar of a terminal."""

import os
import pty
import re
import subprocess
import sys
import time

from conftest import ROOT, assert_same_end, command_line, environment

import train_gpt2


def lines_of(output: str) -> list[str]:
    return [line for line in output.splitlines() if re.match(r"step +\d+ \| loss", line)]


def test_the_lines_of_steps_are_of_one_width(small, capsys):
    train_gpt2.train(small(max_steps=12, max_lr=1.0, warmup_steps=8))
    output = capsys.readouterr().out
    assert len(lines_of(output)) == 12 and len({len(line) for line in lines_of(output)}) == 1


def on_a_terminal(command: list[str], **variables) -> str:
    """What a command shows on a terminal of 100 columns."""
    master, slave = pty.openpty()
    subprocess.run(["stty", "cols", "100", "rows", "30"], stdin=slave, check=True)
    process = subprocess.Popen(
        command, stdin=slave, stdout=slave, stderr=slave, env=environment(**variables)
    )
    os.close(slave)
    shown, deadline = b"", time.monotonic() + 120
    while time.monotonic() < deadline:
        try:
            piece = os.read(master, 65536)
        except OSError:  # the last writer is gone
            break
        shown += piece
    assert process.wait(timeout=10) == 0, shown.decode()
    return shown.decode()


def test_a_terminal_has_a_bar_and_bold_lines_and_a_file_has_neither(small, tmp_path, capsys):
    settings = dict(val_every=2, val_tokens=320)
    shown_run = small(log_dir=str(tmp_path / "shown"), **settings)
    command = [sys.executable, str(ROOT / "train_gpt2.py"), *command_line(shown_run)]
    shown = on_a_terminal(command)
    assert "\x1b[1mstep     2 | validation loss" in shown and "step/s" in shown
    assert re.search(r"\d+%\|.*\| \d/4 ", shown)
    quiet = small(log_dir=str(tmp_path / "quiet"), **settings)
    train_gpt2.train(quiet)
    output, errors = capsys.readouterr()
    assert not set("\x1b\r") & set(output + errors) and "step/s" not in output + errors
    assert len(lines_of(output)) == 4
    assert_same_end(shown_run, quiet)
