"""log.txt, progress.txt, run.json and curves.png."""

import hashlib
import json
import math
import resource
import shutil
import subprocess
import sys
import threading
from pathlib import Path

import pytest
import torch
from conftest import assert_one_line, losses, outcome, weights

import train_gpt2
from support import checkpoint, run_log
from support.errors import SettingError
from support.run_log import LOG_TYPES, RunLog, read_rows
from support.run_output import RunOutput


def read(log: RunLog) -> list[tuple[int, str, float]]:
    return read_rows(log.path, LOG_TYPES)


def test_the_log_has_a_line_for_each_value_and_reads_it_back(tmp_path):
    log = RunLog(tmp_path)
    log.write(0, "val", 10.8249131)
    log.write(0, "train", 10.9)
    log.write(1, "train", float("inf"))
    assert log.path.read_bytes() == b"0 val 10.824913\n0 train 10.900000\n1 train inf\n"
    assert read(log) == [(0, "val", 10.824913), (0, "train", 10.9), (1, "train", float("inf"))]


@pytest.mark.parametrize("partial", ["3", "3 train", "3 train 9.", "3 train 9.123456"])
def test_a_partial_last_line_is_skipped_and_removed(tmp_path, partial):
    log = RunLog(tmp_path)
    lines = "".join(f"{step} train {9 - step}.000000\n" for step in range(3))
    log.path.write_text(lines + partial)
    assert [step for step, _, _ in read(log)] == [0, 1, 2]
    log.remove_steps(3)
    assert log.path.read_text() == lines
    log.write(3, "train", 1.0)
    assert log.path.read_text() == lines + "3 train 1.000000\n"


def test_lines_of_repeated_steps_are_removed_and_the_file_is_created(tmp_path):
    log = RunLog(tmp_path)
    log.remove_steps(0)
    assert log.path.read_text() == log.progress_path.read_text() == ""
    for step in range(4):
        log.write(step, "val", step)
        log.write(step, "train", step)
    log.remove_steps(2)
    assert [(s, stream) for s, stream, _ in read(log)] == [
        (0, "val"), (0, "train"), (1, "val"), (1, "train"),
    ]  # fmt: skip
    log.remove_steps(0)
    assert log.path.read_text() == ""


def test_best_is_the_step_with_the_lowest_validation_loss_among_those_given(tmp_path):
    log = RunLog(tmp_path)
    log.remove_steps(0)
    assert log.best([0, 1]) is None
    for step, value in enumerate([9.0, 5.0, 7.0, 6.0, math.nan]):
        log.write(step, "val", value)
        log.write(step, "train", -value)
    assert log.best([0, 1, 2, 3]) == 1
    assert log.best([0, 2, 3]) == 3
    assert log.best([4, 2, 3]) == 3 and log.best([4]) is None
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
    log = RunLog(tmp_path)
    log.remove_steps(2)
    assert path.read_text(encoding="utf-8") == f"0 val 10.5\n{kept}"
    assert read(log) == [(0, "val", 10.5), (1, "my_stream", 3.5)]
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
    name, copy, stopped, capsys, monkeypatch
):
    """run.json takes more than 100 bytes; log.txt has room for half a line."""
    original = RunOutput.start
    log_dir = Path(copy.log_dir)
    shutil.rmtree(log_dir / "step_00004")
    log = log_dir / "log.txt"
    old = "".join(f"0 old {i}.000000\n" for i in range(1000, 1200)) + log.read_text()
    log.write_text(old)
    kept = "".join(line for line in old.splitlines(keepends=True) if line[0] in "01")
    size = {"run.json": 100, "log.txt": len(kept) + 5}[name]
    _, hard = limits = resource.getrlimit(resource.RLIMIT_FSIZE)

    def start(self, step):
        resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
        original(self, step)

    try:
        with monkeypatch.context() as patch:
            patch.setattr(RunOutput, "start", start)
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
        (step, 64 * (step + 1)) for step in range(4)
    ]
    seconds = [float(s) for *_, s in rows]
    assert all(a < b for a, b in zip([0.0, *seconds], seconds))
    path.write_text(first + "4 320 99.0\n5 7")  # of a run that was killed in the step after
    train_gpt2.train(small(max_steps=6))
    rows = [line.split() for line in path.read_text().splitlines()]
    assert path.read_text().startswith(first) and [int(row[0]) for row in rows] == list(range(6))
    assert seconds[-1] < float(rows[4][2]) < float(rows[5][2]) < 99


def test_the_picture_is_drawn_at_each_evaluation_and_complete_at_the_end(small, monkeypatch):
    drawn = []
    original = run_log.Curves.draw

    def draw(self, wait):
        drawn.append(train_log.read_text().count("\n"))
        if wait:  # which starts plot.py once
            original(self, wait)

    monkeypatch.setattr(run_log.Curves, "draw", draw)
    config = small(max_steps=6, val_every=3, curves=True)
    train_log = Path(config.log_dir) / "log.txt"
    train_gpt2.train(config)
    assert drawn == [1, 5, 9]
    picture = (Path(config.log_dir) / "curves.png").read_bytes()
    assert picture.startswith(b"\x89PNG") and picture.endswith(b"IEND\xaeB`\x82")


