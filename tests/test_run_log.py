"""progress.txt and curves.png."""

import subprocess
import sys
from pathlib import Path

import pytest
from conftest import limit_files

import train_gpt2
from support import run_log


def test_progress_has_tokens_and_seconds_and_continues_after_a_stop(small):
    config = small(max_steps=4)
    train_gpt2.train(config)
    path = Path(config.log_dir) / "progress.txt"
    first = path.read_text()
    rows = [line.split() for line in first.splitlines()]
    assert [(int(step), int(tokens)) for step, tokens, _ in rows] == [
        (step, 128 * (step + 1)) for step in range(4)
    ]
    seconds = [float(s) for *_, s in rows]
    assert all(a < b for a, b in zip([0.0, *seconds], seconds))
    path.write_text(first + "4 640 99.0\n5 7")  # of a run that was killed in the step after
    train_gpt2.train(small(max_steps=6))
    rows = [line.split() for line in path.read_text().splitlines()]
    assert path.read_text().startswith(first) and [int(row[0]) for row in rows] == list(range(6))
    assert seconds[-1] < float(rows[4][2]) < float(rows[5][2]) < 99


def test_the_picture_is_drawn_at_each_evaluation_and_complete_at_the_end(small, monkeypatch):
    drawn = []
    original = run_log.Curves.draw

    def draw(self, wait):
        drawn.append(train_log.read_text().count("\n"))
        original(self, wait)

    monkeypatch.setattr(run_log.Curves, "draw", draw)
    config = small(max_steps=6, val_every=3, val_tokens=320, curves=True)
    train_log = Path(config.log_dir) / "log.txt"
    train_gpt2.train(config)
    assert drawn == [1, 5, 9]
    picture = (Path(config.log_dir) / "curves.png").read_bytes()
    assert picture.startswith(b"\x89PNG") and picture.endswith(b"IEND\xaeB`\x82")


@pytest.mark.parametrize(
    "how", ["the disk is full", "plot.py fails", "it hangs", "no process can be started"]
)
def test_a_picture_that_cannot_be_drawn_stops_no_run(small, tmp_path, monkeypatch, capsys, how):
    original = subprocess.Popen

    def popen(command, **rest):
        if command[1].endswith("plot.py"):
            if how == "no process can be started":
                raise OSError(12, "Cannot allocate memory")
            if how == "the disk is full":
                return original(command, **rest, preexec_fn=limit_files(1000))
            hang = "import time; time.sleep(60)"
            code = hang if how == "it hangs" else "raise SystemExit('a reason')"
            command = [sys.executable, "-c", code]
        return original(command, **rest)

    monkeypatch.setattr(subprocess, "Popen", popen)
    collect, most = run_log.Curves.collect, 0.5 if how == "it hangs" else 60
    monkeypatch.setattr(run_log.Curves, "collect", lambda self, s: collect(self, min(s, most)))
    config = small(val_every=2, val_tokens=320, curves=True)
    assert train_gpt2.train(config) == 0
    reports = [line for line in capsys.readouterr().out.splitlines() if "curves.png" in line]
    assert len(reports) == (0 if how == "it hangs" else 1)
    if how == "the disk is full":
        assert "cannot be written (File too large)" in reports[0]
    assert all("not drawn" in line and "the run continues" in line for line in reports)
