"""The setting `after_checkpoint`: a shell command in the background, which ends with the run.

That a run survives the loss of its machine with it: test_lost_machine.py.
"""

import json
import os
import re
import signal
import sys
import time
from pathlib import Path

import pytest
import torch
from conftest import assert_same_end, finish, losses, outcome, start, wait_for_step
from test_signals import stop_in_step_2

import train_gpt2
from support import checkpoint
from support.after_checkpoint import AfterCheckpoint
from support.distributed import Runtime
from support.stop_signals import StopSignals

ALONE = Runtime(0, 1, torch.device("cpu"), torch.float32)
OFTEN = dict(max_steps=6, checkpoint_every=2)


def output_of(config) -> str:
    """What the command has printed, with the lines for its start and its end."""
    return (Path(config.log_dir) / "after_checkpoint.log").read_text(errors="replace")


def wait_for(path: Path) -> None:
    """Returns when a file exists."""
    deadline = time.monotonic() + 60
    while not path.exists():
        assert time.monotonic() < deadline, f"{path} does not appear"
        time.sleep(0.01)


def is_gone(pid_file: Path) -> bool:
    """Whether the process whose id is in a file ends within a second, and is no zombie of ours."""
    stat = Path(f"/proc/{int(pid_file.read_text())}/stat")
    for _ in range(100):
        try:
            state, parent = stat.read_text().rsplit(") ")[-1].split()[:2]
        except (FileNotFoundError, ProcessLookupError):
            return True
        if state == "Z" and int(parent) != os.getpid():  # init has not come to it yet
            return True
        time.sleep(0.01)
    return False


# -------------------------------------------------------------------------------------------------
# When and how it runs


def test_it_runs_once_for_each_checkpoint_and_the_last_time_after_the_results(
    small, tmp_path, monkeypatch, capsys
):
    """The paths are absolute, the directory is that of the launch, and no launcher is visible."""
    monkeypatch.chdir(tmp_path)
    single = dict(RANK="0", WORLD_SIZE="1", MASTER_ADDR="127.0.0.1", MASTER_PORT="29543")
    for name, value in single.items():
        monkeypatch.setenv(name, value)
    record = 'echo "$STEP $LOG_DIR $CHECKPOINT $PWD ${RANK-}${WORLD_SIZE-}" >> calls'
    copy = f'cat >&2; cp "$LOG_DIR/run.json" "$LOG_DIR/log.txt" {tmp_path}'
    config = small(**OFTEN, log_dir="log", val_every=2, after_checkpoint=f"{record}; {copy}")
    assert train_gpt2.train(config) == 0
    log_dir = tmp_path / "log"
    calls = [line.split(" ") for line in (tmp_path / "calls").read_text().splitlines()]
    assert [int(call[0]) for call in calls] == [2, 4, 6]
    for step, *places in calls:
        directory = log_dir / f"step_{int(step):05d}"
        assert places == [str(log_dir), str(directory), str(tmp_path), ""]
    assert json.loads((tmp_path / "run.json").read_text())["finished_step"] == 6
    assert (tmp_path / "log.txt").read_text() == (log_dir / "log.txt").read_text()
    lines = output_of(config).splitlines()
    form = r"--- \d{4}-\d\d-\d\d \d\d:\d\d:\d\d \| step %d \| %s"
    ends = [form % (step, end) for step in (2, 4, 6) for end in ("started", "exit code 0")]
    assert len(lines) == 6 and all(map(re.fullmatch, ends, lines)), lines
    assert "after_checkpoint: " not in capsys.readouterr().out  # only failures are reported


def test_without_the_setting_there_is_no_new_file_and_no_thread(small):
    config = small(**OFTEN)
    assert train_gpt2.train(config) == 0
    names = {path.name for path in Path(config.log_dir).iterdir()}
    assert names == {".lock", "log.txt", "progress.txt", "run.json", "step_00004", "step_00006"}


def test_a_checkpoint_that_comes_meanwhile_is_not_forgotten_and_none_runs_beside(tmp_path):
    """Of those that come while the command runs, the newest gets one more start."""
    text = "mkdir busy && echo $STEP >> calls; while ! [ -e go ]; do sleep 0.01; done; rmdir busy"
    command = AfterCheckpoint(f"cd {tmp_path}; {text}", tmp_path)
    with StopSignals(ALONE) as signals, command.until_end(signals):
        began = time.monotonic()
        command.start(2)
        wait_for(tmp_path / "busy")
        assert command.step == 2
        for step in (4, 6, 8):
            command.start(step)
        assert time.monotonic() - began < 5
        (tmp_path / "go").touch()
    assert (tmp_path / "calls").read_text() == "2\n8\n"


