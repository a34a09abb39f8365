"""SIGTERM, SIGINT and SIGUSR1: the step is finished and saved, and the run continues from it."""

import json
import os
import signal
import time
from pathlib import Path

import pytest
from conftest import (
    SMALL,
    TEXT,
    assert_same_end,
    assert_second_interrupt_ends,
    losses,
    outcome,
    start,
    wait_for_step,
)

import train_gpt2
from support import checkpoint, hellaswag_eval
from support.stop_signals import StopSignals


def question(context: str) -> str:
    """A line of HellaSwag."""
    endings = [" down.", " up on it.", " a.", " b c d."]
    fields = dict(activity_label="Cats", label=1, endings=endings, ctx=context)
    return json.dumps(fields) + "\n"


@pytest.fixture(scope="module")
def complete(tmp_path_factory):
    """A run of 6 steps that was never stopped."""
    directory = tmp_path_factory.mktemp("complete")
    (directory / "text.txt").write_text(TEXT, encoding="utf-8")
    places = dict(data=str(directory / "text.txt"), log_dir=str(directory / "log"))
    config = train_gpt2.Config(**places, **SMALL | dict(max_steps=6))
    assert train_gpt2.train(config) == 0
    return config


def stop_in_step_2(config, monkeypatch, *names: str) -> int:
    """The exit code of a run that gets these signals in the middle of step 2."""
    original = train_gpt2.get_lr

    def get_lr(step, config):
        if step == 2:
            for name in names:
                os.kill(os.getpid(), getattr(signal, name))
        return original(step, config)

    with monkeypatch.context() as patch:
        patch.setattr(train_gpt2, "get_lr", get_lr)
        return train_gpt2.train(config)


def test_a_SIGINT_after_another_signal_still_waits_for_the_step(small, monkeypatch):
    """^C while the run stops because of a scheduler's SIGTERM must not lose the step."""
    config = small(max_steps=6)
    assert stop_in_step_2(config, monkeypatch, "SIGTERM", "SIGINT") == 128 + signal.SIGINT
    assert checkpoint.find_problem(Path(config.log_dir) / "step_00003") is None


def test_a_second_SIGINT_does_not_wait_for_the_step(small, monkeypatch, capsys):
    original = train_gpt2.get_lr

    def get_lr(step, config):
        if step == 2:
            os.kill(os.getpid(), signal.SIGINT)
            os.kill(os.getpid(), signal.SIGINT)
        return original(step, config)

    monkeypatch.setattr(train_gpt2, "get_lr", get_lr)
    config = small(max_steps=6)
    code, _, errors = outcome(config, capsys)
    assert code == 130 and errors == "interrupted\n"
    assert max(losses(config)) == 1 and not checkpoint.list_checkpoints(Path(config.log_dir))


@pytest.mark.parametrize("name", ["SIGTERM", "SIGINT", "SIGUSR1"])
def test_a_signal_saves_the_step_and_the_run_continues(small, complete, monkeypatch, capsys, name):
    """The signal comes in mid-step; exit code 128 + its number, and nothing is lost."""
    stopped = small(max_steps=6)
    assert stop_in_step_2(stopped, monkeypatch, name) == 128 + getattr(signal, name)
    assert f"stopped by {name} after step 2" in capsys.readouterr().out
    assert checkpoint.find_problem(Path(stopped.log_dir) / "step_00003") is None
    assert train_gpt2.train(stopped) == 0
    assert_same_end(complete, stopped)


def test_a_signal_if_steps_are_logged_late(small, complete, gpu, monkeypatch, capsys):
    """The step launched meanwhile is saved and logged too."""
    gpu.event_ms, stopped = 1, small(max_steps=6)
    assert stop_in_step_2(stopped, monkeypatch, "SIGTERM") == 128 + signal.SIGTERM
    assert "stopped by SIGTERM after step 3" in capsys.readouterr().out
    assert list(losses(stopped)) == list(range(4))
    assert train_gpt2.train(stopped) == 0
    assert_same_end(complete, stopped)


def test_a_signal_from_outside(small):
    """The process exits by the documented code, with a checkpoint and the way to continue."""
    config = small(max_steps=100_000)
    process = start(config)
    wait_for_step(config, 3, process)
    process.send_signal(signal.SIGTERM)
    output = process.communicate(timeout=60)[0]
    assert process.returncode == 128 + signal.SIGTERM, output
    assert "the same command continues the run" in output
    assert len(checkpoint.list_checkpoints(Path(config.log_dir))) == 1


