"""Instants in the work of a device, and values that reach the host without waiting for later work.

On a GPU a call returns when its work is queued. To read a tensor by `tolist` would wait for all
that was queued until then, such as the next step, and leave the device without work.
"""

import time

import torch


class Instant:
    """The instant at which the device has done all that this thread has given it so far."""

    def __init__(self, asynchronous: bool):
        """asynchronous: whether the device is a GPU whose work is queued (`Runtime`)"""
        self.event = torch.cuda.Event(enable_timing=True) if asynchronous else None
        if self.event:
            self.event.record()
        self.host_s = time.perf_counter()

    def wait(self) -> None:
        """Returns when the instant is reached."""
        if self.event:
            self.event.synchronize()

    def seconds_since(self, earlier: "Instant") -> float:
        """The time from an earlier instant to this one; both must have been reached."""
        if self.event:
            return earlier.event.elapsed_time(self.event) / 1000
        return self.host_s - earlier.host_s


class HostCopy:
    """A copy of a small tensor on the host, which arrives when its own computation has ended."""

    def __init__(self, tensor: torch.Tensor, asynchronous: bool):
        self.values = tensor.to("cpu", non_blocking=asynchronous)  # into pinned memory
        self.end = Instant(asynchronous)

    def tolist(self) -> list[float]:
        """The values, as soon as they have arrived."""
        self.end.wait()
        return self.values.tolist()
