"""Coordinated shutdown on a signal (SIGTERM, SIGINT, ...): all ranks stop at the same step."""

import functools
import signal
import threading
import time

import torch

from support.device_clock import HostCopy
from support.distributed import Runtime
from support.launch import print0

# SIGHUP: the terminal or the ssh connection closed; SIGXCPU: the limit of CPU time is near.
NAMES = ("SIGTERM", "SIGINT", "SIGUSR1", "SIGUSR2", "SIGHUP", "SIGXCPU")
NAMES = [name for name in NAMES if hasattr(signal, name)]  # Windows has the first two
STEP_TIMEOUT_S = 10  # for the step in progress to end: torchrun and Slurm kill after 30


class Stopped(Exception):
    """Raised on all ranks at the same point: they save and exit because of signal `number`."""

    def __init__(self, number: int):
        super().__init__(signal.Signals(number).name)
        self.number = number


class StopSignals:
    """A context in which the signals are only recorded; a second SIGINT interrupts at once.

    Each rank adds its `row()` to a sum over all ranks, from which `number_in` gives the same answer
    on each of them; `check` does both.
    """

    def __init__(self, runtime: Runtime, process_ends: bool = False):
        """process_ends: after the context the process only has to end, and ignores the signals"""
        self.runtime, self.process_ends = runtime, process_ends
        self.received, self.received_at = None, 0.0  # index into NAMES, time.monotonic()
        # On the device, so that no step has to copy: row 0 for no signal, then one row each.
        self.rows = torch.eye(len(NAMES) + 1, device=runtime.device)[:, 1:]
        self.previous_handlers = {}
        self.counts = None  # summed row of the last `check`

    def __enter__(self):
        if threading.current_thread() is not threading.main_thread():
            print0("signals are not handled: only the main thread of a program can do that")
            return self
        for index, name in enumerate(NAMES):
            number, handler = getattr(signal, name), functools.partial(self.record, index)
            if name == "SIGHUP" and signal.getsignal(number) == signal.SIG_IGN:
                continue  # nohup: the run is to survive its terminal
            self.previous_handlers[number] = signal.signal(number, handler)
        return self

    def __exit__(self, *_):
        for number, handler in self.previous_handlers.items():
            signal.signal(number, signal.SIG_IGN if self.process_ends else handler)

    def record(self, index, number, frame):
        """The handler of the signals."""
        if number == signal.SIGINT and self.received == index:
            raise KeyboardInterrupt
        if self.received is None:
            self.received_at = time.monotonic()
        self.received = index

    def forget(self) -> None:
        """Makes `check` raise only for a signal that comes from now on."""
        self.received = self.counts = None

    def is_due(self, delay_s: float) -> bool:
        """Whether this process received a signal at least `delay_s` ago."""
        return self.received is not None and time.monotonic() - self.received_at >= delay_s

    def row(self, delay_s: float = 0.0) -> torch.Tensor:
        """float32 (signals,) on the device: 1 for the signal that is due, else 0."""
        return self.rows[self.received + 1 if self.is_due(delay_s) else 0]

    def check(self, delay_s: float = 0.0) -> None:
        """Raises Stopped on all ranks if a signal was due on one of them at the call before.

        The answer is one call late so that a GPU always has work left.
        """
        counts = self.runtime.all_reduce(self.row(delay_s).clone())
        before, self.counts = self.counts, HostCopy(counts, self.runtime.asynchronous)
        if before is not None and (number := self.number_in(before.tolist())):
            raise Stopped(number)

    def check_in_step(self) -> None:
        """`check` between micro-steps, for a signal that has waited too long for the step's end."""
        if self.runtime.world_size == 1:
            if self.is_due(STEP_TIMEOUT_S):
                raise Stopped(getattr(signal, NAMES[self.received]))
        elif self.runtime.device.type == "cpu":  # a step on several GPUs takes seconds at most
            self.check(STEP_TIMEOUT_S)

    @staticmethod
    def number_in(counts) -> int | None:
        """The number of a signal that some rank received, from the summed rows; or None."""
        received = (getattr(signal, name) for name, count in zip(NAMES, counts) if count > 0)
        return next(received, None)