@pytest.mark.faults
def test_a_second_SIGINT_from_outside(small):
    """In a step of 20,000 micro-batches, which takes minutes, the second one ends the process."""
    config = small(B=1, total_batch_size=32 * 20_000)
    process = start(config)
    deadline = time.monotonic() + 60
    while not (Path(config.log_dir) / "log.txt").exists() and time.monotonic() < deadline:
        time.sleep(0.01)
    time.sleep(1)  # into the step
    assert_second_interrupt_ends(process)


def call_at_check(number: int, act, monkeypatch):
    """Calls `act()` before the `number`th check for signals in an evaluation, counted from 0.

    Returns a function that gives the number of checks so far.
    """
    original, calls = StopSignals.check, []

    def check(self, *delay):
        calls.append(None)
        if len(calls) == number + 1:
            act()
        original(self, *delay)

    monkeypatch.setattr(StopSignals, "check", check)
    return calls.__len__


EVALUATIONS = {  # settings, and how many evaluations come before that of step 4
    "validation": (dict(val_every=4, val_tokens=256, B=1), 1),
    "HellaSwag": (dict(hellaswag_every=4, hellaswag_data="questions.jsonl"), 1),
    "samples": (dict(sample_every=4, num_samples=6, sample_tokens=4), 0),
}


@pytest.mark.parametrize("kind", [
    "validation",
    pytest.param("HellaSwag", marks=pytest.mark.faults),
    pytest.param("samples", marks=pytest.mark.faults),
])  # fmt: skip
def test_a_signal_ends_an_evaluation(small, tmp_path, monkeypatch, capsys, kind):
    """The steps so far are saved; the continued run evaluates there like an uninterrupted one."""
    settings, before = EVALUATIONS[kind]
    monkeypatch.chdir(tmp_path)
    lines = [question("The cat " + "sat " * n) for n in range(40)]
    Path("questions.jsonl").write_text("".join(lines))
    monkeypatch.setitem(hellaswag_eval.BATCH_TOKENS, "cpu", 256)
    settings = settings | dict(max_steps=6, checkpoint_every=0)
    complete = small(log_dir=str(tmp_path / "complete"), **settings)
    with monkeypatch.context() as patch:
        checks = call_at_check(-1, None, patch)
        train_gpt2.train(complete)
    of_each = checks() // (before + 2)
    assert of_each > 4
    stopped = small(log_dir=str(tmp_path / "stopped"), **settings)
    with monkeypatch.context() as patch:
        third = of_each * before + 2
        call_at_check(third, lambda: os.kill(os.getpid(), signal.SIGTERM), patch)
        assert train_gpt2.train(stopped) == 128 + signal.SIGTERM
    output = capsys.readouterr().out
    assert "stopped by SIGTERM after step 3, saved" in output
    assert "sample 0 at step 4" not in output.split("finished")[-1]
    log = (tmp_path / "stopped" / "log.txt").read_text().splitlines()
    assert log[-1].startswith("3 train")
    assert train_gpt2.train(stopped) == 0
    assert_same_end(complete, stopped)


def test_a_signal_ends_a_step_of_minutes(small, tmp_path, monkeypatch, capsys):
    """Not for more than ten seconds: then the step in progress is undone."""
    monkeypatch.setattr("support.stop_signals.STEP_TIMEOUT_S", 0)
    settings = dict(max_steps=4, B=1, total_batch_size=4 * 32)
    complete = small(log_dir=str(tmp_path / "complete"), **settings)
    train_gpt2.train(complete)
    stopped = small(log_dir=str(tmp_path / "stopped"), **settings)
    original, calls = StopSignals.check_in_step, iter(range(10**9))

    def check_in_step(self):
        if next(calls) == 3 * 4 + 2:  # the third micro-step of step 3
            os.kill(os.getpid(), signal.SIGTERM)
        original(self)

    with monkeypatch.context() as patch:
        patch.setattr(StopSignals, "check_in_step", check_in_step)
        assert train_gpt2.train(stopped) == 128 + signal.SIGTERM
    assert "stopped by SIGTERM after step 2, saved" in capsys.readouterr().out
    assert train_gpt2.train(stopped) == 0
    assert_same_end(complete, stopped)
