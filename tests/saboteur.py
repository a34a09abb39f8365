"""Runs `train_gpt2.py` and does it some harm: `saboteur.py HARM [+ HARM ...] -- --setting=...`.

Each harm is a function below and is done in the process itself, at an exact point of its work,
which a harm from outside could only hope to hit. What it does is real: signals to itself, NaN in a
gradient.

    kill_at_event 17             SIGKILL before the 17th change of a file below log_dir
    signal_at_step SIGSTOP 1 5   SIGSTOP to rank 1, when it begins step 5
    signal_in_evaluation SIGTERM 1 4   SIGTERM to rank 1, in the middle of the evaluation at step 4
    spoil nan 1 5                a gradient full of NaN in rank 1, at step 5
    tell_windows FILE            a line `step rank windows` in FILE for each step
"""

import os
import signal
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import train_gpt2
from support.errors import run_main

RANK = int(os.environ.get("RANK", 0))


def at_step(step: int, rank: int, act) -> None:
    """Has `act()` done by one rank when it begins a step."""
    original = train_gpt2.train_step

    def train_step(run, *rest):
        if run.step == step and rank == RANK:
            act()
        return original(run, *rest)

    train_gpt2.train_step = train_step


def kill_at_event(number: str) -> None:
    """Python tells its audit hooks of each file that it opens, renames or removes, before it does.

    (Weights and training state are written by Rust and C++, which tell nothing: for a kill in the
    midst of those there are the random instants.)
    """
    log_dir = next(a.split("=", 1)[1] for a in sys.argv if a.startswith("--log_dir="))
    log_dir, left = os.path.abspath(log_dir), int(number)
    changes = ("open", "os.rename", "os.remove", "os.rmdir", "os.mkdir")

    def hook(event, arguments):
        nonlocal left
        if event in changes and isinstance(arguments[0], (str, os.PathLike)):
            reads = event == "open" and not set(arguments[1] or "r") & set("wa+x")
            # os.remove and os.rmdir of a tree have a directory's descriptor and a bare name
            mine = os.path.abspath(arguments[0]).startswith(log_dir) or event.startswith("os.r")
            if mine and not reads:
                left -= 1
                if left == 0:
                    os.kill(os.getpid(), signal.SIGKILL)

    sys.addaudithook(hook)


def signal_at_step(name: str, rank: str, step: str) -> None:
    number = getattr(signal, name)
    at_step(int(step), int(rank), lambda: os.kill(os.getpid(), number))


def signal_in_evaluation(name: str, rank: str, step: str) -> None:
    original = train_gpt2.validation_loss

    def validation_loss(model, loader, rows, processes, check):
        calls = iter(range(10**9))

        def check_and_signal():
            if validation_loss.run_step() == int(step) and next(calls) == 1 and int(rank) == RANK:
                os.kill(os.getpid(), getattr(signal, name))
            check()

        return original(model, loader, rows, processes, check_and_signal)

    seen = []
    original_loop = train_gpt2.train_to_the_end

    def train_to_the_end(run, *rest):
        seen.append(run)
        return original_loop(run, *rest)

    validation_loss.run_step = lambda: seen[-1].step
    train_gpt2.validation_loss = validation_loss
    train_gpt2.train_to_the_end = train_to_the_end


def spoil(value: str, rank: str, step: str) -> None:
    original, spoilt = train_gpt2.HeadLoss.backward, []
    at_step(int(step), int(rank), lambda: spoilt.append(float(value)))

    def backward(ctx, grad):
        dx, dw, *rest = original(ctx, grad)
        return (dx * spoilt.pop() if spoilt else dx, dw, *rest)

    train_gpt2.HeadLoss.backward = staticmethod(backward)


def tell_windows(file: str) -> None:
    original = train_gpt2.train_step

    def train_step(run, *rest):
        loader, step = run.loader, run.step
        first, rows = loader.position, loader.rows_at(loader.position)
        share = [first + rows * r // loader.num_processes for r in (RANK, RANK + 1)]
        results = original(run, *rest)
        windows = loader.windows_of(train_gpt2.np.arange(*share)).tolist()
        with open(file, "a") as out:
            out.write(f"{step} {RANK} {' '.join(map(str, windows))}\n")
        return results

    train_gpt2.train_step = train_step


if __name__ == "__main__":
    cut = sys.argv.index("--")
    harms = " ".join(sys.argv[1:cut]).split("+")
    sys.argv[1:] = sys.argv[cut + 1 :]
    for harm in harms:
        name, *arguments = harm.split()
        globals()[name](*arguments)
    run_main(train_gpt2.main)
