"""The launcher's variables (rank, world size), and printing on one or on every rank."""

import os
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


def read_launch(*sources: tuple[str, ...]) -> Launch:
    """The launch that the first of `sources` whose rank and world size are both set describes.

    sources: names of variables in the order of `Launch`; default: TORCHRUN
    Without any of them: one process. Raises UserError if the values contradict each other.
    """
    for names in sources or (TORCHRUN,):
        rank, world_size, _, local_world_size = names
        if rank in os.environ and world_size in os.environ:
            defaults = Launch._field_defaults.values()
            try:
                values = [os.environ.get(n, default) for n, default in zip(names, defaults)]
                launch = Launch(*map(int, values))
            except ValueError:
                launch = None
            if (
                launch is None
                or not 0 <= launch.rank < launch.world_size
                or min(launch.local_rank + 1, launch.local_world_size) < 1
            ):
                local = os.environ.get(local_world_size, 1)
                raise UserError(
                    f"{rank}={os.environ[rank]}: must be a number below "
                    f"{world_size}={os.environ[world_size]} ({local_world_size}={local}); "
                    "unset all of them to run one process"
                )
            return launch
    return Launch()


def print0(line: str, bold: bool = False, file=None) -> None:
    """Prints a line on rank 0, above the progress bar if there is one.

    bold: on a terminal, unless the variable NO_COLOR is set; file: default standard output
    """
    file = file or sys.stdout
    if environment_rank() > 0:
        return
    if bold and file.isatty() and not os.environ.get("NO_COLOR"):
        line = f"\033[1m{line}\033[0m"
    tqdm.write(line, file=file)
    file.flush()


def print_rank(line: str) -> None:
    """Prints a line to standard error on every rank of torchrun or srun, after "rank N: "."""
    launch = read_launch(TORCHRUN, SLURM)
    prefix = f"rank {launch.rank}: " if launch.world_size > 1 else ""
    print(prefix + line, file=sys.stderr, flush=True)