def test_a_waiting_checkpoint_gives_way_to_the_last_one(tmp_path):
    """It may be pruned when the last one is written, which the command gets at the end."""
    text = "mkdir busy; echo $STEP >> calls; while ! [ -e go ]; do sleep 0.01; done"
    command = AfterCheckpoint(f"cd {tmp_path}; {text}", tmp_path)
    with StopSignals(ALONE) as signals, command.until_end(signals):
        command.start(2)
        wait_for(tmp_path / "busy")
        command.start(4)
        command.start(6, at_end=True)
        (tmp_path / "go").touch()
    assert (tmp_path / "calls").read_text() == "2\n6\n"


def test_the_checkpoint_in_use_is_kept_until_the_command_has_ended(small, tmp_path):
    """With a slow command that needs the first one, until the last is there."""
    wait = 'while ! [ -e "$LOG_DIR/step_00006" ]; do sleep 0.01; done'
    config = small(
        **OFTEN, keep_checkpoints=1,
        after_checkpoint=f'[ $STEP = 2 ] && {{ {wait}; }}; cp -r "$CHECKPOINT" {tmp_path}',
    )  # fmt: skip
    assert train_gpt2.train(config) == 0
    for step in (2, 6):
        assert checkpoint.find_problem(tmp_path / f"step_{step:05d}") is None
    assert list(checkpoint.list_checkpoints(Path(config.log_dir))) == [6]


def test_it_may_change_when_a_run_is_continued(copy, tmp_path, capsys):
    copy.after_checkpoint = f"touch {tmp_path}/ran"
    assert outcome(copy, capsys)[0] == 0
    assert (tmp_path / "ran").exists()  # also if the final checkpoint was there before


# -------------------------------------------------------------------------------------------------
# Failures: one line, and the run ends with 0

FAILURES = {
    "not found": ("/no/such/program --flag", r"exit code 127 \(.*/no/such/program.*\)"),
    "fails": ("echo first; echo ' the  reason '; exit 3", r"exit code 3 \( the  reason \)"),
    "prints nothing": ("exit 4", r"exit code 4"),
    "is killed": ("echo so far; kill -9 $$", r"ended by Killed \(so far\)"),
    "writes megabytes": (
        f"{sys.executable} -c 'print(\"\\033[1mx\" * 10**7)'; printf '1%%\\r2%%' ; false",
        r"exit code 1 \(2%\)",
    ),
    "writes what is no text": (r"printf '\377\000\033[2J\n'; false", r"exit code 1 \(.*\)"),
}


@pytest.mark.parametrize("case", FAILURES)
def test_a_failure_is_one_line_and_the_run_ends_with_0(case, small, capsys, monkeypatch):
    monkeypatch.setenv("SECRET", "s3cr3t" * 5)
    command, words = FAILURES[case]
    config = small(max_steps=2, after_checkpoint=f": $SECRET; {command}")
    code, out, err = outcome(config, capsys)
    assert (code, err) == (0, "")
    file = Path(config.log_dir) / "after_checkpoint.log"
    (line,) = (line for line in out.splitlines() if "after_checkpoint: " in line)
    form = rf"step     2 \| after_checkpoint: {words}; its output is in {re.escape(str(file))}"
    assert re.fullmatch(form, line) and len(line) < 400
    last = output_of(config).splitlines()[-1]
    assert last.startswith("--- ") and "| step 2 | e" in last
    assert "s3cr3t" not in out + output_of(config)


@pytest.mark.parametrize("case", ["no shell", "no log file"])
def test_a_command_that_cannot_be_started_is_one_line(case, small, capsys, monkeypatch):
    config = small(max_steps=2, after_checkpoint="true")
    if case == "no shell":
        monkeypatch.setattr("subprocess._USE_POSIX_SPAWN", False)
        monkeypatch.setattr("subprocess._fork_exec", lambda *_: os.open("/no/sh", os.O_RDONLY))
    else:
        (Path(config.log_dir) / "after_checkpoint.log").mkdir(parents=True)
    code, out, err = outcome(config, capsys)
    assert (code, err) == (0, "") and out.count("after_checkpoint: [Errno") == 1


# -------------------------------------------------------------------------------------------------
# The end of the run: nothing is left behind


def test_a_stop_saves_first_and_then_waits_for_the_command(small, tmp_path, monkeypatch, capsys):
    config = small(max_steps=6, after_checkpoint=f"sleep 1; echo $STEP > {tmp_path}/done")
    assert stop_in_step_2(config, monkeypatch, signal.SIGTERM) == 143
    out = capsys.readouterr().out
    assert "step_00003; the same" in out and "waiting for after_checkpoint" in out
    assert (tmp_path / "done").read_text() == "3\n"


# A command that never ends, and has a child. 0: directory, 1: how it begins
NEVER = "{1}; echo $$ > {0}/pid; sleep 1000 & echo $! > {0}/child; touch {0}/began; wait; sleep 999"