FAILURES = {
    "it fails": ("raise SystemExit('a warning\\na reason')", "a reason"),
    "it is killed": ("import os; os.kill(os.getpid(), 9)", "exit code -9"),
    "it hangs": ("import time; time.sleep(60)", "timed out after 0.5 seconds"),
    "it cannot be started": (None, "[Errno 12] Cannot allocate memory"),
}


@pytest.mark.parametrize("how", FAILURES)
def test_a_picture_that_cannot_be_drawn_is_reported_once(tmp_path, monkeypatch, capsys, how):
    code, reason = FAILURES[how]
    original, started = subprocess.Popen, []

    def popen(command, **rest):
        started.append(Path(command[1]).name)
        if code is None:
            raise OSError(12, "Cannot allocate memory")
        return original([sys.executable, "-c", code], **rest)

    monkeypatch.setattr(subprocess, "Popen", popen)
    monkeypatch.setattr(run_log.Curves, "timeout_s", 0.5 if how == "it hangs" else 60)
    curves = run_log.Curves(tmp_path)
    curves.draw(wait=False)
    curves.draw(wait=True)
    assert started == ["plot.py"] * 2
    (line,) = capsys.readouterr().out.splitlines()
    assert line.startswith(f"{tmp_path / 'curves.png'}: not drawn (")
    assert line.endswith(f"{reason}); the run continues")


def test_while_a_picture_is_drawn_no_other_one_is_started(tmp_path, monkeypatch):
    started, finish = [], threading.Event()

    def run_plot(self):
        started.append(threading.current_thread())
        finish.wait(60)

    monkeypatch.setattr(run_log.Curves, "run_plot", run_plot)
    curves = run_log.Curves(tmp_path)
    for _ in range(3):
        curves.draw(wait=False)
    assert len(started) == 1 and started[0].daemon
    finish.set()
    curves.draw(wait=True)
    assert len(started) == 2 and not started[1].is_alive()


# -------------------------------------------------------------------------------------------------
# run.json


def test_software_is_the_commit_and_a_hash_of_the_changes_to_it(tmp_path, monkeypatch):
    """As `git diff HEAD | sha256sum` prints it; unknown without git and without a repository."""

    def git(*arguments):
        identity = ("-c", "user.name=a", "-c", "user.email=a@b", "-c", "commit.gpgsign=false")
        command = ["git", "-C", tmp_path / "repository", *identity, *arguments]
        return subprocess.run(command, capture_output=True, check=True).stdout

    def found() -> tuple:
        software = run_log.describe_software()
        assert software["versions"]["torch"] == torch.__version__
        return software["commit"], software["changes"]

    monkeypatch.setenv("GIT_CEILING_DIRECTORIES", str(tmp_path))
    monkeypatch.setattr(run_log, "ROOT", tmp_path / "repository")
    assert found() == (None, None)  # no such directory
    run_log.ROOT.mkdir()
    assert found() == (None, None)  # not a repository
    git("init", "--quiet")
    (run_log.ROOT / "file").write_text("one\n")
    git("add", "file")
    assert found() == (None, None)  # nothing committed
    git("commit", "--quiet", "--message=first")
    commit = git("rev-parse", "HEAD").decode().strip()
    assert found() == (commit, None)
    (run_log.ROOT / "file").write_text("two\n")
    changes = hashlib.sha256(git("diff", "HEAD")).hexdigest()[:16]
    assert found() == (commit, changes)
    git("add", "file")
    assert found() == (commit, changes)  # staged or not
    (run_log.ROOT / "file").write_text("one\n")
    assert found() == (commit, None)
    monkeypatch.setenv("PATH", str(tmp_path))
    assert found() == (None, None)  # no git


def test_run_json_names_the_code_that_the_run_started_with(small, monkeypatch):
    software = [{"commit": "a", "changes": "b"}, {"commit": "c", "changes": None}]
    monkeypatch.setattr(run_log, "describe_software", lambda: software.pop(0))
    config = small(max_steps=1)
    train_gpt2.train(config)
    record = json.loads((Path(config.log_dir) / "run.json").read_text())
    assert (record["commit"], record["changes"]) == ("a", "b") and record["finished_step"] == 1


@pytest.mark.parametrize(
    "settings", ['"max_steps"', '["max_steps"]', '{"max_steps": "4"}', '{"max_steps": null}']
)
def test_a_run_json_without_valid_settings_is_refused(tmp_path, settings):
    (tmp_path / "run.json").write_text(f'{{"data": "", "settings": {settings}}}')
    with pytest.raises(SettingError, match="run.json: damaged"):
        run_log.read_run_json(tmp_path, resume=True)


def test_a_deeply_nested_run_json_is_refused(tmp_path):
    (tmp_path / "run.json").write_text("[" * 100_000)
    with pytest.raises(SettingError, match="run.json: damaged"):
        run_log.read_run_json(tmp_path, resume=True)


@pytest.mark.parametrize("name", ["log.txt", "progress.txt", "run.json"])
def test_a_directory_in_the_place_of_a_file_is_named(tmp_path, name):
    (tmp_path / name).mkdir()
    with pytest.raises(SettingError, match=f"log_dir=.*{name}: Is a directory"):
        run_log.read_run_json(tmp_path, resume=True)
