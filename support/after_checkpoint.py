"""A shell command after each checkpoint, in the background: to copy the run, or to evaluate it."""

import concurrent.futures
import contextlib
import os
import signal
import subprocess
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from support.checkpoint import step_directory
from support.errors import SettingError
from support.launch import SLURM, TASKS, TORCHRUN, print0
from support.stop_signals import Stopped, StopSignals

# Programs that the command starts are no ranks of this run.
LAUNCHER = {*TORCHRUN, *SLURM, *TASKS, "MASTER_ADDR", "MASTER_PORT", "TORCHELASTIC_RUN_ID"}
POLL_S = 0.2  # between two checks of the command, when the run has ended
GRACE_S = 5  # from SIGTERM to SIGKILL; torchrun and Slurm kill the run itself after 30


class AfterCheckpoint:
    """Runs the command for one checkpoint at a time, as a process group that no step waits for.

    What it prints is appended to `after_checkpoint.log`; a failure is one line on the console.
    """

    def __init__(self, command: str, log_dir: Path):
        """command: for the shell, with LOG_DIR, CHECKPOINT and STEP in its environment; "": none"""
        self.command, self.log_dir = command, log_dir
        self.pool, self.last_call = ThreadPoolExecutor(max_workers=1), None
        self.newest = self.held = None  # steps of the next checkpoint, and of that for the end
        self.step = None  # of the checkpoint for which the command runs now: it must stay there
        self.process, self.ending = None, False

    def start(self, step: int, at_end: bool = False) -> None:
        """Starts the command for the checkpoint of a step, when it has ended for an earlier one.

        at_end: not before the end of the run, so that a copy contains the results
        """
        self.newest, self.held = step, step if at_end else None
        if self.command and not at_end:
            self.last_call = self.pool.submit(self._run, step)

    @contextlib.contextmanager
    def until_end(self, signals: StopSignals):
        """A context for the run: its end waits for the command, on all ranks, or for a signal."""
        try:
            yield
        except Exception as error:
            # A SettingError is raised on all ranks. After any other one, another rank is perhaps
            # lost, and the device too: this one waits alone.
            alone = not isinstance(error, SettingError)
            self._wait(signals, "the run ends with an error; ", alone)
            raise
        else:
            self._wait(signals)
        finally:
            self._stop()

    def _wait(self, signals: StopSignals, reason: str = "", alone: bool = False) -> None:
        """Returns on all ranks when the command has ended, or one of them has received a signal."""
        if not self.command:
            return
        if self.held is not None:
            self.start(self.held)
        signals.forget()
        if self._is_running(POLL_S):
            print0(f"{reason}waiting for after_checkpoint (a signal, e.g. ^C, ends it)")
        while alone and self._is_running(POLL_S) and signals.received is None:
            pass
        with contextlib.suppress(Stopped):
            while not alone and signals.runtime.sum_float(self._is_running(POLL_S)):
                signals.check()

    def _is_running(self, timeout_s: float) -> bool:
        """Whether the command still runs, or has to run again, after so many seconds."""
        calls = [self.last_call] if self.last_call else []
        return bool(concurrent.futures.wait(calls, timeout_s).not_done)

    def _stop(self) -> None:
        """Ends the command and all that it has started, if it still runs."""
        self.ending = True
        try:
            self._send(signal.SIGTERM)
            self._is_running(GRACE_S)
        finally:
            self._send(signal.SIGKILL)
            self.pool.shutdown()

    def _send(self, number: int) -> None:
        """Sends a signal to the processes of the command, if there are any."""
        if process := self.process:
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.killpg(process.pid, number)

    def _run(self, step: int) -> None:
        """Runs the command for a checkpoint, unless a newer one has come, and reports a failure."""
        self.step, problem, file = step, "", self.log_dir / "after_checkpoint.log"
        try:
            if step == self.newest:
                problem = "not started, the run ends" if self.ending else self._execute(step, file)
        except OSError as error:  # a full disk, no shell, no process
            problem = str(error)
        self.step = None
        if problem:
            print0(f"step {step:5d} | after_checkpoint: {problem}; its output is in {file}")

    def _execute(self, step: int, file: Path) -> str:
        """Runs the command; returns how it failed, in a few words, or "". Raises OSError."""
        paths = dict(LOG_DIR=self.log_dir, CHECKPOINT=step_directory(self.log_dir, step))
        variables = {name: value for name, value in os.environ.items() if name not in LAUNCHER}
        variables |= {name: os.path.abspath(path) for name, path in paths.items()}
        with open(file, "a+b", buffering=0) as log:
            _write(log, step, "started")
            first = log.tell()
            self.process = subprocess.Popen(
                self.command, shell=True, env=variables | {"STEP": str(step)},
                stdin=subprocess.DEVNULL, stdout=log, stderr=log, start_new_session=True,
            )  # fmt: skip
            code = self.process.wait()
            self._send(signal.SIGKILL)  # to what the command left in the background
            self.process = None
            log.seek(max(first, log.seek(0, os.SEEK_END) - 4096))
            tail = log.read().decode(errors="replace")
            result = f"exit code {code}" if code >= 0 else f"ended by {signal.strsignal(-code)}"
            _write(log, step, result, "\n" if tail and tail[-1] != "\n" else "")
        last = ([""] + [line for line in tail.splitlines() if line.strip()])[-1]
        last = "".join(c for c in last[:200] if c.isprintable())
        return (result + (f" ({last})" if last else "")) if code else ""


def _write(log, step: int, text: str, before: str = "") -> None:
    """Adds a line of our own to the output of the command."""
    log.write(f"{before}--- {time.strftime('%F %T')} | step {step} | {text}\n".encode())
