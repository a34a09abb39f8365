"""Console lines of training steps: figures, time, rate, MFU and time left."""

import math
import statistics
import sys
import time
from collections import deque
from pathlib import Path

from tqdm import tqdm

from support.checkpoint import describe_newest
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
    ):
        """peak_flops: of one device, in FLOP/s; None: MFU is unknown"""
        self.max_steps = max_steps
        self.flops_per_token, self.peak = flops_per_token, peak_flops and peak_flops * world_size
        self.last_dts = deque(maxlen=20)
        self.show_bar = show_bar and sys.stdout.isatty()

    def start(self, step: int) -> None:
        """Shows the progress bar, after `step` steps, and starts the clock."""
        self.bar = tqdm(
            total=self.max_steps, initial=step, unit="step", dynamic_ncols=True,
            disable=not self.show_bar, file=sys.stdout, leave=False,
        )  # fmt: skip
        self.restart_clock()

    def restart_clock(self) -> None:
        """Excludes from the next step's time what came before it: validation, saving."""
        self.clock = time.perf_counter()

    def log(self, step: int, lr: float, tokens: int, figures: dict[str, float]) -> dict[str, float]:
        """Prints the line of a step that has just ended.

        figures: at least loss and norm; any others are printed too
        Returns dt_s (seconds since the last step's end), tok_per_sec and, if it is known, mfu.
        """
        now = time.perf_counter()
        dt_s, self.clock = now - self.clock, now
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


class DelayedCalls:
    """Calls `function` for each `add`: at once or, with `delay`, at the next `add` or `flush`.

    While an asynchronous device computes a step, the host can then launch the next one.
    """

    def __init__(self, function, delay: bool):
        self.function, self.delay, self.pending = function, delay, deque()

    def add(self, *arguments) -> None:
        """Takes the arguments of a call."""
        self.pending.append(arguments)
        self.flush(keep=1 if self.delay else 0)

    def flush(self, keep: int = 0) -> None:
        """Makes the pending calls but the last `keep` ones."""
        while len(self.pending) > keep:
            self.function(*self.pending.popleft())


def count_bad_steps(
    bad_steps: int, limit: int, step: int, figures: dict[str, float], scale: float, log_dir: Path
) -> int:
    """Non-finite steps in a row after this one, of which there were `bad_steps` before it.

    scale: loss scale of float16, else 0: while it is 1 or more, an overflow of the gradient is not
        counted, because the scale was just halved
    log_dir: its newest checkpoint is named in the error. Raises SettingError if `limit` is reached.
    """
    loss, norm = figures["loss"], figures["norm"]
    if math.isfinite(loss) and math.isfinite(norm):
        return 0
    if math.isfinite(loss) and scale >= 1:
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
