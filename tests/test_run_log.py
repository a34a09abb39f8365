"""log.txt, progress.txt, run.json and curves.png."""

import resource
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import assert_one_line, limit_files, losses, outcome, weights

import train_gpt2
from support import checkpoint, run_log
from support.run_log import RunLog, remove_steps


def test_the_log_has_a_line_for_each_value_and_reads_it_back(tmp_path):
    log = RunLog(tmp_path)
    assert log.read() == []
    log.write(0, "val", 10.8249131)
    log.write(0, "train", 10.9)
    log.write(1, "train", float("inf"))
    assert log.path.read_bytes() == b"0 val 10.824913\n0 train 10.900000\n1 train inf\n"
    assert log.read() == [(0, "val", 10.824913), (0, "train", 10.9), (1, "train", float("inf"))]


@pytest.mark.parametrize("partial", ["3", "3 train", "3 train 9.", "3 train 9.123456"])
def test_a_partial_last_line_is_skipped_and_removed(tmp_path, partial):
    log = RunLog(tmp_path)
    lines = "".join(f"{step} train {9 - step}.000000\n" for step in range(3))
    log.path.write_text(lines + partial)
    assert [step for step, _, _ in log.read()] == [0, 1, 2]
    remove_steps(log.path, 3)
    assert log.path.read_text() == lines
    log.write(3, "train", 1.0)
    assert log.path.read_text() == lines + "3 train 1.000000\n"


def test_lines_of_repeated_steps_are_removed_and_the_file_is_created(tmp_path):
    log = RunLog(tmp_path)
    remove_steps(log.path, 0)
    assert log.path.read_text() == "" and list(tmp_path.iterdir()) == [log.path]
    for step in range(4):
        log.write(step, "val", step)
        log.write(step, "train", step)
    remove_steps(log.path, 2)
    assert [(s, stream) for s, stream, _ in log.read()] == [
        (0, "val"), (0, "train"), (1, "val"), (1, "train"),
    ]  # fmt: skip
    remove_steps(log.path, 0)
    assert log.path.read_text() == ""


def test_best_is_the_step_with_the_lowest_validation_loss_among_those_given(tmp_path):
    log = RunLog(tmp_path)
    assert log.best([0, 1]) is None
    for step, value in enumerate([9.0, 5.0, 7.0, 6.0]):
        log.write(step, "val", value)
        log.write(step, "train", -value)
    assert log.best([0, 1, 2, 3]) == 1
    assert log.best([0, 2, 3]) == 3
    assert log.best([7]) is None
    assert log.best({}) is None


# Lines that this program does not write, one with a line separator within it.
OTHER_LINES = (
    "1 train 9.000000 extra", "1 my_stream 3.5", "two more words", "1 note good", "# a note", "",
    "a\u2028b", "-1 train x",
)  # fmt: skip


def test_removing_steps_keeps_lines_that_it_does_not_know(tmp_path):
    path = tmp_path / "log.txt"
    kept = "".join(f"{line}\n" for line in OTHER_LINES)
    path.write_text(f"0 val 10.5\n{kept}2 train 9.0\n3 train 8.0 extra\n2 my_stream 4\n3 tr")
    remove_steps(path, 2)
    assert path.read_text(encoding="utf-8") == f"0 val 10.5\n{kept}"
    log = RunLog(tmp_path)
    assert log.read() == [(0, "val", 10.5), (1, "my_stream", 3.5)]
    assert log.best([0, 1]) == 0


def test_a_resumed_run_keeps_lines_that_it_does_not_know(copy, stopped, capsys):
    """Lines of the steps that it repeats are removed, all others stay as they are."""
    log_dir = Path(copy.log_dir)
    shutil.rmtree(log_dir / "step_00004")
    for name in ("log.txt", "progress.txt"):
        lines = (log_dir / name).read_text().splitlines()
        added = [*lines[:2], *OTHER_LINES, *lines[2:], "2 my_stream 1.0", "3 train 1.0 2.0"]
        (log_dir / name).write_text("\n".join(added) + "\n", encoding="utf-8")
    assert outcome(copy, capsys)[0] == 0
    for name in ("log.txt", "progress.txt"):
        lines = (log_dir / name).read_text(encoding="utf-8").split("\n")
        expected = (Path(stopped.log_dir) / name).read_text().split("\n")
        assert tuple(lines[2 : 2 + len(OTHER_LINES)]) == OTHER_LINES
        del lines[2 : 2 + len(OTHER_LINES)]
        if name == "progress.txt":  # whose last column is a time
            lines, expected = ([line[:5] for line in part] for part in (lines, expected))
        assert lines == expected


@pytest.mark.parametrize("name", ["run.json", "log.txt"])
def test_without_room_for_the_log_the_run_ends_with_one_line_and_a_rerun_completes(
    name, copy, stopped, capsys
):
    """run.json takes more than 100 bytes; log.txt has room for half a line."""
    log_dir = Path(copy.log_dir)
    shutil.rmtree(log_dir / "step_00004")
    log = log_dir / "log.txt"
    old = "".join(f"0 old {i}.000000\n" for i in range(1000, 1200)) + log.read_text()
    log.write_text(old)
    kept = "".join(line for line in old.splitlines(keepends=True) if line[0] in "01")
    size = {"run.json": 100, "log.txt": len(kept) + 5}[name]
    _, hard = limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        code, _, err = outcome(copy, capsys)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert code == 2
    assert_one_line(err, (copy.log_dir, "make room"))
    assert checkpoint.newest_valid(log_dir) == log_dir / "step_00002"
    assert outcome(copy, capsys)[0] == 0
    assert weights(copy) == weights(stopped) and losses(copy) == losses(stopped)


# -------------------------------------------------------------------------------------------------
# progress.txt and curves.png


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