@pytest.mark.parametrize("stubborn", [False, pytest.param(True, marks=pytest.mark.faults)])
@pytest.mark.parametrize("names", [
    ["SIGTERM"], pytest.param(["SIGINT", "SIGINT"], marks=pytest.mark.faults),
])  # fmt: skip
def test_a_signal_ends_a_command_that_never_ends(names, stubborn, small, tmp_path):
    """SIGTERM while a finished run waits; and a second ^C after the one that stopped the run."""
    command = NEVER.format(tmp_path, "trap '' TERM" if stubborn else ":")
    stopped = len(names) == 2
    config = small(max_steps=10**5 if stopped else 2, after_checkpoint=command)
    process = start(config)
    if stopped:
        wait_for_step(config, 2, process)
        process.send_signal(getattr(signal, names[0]))
    wait_for(tmp_path / "began")
    time.sleep(0.5)
    assert process.poll() is None
    process.send_signal(getattr(signal, names[-1]))
    output = process.communicate(timeout=30)[0]
    assert process.returncode == (130 if stopped else 0), output
    assert output.count("waiting for after_checkpoint (a signal, e.g. ^C, ends it)") == 1
    word = "Killed" if stubborn else "Terminated"
    assert output.count(f"after_checkpoint: ended by {word}; its output") == 1
    assert is_gone(tmp_path / "pid") and is_gone(tmp_path / "child")


def test_a_second_interrupt_in_a_step_ends_run_and_command_at_once(small, tmp_path):
    settings = dict(B=1, total_batch_size=32 * 100, checkpoint_every=1, max_steps=10**5)
    process = start(small(**settings, after_checkpoint=NEVER.format(tmp_path, ":")))
    wait_for(tmp_path / "began")
    for _ in range(2):
        time.sleep(0.05)  # for Python to see both
        process.send_signal(signal.SIGINT)
    output = process.communicate(timeout=30)[0]
    assert process.returncode == 130 and output.endswith("interrupted\n")
    assert is_gone(tmp_path / "pid") and is_gone(tmp_path / "child")


def test_what_the_command_leaves_in_the_background_ends_with_it(small, tmp_path):
    command = f"sleep 1000 & echo $! > {tmp_path}/child; trap '' HUP"
    assert train_gpt2.train(small(max_steps=2, after_checkpoint=command)) == 0
    assert is_gone(tmp_path / "child")


class Interrupt(BaseException):
    """Stands for KeyboardInterrupt, which would end pytest."""


@pytest.mark.parametrize("error", [ValueError, Interrupt])
def test_an_error_of_the_run_waits_and_an_interrupt_does_not(error, tmp_path, capsys):
    command = AfterCheckpoint(f"touch {tmp_path}/began; sleep 1; touch {tmp_path}/done", tmp_path)
    began = time.monotonic()
    with pytest.raises(error), StopSignals(ALONE) as signals, command.until_end(signals):
        command.start(2)
        wait_for(tmp_path / "began")
        raise error
    assert (tmp_path / "done").exists() == (error is ValueError)
    assert (time.monotonic() - began < 1) == (error is Interrupt)
    assert ("the run ends with an error; waiting" in capsys.readouterr().out) == (
        error is ValueError
    )


def test_a_checkpoint_whose_turn_does_not_come_is_named(tmp_path, capsys):
    command = AfterCheckpoint(f"touch {tmp_path}/began; sleep 1000", tmp_path)
    with StopSignals(ALONE) as signals, command.until_end(signals):
        command.start(2)
        wait_for(tmp_path / "began")
        command.start(4, at_end=True)
        signals.forget = lambda: signals.record(0, signal.SIGTERM, None)  # while it waits
    out = capsys.readouterr().out
    assert "step     2 | after_checkpoint: ended by Terminated" in out
    assert "step     4 | after_checkpoint: not started, the run ends" in out


@pytest.mark.faults
@pytest.mark.parametrize("whom", ["launcher", "rank 1"])
def test_all_ranks_wait_together(small, tmp_path, whom):
    """A rank that ended earlier, with the code of the signal, would have torchrun end the first."""
    from test_faults import ranks_of

    command = f"sleep 4; echo $STEP > {tmp_path}/done"
    config = small(max_steps=10**5, after_checkpoint=command, timeout_s=3)
    torchrun = start(config, processes=2)
    wait_for_step(config, 3, torchrun)
    pid, number = torchrun.pid, signal.SIGTERM
    if whom == "rank 1":
        pid, number = ranks_of(torchrun)[1], signal.SIGUSR1
    os.kill(pid, number)
    output = torchrun.communicate(timeout=60)[0]
    assert f"exitcode  : {128 + number}" in output or whom == "launcher", output
    assert int((tmp_path / "done").read_text()) == len(losses(config))


@pytest.mark.faults
def test_the_result_of_a_run_does_not_depend_on_the_command(small, tmp_path):
    plain = small(log_dir=str(tmp_path / "plain"), **OFTEN)
    config = small(after_checkpoint=f'cp -r "$LOG_DIR" {tmp_path}/to', **OFTEN)
    for each in (plain, config):
        finish(start(each))
    assert_same_end(plain, config)
