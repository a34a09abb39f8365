"""Runs `train_gpt2.py` with a fault injected: `saboteur.py FAULT [+ FAULT ...] -- --setting=...`.

Each fault is a function below. It happens in the process itself, at an exact point of its work,
which a fault from outside could only meet by chance. It is real: signals to itself, NaN in a
gradient.

    kill_at_event 17             SIGKILL before the 17th change of a file below log_dir
    copy_at_events DIR           copies log_dir to DIR/N before the Nth change of a file in it
    signal_at_step SIGSTOP 1 5   SIGSTOP to rank 1, when it begins step 5
    signal_in_evaluation SIGTERM 1 4   SIGTERM to rank 1, in the middle of the evaluation at step 4
    signal_at_end SIGUSR1        a signal after the last step, and another when Python exits
    replace_gradient nan 1 5     a gradient full of NaN in rank 1, at step 5
    record_windows FILE          a line `step rank windows` in FILE for each step
    compile_with eager           torch.compile with another backend, which makes no machine code
    simulate_gpu                 log and save as on a GPU: a step later, and in the background
    delay_checkpoints 5          each checkpoint takes 5 seconds longer
"""

import atexit
import functools
import itertools
import os
import shutil
import signal
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import numpy as np
import torch

import train_gpt2
from support import distributed, fused_loss, huggingface
from support.errors import run_main

RANK = int(os.environ.get("RANK", 0))


def call_at_step(step: int, rank: int, act) -> None:
    """Makes one rank call `act()` when it begins a step."""
    original = train_gpt2.train_step

    def train_step(run, *rest):
        if run.step == step and rank == RANK:
            act()
        return original(run, *rest)

    train_gpt2.train_step = train_step


def before_changes(act) -> None:
    """Calls `act(n)` before this process changes a file of its log_dir for the nth time.

    Python calls its audit hooks before it opens, renames or removes a file. Weights and training
    state are written by Rust and C++, which call no hook.
    """
    log_dir, numbers = os.path.abspath(setting("log_dir")), itertools.count(1)
    changes = ("open", "os.rename", "os.remove", "os.rmdir", "os.mkdir")

    def hook(event, arguments):
        if event in changes and isinstance(arguments[0], (str, os.PathLike)):
            reads = event == "open" and not set(arguments[1] or "r") & set("wa+x")
            # os.remove and os.rmdir of a tree have a directory's descriptor and a bare name
            inside = os.path.abspath(arguments[0]).startswith(log_dir) or event.startswith("os.r")
            if inside and not reads:
                act(next(numbers))

    sys.addaudithook(hook)


def setting(name: str) -> str:
    """The value of a setting in the command line."""
    return next(a.split("=", 1)[1] for a in sys.argv if a.startswith(f"--{name}="))


def kill_at_event(number: str) -> None:
    """Kills the process before it changes a file for the `number`th time.

    Kills at random instants cover the files that `before_changes` does not see.
    """
    before_changes(lambda n: os.kill(os.getpid(), signal.SIGKILL) if n == int(number) else None)


def copy_at_events(directory: str) -> None:
    """Copies log_dir to `directory/N` before a file of it is changed for the Nth time."""
    log_dir = Path(setting("log_dir"))

    def copy_file(source, target):  # a file of a checkpoint is written once
        (shutil.copy if Path(source).parent == log_dir else os.link)(source, target)

    def copy(n):
        if log_dir.is_dir():
            shutil.copytree(log_dir, f"{directory}/{n:04d}", copy_function=copy_file)

    before_changes(copy)


def signal_at_step(name: str, rank: str, step: str) -> None:
    """Sends a signal to one rank when it begins a step."""
    number = getattr(signal, name)
    call_at_step(int(step), int(rank), lambda: os.kill(os.getpid(), number))


def signal_in_evaluation(name: str, rank: str, step: str) -> None:
    """Sends a signal to one rank before the second batch of the validation at a step."""
    runs, original, original_loop = [], train_gpt2.validation_loss, train_gpt2.train_loop

    def validation_loss(model, loader, rows, runtime, check_signals):
        calls = iter(range(10**9))

        def check_and_signal():
            if runs[-1].step == int(step) and next(calls) == 1 and int(rank) == RANK:
                os.kill(os.getpid(), getattr(signal, name))
            check_signals()

        return original(model, loader, rows, runtime, check_and_signal)

    def train_loop(run, *rest):
        runs.append(run)
        return original_loop(run, *rest)

    train_gpt2.validation_loss = validation_loss
    train_gpt2.train_loop = train_loop


def signal_at_end(name: str) -> None:
    """Sends a signal when the last line of a finished run is printed, and again at exit."""
    original, number = train_gpt2.print0, getattr(signal, name)

    def print0(line, **options):
        original(line, **options)
        if line.startswith("finished"):
            os.kill(os.getpid(), number)

    train_gpt2.print0 = print0
    atexit.register(os.kill, os.getpid(), number)


def replace_gradient(value: str, rank: str, step: str) -> None:
    """Multiplies the gradient of one rank by `value` in the first micro-step of a step."""
    original, factors = fused_loss.ChunkedLoss.backward, []
    call_at_step(int(step), int(rank), lambda: factors.append(float(value)))

    def backward(ctx, grad):
        loss_fn, dx, *rest = original(ctx, grad)
        return (loss_fn, dx * factors.pop() if factors else dx, *rest)

    fused_loss.ChunkedLoss.backward = staticmethod(backward)


def record_windows(file: str) -> None:
    """Appends the windows that this rank trains on in each step to a file."""
    original = train_gpt2.train_step

    def train_step(run, *rest):
        loader, step = run.loader, run.step
        first, rows = loader.position, loader.rows_at(loader.position)
        share = [first + rows * r // loader.num_processes for r in (RANK, RANK + 1)]
        results = original(run, *rest)
        windows = loader.windows_of(np.arange(*share)).tolist()
        with open(file, "a") as out:
            out.write(f"{step} {RANK} {' '.join(map(str, windows))}\n")
        return results

    train_gpt2.train_step = train_step


def compile_with(backend: str) -> None:
    """Makes torch.compile use another backend: what is traced, and when, stays the same."""
    torch.compile = functools.partial(torch.compile, backend=backend)


def simulate_gpu() -> None:
    """Makes the run believe that the CPU is a GPU whose work is queued."""

    class Event:
        def __init__(self, enable_timing):
            pass

        def record(self):
            self.time_s = time.perf_counter()

        def synchronize(self):
            pass

        def elapsed_time(self, later):
            return 1000 * (later.time_s - self.time_s)

    torch.cuda.Event, distributed.Runtime.asynchronous = Event, True


def delay_checkpoints(seconds: str) -> None:
    """Makes writing the files of a checkpoint take longer."""
    original = huggingface.write_model

    def write_model(*arguments):
        time.sleep(float(seconds))
        original(*arguments)

    huggingface.write_model = write_model


if __name__ == "__main__":
    cut = sys.argv.index("--")
    faults = " ".join(sys.argv[1:cut]).split("+")
    sys.argv[1:] = sys.argv[cut + 1 :]
    for fault in faults:
        name, *arguments = fault.split()
        globals()[name](*arguments)
    run_main(train_gpt2.main)
