"""What a user can mend, said in one line.

Every script raises `UserError` for bad input and runs its main function through `run_main`, which
prints the line and exits with its code, 2. Anything else that is raised is a bug and keeps its
traceback.
"""

import os
import sys


class UserError(Exception):
    """Something the user can mend: the message names the file or setting, and the remedy."""

    code = 2  # with which the program ends


class SettingError(UserError):
    """A UserError that every process of a run meets alike, so that only the first one tells it."""


def is_follower() -> bool:
    """Whether another process of this run is its first: a rank that makes no sense is none."""
    rank, world = os.environ.get("RANK", ""), os.environ.get("WORLD_SIZE", "")
    return rank.isdecimal() and world.isdecimal() and 0 < int(rank) < int(world)


def run_main(main) -> None:
    """Exits with what `main()` returns; with one line and code 2 on a UserError; with 130 on ^C.

    Also with 141, as programs do on SIGPIPE, where nobody reads on (`| head`).
    """
    for stream in (sys.stdout, sys.stderr):  # a name that the console cannot show is no error
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="backslashreplace")
    try:
        sys.exit(main())
    except UserError as error:
        if not (isinstance(error, SettingError) and is_follower()):
            print("error:", " ".join(str(error).split()), file=sys.stderr, flush=True)
        sys.exit(error.code)
    except BrokenPipeError:
        # Python flushes once more at its end, which must not fail again
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(141)
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr, flush=True)
        sys.exit(130)
