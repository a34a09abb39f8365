"""The console: lines of steps, and the progress bar of a terminal."""

import os
import pty
import re
import sys
import threading

import pytest
import torch
from conftest import assert_same_end

import train_gpt2
from support.step_log import DelayedReports


def lines_of(output: str) -> list[str]:
    return [line for line in output.splitlines() if re.match(r"step +\d+ \| loss", line)]


@pytest.fixture
def terminal(monkeypatch):
    """A function: function -> what it shows if standard output is a terminal of 100 columns."""

    def call(function) -> str:
        master, slave = pty.openpty()
        os.system(f"stty cols 100 rows 30 < {os.ttyname(slave)}")
        shown = []

        def read() -> None:
            try:
                while piece := os.read(master, 65536):
                    shown.append(piece)
            except OSError:  # the terminal is closed
                pass

        reader = threading.Thread(target=read)
        reader.start()
        with open(slave, "w") as file, monkeypatch.context() as patch:
            patch.setattr(sys, "stdout", file)
            function()
        reader.join(timeout=60)
        return b"".join(shown).decode()

    return call


def test_a_terminal_has_a_bar_and_bold_lines_and_a_file_has_neither(
    small, tmp_path, terminal, capsys
):
    """The lines of steps are of one width, also if the numbers in them differ much."""
    settings = dict(val_every=2, max_steps=12, max_lr=1.0, warmup_steps=8)
    shown_run = small(log_dir=str(tmp_path / "shown"), **settings)
    shown = terminal(lambda: train_gpt2.train(shown_run))
    assert "\x1b[1mstep     2 | validation loss" in shown and "step/s" in shown
    assert re.search(r"\d+%\|.*\| \d+/12 ", shown)
    quiet = small(log_dir=str(tmp_path / "quiet"), **settings)
    train_gpt2.train(quiet)
    output, errors = capsys.readouterr()
    assert not set("\x1b\r") & set(output + errors) and "step/s" not in output + errors
    assert len(lines_of(output)) == 12 and len({len(line) for line in lines_of(output)}) == 1
    assert_same_end(shown_run, quiet)


def test_reports_are_made_at_the_next_step_or_at_a_flush(gpu):
    """A report that raises an exception is not repeated, and the next one is still made."""
    made = []

    def report(step, figures, signal_counts, end):
        made.append((step, figures, signal_counts))
        if step == 2:
            raise ValueError

    def add(reports, step):
        reports.add({"loss": torch.tensor(step + 0.5)}, [torch.tensor(1.0)], step)

    at_once, late = DelayedReports(report, False), DelayedReports(report, True)
    add(at_once, 1)
    assert made == [(1, {"loss": 1.5}, [1.0])]
    add(late, 2)
    assert len(made) == 1
    with pytest.raises(ValueError):
        add(late, 3)
    add(late, 4)
    assert [step for step, *_ in made] == [1, 2, 3]
    late.flush()
    late.flush()
    assert [step for step, *_ in made] == [1, 2, 3, 4]
