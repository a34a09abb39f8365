"""SIGTERM, SIGINT and SIGUSR1 as a wish that all processes of a run obey at the same step."""

import functools
import signal

import torch

NAMES = [name for name in ("SIGTERM", "SIGINT", "SIGUSR1") if hasattr(signal, name)]


class StopSignals:
    """A context in which the signals are only noted; a second SIGINT interrupts at once.

    Each process adds its `row()` to a sum over all processes, and `number_in(sum)` tells them all
    the same.
    """

    def __init__(self, device: torch.device):
        self.received = None  # index into NAMES
        # Made now, so that a step copies nothing to the device: row 0 for no signal, then one each.
        self.rows = torch.eye(len(NAMES) + 1, device=device)[:, 1:]
        self.former = {}

    def __enter__(self):
        for index, name in enumerate(NAMES):
            number = getattr(signal, name)
            self.former[number] = signal.signal(number, functools.partial(self.note, index))
        return self

    def __exit__(self, *_):
        for number, handler in self.former.items():
            signal.signal(number, handler)

    def note(self, index, number, frame):
        if number == signal.SIGINT and self.received == index:
            raise KeyboardInterrupt
        self.received = index

    def row(self):
        """float32 (signals,) on the device: a one for the signal that this process received."""
        return self.rows[0 if self.received is None else self.received + 1]

    @staticmethod
    def number_in(counts) -> int | None:
        """The number of a signal that some process received, from the summed rows; or None."""
        for name, count in zip(NAMES, counts):
            if count > 0:
                return int(getattr(signal, name))
        return None
