"""Errors that the user can correct, each reported in one line.

A command raises `UserError` for bad input and runs its main function through `run_main`, which
prints the line and exits with the error's code, 2. So does a package that is not installed. Any
other exception is a bug and keeps its traceback.
"""

import os
import sys


class UserError(Exception):
    """An error that the user can correct: the message names the file or setting and the remedy."""

    code = 2  # exit code of the program


class SettingError(UserError):
    """A UserError that every rank of a node raises, so that only the first of them prints it."""


def environment_rank() -> int:
    """The rank in the launcher's variables; 0 if they are missing or contradict each other."""
    rank, world_size = os.environ.get("RANK", ""), os.environ.get("WORLD_SIZE", "")
    valid = rank.isdecimal() and world_size.isdecimal() and int(rank) < int(world_size)
    return int(rank) if valid else 0


def first_of_node() -> bool:
    """Whether the launcher's variables make this process the first one of its node, or the only."""
    return environment_rank() == 0 or os.environ.get("LOCAL_RANK", "0") == "0"


def run_main(main, alone: bool = False) -> None:
    """Runs `main()` and exits with the code that it returns.

    alone: whether the command is always one process, whatever RANK says
    A UserError is printed in one line and exits with its code, an interrupt (^C) exits with 130,
    and a reader that closed the pipe (`| head`) ends the program with 141, as SIGPIPE would.
    """
    # Without a console (`>&-`, pythonw) there are no streams.
    sys.stdin = sys.stdin or open(os.devnull)
    sys.stdout, sys.stderr = (s or open(os.devnull, "w") for s in (sys.stdout, sys.stderr))
    for stream in (sys.stdout, sys.stderr):  # file names may hold what the console cannot print
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="backslashreplace")
    try:
        sys.exit(main())
    except ModuleNotFoundError as error:
        name = error.name
        print(f"error: {name}: not installed; pip install {name}", file=sys.stderr, flush=True)
        sys.exit(UserError.code)
    except UserError as error:
        if alone or first_of_node() or not isinstance(error, SettingError):
            print("error:", " ".join(str(error).split()), file=sys.stderr, flush=True)
        distributed = sys.modules.get("torch.distributed")
        if distributed and distributed.is_available() and distributed.is_initialized():
            # Without the interpreter's teardown, which would wait for NCCL's kernels or be aborted
            # by Gloo's threads, since the group was not left.
            sys.stdout.flush()
            os._exit(error.code)
        sys.exit(error.code)
    except BrokenPipeError:
        # Python flushes standard output once more when it exits; that must not fail again.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(141)
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr, flush=True)
        sys.exit(130)
