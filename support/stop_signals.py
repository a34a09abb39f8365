"""SIGTERM, SIGINT and SIGUSR1 as a wish that all processes of a run obey at the same point."""

import ctypes
import functools
import os
import signal
import sys
import time

import torch

NAMES = [name for name in ("SIGTERM", "SIGINT", "SIGUSR1") if hasattr(signal, name)]
PATIENCE_S = 10  # for the step in progress: torchrun and Slurm kill after 30


class Stopped(Exception):
    """Raised in all processes at the same point: they are to save and leave for signal `number`."""

    def __init__(self, number: int):
        super().__init__(signal.Signals(number).name)
        self.number = number


class StopSignals:
    """A context in which the signals are only noted; a second SIGINT interrupts at once.

    Each process adds its `row()` to a sum over all processes, and `number_in(sum)` tells them all
    the same; `check` does both. processes: of the trainer, for their `sum`
    """

    def __init__(self, processes):
        self.processes = processes
        self.received, self.received_at = None, 0.0  # index into NAMES, time.monotonic()
        # Made now, so that a step copies nothing to the device: row 0 for no signal, then one each.
        self.rows = torch.eye(len(NAMES) + 1, device=processes.device)[:, 1:]
        self.former = {}
        self.counts = None  # of the last `check`

    def __enter__(self):
        for index, name in enumerate(NAMES):
            number = getattr(signal, name)
            self.former[number] = signal.signal(number, functools.partial(self.note, index))
        leave_with_the_launcher()
        return self

    def __exit__(self, *_):
        for number, handler in self.former.items():
            signal.signal(number, handler)

    def note(self, index, number, frame):
        """The handler of the signals."""
        if number == signal.SIGINT and self.received == index:
            raise KeyboardInterrupt
        if self.received is None:
            self.received_at = time.monotonic()
        self.received = index

    def due(self, patience_s: float) -> bool:
        """Whether this process received a signal at least `patience_s` ago."""
        return self.received is not None and time.monotonic() - self.received_at >= patience_s

    def row(self, patience_s: float = 0.0):
        """float32 (signals,) on the device: a one for the signal that is due."""
        return self.rows[self.received + 1 if self.due(patience_s) else 0]

    def check(self, patience_s: float = 0.0) -> None:
        """Raises Stopped in all processes alike where a signal was due in one of them.

        It tells what was so at the call before: a GPU, meanwhile, has more to do.
        """
        before, self.counts = self.counts, self.processes.sum(self.row(patience_s).clone())
        if before is not None and (number := self.number_in(before.tolist())):
            raise Stopped(number)

    def check_in_step(self) -> None:
        """`check` between two micro-steps, for a signal that waits for the end of a long step."""
        if self.processes.world_size == 1:
            if self.due(PATIENCE_S):
                raise Stopped(getattr(signal, NAMES[self.received]))
        elif self.processes.device.type == "cpu":  # several GPUs take seconds for a step
            self.check(PATIENCE_S)

    @staticmethod
    def number_in(counts) -> int | None:
        """The number of a signal that some process received, from the summed rows; or None."""
        for name, count in zip(NAMES, counts):
            if count > 0:
                return int(getattr(signal, name))
        return None


def leave_with_the_launcher() -> None:
    """Has the kernel send SIGTERM when torchrun is gone, which else would leave its processes to
    train on unseen: SIGUSR1, say, kills it on the spot."""
    if "TORCHELASTIC_RUN_ID" in os.environ and sys.platform == "linux":
        ctypes.CDLL(None).prctl(1, signal.SIGTERM)  # PR_SET_PDEATHSIG
