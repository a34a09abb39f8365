"""The launcher's variables (rank, world size), and printing on one or on every rank."""

import contextlib
import os
import socket
import sys
from typing import NamedTuple

from tqdm import tqdm

from support.errors import UserError, environment_rank


class Launch(NamedTuple):
    """Place of this process among all processes of a run."""

    rank: int = 0  # from 0 to world_size - 1
    world_size: int = 1  # processes of the run
    local_rank: int = 0  # rank on this machine, which chooses the GPU
    local_world_size: int = 1  # processes of the run on this machine


TORCHRUN = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE")
# srun sets these for the tasks of a step; a batch script itself has no SLURM_STEP_NUM_TASKS.
SLURM = ("SLURM_PROCID", "SLURM_STEP_NUM_TASKS", "SLURM_LOCALID", "SLURM_NTASKS_PER_NODE")
# How many tasks other launchers started; by themselves they give the tasks no RANK.
TASKS = ("SLURM_NTASKS", "SLURM_STEP_NUM_TASKS", "OMPI_COMM_WORLD_SIZE", "PMI_SIZE")


def read_launch(*sources: tuple[str, ...]) -> Launch:
    """The launch that the first of `sources` that is set describes; one process if none is.

    sources: names of variables in the order of `Launch`; default: TORCHRUN
    Raises UserError if the values are incomplete or contradict each other, and if another launcher
    has started several tasks.
    """
    for names in sources or (TORCHRUN,):
        present = [name in os.environ for name in names[:2]]
        # A Slurm batch script has SLURM_PROCID without being a task of a step.
        if all(present) or (any(present) and names == TORCHRUN):
            return _parse_launch(names)
    for name in TASKS:
        count = os.environ.get(name, "")
        of_slurm = name.startswith("SLURM") and SLURM in sources
        if not of_slurm and count.isdecimal() and int(count) > 1:
            raise UserError(
                f"{name}={count}: {count} tasks without RANK and WORLD_SIZE would each be a run of "
                "its own; use torchrun --nproc_per_node=N, or set both for each task as in "
                f"docs/slurm.md; for one process unset {name}"
            )
    return Launch()


def _parse_launch(names: tuple[str, ...]) -> Launch:
    """The launch in the variables `names`. Raises UserError if they are not valid."""
    given = {name: os.environ[name] for name in names if name in os.environ}
    values = [given.get(name, default) for name, default in zip(names, (None, None, 0, 1))]
    try:
        launch = Launch(*map(int, values))
        valid = 0 <= launch.rank < launch.world_size and 0 <= launch.local_rank
        valid = valid and (names[3] not in given or launch.local_rank < launch.local_world_size)
    except (TypeError, ValueError):  # one is missing, or not a number
        valid = False
    if not valid:
        shown = ", ".join(f"{name}={value}" for name, value in given.items())
        raise UserError(
            f"{shown}: {names[0]} must be a number from 0 to {names[1]} - 1, and so must "
            f"{names[2]} of {names[3]}; unset all of them to run one process"
        )
    return launch


def read_address() -> tuple[str, int]:
    """(address, port) at which rank 0 is found, in MASTER_ADDR and MASTER_PORT.

    Raises UserError if they are missing or not valid.
    """
    address, port = os.environ.get("MASTER_ADDR", ""), os.environ.get("MASTER_PORT", "")
    resolved = None
    with contextlib.suppress(OSError, UnicodeError):
        resolved = address and socket.getaddrinfo(address, None)
    if not resolved:
        raise UserError(
            f"MASTER_ADDR={address}: must be the name or address of the machine of rank 0; start "
            "the processes with torchrun, which sets it, or unset RANK and WORLD_SIZE"
        )
    if not port.isdecimal() or not 0 < int(port) < 65536:
        raise UserError(f"MASTER_PORT={port}: must be a port of {address}, from 1 to 65535")
    return address, int(port)


def print0(line: str, bold: bool = False, file=None) -> None:
    """Prints a line on rank 0, above the progress bar if there is one.

    bold: on a terminal, unless the variable NO_COLOR is set; file: default standard output
    """
    file = file or sys.stdout
    if environment_rank() > 0:
        return
    if bold and file.isatty() and not os.environ.get("NO_COLOR"):
        line = f"\033[1m{line}\033[0m"
    try:
        tqdm.write(line, file=file)
        file.flush()
    except BrokenPipeError:  # the reader of `| head` has ended
        raise
    except OSError:  # the terminal is gone, or the disk of the console's file is full
        os.dup2(os.open(os.devnull, os.O_WRONLY), file.fileno())


def print_rank(line: str) -> None:
    """Prints a line to standard error on every rank of torchrun or srun, after "rank N: "."""
    launch = read_launch(TORCHRUN, SLURM)
    prefix = f"rank {launch.rank}: " if launch.world_size > 1 else ""
    print(prefix + line, file=sys.stderr, flush=True)
