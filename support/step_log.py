"""Console lines of training steps: figures, time, rate, MFU and time left."""

import math
import statistics
import sys
from collections import deque
from pathlib import Path

import torch
from tqdm import tqdm

from support.checkpoint import describe_newest
from support.device_clock import HostCopy, Instant
from support.errors import SettingError
from support.launch import print0


class StepLog:
    """Prints a line for each step on rank 0, and a progress bar below it on a terminal."""

    def __init__(
        self,
        max_steps: int,
        flops_per_token: float,
        peak_flops: float | None,
        world_size: int,
        show_bar: bool,
        asynchronous: bool = False,
    ):
        """peak_flops: of one device, in FLOP/s; None: MFU is unknown; asynchronous: of `Instant`"""
        self.max_steps = max_steps
        self.flops_per_token, self.peak = flops_per_token, peak_flops and peak_flops * world_size
        self.last_dts = deque(maxlen=20)
        self.show_bar, self.asynchronous = show_bar and sys.stdout.isatty(), asynchronous

    def start(self, step: int) -> None:
        """Shows the progress bar, after `step` steps, and starts the clock."""
        self.bar = tqdm(
            total=self.max_steps, initial=step, unit="step", dynamic_ncols=True,
            disable=not self.show_bar, file=sys.stdout, leave=False,
        )  # fmt: skip
        self.restart_clock()

    def restart_clock(self) -> None:
        """Excludes from the next step's time what came before it: validation, saving."""
        self.last_end = Instant(self.asynchronous)

    def log(
        self, step: int, lr: float, tokens: int, figures: dict[str, float], end: Instant
    ) -> dict[str, float]:
        """Prints the line of a step.

        figures: at least loss and norm; any others are printed too; end: of the step
        Returns dt_s (seconds since the last step's end), tok_per_sec and, if it is known, mfu.
        """
        dt_s, self.last_end = end.seconds_since(self.last_end), end
        self.last_dts.append(dt_s)
        rate = tokens / dt_s
        mfu = self.mfu(rate)
        left_s = statistics.median(self.last_dts) * (self.max_steps - step - 1)
        left = tqdm.format_interval(left_s)
        more = "".join(f"{name}: {value:.4f} | " for name, value in [*figures.items()][2:])
        print0(
            f"step {step:5d} | loss: {figures['loss']:9.6f} | lr {lr:.4e} | "
            f"norm: {figures['norm']:8.4f} | {more}"
            f"dt: {1000 * dt_s:8.2f}ms | tok/sec: {rate:10.2f} | "
            f"mfu: {'n/a' if mfu is None else f'{mfu:.1%}':>5} | left: {left:>9}"
        )
        self.bar.update()
        return dict(dt_s=dt_s, tok_per_sec=rate) | ({} if mfu is None else dict(mfu=mfu))

    def mfu(self, rate: float) -> float | None:
        """The share of the peak at `rate` tokens per second; None if it is unknown."""
        return rate * self.flops_per_token / self.peak if self.peak else None

    def close(self) -> None:
        """Removes the progress bar."""
        self.bar.close()


class DelayedReports:
    """Reports the results of each step: at once, or on a GPU when the next step is queued."""

    def __init__(self, function, asynchronous: bool):
        """function(*arguments, figures, signal_counts, end): called for each step, in order"""
        self.function, self.asynchronous, self.pending = function, asynchronous, deque()

    def add(self, figures: dict[str, torch.Tensor], signal_counts, *arguments) -> None:
        """Takes the results of the step that was just launched: scalars on the device."""
        values = torch.stack([*figures.values(), *signal_counts])
        self.pending.append((arguments, list(figures), HostCopy(values, self.asynchronous)))
        self.flush(keep=1 if self.asynchronous else 0)

    def flush(self, keep: int = 0) -> None:
        """Reports the pending steps but the last `keep` ones, as soon as each has ended."""
        while len(self.pending) > keep:
            arguments, names, copy = self.pending.popleft()
            values = copy.tolist()
            figures, signal_counts = dict(zip(names, values)), values[len(names) :]
            self.function(*arguments, figures, signal_counts, copy.end)


def count_bad_steps(
    bad_steps: int, limit: int, step: int, figures: dict[str, float], get_scale, log_dir: Path
) -> int:
    """Non-finite steps in a row after this one, of which there were `bad_steps` before it.

    get_scale(): loss scale of float16, else 0: while it is 1 or more, an overflow of the gradient
        is not counted, because the scale was just halved
    log_dir: its newest checkpoint is named in the error. Raises SettingError if `limit` is reached.
    """
    loss, norm = figures["loss"], figures["norm"]
    if math.isfinite(loss) and math.isfinite(norm):
        return 0
    if math.isfinite(loss) and get_scale() >= 1:
        print0(f"step {step}: gradient overflow: update skipped, scale halved")
        return bad_steps
    bad_steps += 1
    print0(
        f"step {step}: loss {loss}, norm {norm}: not finite, update skipped "
        f"({bad_steps} in a row, {limit} stop the run)"
    )
    if bad_steps >= limit:
        raise SettingError(
            f"max_bad_steps={limit}: the last {limit} steps up to step {step} had no finite loss "
            f"or gradient; {describe_newest(log_dir)}; "
            "try a lower --max_lr or --dtype=float32 in another --log_dir"
        )
    return bad_steps
