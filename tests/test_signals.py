"""Signals beside SIGTERM and ^C: closed terminals, limits, and those that come too late."""

import os
import signal
import threading
from pathlib import Path

import pytest
import torch
from conftest import finish, losses, start, wait_for_step

import train_gpt2
from support import checkpoint
from support.distributed import Runtime
from support.stop_signals import StopSignals

ALONE = Runtime(0, 1, torch.device("cpu"), torch.float32)


@pytest.fixture(autouse=True)
def default_hangup():
    """SIGHUP ends a process here, also if nohup has started the tests."""
    before = signal.signal(signal.SIGHUP, signal.SIG_DFL)
    yield
    signal.signal(signal.SIGHUP, before)


def stop_in_step_2(config, monkeypatch, number: int) -> int:
    """The exit code of a run in this process that gets a signal in step 2."""
    original = train_gpt2.get_lr

    def get_lr(step, config):
        if step == 2:
            os.kill(os.getpid(), number)
        return original(step, config)

    monkeypatch.setattr(train_gpt2, "get_lr", get_lr)
    return train_gpt2.train(config)


@pytest.mark.parametrize("name", ["SIGHUP", "SIGXCPU", "SIGUSR2"])
def test_each_signal_that_would_end_the_run_saves_it(small, monkeypatch, capsys, name):
    """ssh that closes, `ulimit -t` or a scheduler's limit of CPU time, a scheduler's warning."""
    number, config = getattr(signal, name), small(max_steps=6)
    assert stop_in_step_2(config, monkeypatch, number) == 128 + number
    assert f"stopped by {name} after step 2" in capsys.readouterr().out
    assert checkpoint.find_problem(Path(config.log_dir) / "step_00003") is None
    assert signal.getsignal(number) == signal.SIG_DFL  # for the program that called train()


def test_under_nohup_a_closed_terminal_does_not_stop_the_run(small, monkeypatch):
    signal.signal(signal.SIGHUP, signal.SIG_IGN)
    config = small(max_steps=6)
    assert stop_in_step_2(config, monkeypatch, signal.SIGHUP) == 0
    assert len(losses(config)) == 6


def test_signals_after_the_last_step_do_not_fail_a_finished_run(small):
    """Slurm's --signal at the end of the time limit must not requeue the job for nothing."""
    config = small()
    output = finish(start(config, harm="signal_at_end SIGUSR1 + signal_at_end SIGTERM"))
    assert output.splitlines()[-1].startswith("finished")


def test_train_in_a_thread_runs_without_signal_handlers(small, capsys):
    """As in a notebook's or a server's thread, where Python allows no handlers."""
    config, codes = small(), []
    thread = threading.Thread(target=lambda: codes.append(train_gpt2.train(config)))
    thread.start()
    thread.join()
    output = capsys.readouterr().out
    assert codes == [0] and len(losses(config)) == 4
    assert output.count("signals are not handled") == 1


def test_a_program_that_ends_ignores_further_signals():
    with StopSignals(ALONE, process_ends=True) as signals:
        before = dict(signals.previous_handlers)
    try:
        assert {signal.getsignal(number) for number in before} == {signal.SIG_IGN}
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def under_torchrun(config, nohup: bool, launcher=()) -> str:
    """The output of two processes whose terminal closes, and that are then stopped.

    launcher: options of torchrun with which they survive the terminal
    """
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN if nohup else signal.SIG_DFL)
    try:
        torchrun = start(config, processes=2, launcher=launcher)
    finally:
        signal.signal(signal.SIGHUP, before)
    wait_for_step(config, 2, torchrun)
    torchrun.send_signal(signal.SIGHUP)
    if launcher:
        wait_for_step(config, max(losses(config)) + 5, torchrun)
        torchrun.terminate()
    output = torchrun.communicate(timeout=60)[0]
    assert torchrun.returncode != 0
    newest = checkpoint.newest_valid(Path(config.log_dir))
    assert newest is not None and len(losses(config)) == int(newest.name[5:])
    return output


@pytest.mark.faults
@pytest.mark.parametrize("nohup", [False, True])
def test_torchrun_whose_terminal_closes_saves_the_run(small, nohup):
    """torchrun handles SIGHUP, also under nohup, and sends it to its processes."""
    output = under_torchrun(small(max_steps=100_000), nohup)
    assert "stopped by SIGHUP" in output


@pytest.mark.faults
def test_torchrun_survives_its_terminal_if_it_leaves_SIGHUP_to_nohup(small):
    launcher = ["--signals-to-handle=SIGTERM,SIGINT"]
    output = under_torchrun(small(max_steps=100_000), True, launcher)
    assert "stopped by SIGTERM" in output
