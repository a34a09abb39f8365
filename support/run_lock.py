"""One run at a time in a log directory: a lock that ends with its process, however that ends."""

import contextlib
import json
import os
import socket
import time
from pathlib import Path

from filelock import FileLock, Timeout

from support.distributed import Runtime
from support.errors import SettingError
from support.files import write_text
from support.launch import print0


class RunLock:
    """A context that holds the lock of a log directory on behalf of all ranks.

    If a run was there before, the lock is taken at the beginning of the context, so that what is
    read of that run does not change; else by `acquire`, before the first file is written.
    """

    def __init__(self, log_dir, runtime: Runtime):
        self.log_dir, self.runtime = Path(log_dir), runtime
        # Not the soft lock, a file that a killed process would leave.
        self.lock = FileLock(self.log_dir / ".lock", fallback_to_soft=False)
        self.holder = self.log_dir / ".lock.json"  # the process that has the lock, or was killed

    def __enter__(self):
        self._try(write=False)
        return self

    def __exit__(self, *_):
        if self.lock.is_locked:
            self.holder.unlink(missing_ok=True)
        self.lock.release()

    def acquire(self) -> None:
        """Takes the lock, and records its holder. Raises SettingError if another process has it."""
        self._try(write=True)

    def _try(self, write: bool) -> None:
        """Takes the lock on rank 0, and fails on all ranks if that fails."""
        problem = None
        if self.runtime.master_process and (write or Path(self.lock.lock_file).exists()):
            problem = self._lock()
            if self.lock.is_locked:
                started = time.strftime("%Y-%m-%d %H:%M:%S")
                holder = dict(host=socket.gethostname(), pid=os.getpid(), since=started)
                with contextlib.suppress(OSError):  # `try_directory` reports it
                    write_text(self.holder, json.dumps(holder) + "\n")
        if problem := self.runtime.all_gather(problem)[0]:
            raise SettingError(problem)

    def _lock(self) -> str | None:
        """Takes the lock, unless this process has it; returns why it cannot."""
        try:
            self.log_dir.mkdir(parents=True, exist_ok=True)
            if not self.lock.is_locked:
                self.lock.acquire(blocking=False)
        except Timeout:
            return (
                f"log_dir={str(self.log_dir)!r}: in use by {self._describe_holder()}; wait until "
                "it ends, or choose another --log_dir"
            )
        # A file system without flock: filelock raises the second for ENOSYS, else the first.
        except (OSError, NotImplementedError) as error:
            print0(f"{self.log_dir}: cannot be locked ({error}); start no second run in it")
        return None

    def _describe_holder(self) -> str:
        """The process that has the lock, in a few words."""
        try:
            holder = json.loads(self.holder.read_text(encoding="utf-8"))
            return f"process {holder['pid']} on {holder['host']} since {holder['since']}"
        except (OSError, ValueError, KeyError, TypeError):
            return "another process"
